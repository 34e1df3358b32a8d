"""Extractors: feature networks as the evaluation sees them, and what they see of images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.config.experiment import Experiment
from harness.config.schema import PretrainedFeatures
from harness.data.captioned_digits import Attributes
from harness.data.datasets import Dataset
from harness.denoiser import to_model_space
from harness.errors import UserError
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.frechet import BLOCK
from harness.features.provides import provides
from harness.features.towers import PREFIX, TOWERS, full_precision
from harness.features.train import load_feature_network
from harness.io.artifacts import load_tensors, read_json


@dataclass
class Extractor:
    """A named feature network. Input: uint8 `(B, C, H, W)` at the data set's own resolution.

    `kind`: what metrics call its section. `unavailable`: why it cannot be had (then it sees
    nothing, and `sha256` is that of the weights that it should have); `missing`: the same of parts
    of what it sees. `pretraining`: the sets of images that a network from elsewhere was trained on,
    which a student's discriminator may know, too; `same_as`: what the record of a student calls it.
    `details`: what else of it belongs to the protocol.
    """

    name: str
    kind: str
    network: nn.Module | None
    sha256: str
    head: nn.Module | None = None
    head_sha256: str | None = None
    resize: str = "none"
    unavailable: str | None = None
    pretraining: tuple[str, ...] = ()
    same_as: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    provides: frozenset[str] = frozenset()
    _class_features: Tensor | None = field(default=None, repr=False)

    @property
    def is_clip(self) -> bool:
        return hasattr(self.network, "class_features")

    @property
    def hashes(self) -> dict[str, str]:
        """Weights that every number of this extractor depends on."""
        return {"weights": self.sha256} | ({"head": self.head_sha256} if self.head else {})

    @torch.no_grad()
    def see(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The outputs of `FeatureSet` for one block of images, on the host. `labels` None: nothing
        is known of what they were to show."""
        if self.kind not in ("cnn", "resnet", "clip"):
            return self.network.see(pixels, labels)
        with full_precision():
            seen = self._see(to_model_space(pixels.to(self.device)), labels)
        return {name: part.cpu() for name, part in seen.items()}

    def _see(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        features = self.network.features(x)
        if not self.is_clip:
            return {"features": features, "probabilities": self.network.logits(features).softmax(1)}
        seen = {"features": features}
        if labels is not None:
            if self._class_features is None:
                self._class_features = self.network.class_features()
            said = self._class_features[labels.to(self.device)]
            seen["text_similarity"] = (features * said).sum(dim=1)
        return seen | ({"aesthetic": self.head(features)} if self.head else {})

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def load_extractor(experiment: Experiment, name: str, dataset: Dataset) -> Extractor:
    """The extractor in `features/<name>/`; a pretrained one may be unavailable."""
    section, folder = experiment.features[name], experiment.features_dir(name)
    if isinstance(section, PretrainedFeatures):
        return _load_fetched(
            name, section, read_json(folder / "features.json"), experiment, dataset
        )
    network, record = load_feature_network(folder, dataset)
    if "aesthetic" not in record:
        return Extractor(
            name,
            section.type,
            network.to(experiment.device),
            record["sha256"],
            provides=provides(section),
        )
    from harness.features.aesthetic import AestheticHead

    sha256 = record["aesthetic"]["sha256"]
    weights = load_tensors(folder / "aesthetic.safetensors", sha256)
    head = AestheticHead(network.embed_dim)
    head.load_state_dict(weights)
    network, head = network.to(experiment.device), head.to(experiment.device).eval()
    return Extractor(
        name, section.type, network, record["sha256"], head, sha256, provides=provides(section)
    )


def _load_fetched(
    name: str, section: PretrainedFeatures, record: dict, experiment: Experiment, dataset: Dataset
) -> Extractor:
    source, network = TOWERS[section.type], None
    facts, missing, heads = source.facts(section), record.get("missing", {}), {}
    if "unavailable" not in record:
        from harness.features.aesthetic import LaionHead

        for version in getattr(section, "aesthetic", ()):
            if f"aesthetic_{version}" not in missing:
                heads[f"aesthetic_{version}"] = LaionHead.published(version)
        network = source.load(section, source.fetch(section), dataset, heads)
        network = network.to(experiment.device)
        if getattr(network, "captions", None):
            facts["details"] |= {
                name: f"{network.truncated(prefix)} of {len(network.captions)}"
                for name, prefix in (("truncated_captions", ""), ("truncated_after_prefix", PREFIX))
            }
    if dataset.evaluation_prompts and "caption" in facts.get("details", {}):
        facts["details"]["caption"] = "the prompt"
    published = facts.pop("sha256")
    sha256 = record.get("sha256") or published or "unknown"
    return Extractor(
        name,
        section.kind,
        network,
        sha256,
        unavailable=record.get("unavailable"),
        provides=provides(section),
        missing=missing,
        **facts,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts `(n, ...)` as one tensor; empties the list, each part as soon as it is copied."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


class Observer:
    """Collects what every extractor sees while images stream by; pixels are not kept.

    `captions`: what labels are the numbers of; a program then looks for what they name."""

    def __init__(self, extractors: list[Extractor], captions: Attributes | None = None):
        self.extractors, self.captions = extractors, captions
        self._shown: list[Tensor] = []
        self._seen: dict[str, list[dict[str, Tensor]]] = {e.name: [] for e in extractors}
        self._labels: list[Tensor] = []

    def add(self, pixels: Tensor, labels: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """Returns what each extractor sees of this block."""
        seen = {e.name: e.see(pixels, labels) for e in self.extractors}
        shown = None
        if self.captions and labels is not None:
            shown = self.captions.check(pixels, labels)
        self._take(seen, labels, shown)
        return seen

    def _take(self, seen: dict[str, dict[str, Tensor]], labels, shown) -> None:
        for name, parts in seen.items():
            self._seen[name].append(parts)
        self._labels += [labels] if labels is not None else []
        self._shown += [shown] if shown is not None else []

    def last(self, blocks: int) -> dict[str, Tensor]:
        """What was seen of the last so many blocks, as tensors by name."""
        tensors = {}
        for name, parts in self._seen.items():
            for key in parts[0]:
                tensors[f"seen/{name}/{key}"] = torch.cat([p[key] for p in parts[-blocks:]])
        for name, parts in (("labels", self._labels), ("shown", self._shown)):
            if parts:
                tensors[name] = torch.cat(parts[-blocks:])
        return tensors

    def again(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `last` gave."""
        seen = {}
        for name in self._seen:
            prefix = f"seen/{name}/"
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            seen[name] = found
        self._take(seen, tensors.get("labels"), tensors.get("shown"))

    def views(self, name: str, reference: Reference, neighbours: int) -> FeatureSet:
        """Once for each extractor: its parts go as they are joined, so that no features are held
        twice."""
        parts = self._seen.pop(name)
        joined = {key: _joined([part.pop(key) for part in parts]) for key in list(parts[0])}
        blocks = joined["features"].split(BLOCK)  # a look at all at once would take as much again
        bad = sum((~block.isfinite().all(dim=1)).sum().item() for block in blocks)
        if bad:
            raise UserError(
                f"{name}: the features of {bad} of {len(joined['features'])} images are no finite "
                "numbers; are its weights damaged?"
            )
        labels = torch.cat(self._labels) if self._labels else None
        classes = None
        if self._shown:
            classes, correct = self.captions.classes(labels), torch.cat(self._shown)
            joined["attributes_correct"] = correct.all(dim=1)
            joined |= {f"{n}_correct": correct[:, i] for i, n in enumerate(self.captions.names)}
        return FeatureSet(joined, reference, labels, classes, neighbours)
