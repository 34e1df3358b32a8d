"""Feature networks: classifiers and a CLIP with an aesthetic head, trained in the workflow, and
published ones, fetched.

They give the features of distances, class probabilities and text similarity. Each has a folder
`features/<name>/` with `features.json` (architecture, accuracy) and, if trained, its weights
(safetensors).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from harness.config.experiment import Experiment
from harness.config.schema import FeatureSection, PretrainedFeatures
from harness.context import Context, Sources
from harness.data import datasets
from harness.data.datasets import Dataset, Images, placed
from harness.denoiser import to_model_space
from harness.errors import UserError
from harness.features.classifiers import CLASSIFIERS
from harness.io.artifacts import (
    digest,
    link,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)
from harness.io.locks import run_lock
from harness.method import OptimizerConfig, Phase
from harness.streams import seeded
from harness.training.trainer import TrainingRun, train, training_record


def build_feature_network(kind: str, dataset: Dataset, width: int) -> nn.Module:
    if kind == "clip":
        from harness.features.small_clip import SmallCLIP

        wordings = 1 if dataset.attributes else len(dataset.caption_templates)
        return SmallCLIP(dataset.image_shape, dataset.num_conditions, width, wordings)
    return CLASSIFIERS[kind](dataset.image_shape, dataset.num_classes, width)


def augmented(context: Context, x: Tensor) -> Tensor:
    """Shifts by up to a pixel in each direction, and a little noise."""
    shift = (context.uniform("shift", (2,)) * 3).long().clamp_max(2)
    rows = shift[:, :1] + torch.arange(x.shape[2], device=x.device)
    columns = shift[:, 1:] + torch.arange(x.shape[3], device=x.device)
    padded = pad(x, (1, 1, 1, 1), value=-1.0)
    sample = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    shifted = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return shifted + 0.1 * context.normal("augment_noise", tuple(x.shape[1:]))


def classification_loss(context: Context, label_smoothing: float) -> Tensor:
    x, labels = context.real()
    logits = context.networks["features"](augmented(context, x))
    return cross_entropy(logits, labels, label_smoothing=label_smoothing)


def contrastive_loss(context: Context) -> Tensor:
    """CLIP's loss in both directions. Captions repeat within a batch: every image of the caption's
    class (of a set with captions, every image of which the caption is true) is its match, and the
    targets share the mass (Yang et al. 2022, UniCL)."""
    clip = context.networks["features"]
    x, labels = context.real()
    captions = clip.captions
    template = (
        (context.uniform("template") * captions.shape[1]).long().clamp_max(captions.shape[1] - 1)
    )
    logits = clip(augmented(context, x), captions[labels, template])
    meaning = clip.meaning[labels]
    same = (meaning[:, None] == meaning[None]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _labelled(dataset: Dataset, kind: str) -> Images:
    """The training part with what a network is taught: captions or classes, or classes alone."""
    train = dataset.train
    return train if kind == "clip" else Images(train.pixels, dataset.classes(train.labels))


def make_features(experiment: Experiment, name: str) -> dict:
    """Leave `features/<name>/` with its `features.json`; returns what that says."""
    if isinstance(experiment.features[name], PretrainedFeatures):
        return fetch_features(experiment, name)
    return train_features(experiment, name)


def fetch_features(experiment: Experiment, name: str) -> dict:
    """Fetch the weights of a pretrained network.

    Where they cannot be had the record says `unavailable`, and why: nothing else needs to wait, and
    the tables say it in every row. `missing` says the same of the heads on top of it.
    """
    from harness.features.towers import TOWERS

    section, folder = experiment.features[name], experiment.features_dir(name)
    source, record = TOWERS[section.type], {"name": name, "type": section.type}
    try:
        path = source.fetch(section)
    except UserError as error:
        print(f"{name} is unavailable: {error}", file=sys.stderr)
        record |= {"unavailable": "no weights", "why": str(error)}
    else:
        known = source.facts(section)["sha256"]
        record |= {"file": Path(path or "").name, "sha256": known or sha256_file(path)}
    for version in getattr(section, "aesthetic", ()):
        from harness.features.aesthetic import LaionHead

        try:
            LaionHead.published(version)
        except UserError as error:
            print(f"{name}: aesthetic {version} is unavailable: {error}", file=sys.stderr)
            record.setdefault("missing", {})[f"aesthetic_{version}"] = "no weights"
    write_json(folder / "features.json", record)
    return record


def train_features(experiment: Experiment, name: str) -> dict:
    """Train feature network `name` and write its folder; returns what `features.json` says."""
    section, folder = experiment.features[name], experiment.features_dir(name)
    dataset = datasets.load(experiment.data_dir())
    key = digest([experiment.features_spec(name), dataset.sha256])
    device = experiment.device

    def make() -> TrainingRun:
        with seeded(section.seed):
            network = build_feature_network(section.type, dataset, section.width)
        if section.type == "clip":
            network.set_captions(dataset)
            loss, optimizer = contrastive_loss, OptimizerConfig(lr=section.lr)
        else:
            loss = partial(classification_loss, label_smoothing=section.label_smoothing)
            optimizer = OptimizerConfig(lr=section.lr, weight_decay=section.weight_decay)
        return TrainingRun(
            name=f"features {name}",
            folder=folder / "runs" / key,
            key=key,
            seed=section.seed,
            networks={"features": network},
            frozen={},
            main="features",
            phases=[Phase("classify", "features", loss, optimizer)],
            sources=Sources(
                dataset.image_shape,
                dataset.num_conditions,
                sigma_init=0.0,
                **placed(_labelled(dataset, section.type), device),
            ),
            batch=section.batch,
            budget=[{"unit": "images", "amount": section.images}],
            export=lambda ema, to: {
                "sha256": save_tensors(to / "features.safetensors", ema.state_dict())
            },
            ema_half_life=section.images // 20,
            device=device,
            checkpoint_seconds=experiment.training.checkpoint_seconds,
            max_nonfinite=experiment.training.max_nonfinite,
            tick_images=max(section.images // 20, 1),
        )

    with run_lock(folder):
        outcome = train(make)
        final = folder / "runs" / key / "snapshots" / outcome.snapshots[-1]["name"]
        link(folder / "features.safetensors", final / "features.safetensors")
        record = {
            "name": name,
            "architecture": section.model_dump(),
            **training_record(outcome, key),
        }
        network = _build(record, dataset)
        network.load_state_dict(load_tensors(folder / "features.safetensors", record["sha256"]))
        record["held_out_accuracy"] = held_out_accuracy(network.eval(), dataset)
        if section.type == "clip":
            from harness.features.aesthetic import train_head

            head, quality = train_head(network, dataset)
            record["aesthetic"] = quality
            record["aesthetic"]["sha256"] = save_tensors(
                folder / "aesthetic.safetensors", head.state_dict()
            )
        write_json(folder / "features.json", record)
    return record


def _build(record: dict, dataset: Dataset) -> nn.Module:
    section = FeatureSection(**record["architecture"])
    return build_feature_network(section.type, dataset, section.width)


@torch.no_grad()
def held_out_accuracy(network: nn.Module, dataset: Dataset) -> float | None:
    """Accuracy on the held-out part: of the classifier, or of CLIP by the nearest caption, which
    must name what the image's own does, in whatever wording. None without such a part."""
    held_out, correct = dataset.held_out, []
    if not len(held_out):
        return None
    for pixels, labels in held_out.blocks(1024):
        x = to_model_space(pixels)
        if not hasattr(network, "class_features"):
            correct.append(network(x).argmax(dim=1) == dataset.classes(labels))
            continue
        found = (network.features(x) @ network.class_features().T).argmax(dim=1)
        if dataset.attributes:
            meanings = dataset.attributes.meanings()
            correct.append(meanings[found] == meanings[labels])
        else:
            correct.append(found == labels)
    return torch.cat(correct).double().mean().item()


def load_feature_network(folder: Path, dataset: Dataset) -> tuple[nn.Module, dict]:
    """The network in `features/<name>/`, in evaluation mode, and its record."""
    record = read_json(folder / "features.json")
    path = folder / "features.safetensors"
    network = _build(record, dataset)
    try:
        network.load_state_dict(load_tensors(path, record["sha256"], owner=folder))
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its features.json: {str(error).splitlines()[-1]}"
        ) from None
    return network.eval().requires_grad_(False), record
