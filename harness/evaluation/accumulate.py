"""Collect the outputs of all extractors while images stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.data.datasets import Attributes
from harness.errors import UserError
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.frechet import BLOCK
from harness.features.base import FeatureExtractor


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate parts `(n, ...)`; empties the list and frees each part when it is copied."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


class FeatureAccumulator:
    """Outputs of every extractor for a stream of images; pixels are not stored.

    attributes: of a data set whose prompts name attributes that a program can check.
    """

    def __init__(self, extractors: list[FeatureExtractor], attributes: Attributes | None = None):
        self.extractors, self.attributes = extractors, attributes
        self._shown: list[Tensor] = []
        self._seen: dict[str, list[dict[str, Tensor]]] = {e.name: [] for e in extractors}
        self._labels: list[Tensor] = []

    def add(self, pixels: Tensor, labels: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """Extract and store one block; returns each extractor's outputs."""
        seen = {e.name: e.extract(pixels, labels) for e in self.extractors}
        shown = None
        if self.attributes and labels is not None:
            shown = self.attributes.check(pixels, labels)
        self._take(seen, labels, shown)
        return seen

    def _take(self, seen: dict[str, dict[str, Tensor]], labels, shown) -> None:
        for name, parts in seen.items():
            self._seen[name].append(parts)
        self._labels += [labels] if labels is not None else []
        self._shown += [shown] if shown is not None else []

    def last(self, blocks: int) -> dict[str, Tensor]:
        """Everything stored for the last blocks, as tensors by name."""
        tensors = {}
        for name, parts in self._seen.items():
            for key in parts[0]:
                tensors[f"seen/{name}/{key}"] = torch.cat([p[key] for p in parts[-blocks:]])
        for name, parts in (("labels", self._labels), ("shown", self._shown)):
            if parts:
                tensors[name] = torch.cat(parts[-blocks:])
        return tensors

    def again(self, tensors: dict[str, Tensor]) -> None:
        """Store what `last` returned."""
        seen = {}
        for name in self._seen:
            prefix = f"seen/{name}/"
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            seen[name] = found
        self._take(seen, tensors.get("labels"), tensors.get("shown"))

    def feature_set(self, name: str, reference: Reference, neighbours: int) -> FeatureSet:
        """Join an extractor's outputs; call it once per extractor. Blocks are freed as they are
        joined, so that memory holds features once."""
        parts = self._seen.pop(name)
        joined = {key: _joined([part.pop(key) for part in parts]) for key in list(parts[0])}
        blocks = joined["features"].split(BLOCK)  # a mask of all features would double the memory
        bad = sum((~block.isfinite().all(dim=1)).sum().item() for block in blocks)
        if bad:
            raise UserError(
                f"{name}: features of {bad} of {len(joined['features'])} images are not finite; are "
                "its weights damaged?",
                "not-finite",
            )
        labels = torch.cat(self._labels) if self._labels else None
        classes = None
        if self._shown:
            classes, correct = self.attributes.classes(labels), torch.cat(self._shown)
            joined["attributes_correct"] = correct.all(dim=1)
            joined |= {f"{n}_correct": correct[:, i] for i, n in enumerate(self.attributes.names)}
        return FeatureSet(joined, reference, labels, classes, neighbours)
