"""What the stages that train something share, and the stage that trains a student."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from harness import data as datasets
from harness.artifacts import digest, machine_slot, run_lock, sha256_file, write_json
from harness.config import Experiment
from harness.ledger import Cost, Ledger
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


def _pairs(experiment: Experiment, student: str) -> tuple[dict, dict] | None:
    """The record and the tensors of the teacher pairs a student needs, or None."""
    from harness.pairs import load_pairs

    name = experiment.pairs_name(student)
    return load_pairs(experiment.pairs_dir(name)) if name else None


def build_student_run(experiment: Experiment, student: str, seed: int, contended: bool = False):
    """The `TrainingRun` of a student and a function that builds it afresh: `(key, make, facts)`.

    `facts` is what student.json says beside the training record.
    """
    from harness.feature_networks import load_feature_network
    from harness.freezing import freeze
    from harness.method import Sources, get_method
    from harness.networks import clone_denoiser, load_denoiser, save_denoiser
    from harness.networks.classifiers import FeatureMaps

    section, training = experiment.students[student], experiment.training
    config, needs = experiment.method_config(student), experiment.requirements(student)
    method_class, device = get_method(section.method), experiment.device
    teacher_folder = experiment.teacher_dir(experiment.teacher_of(student))
    dataset = datasets.load(experiment.data_dir())
    teacher = load_denoiser(teacher_folder, device=device)
    pairs = _pairs(experiment, student)
    features, features_record = None, None
    if needs.features:
        features, features_record = load_feature_network(
            experiment.features_dir(needs.features), dataset
        )
    import methods

    source = Path(methods.__path__[0]) / f"{section.method}.py"
    key = digest(
        {
            "spec": experiment.run_spec(student, seed),
            "data": dataset.sha256,
            "teacher": sha256_file(teacher_folder / "diffusion_pytorch_model.safetensors"),
            "pairs": pairs[0]["sha256"] if pairs else None,
            "features": features_record["sha256"] if features_record else None,
            "method": sha256_file(source),
        }
    )
    facts: dict = {}

    def make() -> TrainingRun:
        with seeded(seed):
            method = method_class(config, teacher, FeatureMaps(features) if features else None)
        network = clone_denoiser(teacher)
        facts["frozen_fraction"] = freeze(network, section.freeze)
        facts["parameters"] = sum(p.numel() for p in network.parameters())
        ledger = Ledger()
        if pairs:
            cost = Cost(pairs[0]["flops"], {"teacher": [pairs[0]["evaluations"], 0]})
            ledger.charge("pairs", cost, pairs[0]["seconds"])
        return TrainingRun(
            name=f"{student}/seed{seed}",
            folder=experiment.run_dir(student, seed) / "runs" / key,
            key=key,
            seed=seed,
            networks={"student": network, **method.networks()},
            frozen=method.frozen_networks(),
            main="student",
            phases=method.phases(),
            sources=Sources(
                dataset.image_shape,
                dataset.num_classes,
                config.sigma_init,
                images=datasets.to_model_space(dataset.train.pixels).to(device)
                if needs.real_images
                else None,
                labels=dataset.train.labels.to(device) if needs.real_images else None,
                pair_tensors={k: v.to(device) for k, v in pairs[1].items()} if pairs else None,
            ),
            batch=config.batch,
            budget=experiment.budget_spec(),
            export=lambda ema, to: {
                "sha256": save_denoiser(ema, to, {"sigma_init": config.sigma_init})
            },
            ledger=ledger,
            micro_batch=training.micro_batch,
            ema_half_life=config.ema_half_life,
            ema_ramp_up=config.ema_ramp_up,
            snapshot_grid={unit: grid.model_dump() for unit, grid in training.snapshots.items()},
            device=device,
            precision=training.precision,
            tick_images=training.tick_images,
            checkpoint_seconds=training.checkpoint_seconds,
            max_nonfinite=training.max_nonfinite,
        )

    defaults = method_class.Config().model_dump()
    changed = {k: v for k, v in config.model_dump().items() if v != defaults[k]}
    facts |= {
        "experiment": experiment.name,
        "student": student,
        "seed": seed,
        "method": section.method,
        "paper": method_class.paper,
        "data_free": method_class.data_free,
        "deviations": list(method_class.deviations),
        "settings": config.model_dump(),
        "changed_settings": changed,
        "freeze": section.freeze,
        "teacher": experiment.teacher_of(student),
        "trained_against": [needs.features] if needs.features else [],
        "device": device,
        "nfe": 1,
    }
    return key, make, facts


def train_student(experiment: Experiment, student: str, seed: int) -> dict:
    """Train one run to its budget and write `student.json`; returns what it says."""
    run_dir = experiment.run_dir(student, seed)
    with run_lock(run_dir), machine_slot(exclusive=experiment.seconds_budget) as alone:
        key, make, facts = build_student_run(experiment, student, seed)
        folder = run_dir / "runs" / key
        try:
            outcome = train(make)
        finally:
            if folder.exists():
                for name in ("snapshots", "train.csv"):
                    link(run_dir / name, folder / name)
        link(run_dir / "model", folder / "snapshots" / outcome.snapshots[-1]["name"])
        record = {**facts, **training_record(outcome, key), "snapshots": outcome.snapshots}
        record["contended"] = experiment.seconds_budget and not alone
        write_json(run_dir / "student.json", record)
    return record
