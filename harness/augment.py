"""EDM's augmentation of training images (Karras et al. 2022, appendix F.2).

The network receives nine numbers per image that describe the transformations (zeros: none), so
that they do not leak into samples. Images are reflected at their borders, upsampled by a wavelet
filter, transformed, and downsampled by the same filter (Karras et al. 2020, arXiv 2006.06676).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

from harness.context import Context

LABELS = 9
# The low-pass filter of the symlet with six vanishing moments (Daubechies), "sym6".
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
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
    kind = images.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        return _transform(images.float(), parameters.float())


def _transform(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    flip_x, flip_y, scale, angle, aniso, direction, *shift = parameters.unbind(1)
    for flip, axis in ((flip_x, 3), (flip_y, 2)):
        images = torch.where(flip.view(-1, 1, 1, 1) > 0, images.flip(axis), images)
    # Map output positions to input positions: the inverse transformations in order. Coordinates run
    # from -1 to 1, so one image width is 2; the y axis points down.
    factor, stretch = (-SCALE_STD * scale).exp2(), (-ANISO_STD * aniso).exp2()
    one = torch.ones_like(factor)
    matrix = _scale(factor, factor) @ _rotate(angle)
    matrix = matrix @ _rotate(-direction) @ _scale(stretch, 1 / stretch) @ _rotate(direction)
    step_x, step_y = (-2 * TRANSLATE_STD * s for s in shift)
    matrix = matrix @ _matrix([[one, 0, step_x], [0, one, step_y], [0, 0, 1]], one)
    labels = [flip_x, flip_y, scale, angle.cos() - 1, angle.sin()]
    labels += [aniso * direction.cos(), aniso * direction.sin(), *shift]
    return _resample(images, matrix), torch.stack(labels, dim=1)


def _resample(images: Tensor, matrix: Tensor) -> Tensor:
    """Square images `(B, C, N, N)` at the positions to which `matrix` `(B, 3, 3)` maps those of the
    output."""
    batch, channels, _, size = images.shape
    taps = images.new_tensor(SYM6)
    row = (taps / taps.sum()).view(1, 1, 1, -1)
    column = row.transpose(2, 3)
    # Twice the size: pixel p of the padded image is at position 2p. The borders are reflected as
    # far as possible; transformed positions beyond are black.
    x = pad(images, (size - 1,) * 4, mode="reflect").flatten(0, 1)[:, None]
    x = conv_transpose2d(x, 2 * row, stride=(1, 2), padding=(0, 5))
    x = conv_transpose2d(x, 2 * column, stride=(2, 1), padding=(5, 0))
    fine, sampled = x.shape[-1], 2 * (size + len(SYM6) // 2)
    # Coordinates from -1 to 1 of the sampled grid, of the image, and of the fine image.
    one = torch.ones_like(matrix[:, 0, 0])
    grow, half = sampled / (2 * size), 1 / (2 * size)
    to_image = _matrix([[grow, 0, half], [0, grow, half], [0, 0, 1]], one)
    shrink, shift = 2 * size / fine, -1 / fine
    to_fine = _matrix([[shrink, 0, shift], [0, shrink, shift], [0, 0, 1]], one)
    theta, shape = (to_fine @ matrix @ to_image)[:, :2], [batch, channels, sampled, sampled]
    grid = affine_grid(theta, shape, align_corners=False)
    x = grid_sample(x.view(batch, channels, fine, fine), grid, align_corners=False)
    x = x.flatten(0, 1)[:, None, 1:, 1:]
    x = conv2d(conv2d(x, row, stride=(1, 2)), column, stride=(2, 1))
    return x.view_as(images)


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
