"""What the stages that train something share, and the stage that trains a student."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from harness.config.experiment import Experiment
from harness.config.schema import micro_batch
from harness.context import Sources
from harness.data.datasets import placed, placement
from harness.denoiser import Denoiser
from harness.io.artifacts import digest, link, write_json
from harness.io.locks import machine_slot, run_lock
from harness.method import get_method
from harness.streams import seeded
from harness.students.inputs import Inputs, load_inputs
from harness.training.distributed import processes
from harness.training.ledger import Ledger
from harness.training.lora import add_adapters, parameter_count
from harness.training.trainer import TrainingRun, train, training_record


def assemble(
    experiment: Experiment, student: str, seed: int, inputs: Inputs, folder: Path, key: str
) -> TrainingRun:
    """The run of a student: its networks, its method's phases, and what they draw from."""
    from harness.denoiser import clone_denoiser, set_dropout
    from harness.features.base import FeatureMaps
    from harness.freezing import freeze
    from harness.networks import save_denoiser

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
    from harness.features.timm_backbones import pretraining_set

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
