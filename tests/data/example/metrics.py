"""Three metrics, as a plug-in file: of features, of pixels, and of image-text pairs."""

import torch

from harness.evaluation.feature_set import jackknifed
from harness.evaluation.references import PAIRWISE_LIMIT
from harness.evaluation.registry import register, register_per_image


def mean_distance(x):
    """The mean Euclidean distance of two different rows of `x` `(N, D)`, in float64."""
    return torch.cdist(x, x).sum().item() / (len(x) * (len(x) - 1))


@register(
    "energy-distance",
    "Energy distance",
    higher_is_better=False,
    needs=("reference.features",),  # real images to compare with
    limit=PAIRWISE_LIMIT,  # memory grows with the square of the number of samples
)
def energy_distance(features):
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias (Székely and Rizzo 2013)."""
    reference, real = features.reference, features.reference.features.double()
    within = reference.cached("mean distance", lambda: mean_distance(real))

    def distance(x):
        return 2 * torch.cdist(x, real).mean().item() - mean_distance(x) - within

    return jackknifed(features.features.double(), distance)  # the value and its standard error


@register_per_image("saturation", "Mean saturation", higher_is_better=None)
def saturation(images):
    """The saturation of HSV, mean over the pixels: 0 for grey images, at most 1."""
    x = images.pixels.float() / 255
    low, high = x.amin(dim=1), x.amax(dim=1)
    return ((high - low) / high.clamp_min(1e-6)).mean(dim=(1, 2))


@register_per_image("direction", "Stripes as in the text (%)", higher_is_better=True, texts=True)
def direction(images):
    """100 for images whose stripes run in the direction that their text names, otherwise 0."""
    x = images.pixels.float()
    rows, columns = (x.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3))
    named = torch.tensor(["horizontal" in text for text in images.texts])
    return 100.0 * ((rows > columns) == named)
