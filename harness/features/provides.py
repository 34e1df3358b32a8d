"""What each type of feature network provides to the metrics."""

from __future__ import annotations

from typing import Any

_PROVIDES = {
    "cnn": {"probabilities", "data-classes", "fd"},
    "resnet": {"probabilities", "data-classes", "fd"},
    "clip": {"text_similarity", "aesthetic", "image-text", "short-captions", "fd"},
    "open-clip": {"text_similarity", "prefixed_similarity", "image-text", "fd"},
    "dinov2": {"fd"},
    "efficientnet-lite": {"probabilities", "fd"},
    "inception": {"probabilities", "inception"},
}


def provides(settings: Any) -> frozenset[str]:
    """Names of the outputs and traits of a feature network with these settings."""
    names = {"features"} | _PROVIDES[settings.type]
    names |= {f"aesthetic_{version}" for version in getattr(settings, "aesthetic", ())}
    if settings.type == "inception":
        names.add(f"fid-{settings.resize}")
    return frozenset(names)
