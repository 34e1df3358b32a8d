"""What the stages that train something share, and the stage that trains a student."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import data as datasets
from harness.adapters import add_adapters, parameter_count
from harness.artifacts import (
    digest,
    machine_slot,
    read_json,
    run_lock,
    sha256_file,
    write_json,
)
from harness.config import Experiment, micro_batch
from harness.data import Dataset, Images
from harness.denoiser import Denoiser
from harness.ledger import Cost, Ledger
from harness.method import Sources, get_method
from harness.processes import processes
from harness.prompts import Embeddings, load_embeddings
from harness.trainer import Outcome, TrainingRun, train


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights from `seed`, without touching the global generator otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def link(path: Path, target: Path) -> None:
    """Make `path` a relative symbolic link to `target`, replacing what is there, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    os.replace(temporary, path)


def training_record(outcome: Outcome, key: str) -> dict:
    """The part that teacher.json, student.json and features.json have in common."""
    from harness import __version__

    return {
        "schema": 1,
        "harness": __version__,
        "torch": torch.__version__,
        "key": key,
        "sha256": outcome.snapshots[-1]["sha256"],
        "stop": outcome.stop,
        "nonfinite": outcome.nonfinite,
        "ledger": outcome.ledger.to_json(),
    }


# Bytes of images that a run keeps on its device; of more, each batch is brought there.
ON_DEVICE = 4 << 30


@dataclass
class Inputs:
    """What a student's run is made from. `charge`: what its teacher pairs cost (name, cost,
    seconds). `hashes`: of everything here that came from a file."""

    dataset: Dataset
    teacher: Denoiser
    features: nn.Module | None = None
    backbones: nn.ModuleList | None = None
    lpips: nn.Module | None = None
    pairs: dict[str, Tensor] | None = None
    embeddings: Embeddings | None = None  # of prompts, if the teacher takes some
    charge: tuple[str, Cost, float] | None = None
    hashes: dict[str, str | dict | None] | None = None
    contended: bool = False  # the pairs' seconds were measured beside other work


def load_inputs(experiment: Experiment, student: str) -> Inputs:
    """Read a student's data, teacher, feature network and pairs from the experiment's folder."""
    import methods
    from harness.feature_networks import load_feature_network
    from harness.networks import load_codec, load_denoiser, parts_sha256
    from harness.networks.backbones import load_backbone
    from harness.networks.perceptual import TRUNK_SHA256, load_lpips
    from harness.pairs import load_pairs

    needs = experiment.requirements(student)
    folder = experiment.teacher_dir(experiment.teacher_of(student))
    dataset = datasets.load(experiment.data_dir(), images=needs.real_images)
    source = Path(methods.__path__[0]) / f"{experiment.students[student].method}.py"
    hashes: dict[str, str | dict | None] = {
        "data": dataset.images_sha256,
        "teacher": read_json(folder / "teacher.json")["sha256"],
        "method": sha256_file(source),
        "pairs": None,
        "features": None,
    }
    teacher = load_denoiser(folder, hashes["teacher"], experiment.device)
    if needs.pixels:
        teacher.codec = load_codec(folder, experiment.device)
    inputs = Inputs(dataset, teacher, embeddings=load_embeddings(folder), hashes=hashes)
    if inputs.embeddings:
        hashes["prompts"] = inputs.embeddings.record["sha256"]
    if parts := parts_sha256(folder):
        hashes["parts"] = parts
    if needs.features:
        inputs.features, record = load_feature_network(
            experiment.features_dir(needs.features), dataset
        )
        hashes["features"] = record["sha256"]
    if needs.backbones:
        inputs.backbones = nn.ModuleList(map(load_backbone, needs.backbones))
        hashes["backbones"] = {b.name: b.sha256 for b in inputs.backbones}
    if needs.lpips:
        inputs.lpips, hashes["lpips"] = load_lpips(), TRUNK_SHA256
    if needs.pairs:
        record, inputs.pairs = load_pairs(experiment.pairs_dir(experiment.pairs_name(student)))
        cost = Cost(record["flops"], {"teacher": [record["evaluations"], 0]})
        inputs.charge = ("pairs", cost, record["seconds"])
        inputs.contended = record["contended"]
        hashes["pairs"] = record["sha256"]
    return inputs


def placement(data: Tensor, device: str) -> torch.device:
    """Where a set of images is kept: on the device, unless it would take too much of it."""
    return torch.device(device) if data.nbytes <= ON_DEVICE else data.device


def placed(images: Images, device: str) -> dict[str, Tensor]:
    """Pixels and labels where a run keeps them, as `Sources` takes them."""
    place = placement(images.pixels, device)
    return {"pixels": images.pixels.to(place), "labels": images.labels.to(place)}


def assemble(
    experiment: Experiment, student: str, seed: int, inputs: Inputs, folder: Path, key: str
) -> TrainingRun:
    """The run of a student: its networks, its method's phases, and what they draw from."""
    from harness.freezing import freeze
    from harness.networks import clone_denoiser, save_denoiser, set_dropout
    from harness.networks.classifiers import FeatureMaps

    section, training = experiment.students[student], experiment.training
    config, needs = experiment.method_config(student), experiment.requirements(student)
    dataset, device = inputs.dataset, experiment.device
    with seeded(seed):
        features = FeatureMaps(inputs.features) if inputs.features else None
        features = features or inputs.backbones or inputs.lpips
        method = get_method(section.method)(config, inputs.teacher, features)
        beside = method.networks()
    network = clone_denoiser(inputs.teacher)
    set_dropout(network, 0.0)  # a generator has none; its teacher was trained with some
    method.prepare_student(network)
    freeze(network, section.freeze)
    if section.lora:
        with seeded(seed):
            for clone in (network, *beside.values()):
                if isinstance(clone, Denoiser):
                    add_adapters(clone, inputs.teacher, section.lora.rank, section.lora.scale)
    # Embeddings are read on the host, so images and pairs are chosen there, too.
    home = "cpu" if inputs.embeddings and device != "meta" else device
    real = placed(dataset.train, home) if needs.real_images else {}
    sources = Sources(
        inputs.teacher.image_shape,
        dataset.num_conditions,
        config.sigma_init,
        embeddings=inputs.embeddings,
        **real,
    )
    if inputs.pairs:
        place = placement(inputs.pairs["x"], home)
        sources.pair_tensors = {k: v.to(place) for k, v in inputs.pairs.items()}
    frozen = method.frozen_networks()
    if needs.pixels and any(True for _ in inputs.teacher.codec.parameters()):
        frozen["codec"] = inputs.teacher.codec
    ledger = Ledger()
    if inputs.charge:
        ledger.charge(*inputs.charge)
    return TrainingRun(
        name=f"{student}/seed{seed}",
        folder=folder,
        key=key,
        seed=seed,
        networks={"student": network, **beside},
        frozen=frozen,
        main="student",
        phases=method.phases(),
        sources=sources,
        batch=config.batch,
        budget=experiment.budget_spec(student),
        export=lambda ema, to: {
            "sha256": save_denoiser(ema, to, {"sigma_init": config.sigma_init})
        },
        ledger=ledger,
        micro_batch=micro_batch(config.batch, training.micro_batch),
        ema_half_life=config.ema_half_life,
        ema_ramp_up=config.ema_ramp_up,
        snapshot_grid={unit: grid.model_dump() for unit, grid in training.snapshots.items()},
        device=device,
        precision=training.precision,
        channels_last=training.channels_last,
        compile=training.compile,
        gradient_checkpointing=training.gradient_checkpointing,
        tick_images=training.tick_images,
        checkpoint_seconds=training.checkpoint_seconds,
        max_nonfinite=training.max_nonfinite,
    )


def describe(experiment: Experiment, student: str, seed: int) -> dict:
    """What student.json says of a run beside its training record.

    `trained_against`: networks that it must not be scored by unflagged; `pretraining`: what those
    from elsewhere had been trained on, which a metric's own network may share.
    """
    from harness.networks.backbones import pretraining_set

    section, config = experiment.students[student], experiment.method_config(student)
    method, needs = get_method(section.method), experiment.requirements(student)
    against = [needs.features] if needs.features else []
    against += [f"timm/{name}" for name in needs.backbones] + ["lpips-vgg"] * needs.lpips
    pretraining = {pretraining_set(name) for name in needs.backbones}
    pretraining |= {"imagenet-1k"} if needs.lpips else set()
    adapted = [f"LoRA of rank {section.lora.rank}"] if section.lora else []
    settings, defaults = config.model_dump(), method.Config().model_dump()
    return {
        "experiment": experiment.name,
        "student": student,
        "seed": seed,
        "method": section.method,
        "paper": method.paper,
        "data_free": method.data_free,
        "deviations": [*method.deviations_under(config), *adapted],
        "settings": settings,
        "changed_settings": {k: v for k, v in settings.items() if v != defaults[k]},
        "freeze": section.freeze,
        **section.model_dump(include={"lora"}, exclude_none=True),
        "teacher": experiment.teacher_of(student),
        "trained_against": against,
        "pretraining": sorted(pretraining),
        "device": experiment.device,
        "processes": processes().size,
        "nfe": 1,
    }


def _parameters(network: nn.Module) -> dict:
    """Those that the exported network has: adapters will be part of their weights."""
    total = parameter_count(network)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {"parameters": total, "frozen_fraction": max(0.0, 1 - trained / total)}


def train_student(experiment: Experiment, student: str, seed: int) -> dict:
    """Train one run to its budget and write `student.json`; returns what it says."""
    run_dir = experiment.run_dir(student, seed)
    group, slot = processes(), machine_slot(exclusive=experiment.seconds_budget)
    with group.leading(run_lock(run_dir)), group.leading(slot) as alone:
        inputs = load_inputs(experiment, student)
        key = digest([experiment.run_spec(student, seed), inputs.hashes])
        folder = run_dir / "runs" / key
        contended = folder / "contended"  # stays when an interrupted run goes on alone
        if group.first and (not alone or inputs.contended):
            folder.mkdir(parents=True, exist_ok=True)
            contended.touch()
        make = partial(assemble, experiment, student, seed, inputs, folder, key)
        try:
            outcome = train(make)
        finally:
            if group.first and folder.exists():
                for name in ("snapshots", "train.csv"):
                    link(run_dir / name, folder / name)
        if not group.first:
            return {}
        link(run_dir / "model", folder / "snapshots" / outcome.snapshots[-1]["name"])
        record = {
            "spec": digest([experiment.run_spec(student, seed), experiment.budget_spec(student)]),
            **describe(experiment, student, seed),
            **_parameters(make().networks["student"]),
            **training_record(outcome, key),
            "inputs": inputs.hashes,
            "snapshots": outcome.snapshots,
            "contended": experiment.seconds_budget
            and (not alone or inputs.contended or contended.exists()),
        }
        write_json(run_dir / "student.json", record)
    return record
