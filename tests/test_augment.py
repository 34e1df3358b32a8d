"""EDM's augmentations: images and labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from harness.augment import LABELS, edm_augment, transform
from harness.context import Context, TrainingData


class FixedDraws(Context):
    """A context with given random numbers."""

    def __init__(self, uniform, normal):
        super().__init__({}, TrainingData((1, 8, 8), 10, 1.0), 0, 0, range(len(uniform)))
        self._uniform, self._normal = torch.tensor(uniform), torch.tensor(normal)

    def uniform(self, name, shape=()):
        return self._uniform

    def normal(self, name, shape=()):
        return self._normal


OFF = [1.0] * 5  # all five transformations off


def augment(switches, flips, turns, sizes, x):
    context = FixedDraws([[*switches, *flips, *turns, 0.0]] * len(x), [sizes] * len(x))
    return edm_augment(context, x, 0.5)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def golden():
    """EDM's own pipeline (golden numbers of the official code), with given parameters."""
    with np.load(Path(__file__).parent / "data/edm_augment.npz") as arrays:
        return {name: torch.tensor(array) for name, array in arrays.items()}


def test_images_and_labels_are_those_of_edm(golden):
    """A wrong sign of an angle gives 0.25 to 0.9 on the rotated and obliquely stretched rows,
    bicubic interpolation 0.01 to 0.03."""
    out, labels = transform(golden["images"], golden["parameters"])
    torch.testing.assert_close(labels, golden["labels"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out, golden["out"], atol=1e-4, rtol=0)
    for column in (3, 5):
        turned = golden["parameters"].clone()
        turned[:, column] *= -1
        wrong, _ = transform(golden["images"], turned)
        inner = (wrong - golden["out"])[:, :, 8:24, 8:24].abs().mean(dim=(1, 2, 3))
        assert inner.max() > 0.2


def test_no_transformation_keeps_the_image(x):
    same, labels = augment(OFF, [1, 1], [0.3, 0.7], [1, 2, 3, 4], x)
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)
    assert labels.shape == (2, LABELS) and not labels.any()


def test_flips_and_shifts_are_exact_and_rotations_nearly(x):
    flipped, labels = augment([0.0, *OFF[1:]], [0, 0], [0.5, 0.5], [0, 0, 0, 0], x)
    torch.testing.assert_close(flipped, x.flip(2, 3), atol=1e-5, rtol=0)
    assert labels[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    # u = 0.75 is an angle of π/2.
    _, labels = augment([1, 1, 0.0, 1, 1], [1, 1], [0.75, 0.5], [0, 0, 0, 0], x)
    torch.testing.assert_close(labels[0, 3:5], torch.tensor([-1.0, 1.0]), atol=1e-6, rtol=0)
    smooth = interpolate(x[:, :, :4, :4], size=(32, 32), mode="bicubic")
    rotated, _ = augment([1, 1, 0.0, 1, 1], [1, 1], [0.75, 0.5], [0, 0, 0, 0], smooth)
    # The filter is not quite symmetric.
    error, wrong = ((rotated - smooth.rot90(k, (2, 3))).abs().mean() for k in (1, 3))
    assert error < 0.02 < 0.5 < wrong
    # A shift of one standard deviation is an eighth of the width: one pixel of eight.
    shifted, labels = augment([1, 1, 1, 1, 0.0], [1, 1], [0.5, 0.5], [0, 0, 1, -1], x)
    torch.testing.assert_close(shifted[:, :, :-1, 1:], x[:, :, 1:, :-1], atol=1e-5, rtol=0)
    assert labels[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, -1]


def test_scaling_agrees_with_its_label():
    """A linear ramp magnified by 2^(0.2 a) has its slope divided by that; the centre stays."""
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    scaled, labels = augment([1, 0.0, 1, 1, 1], [1, 1], [0.5, 0.5], [2.0, 0, 0, 0], ramp)
    assert labels[0, 2] == 2
    inner = scaled[0, 0, 8, 6] - scaled[0, 0, 8, 9]
    assert inner / (ramp[0, 0, 8, 6] - ramp[0, 0, 8, 9]) == pytest.approx(2**-0.4, rel=0.04)
    # Anisotropic scaling along x (direction 0).
    wide, labels = augment([1, 1, 1, 0.0, 1], [1, 1], [0.5, 0.5], [0, 2.0, 0, 0], ramp)
    assert labels[0, 5:7].tolist() == pytest.approx([2, 0])
    inner = wide[0, 0, 8, 6] - wide[0, 0, 8, 9]
    assert inner / (ramp[0, 0, 8, 6] - ramp[0, 0, 8, 9]) == pytest.approx(2**-0.4, rel=0.04)


def test_transformations_have_the_given_probability():
    context = Context({}, TrainingData((1, 8, 8), 10, 1.0), 0, 0, range(4000))
    context.enter("fake_score", 0)
    _, labels = edm_augment(context, torch.zeros(4000, 1, 8, 8), 0.12)
    share = (labels != 0).float().mean(dim=0)
    expected = [0.5, 0.06, *[0.12] * 4, 0.06, *[0.12] * 2]  # anisotropy: half of it along an axis
    assert share.tolist() == pytest.approx(expected, abs=0.025)
