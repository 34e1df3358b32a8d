"""Build the frozen features and the discriminator that a GAN's settings name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from harness.denoiser import Denoiser
from harness.discriminators.compact import CompactDiscriminator, CompactFeatures
from harness.discriminators.feature_maps import FeatureDiscriminator
from harness.discriminators.projected import ProjectedDiscriminator, ProjectedFeatures


def build_discriminator(
    kind: str, config: Any, teacher: Denoiser, required: Mapping[str, nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """Frozen features and a discriminator, conditioned as the teacher is.

    kind: "maps" (heads on the maps of a feature network of the experiment), "compact" or "authors"
    (see `methods.gdd`). config: with `width`, `resolution`, and for "authors" with `batch`,
    `ghost_batch` and `projection_seed`. required: "features" for "maps", otherwise "backbones", and
    "class_table" if there is one.
    """
    classes, text = teacher.num_classes, teacher.text_width
    if kind == "maps":
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
