"""The stage that trains a student."""

from pathlib import Path

from harness.config.jobs import StudentRun
from harness.context import LabelLaw, TrainingData
from harness.data.datasets import placed, placement
from harness.denoiser import Denoiser, clone_denoiser, set_dropout
from harness.freezing import freeze
from harness.io.artifacts import digest, link
from harness.io.locks import machine_slot, run_lock
from harness.io.records import StudentRecord
from harness.method import METHODS
from harness.precision import set_precision
from harness.streams import seeded
from harness.students.inputs import Inputs, load_inputs
from harness.training.distributed import processes
from harness.training.loop import train
from harness.training.lora import add_adapters, parameter_count
from harness.training.run import TrainingRun


def assemble(run: StudentRun, inputs: Inputs, folder: Path, run_id: str) -> TrainingRun:
    """Build a student's training: its networks, its method's phases, and its data."""
    from harness.networks import save_denoiser

    student, config, needs = run.student, run.student.settings, run.student.requirements
    with seeded(run.seed):
        method = METHODS[student.method](config, inputs.teacher, inputs.required)
        auxiliary = method.networks()
    network = clone_denoiser(inputs.teacher)
    set_dropout(network, config.generator_dropout)
    method.prepare_student(network)
    freeze(network, student.freeze)
    if student.lora:
        with seeded(run.seed):
            for clone in (network, *auxiliary.values()):
                if isinstance(clone, Denoiser):
                    add_adapters(clone, inputs.teacher, student.lora.rank, student.lora.scale)
    # Embeddings are read on the host, so images and pairs are drawn there, too.
    device = "cpu" if inputs.embeddings and run.device != "meta" else run.device
    counts = inputs.dataset.label_counts
    data = TrainingData(
        inputs.teacher.image_shape,
        inputs.dataset.num_conditions,
        config.sigma_init,
        embeddings=inputs.embeddings,
        label_law=LabelLaw.of(counts, device) if counts and config.labels == "data" else None,
        **(placed(inputs.dataset.train, device) if needs.real_images else {}),
    )
    if inputs.pairs:
        place = placement(inputs.pairs["x"], device)
        data.pair_tensors = {name: tensor.to(place) for name, tensor in inputs.pairs.items()}
    frozen = method.frozen_networks()
    if needs.pixels and any(True for _ in inputs.teacher.codec.parameters()):
        frozen["codec"] = inputs.teacher.codec
    return TrainingRun(
        name=run.name,
        folder=folder,
        run_id=run_id,
        seed=run.seed,
        networks={"student": network, **auxiliary},
        frozen=frozen,
        main="student",
        phases=method.phases(),
        data=data,
        batch=config.batch,
        budget=run.budget,
        export=lambda ema, to: save_denoiser(ema, to, {"sigma_init": config.sigma_init}),
        ledger=inputs.ledger,
        ema_half_life=config.ema_half_life,
        ema_ramp_up=config.ema_ramp_up,
        ghost_batch=needs.ghost_batch,
        snapshot_grid=student.snapshots,
        loop=run.training,
        device=run.device,
    )


def describe(run: StudentRun) -> dict:
    """The part of student.json that is known before training."""
    from harness.features.timm_backbones import pretraining_set

    student, needs = run.student, run.student.requirements
    method = METHODS[student.method]
    against = [needs.features] if needs.features else []
    against += [f"timm/{name}" for name in needs.backbones] + ["lpips-vgg"] * needs.lpips
    pretraining = {*map(pretraining_set, needs.backbones), *["imagenet-1k"] * needs.lpips}
    adapters = [f"LoRA of rank {student.lora.rank}"] if student.lora else []
    settings, defaults = student.settings.model_dump(), method.Config().model_dump()
    adapted = [
        f"{name} {settings[name]:g} instead of {defaults[name]:g} ({reason})"
        for name, reason in student.adapted.items()
    ]
    return {
        "experiment": run.experiment,
        "student": student.name,
        "seed": run.seed,
        "method": student.method,
        "paper": method.paper,
        "data_free": method.data_free,
        "deviations": [*method.deviations_under(student.settings), *adapters, *adapted],
        "settings": settings,
        "changed_settings": {k: v for k, v in settings.items() if v != defaults[k]},
        "freeze": student.freeze,
        "lora": student.lora and student.lora.model_dump(exclude_none=True),
        "teacher": student.teacher,
        "trained_against": against,
        "pretraining": sorted(pretraining),
        "device": run.device,
        "processes": processes().size,
        "nfe": 1,
    }


def train_student(run: StudentRun) -> StudentRecord | None:
    """Train a run to its budget and write `student.json`; the first process returns the record."""
    set_precision(run.device, run.training.tf32, static_shapes=True)
    group, slot = processes(), machine_slot(exclusive=run.exclusive)
    with group.leading(run_lock(run.folder)), group.leading(slot) as exclusive:
        inputs = load_inputs(run)
        run_id = digest([run.fingerprint, inputs.hashes])
        folder = run.folder / "runs" / run_id
        contended = folder / "contended"  # remains if an interrupted run continues alone
        shared_machine = not exclusive or inputs.shared_machine
        if group.first and shared_machine:
            folder.mkdir(parents=True, exist_ok=True)
            contended.touch()
        training = assemble(run, inputs, folder, run_id)
        try:
            outcome = train(training)
        finally:
            if group.first and folder.exists():
                for name in ("snapshots", "train.csv"):
                    link(run.folder / name, folder / name)
        if not group.first:
            return None
        link(run.folder / "model", training.snapshot(outcome.snapshots[-1]["name"]))
        network = training.networks["student"]
        parameters = parameter_count(network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        record = StudentRecord(
            fingerprint=digest([run.fingerprint, run.budget]),
            **describe(run),
            parameters=parameters,
            frozen_fraction=max(0.0, 1 - trained / parameters),
            **outcome.record(run_id),
            inputs=inputs.hashes,
            snapshots=outcome.snapshots,
            contended=run.exclusive and (shared_machine or contended.exists()),
        )
        record.write(run.folder / "student.json")
    return record
