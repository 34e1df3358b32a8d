"""Checks of the section `features` that the schema cannot express."""

from __future__ import annotations

from collections.abc import Mapping

from harness.config.schema import DataSection, FeatureSettings
from harness.errors import Problem
from harness.features.base import FEATURES


def check(
    features: Mapping[str, FeatureSettings], data: DataSection | None, files: bool
) -> list[Problem]:
    """Errors in the settings of all feature networks; `files`: local files must exist."""
    problems = []
    for name, settings in features.items():
        extractor = FEATURES[settings.type]
        problems += extractor.check(name, settings, files)
        if extractor.trained and data is not None:
            problems += _check_training_data(f"features.{name}", data)
    return problems


def _check_training_data(key: str, data: DataSection) -> list[Problem]:
    if not data.has_images:
        return [Problem(key, "needs-images", "needs images for training; this data set has none")]
    if not data.labels:
        return [Problem(key, "needs-labels", "needs labels for training; data.labels is false")]
    if data.prompts is not None:
        message = "cannot be trained on prompts; use a pretrained network"
        return [Problem(key, "needs-labels", message)]
    return []
