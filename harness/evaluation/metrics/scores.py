"""Inception Score, accuracies by a classifier of the data set's own classes, CLIP score (similarity
of images and texts) and ratings of images (aesthetic score)."""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from harness.data.registry import attribute_names
from harness.evaluation.feature_set import Estimate, FeatureSet, jackknifed, mean_estimate
from harness.evaluation.registry import register

SPLITS = 10  # of all published Inception Scores; the number of splits biases the score

_score = partial(register, higher_is_better=True)
_class_score = partial(_score, final_only=True)
_accuracy = partial(_score, requires=("data-classes",))
_clip_score = partial(_score, label="CLIP score", needs=("text_similarity",))


def _effective_classes(probabilities: Tensor) -> float:
    """`exp(E KL(p(y|x) ‖ p(y)))` (Salimans et al. 2016)."""
    p = probabilities.double()
    entropy = torch.special.entr(p).sum(dim=1).mean()
    return (torch.special.entr(p.mean(dim=0)).sum() - entropy).exp().item()


@_class_score(
    "inception-score",
    "Inception Score",
    requires=("probabilities", "inception"),
    splits="mean over 10, in the order of the samples",
)
def inception_score(features: FeatureSet) -> Estimate:
    probabilities = features.outputs["probabilities"]
    ends = [i * len(probabilities) // SPLITS for i in range(SPLITS + 1)]
    values = torch.tensor([_effective_classes(probabilities[a:b]) for a, b in pairwise(ends)])
    return Estimate(values.mean().item(), (values.std() / math.sqrt(SPLITS)).item())


# "fd": not for Inception, as its distance is called FID.
@_class_score("class-score", "Class score", requires=("probabilities", "fd"), splits="none")
def class_score(features: FeatureSet) -> Estimate:
    """The Inception Score's formula with another classifier: the effective number of classes."""
    return jackknifed(features.outputs["probabilities"], _effective_classes)


@_accuracy("accuracy", "Class accuracy (%)", needs=("labels",))
def accuracy(features: FeatureSet) -> Estimate:
    """Percentage of samples that the classifier assigns to the requested class."""
    return mean_estimate(100.0 * features.class_correct)


@_accuracy(
    "attribute-accuracy",
    "Attribute accuracy (%)",
    needs=("attributes_correct",),
    attributes="the class by the classifier, the others by a program",
)
def attribute_accuracy(features: FeatureSet) -> Estimate:
    """Percentage of samples that show everything that their caption names."""
    return mean_estimate(100.0 * (features.class_correct & features.outputs["attributes_correct"]))


for _name in attribute_names():
    _key = f"{_name}_correct"
    _label, _needs = f"{_name.capitalize()} accuracy (%)", ("attributes_correct", _key)
    _accuracy(f"{_name}-accuracy", _label, needs=_needs, final_only=True)(
        lambda features, key=_key: mean_estimate(100.0 * features.outputs[key])
    )


@_clip_score("clip-score", requires=("text_similarity", "short-captions"), scale=100)
@_clip_score(
    "clip-score-100-plain",
    requires=("text_similarity", "prefixed_similarity"),
    scale="100 max(cos, 0)",
    prefix="none",
)
def clip_score(features: FeatureSet) -> Estimate:
    """100 cos(image, requested caption), at least 0: Hessel et al. 2021 without their factor of 2.5
    and their prefix, as in most text-to-image papers."""
    return mean_estimate(100.0 * features.outputs["text_similarity"].clamp_min(0))


@_score(
    "clip-score-2.5-depicts",
    "CLIPScore (Hessel et al.)",
    requires=("prefixed_similarity",),
    needs=("prefixed_similarity",),
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
    _score(_name, _label, requires=(_output,), **_settings)(
        lambda features, output=_output: mean_estimate(features.outputs[output])
    )
