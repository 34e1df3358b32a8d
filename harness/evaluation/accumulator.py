"""The outputs of all extractors for a stream of images, which can resume."""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from harness.data.registry import AttributeChecker, Images
from harness.errors import UserError
from harness.evaluation.checks import KEPT_BYTES
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.frechet import BLOCK
from harness.evaluation.neighbours import nearest
from harness.evaluation.references import Reference
from harness.features.base import FeatureExtractor, Outputs, start_checked
from harness.io.shards import TensorShards
from harness.precision import full_precision
from harness.training.distributed import processes
from harness.transfers import is_gpu, to_device

NEAREST = 10  # image pairs in the figure of nearest neighbours


class Checkpoints:
    """When a scoring job saves unfinished work: every `seconds`. A job shorter than that saves
    nothing; once it has saved something, it also saves the end of each stream."""

    def __init__(self, seconds: float):
        self.seconds, self.used, self.last = seconds, False, time.monotonic()

    def due(self, ended: bool) -> bool:
        return time.monotonic() - self.last >= self.seconds or (ended and self.used)


def stored_images(shards: TensorShards) -> int:
    """How many images an interrupted job has processed; only the first process reads its shards."""
    group = processes()
    stored = sum(record["images"] for record in shards.records) if group.first else 0
    return int(group.agree(stored))


class NearestImages:
    """The generated images that are nearest to a training image, in one extractor's features;
    images of another size than the training part `train` are ignored. device: where to search."""

    def __init__(self, extractor: str, reference: Reference, train: Images, device: str = "cpu"):
        self.extractor, self.reference, self.train = extractor, reference, train
        self.device = device
        # On a stream of its own the search waits for no other work of the GPU.
        self._stream = nullcontext()
        if is_gpu(device):
            self._stream = torch.cuda.stream(torch.cuda.Stream(device))
        self.best: dict[str, Tensor] = {}  # pixels, distance and neighbour (in `reference`)

    @cached_property
    def _reference(self) -> Tensor:
        return to_device(self.reference.features, self.device)

    @full_precision()
    def add(self, pixels: Tensor, features: Tensor) -> None:
        if pixels.shape[1:] != self.train.pixels.shape[1:]:
            return
        with self._stream:
            found = nearest(to_device(features, self.device), self._reference)
            distance, neighbour = (t.cpu() for t in found)
        candidates = {"pixels": pixels, "distance": distance, "neighbour": neighbour}
        if self.best:
            candidates = {k: torch.cat([self.best[k], t]) for k, t in candidates.items()}
        order = candidates["distance"].argsort(stable=True)[:NEAREST]
        self.best = {name: tensor[order] for name, tensor in candidates.items()}

    def tensors(self) -> dict[str, Tensor]:
        """`closest`: the images, nearest first; `closest_training`: their nearest training images;
        `closest_distance`: in units of `Reference.typical_nearest` if that is known."""
        if not self.best:
            return {}
        index = self.reference.index[self.best["neighbour"]]
        return {
            "closest": self.best["pixels"],
            "closest_training": self.train.pixels[index],
            "closest_distance": self.best["distance"] / (self.reference.typical_nearest or 1.0),
        }


class StartedBlock(NamedTuple):
    """A block of images whose outputs are being computed, one function per extractor."""

    pixels: Tensor
    labels: Tensor | None
    outputs: list[Outputs]


class FeatureAccumulator:
    """Outputs of every extractor for a stream of images.

    attributes: checker of a data set whose prompts name attributes that a program can check.
    keep: how many images to store themselves, up to KEPT_BYTES. nearest: which images to search
    for. shards: where to resume from, and to save to when `checkpoints` are due; None: in memory.
    """

    def __init__(
        self,
        extractors: Sequence[FeatureExtractor],
        attributes: AttributeChecker | None = None,
        keep: int = 0,
        nearest: NearestImages | None = None,
        shards: TensorShards | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        self.extractors, self.attributes, self.keep = extractors, attributes, keep
        self.nearest, self.shards, self.checkpoints = nearest, shards, checkpoints
        # Names: "pixels", "labels", "attributes" and "<extractor>/<output>".
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        for tensors in shards or ():
            for name, tensor in tensors.items():
                if name.startswith("nearest/"):
                    self.nearest.best[name.removeprefix("nearest/")] = tensor
                else:
                    self._parts[name].append(tensor)
        self.count = sum(record["images"] for record in shards.records) if shards else 0
        self._mark_saved()

    def _mark_saved(self) -> None:
        self._saved_count = self.count
        self._saved_parts = {name: len(parts) for name, parts in self._parts.items()}

    def start(self, pixels: Tensor, labels: Tensor | None) -> StartedBlock:
        """Start to extract from one block: uint8 pixels `(B, C, H, W)`, labels int64 `(B,)`."""
        outputs = [start_checked(extractor, pixels, labels) for extractor in self.extractors]
        return StartedBlock(pixels, labels, outputs)

    def add(self, pixels: Tensor, labels: Tensor | None) -> None:
        """Process one block, as for `start`."""
        self.complete(self.start(pixels, labels))

    def complete(self, block: StartedBlock) -> None:
        """Wait for the outputs of a block and add it."""
        pixels, labels = block.pixels, block.labels
        for extractor, outputs in zip(self.extractors, block.outputs, strict=True):
            found = outputs()
            for name, output in found.items():
                parts = self._parts[f"{extractor.name}/{name}"]
                if parts and parts[-1].shape[1:] != output.shape[1:]:
                    shapes = " and ".join(str(tuple(t.shape[1:])) for t in (parts[-1], output))
                    message = f"extract returned {name!r} of two shapes per image, {shapes}"
                    raise UserError(f"features.{extractor.name}: {message}", "outputs")
                parts.append(output)
            if self.nearest and extractor.name == self.nearest.extractor:
                self.nearest.add(pixels, found["features"])
        if self.count < min(self.keep, KEPT_BYTES // pixels[0].numel()):
            self._parts["pixels"].append(pixels.clone())  # not in pinned memory, which is scarce
        if labels is not None:
            self._parts["labels"].append(labels)
            if self.attributes:
                self._parts["attributes"].append(self.attributes.check(pixels, labels))
        self.count += len(pixels)
        self.save()

    def save(self, ended: bool = False) -> None:
        """Append everything that is not on disk yet to the shards, if it is time. `ended`: the
        stream has ended."""
        images = self.count - self._saved_count
        if self.shards is None or not images or not self.checkpoints.due(ended):
            return
        new = {key: parts[self._saved_parts.get(key, 0) :] for key, parts in self._parts.items()}
        tensors = {name: torch.cat(parts) for name, parts in new.items() if parts}
        if self.nearest:
            tensors |= {f"nearest/{name}": tensor for name, tensor in self.nearest.best.items()}
        self.shards.append(tensors, images=images)
        self.checkpoints.last, self.checkpoints.used = time.monotonic(), True
        self._mark_saved()

    def images(self) -> dict[str, Tensor]:
        """`pixels` and `labels` of the first images, and the nearest ones."""
        kept = {}
        if pixels := self._parts["pixels"]:
            count = min(self.keep, KEPT_BYTES // pixels[0][0].numel())
            parts = {"pixels": pixels, "labels": self._parts["labels"]}
            kept = {name: torch.cat(part)[:count].clone() for name, part in parts.items() if part}
        return kept | (self.nearest.tensors() if self.nearest else {})

    def feature_set(self, name: str, reference: Reference, neighbours: int) -> FeatureSet:
        """Join an extractor's outputs; call it once per extractor. Blocks are freed as they are
        joined, so that memory holds all features only once."""
        extractor = next(e for e in self.extractors if e.name == name)
        # Shards list tensors by name, so that a resumed job has the same order.
        names = sorted(key for key in self._parts if key.startswith(f"{name}/"))
        outputs = {key.removeprefix(f"{name}/"): _join(self._parts.pop(key)) for key in names}
        for key, output in outputs.items():
            if not output.is_floating_point():
                continue
            # A mask of all features would double the memory.
            blocks = (block.reshape(len(block), -1) for block in output.split(BLOCK))
            if bad := sum((~block.isfinite().all(dim=1)).sum().item() for block in blocks):
                weights = "are its weights damaged?"
                cause = f"check {extractor.plugin}" if extractor.plugin else weights
                message = f"the {key} of {bad} of {self.count} images are not finite"
                raise UserError(f"{name}: {message}; {cause}", "not-finite")
        labels = torch.cat(self._parts["labels"]) if self._parts["labels"] else None
        classes = None
        if self._parts["attributes"]:
            classes, correct = self.attributes.classes(labels), torch.cat(self._parts["attributes"])
            outputs["attributes_correct"] = correct.all(dim=1)
            attributes = zip(self.attributes.names, correct.T, strict=True)
            outputs |= {f"{key}_correct": column for key, column in attributes}
        facts = {"neighbours": neighbours, "captions": extractor.captions}
        return FeatureSet(outputs, reference, labels, classes, **facts)


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate parts `(n, ...)`, freeing each part when it is copied; empties the list."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole
