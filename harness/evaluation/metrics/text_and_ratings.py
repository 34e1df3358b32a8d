"""Similarity of images and texts (CLIP score), and ratings of images (aesthetic score)."""

from __future__ import annotations

from harness.evaluation.estimates import Estimate, mean_estimate
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.registry import register


@register(
    "clip-score",
    "CLIP score",
    True,
    ("text_similarity", "short-captions"),
    ("text_similarity",),
    scale=100,
)
@register(
    "clip-score-100-plain",
    "CLIP score",
    True,
    ("text_similarity", "prefixed_similarity"),
    ("text_similarity",),
    scale="100 max(cos, 0)",
    prefix="none",
)
def clip_score(features: FeatureSet) -> Estimate:
    """100 cos(image, requested caption), at least 0: Hessel et al. 2021 without their factor of 2.5
    and their prefix, as in most text-to-image papers."""
    return mean_estimate(100.0 * features.outputs["text_similarity"].clamp_min(0))


@register(
    "clip-score-2.5-depicts",
    "CLIPScore (Hessel et al.)",
    True,
    ("prefixed_similarity",),
    ("prefixed_similarity",),
    final_only=True,
    scale="2.5 max(cos, 0)",
    prefix="A photo depicts",
)
def clip_score_depicts(features: FeatureSet) -> Estimate:
    """As defined by Hessel et al. 2021."""
    return mean_estimate(2.5 * features.outputs["prefixed_similarity"].clamp_min(0))


for _output, _name, _label, _settings in (
    ("aesthetic_v1", "aesthetic-v1", "Aesthetic, LAION v1", {}),
    ("aesthetic_v2", "aesthetic-v2", "Aesthetic, LAION v2", {}),
    ("aesthetic", "aesthetic", "Aesthetic (legibility)", {"scale": "0-10"}),
):
    register(_name, _label, True, (_output,), **_settings)(
        lambda features, output=_output: mean_estimate(features.outputs[output])
    )
