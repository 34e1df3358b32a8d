"""What metrics take and return: the features of a set of images, and estimates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from harness.evaluation.frechet import BLOCK, Moments
from harness.evaluation.neighbours import Neighbourhood, neighbourhood
from harness.evaluation.references import Reference

GROUPS = 10  # of the delete-a-group jackknife: consecutive samples
DENSITY_NEIGHBOURS = 5  # of density and coverage, as in the authors' code


class Estimate(NamedTuple):
    """A value and its standard error over the draw of samples (NaN where unknown).

    `leave_out[g]` is the value without the samples of group g. The group of a sample depends on its
    position only, so two generators with the same noise can be compared group by group
    (`harness.reporting.intervals`).
    """

    value: float
    stderr: float = math.nan
    leave_out: tuple[float, ...] = ()


def jackknife(estimates: Sequence[float]) -> float:
    """Standard error from estimates that each leave out one of the groups."""
    t = torch.tensor(estimates, dtype=torch.float64)
    return math.sqrt((len(t) - 1) * t.var(correction=0).item())


def jackknifed(x: Tensor, function: Callable[[Tensor], float]) -> Estimate:
    """`function` of all rows of x, with its jackknife error."""
    groups = x.chunk(GROUPS)
    leaves = (torch.cat([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups)))
    without = tuple(map(function, leaves))
    return Estimate(function(x), jackknife(without), without)


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of per-image values `(N,)`."""
    values = values.double()
    left = [(values.sum() - g.sum()) / (len(values) - len(g)) for g in values.chunk(GROUPS)]
    error = (values.std() / math.sqrt(len(values))).item()
    return Estimate(values.mean().item(), error, tuple(x.item() for x in left))


def mean_over_subsets(estimates: Sequence[Estimate]) -> Estimate:
    """Average over disjoint subsets, the groups of `leave_out`, with the standard error from their
    spread; a single subset keeps its own error."""
    if len(estimates) == 1:
        return estimates[0]
    t = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    left = (t.sum() - t) / (len(t) - 1)
    return Estimate(t.mean().item(), (t.std() / len(t) ** 0.5).item(), tuple(left.tolist()))


@dataclass
class FeatureSet:
    """What one feature extractor computed of a set of images.

    outputs: per-image tensors by name, `(N, ...)`: "features" `(N, D)` (not of type `pixels`), what
    else the extractor provides, and, if a program can check the attributes that the captions name,
    bool "attributes_correct" (all of them) and "<attribute>_correct".
    labels: requested class or prompt of each image; classes: the classes that the prompts name
    (default: `labels`). captions: the text of each class or prompt, if known. neighbours: k of
    precision and recall. is_subset: one of several subsets, whose spread gives the standard error,
    so metrics may omit it.
    """

    outputs: dict[str, Tensor]
    reference: Reference
    labels: Tensor | None = None
    classes: Tensor | None = None
    neighbours: int = 3
    is_subset: bool = False
    captions: Sequence[str] = ()
    _subsets: dict[int, list[FeatureSet]] = field(default_factory=dict, init=False, repr=False)

    @property
    def features(self) -> Tensor:
        return self.outputs["features"]

    @property
    def texts(self) -> list[str] | None:
        """The prompt or caption of each image; None if unknown."""
        if self.labels is None or not self.captions:
            return None
        return [self.captions[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(next(iter(self.outputs.values())))

    def has(self, name: str) -> bool:
        """Whether there is an output, or an attribute such as "reference.held_out"."""
        value = self
        for part in name.split("."):
            value = getattr(value, part, None)
        return name in self.outputs or value is not None

    @cached_property
    def frechet(self) -> Estimate:
        """Fréchet distance to the reference with its jackknife error."""
        features, reference = self.features, self.reference
        if self.is_subset:
            return Estimate(reference.frechet(features))
        if len(features) <= features.shape[1]:
            return jackknifed(features, reference.frechet)
        total = Moments.over(features.split(BLOCK))
        groups = map(Moments.of, features.chunk(GROUPS))
        without = tuple(reference.frechet_of_moments(total - group) for group in groups)
        return Estimate(reference.frechet_of_moments(total), jackknife(without), without)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        radii = map(self.reference.radii, (self.neighbours, DENSITY_NEIGHBOURS))
        return neighbourhood(self.features, self.reference.features, self.neighbours, *radii)

    @property
    def class_correct(self) -> Tensor:
        """Whether the classifier predicts the requested class, bool `(N,)`."""
        requested = self.labels if self.classes is None else self.classes
        return self.outputs["probabilities"].argmax(dim=1) == requested

    def per_image(self) -> dict[str, Tensor]:
        """What metrics average over the images: all scalar outputs, `(N,)` each."""
        values = {k: t for k, t in self.outputs.items() if t.ndim == 1 and t.is_floating_point()}
        if "attributes_correct" in self.outputs and "probabilities" in self.outputs:
            values["attributes_correct"] = self.class_correct & self.outputs["attributes_correct"]
        return values

    def subsets(self, count: int) -> list[FeatureSet]:
        """All disjoint subsets of `count` consecutive images, without the remainder. The same
        objects at every call, so that metrics share cached quantities."""
        starts = range(0, len(self) - count + 1, count)

        def subset(rows: slice) -> FeatureSet:
            outputs = {name: tensor[rows] for name, tensor in self.outputs.items()}
            labels, classes = (t if t is None else t[rows] for t in (self.labels, self.classes))
            several = len(starts) > 1
            return replace(self, outputs=outputs, labels=labels, classes=classes, is_subset=several)

        if count not in self._subsets:
            self._subsets[count] = [subset(slice(start, start + count)) for start in starts]
        return self._subsets[count]
