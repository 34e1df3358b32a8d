"""Resizes of 8-bit images: the same bits by matrix products as by PyTorch's operation on CPU."""

import threading

import pytest
import torch
from torch.nn.functional import interpolate

from harness.features import resize

SHAPES = [(32, 32), (8, 8), (1, 5), (64, 37), (512, 512), (225, 223), (224, 100), (300, 30)]


def images(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Noise, and noise of 0 and 255, whose resize overshoots."""
    generator = torch.Generator().manual_seed(height)
    pixels = torch.randint(256, (2, channels, height, width), generator=generator).byte()
    pixels[1] = pixels[1] // 128 * 255
    return pixels


@pytest.mark.parametrize("size", [224, 32, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_point_resize_has_the_bits_of_the_operation(shape, size):
    for channels in (1, 3):
        pixels = images(*shape, channels)
        expected = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        assert torch.equal(resize.fixed_point_bicubic(pixels, size), expected)


def test_resize_by_the_device_has_the_bits_of_the_host(monkeypatch):
    pixels, cpu = images(9, 12).repeat(40, 1, 1, 1), torch.device("cpu")
    expected = resize.bicubic(pixels, 16, cpu)
    monkeypatch.setattr(resize, "is_gpu", lambda device: True)
    monkeypatch.setattr(resize, "interpolate", None)  # the host does nothing
    monkeypatch.setattr(resize, "_same_bits", lambda *_: True)
    assert torch.equal(resize.bicubic(pixels, 16, cpu), expected)


def test_a_device_with_other_bits_leaves_the_resize_to_the_host(monkeypatch, caplog):
    pixels, cpu = images(8, 8), torch.device("cpu")
    expected = resize.bicubic(pixels, 16, cpu)
    assert resize._same_bits(8, 8, 16, cpu)
    plain = resize.fixed_point_bicubic
    monkeypatch.setattr(resize, "is_gpu", lambda device: True)
    monkeypatch.setattr(resize, "fixed_point_bicubic", lambda *inputs: plain(*inputs) ^ 1)
    resize._same_bits.cache_clear()
    for _ in range(2):
        assert torch.equal(resize.bicubic(pixels, 16, cpu), expected)
    assert caplog.messages == [
        "cpu resizes from 8 x 8 to 16 with other bits; the host resizes instead"
    ]
    resize._same_bits.cache_clear()


def test_images_are_resized_by_several_threads_in_order(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = threading.Barrier(2, timeout=5)  # one thread would wait in vain

    def function(number: int) -> int:
        together.wait()
        return -number

    assert resize.in_threads(function, range(6), torch.device("cpu")) == [0, -1, -2, -3, -4, -5]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_resizes_with_the_bits_of_the_host(shape):
    assert resize._same_bits(*shape, 224, torch.device("cuda"))
