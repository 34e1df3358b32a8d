"""Similarity of images and texts (CLIP score), and ratings of images (aesthetic score)."""

from functools import partial

from harness.evaluation.feature_set import Estimate, FeatureSet, mean_estimate
from harness.evaluation.registry import register

_plain = partial(register, label="CLIP score", higher_is_better=True, needs=("text_similarity",))


@_plain("clip-score", requires=("text_similarity", "short-captions"), scale=100)
@_plain(
    "clip-score-100-plain",
    requires=("text_similarity", "prefixed_similarity"),
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


for _name, _label, _settings in (
    ("aesthetic-v1", "Aesthetic, LAION v1", {}),
    ("aesthetic-v2", "Aesthetic, LAION v2", {}),
    ("aesthetic", "Aesthetic (legibility)", {"scale": "0-10"}),
):
    _output = _name.replace("-", "_")
    register(_name, _label, True, (_output,), **_settings)(
        lambda features, output=_output: mean_estimate(features.outputs[output])
    )
