"""EDM's augmentation of training images (Karras et al. 2022, appendix F.2).

The network receives nine numbers per image that describe the transformations (zeros: none), so
that they do not leak into samples. Resampling is bicubic (paper: wavelet filters), with reflection.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from harness.context import Context

LABELS = 9
SCALE_STD, ANISO_STD, TRANSLATE_STD = 0.2, 0.2, 0.125  # octaves, octaves, image widths


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """`(B, 3, 3)` from entries that are tensors `(B,)` or numbers."""
    return torch.stack(
        [torch.stack([like.new_zeros(len(like)) + entry for entry in row], -1) for row in rows], 1
    )


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def _rotate(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], angle)


def transform(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Images `(B, C, H, W)` transformed by `parameters` `(B, 8)`, and their labels `(B, 9)`.

    Parameters: flip_x, flip_y (0 or 1), scale, angle, aniso, direction, shift_x, shift_y. Angle and
    direction are in radians, counter-clockwise. The others are in units of their standard
    deviations (`SCALE_STD`, ...): an image is magnified by `2**(0.2 scale)`; by `2**(0.2 aniso)`
    along `direction` and its inverse across; and moved by `0.125 shift` image widths.

    Labels: x-flip, y-flip, scale, cos - 1 and sin of the angle, `aniso` times cos and sin of the
    direction, and the two shifts.
    """
    flip_x, flip_y, scale, angle, aniso, direction, *shift = parameters.unbind(1)
    # Map output positions to input positions: the inverse transformations in order. Coordinates run
    # from -1 to 1, so one image width is 2; the y axis points down.
    factor, stretch = (-SCALE_STD * scale).exp2(), (-ANISO_STD * aniso).exp2()
    one = torch.ones_like(factor)
    matrix = _scale(1 - 2 * flip_x, 1 - 2 * flip_y)
    matrix = matrix @ _scale(factor, factor) @ _rotate(angle)
    matrix = matrix @ _rotate(-direction) @ _scale(stretch, 1 / stretch) @ _rotate(direction)
    step_x, step_y = (-2 * TRANSLATE_STD * s for s in shift)
    matrix = matrix @ _matrix([[one, 0, step_x], [0, one, step_y], [0, 0, 1]], one)

    labels = [flip_x, flip_y, scale, angle.cos() - 1, angle.sin()]
    labels += [aniso * direction.cos(), aniso * direction.sin(), *shift]
    grid = affine_grid(matrix[:, :2].to(images.dtype), list(images.shape), align_corners=False)
    out = grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return out, torch.stack(labels, dim=1)


def edm_augment(context: Context, x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Randomly augmented images `(B, C, H, W)` and their augmentation labels `(B, 9)`.

    The x-flip is applied to half of all images, every other transformation with `probability`.
    """
    uniform, normal = context.uniform("augment", (10,)), context.normal("augment_size", (4,))
    on = uniform[:, :5] < probability  # y-flip, scale, rotation, anisotropy, translation
    flip_x = (uniform[:, 5] < 0.5).float()
    flip_y = (uniform[:, 6] < 0.5).float() * on[:, 0]
    scale = normal[:, 0] * on[:, 1]
    angle = (2 * uniform[:, 7] - 1) * math.pi * on[:, 2]
    # Half of the scalings are along the image's axes, half along rotated axes.
    aniso = normal[:, 1] * on[:, 3]
    direction = (2 * uniform[:, 8] - 1) * math.pi * (uniform[:, 9] < 0.5)
    shift = normal[:, 2:] * on[:, 4:]
    sizes = (flip_x, flip_y, scale, angle, aniso, direction, *shift.unbind(1))
    return transform(x, torch.stack(sizes, dim=1))
