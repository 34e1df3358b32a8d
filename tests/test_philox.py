"""Triton kernels draw the numbers of the plain path."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from harness import kernels as switch
from harness.kernels import kernels
from harness.streams import Stream, within_one_ulp
from tests.conftest import ROOT

DRAWS = {
    "uniform": Stream.uniform,
    "integers": partial(Stream.integers, high=1000),
    "normal": Stream.normal,
}
INDEX = torch.tensor([0, 1, 7, 2**32 - 1, 2**32, 2**40 + 3, 2**62])


@pytest.fixture
def interpreted():
    """Kernels run on CPU, by Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without its interpreter")
    with kernels("always"):
        yield


def test_kernels_draw_the_numbers_of_the_plain_path(interpreted):
    from harness import philox

    stream = Stream(5, "noise")
    for count in (1, 2, 3, 4, 5, 7, 8, 29, 300):  # 1030: several programs
        with kernels("off"):
            expected = stream._words(INDEX, count)
        assert torch.equal(philox.words(INDEX, stream.key, count), expected)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(), (5, 1), (2, 3, 4), (3, 3, 3)])
def test_draws_by_kernels_have_the_bits_of_the_plain_path(name, shape, interpreted):
    stream, draw = Stream(3, "evaluation"), DRAWS[name]
    with kernels("off"):
        expected = draw(stream, INDEX, shape=shape)
    found = draw(stream, INDEX, shape=shape)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if name == "normal":
        assert within_one_ulp(found, expected)
    else:
        assert torch.equal(found, expected)
    every_second = torch.stack([INDEX, INDEX + 9], dim=1)[:, 0]
    assert not every_second.is_contiguous()
    assert torch.equal(draw(stream, every_second, shape=shape), found)
    assert draw(stream, INDEX[:0], shape=shape).shape == (0, *shape)


def test_every_draw_is_one_launch(interpreted, monkeypatch):
    from harness import philox

    launches = []
    monkeypatch.setattr(philox, "_launch", lambda kernel, *_: launches.append(kernel) or INDEX)
    for draw in DRAWS.values():
        draw(Stream(0), INDEX)
    assert launches == [philox._draw, philox._draw, philox._draw_normal]


def test_other_numbers_of_the_kernels_turn_them_off(interpreted, monkeypatch, caplog):
    from harness import philox

    monkeypatch.setattr(switch, "_agreement", {})
    monkeypatch.setattr(philox, "uniform", lambda index, *_: torch.zeros(len(index), 1))
    with kernels("off"):
        expected = Stream(0).uniform(INDEX)
    assert torch.equal(Stream(0).uniform(INDEX), expected)
    assert "harness.philox: Triton kernels are off" in caplog.text


def test_the_comparison_before_the_first_use_may_differentiate(monkeypatch):
    """A network that samples runs without gradients, but its kernels are compared with them."""
    monkeypatch.setattr(switch, "_agreement", {})
    with torch.no_grad():
        x = torch.ones(2, requires_grad=True)
        assert switch.agrees("sampling", lambda: torch.autograd.grad(x.square().sum(), x))


def test_the_comparison_before_the_first_use_is_without_tf32(monkeypatch):
    """The plain path would round; afterwards the flag is what it was."""
    monkeypatch.setattr(switch, "_agreement", {})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    found = []
    assert switch.agrees("training", lambda: found.append(torch.backends.cudnn.allow_tf32))
    assert found == [False] and torch.backends.cudnn.allow_tf32


def test_one_ulp_is_the_distance_to_the_next_number():
    a = torch.tensor([1.0, -3e-30, 0.7])
    assert within_one_ulp(a, a) and within_one_ulp(a, a.nextafter(torch.tensor(9.0)))
    assert not within_one_ulp(a, a * (1 + 3e-7))


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from harness import philox

types = {"index": "*i64", "seed": "u64"}
variants = [(philox._draw, "*i64", {"KIND": 0}), (philox._draw, "*fp32", {"KIND": 1})]
variants += [(philox._draw, "*i64", {"KIND": 2})]
variants += [(philox._draw_normal, "*fp32", {"SHIFT": shift}) for shift in range(4)]
for kernel, out, values in variants:
    values = values | {"TILE": philox.TILE}
    signature = {name: types.get(name, "i64") for name in kernel.arg_names}
    signature |= {"out": out} | dict.fromkeys(values, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(kernel, signature, constants)
    target, options = GPUTarget("cuda", 90, 32), {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    if kernel is philox._draw_normal:  # 2π has 53 bits, and no function is an approximation
        assert "0d401921FB54442D18" in compiled.asm["ptx"], "2 pi"
        assert "sqrt.rn.f64" in compiled.asm["ptx"]
        for function in ("sin", "cos", "lg2"):
            assert f"{function}.approx" not in compiled.asm["ptx"], function
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100():
    """Without a GPU, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DRAWS)
def test_draws_on_a_gpu_have_the_bits_of_the_host(name):
    index, draw = torch.arange(2**32 - 500, 2**32 + 500), DRAWS[name]
    expected = draw(Stream(3), index, shape=(3, 32, 33))
    found = draw(Stream(3), index.cuda(), shape=(3, 32, 33))
    assert switch._agreement["harness.philox"]
    assert within_one_ulp(found.cpu(), expected)
    assert name == "normal" or torch.equal(found.cpu(), expected)
