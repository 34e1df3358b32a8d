"""Build the frozen features and the discriminator that a GAN's settings name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from harness.denoiser import Denoiser
from harness.discriminators.compact import CompactDiscriminator, CompactFeatures
from harness.discriminators.feature_maps import FeatureDiscriminator
from harness.discriminators.projected import ProjectedDiscriminator, ProjectedFeatures

# Settings without an effect on each kind of discriminator.
UNUSED = {
    "authors": ("features", "width"),
    "compact": ("features", "ghost_batch", "projection_seed", "class_table"),
    "features": ("backbones", "resolution", "ghost_batch", "projection_seed", "class_table"),
}

# How each kind deviates from the authors' discriminator.
DEVIATIONS = {
    "compact": "compact discriminator, with GroupNorm and learned embeddings",
    "features": "another feature network and simpler heads in the discriminator",
}


def build_discriminator(
    kind: str, config: Any, teacher: Denoiser, required: Mapping[str, nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """Frozen features and a discriminator, conditioned as the teacher is.

    kind: "features" (heads on the maps of a feature network of the experiment), "compact" or
    "authors" (see `methods.gdd`). config: with `width`, `resolution`, and for "authors" with
    `batch`, `ghost_batch` and `projection_seed`. required: "features" for that kind, otherwise
    "backbones", and "class_table" if there is one.
    """
    classes, text = teacher.num_classes, teacher.text_width
    if kind == "features":
        features = required["features"]
        return features, FeatureDiscriminator(features, classes, config.width, text)
    if kind == "compact":
        features = CompactFeatures(required["backbones"], config.width, config.resolution)
        return features, CompactDiscriminator(features, classes, config.width, text)
    own = config.projection_seed == "rank"
    projections = config.batch // config.ghost_batch if own else 1
    features = ProjectedFeatures(required["backbones"], projections, config.resolution)
    table = required["class_table"].weight if "class_table" in required else None
    return features, ProjectedDiscriminator(features, classes, table)
