"""configs/paper: every experiment is valid, `plan` counts its networks, and its phases run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from harness.config.loading import read_experiment
from harness.errors import ConfigError
from harness.io.artifacts import size_text
from harness.networks.vp import Codec
from harness.reporting.published.match import concerning, runs_of
from harness.students.run import assemble
from harness.teachers.pipelines import STABLE_DIFFUSION_VAE as VAE
from harness.teachers.pipelines import build_pipeline_denoiser
from harness.teachers.sources import reads_text
from harness.training.ledger import measure
from harness.training.trainer import Trainer
from harness.validation import load_experiment, parse_experiment
from harness.workflow.dry_run import SavedTensorMemory, dry_run_inputs, dry_run_pipeline
from harness.workflow.plan import Estimate
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "paper"
NAMES = ["cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64", "imagenet64"]
WEIGHTINGS = ["dmd-sigma", "dmd-sigma3"]  # ablations
TEXT = {"t2i-sd15-dmd": 859_520_964, "t2i-pixart-sim": 610_856_096}  # parameters of the teachers


def load(name):
    return load_experiment(FOLDER / f"{name}.yaml", files=False)


def test_every_experiment_has_the_name_of_its_file():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    variants = (f"{name}-{kind}" for name in NAMES for kind in ("scaled", "released"))
    assert names == {*NAMES, *variants, *TEXT}
    for name in names:
        assert load(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_fids_use_the_published_statistics(name):
    """NVIDIA's statistics have the name of the file of images."""
    for experiment in (load(name), load(f"{name}-scaled")):
        images = experiment.data.source.removeprefix("datasets/").removesuffix(".zip")
        assert experiment.evaluation.statistics == f"datasets/fid-refs/{images}.npz"
    with pytest.raises(ConfigError) as error:
        load_experiment(FOLDER / f"{name}.yaml")
    assert "evaluation.statistics" in {problem.key for problem in error.value.problems}


@pytest.mark.parametrize("name", NAMES)
def test_released_experiments_train_nothing(name):
    """They need the authors' files, the statistics and Inception, and compare with the papers."""
    exact, experiment = load(name), load(f"{name}-released")
    assert set(experiment.released) == set(experiment.students) and not experiment.teachers
    assert not experiment.data.has_images and not experiment.pair_sets
    assert experiment.data.num_classes == exact.data.num_classes
    assert experiment.evaluation.statistics == exact.evaluation.statistics
    assert experiment.paper.dataset == exact.paper.dataset
    assert experiment.paper.conditioning == exact.paper.conditioning
    found = {}
    for entry in concerning(experiment.paper):
        if entry["metric"] == "FID" and entry["paper"] in ("SiD", "GDD"):
            for student in runs_of(experiment, entry):
                found.setdefault(student, []).append(entry["value"])
    assert set(found) == set(experiment.students)
    for name, student in experiment.students.items():
        expected = (2.5, 0.0) if student.method == "sid" else (80.0, 0.002)
        settings = student.settings
        assert (settings.sigma_init, getattr(settings, "epsilon", 0.0)) == expected, name


@pytest.mark.parametrize("name", NAMES)
def test_scaled_experiments_have_one_budget(name):
    exact, scaled = load(name), load(f"{name}-scaled")
    assert [s for s in exact.students if s not in WEIGHTINGS] == list(scaled.students)
    budgets = {str(scaled.students[student].budget) for student in scaled.students}
    assert len(budgets) == 1 and len(scaled.teachers) == 1
    (limit,) = scaled.training.budget
    assert limit.unit == "images" and 5e6 <= limit.amount < 5.2e6
    assert len({str(exact.students[s].budget) for s in exact.students}) > 1


@pytest.mark.parametrize("name", TEXT)
def test_an_incomplete_download_does_not_matter_without_files(name, tmp_path, monkeypatch):
    """`plan` takes a teacher's network from the experiment until its folder is complete."""
    monkeypatch.chdir(tmp_path)
    expected = load(name)
    for teacher in expected.teachers.values():
        Path(teacher.source).mkdir(parents=True)
    assert load(name).raw == expected.raw
    for teacher in expected.teachers.values():
        assert reads_text(teacher)
        with torch.device("meta"):
            parameters = dry_run_pipeline(teacher).backbone.parameters()
        assert sum(p.numel() for p in parameters) == TEXT[name]
    with pytest.raises(ConfigError) as error:
        load_experiment(FOLDER / f"{name}.yaml")
    assert "reads-no-text" in {problem.code for problem in error.value.problems}


# From the authors' code or the paper.
@pytest.mark.parametrize(
    ("name", "student", "expected"),
    [
        ("cifar10-uncond", "sid", {"alpha": 1.2, "lr": 1e-5, "batch": 256, "dropout": 0.13}),
        ("cifar10-cond", "dmd", {"pairs": 100_000, "pair_steps": 18, "regression_weight": 0.25}),
        ("cifar10-cond", "dmd-noreg", {"regression": "none", "lr": 1e-5}),
        ("cifar10-cond", "dmd-nodm", {"regression": "lpips", "lr": 5e-5, "pairs": 100_000}),
        ("imagenet64", "dmd-noreg", {"regression": "none", "batch": 336, "lr": 1e-5}),
        ("imagenet64", "dmd-nodm", {"batch": 336, "lr": 2e-6, "pair_steps": 256}),
        ("ffhq64", "sid", {"batch": 512, "augment": 0.15, "generator_betas": (0.9, 0.999)}),
        ("ffhq64", "gdd", {"lr": 2e-5, "discriminator_lr": 4e-5}),
        ("afhqv2-64", "sid", {"alpha": 1.0, "lr": 5e-6, "generator_betas": (0.0, 0.999)}),
        ("imagenet64", "sid", {"batch": 8192, "lr": 4e-6, "ema_half_life": 2_000_000}),
        ("imagenet64", "dmd", {"batch": 336, "lr": 2e-6, "pairs": 25_000, "pair_steps": 256}),
        ("imagenet64", "gdd", {"batch": 512, "lr": 8e-6, "ema_half_life": 50_000_000}),
        ("t2i-sd15-dmd", "dmd", {"batch": 2304, "lr": 1e-5, "pairs": 500_000}),
        ("t2i-pixart-sim", "sim", {"sigma_init": 2.5, "c": 0.001}),
    ],
)
def test_settings_equal_the_published_ones(name, student, expected):
    config = load(name).students[student].settings
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.slow
def test_the_plan_counts_the_official_networks():
    # Without micro-batches, images are generated once per iteration.
    whole = {"training": {"micro_batch": None}}
    experiment = load_experiment(FOLDER / "cifar10-uncond.yaml", whole, files=False)
    sid = Estimate(experiment, "sid")
    assert sid.parameters == sid.auxiliary == 55_733_891
    with torch.device("meta"):
        inputs = dry_run_inputs(replace(experiment, device_setting="meta"), "sid", 2)
        with torch.no_grad(), measure({}) as forward:
            inputs.teacher(torch.zeros(1, 3, 32, 32), torch.ones(1), None)
    # In units of a forward pass: student and fake score in their own updates need 3 each (forward,
    # gradients of input and weights); teacher and fake score in the generator loss need 2 each; the
    # images for the fake score need 1.
    assert sid.flops_per_image == pytest.approx(11 * forward.flops, rel=0.02)
    # As many float32 weights for each snapshot, every 5 million images.
    assert (sid.snapshots, size_text(sid.snapshot_bytes)) == (100, "223 MB")
    assert sid.images == 5e8 and sid.flops == pytest.approx(5e8 * sid.flops_per_image)


@pytest.mark.parametrize("name", NAMES)
def test_exact_experiments_select_among_linear_snapshots(name):
    exact, scaled = load(name), load(f"{name}-scaled")
    for student in exact.students.values():
        grid, (limit,) = student.snapshots["images"], student.budget
        assert list(student.snapshots) == ["images"]
        assert grid.every == (250_000 if student.method == "gdd" else 5_000_000)
        if (name, student.name) == ("cifar10-uncond", "gdd"):
            assert grid.index(limit.amount) == 20
    evaluation = exact.evaluation
    assert len(evaluation.sampling_seeds) == 10
    assert evaluation.selection_seed not in (None, *evaluation.sampling_seeds)
    assert scaled.evaluation.selection_seed is None
    assert scaled.evaluation.sampling_seeds == [0, 1, 2]
    grids = [student.snapshots for student in scaled.students.values()]
    assert all(
        grid == scaled.training.snapshots and set(grid) == {"images", "flops"} for grid in grids
    )


def test_a_graph_counts_until_its_backward_pass():
    """SiD generates its images in the fake score's phase and uses their graph in the student's."""
    weight, memory = torch.nn.Linear(1000, 1000), SavedTensorMemory()
    with memory.track([weight]):
        x = torch.randn(10, 1000)
        waiting = weight(x).sin()  # saves x and the input of the sine
        assert memory.current == 2 * x.nbytes
        (weight(x).sin().sum()).backward()  # x is counted already
        assert (memory.current, memory.peak) == (2 * x.nbytes, 3 * x.nbytes)
        waiting.sum().backward()
    del waiting
    assert (memory.current, memory.peak) == (0, 3 * x.nbytes)


def test_the_sampler_of_pairs_is_deterministic():
    """The teacher's own sampler on ImageNet is stochastic."""
    experiment = load("imagenet64")
    (name,) = experiment.pair_sets
    assert experiment.teachers["adm"].sampler.s_churn == 40
    sampler = experiment.pairs_fingerprint(name)["sampler"]
    assert (sampler["s_churn"], sampler["steps"]) == (0, 256)


# One of each code path.
STEPS = [
    ("cifar10-uncond", "dmd"),
    ("cifar10-uncond", "sid"),
    ("cifar10-uncond-scaled", "sid"),
    ("cifar10-uncond", "gdd"),
    ("cifar10-cond", "dmd-noreg"),
    ("cifar10-cond", "dmd-nodm"),
    ("ffhq64", "sid"),
    ("afhqv2-64", "sim"),
    ("imagenet64", "sid"),
    ("imagenet64", "gdd-i"),
    ("../cifar10-small", "dmd"),
    ("../cifar10-small-fast", "gdd"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "student"), STEPS)
def test_a_training_step_of_narrow_networks(name, student, tmp_path, record_property):
    raw = read_experiment(FOLDER / f"{name}.yaml")
    raw["students"] = {student: raw["students"][student]}
    for teacher in raw["teachers"].values():
        teacher["network"] |= {"model_channels": 32, "num_blocks": 1}
    settings = raw["students"][student].setdefault("settings", {})
    settings |= {"batch": 2}
    if raw["students"][student]["method"] == "gdd":
        settings |= {"ghost_batch": 2}
    raw["training"]["budget"] = [{"unit": "images", "amount": 2}]
    if not name.endswith("-scaled"):  # bfloat16 is ten times slower on CPU
        raw["training"]["precision"] = "fp32"
    raw["students"][student]["budget"] = None
    raw["device"] = "cpu"
    experiment = parse_experiment(raw, name, files=False)
    inputs = dry_run_inputs(experiment, student, images=4)
    before = [p.clone() for p in inputs.teacher.parameters()]
    run = assemble(experiment.student_run(student, 0), inputs, tmp_path, "step")
    trainer, memory = Trainer(run), SavedTensorMemory()
    # Without the regression, DMD's first generator update has no gradient: scores are still equal.
    steps = 2 if student == "dmd-noreg" else 1
    with memory.track(trainer.all_networks.values()):
        for _ in range(steps):
            trainer.step()
    assert memory.current == 0 and memory.peak > 0
    assert all(count == 0 for count in trainer.nonfinite.values())
    student_net = trainer.networks["student"]
    moved = [not torch.equal(a, b) for a, b in zip(before, student_net.parameters(), strict=True)]
    frozen = [not p.requires_grad for p in student_net.parameters()]
    assert any(moved) and not any(m and f for m, f in zip(moved, frozen, strict=True))
    assert any(frozen) == (student == "gdd-i")
    assert trainer.ledger.images == 2 * steps and trainer.ledger.flops > 0
    record_property("GFLOPs per image", f"{trainer.ledger.flops / steps / 2e9:.2f}")
    record_property("MiB saved for backward passes", f"{memory.peak / 2**20:.1f}")


@pytest.mark.parametrize("name", TEXT)
def test_text_to_image_teachers_are_the_official_networks(name):
    (section,) = load(name).teachers.values()
    with torch.device("meta"):
        teacher = build_pipeline_denoiser(section.network)
        assert sum(p.numel() for p in Codec(AutoencoderKL(**VAE)).parameters()) == 83_653_863
    assert sum(p.numel() for p in teacher.backbone.parameters()) == TEXT[name]
    assert teacher.image_shape == (4, 64, 64)
    assert teacher.text_width == {"t2i-sd15-dmd": 768, "t2i-pixart-sim": 4096}[name]


def narrow(name: str, student: str, lora: bool, monkeypatch):
    """A text-to-image experiment with a narrow network and decoder, and images of 16 pixels."""
    raw = read_experiment(FOLDER / f"{name}.yaml")
    (teacher,) = raw["teachers"].values()
    if "PixArt" in teacher["network"]["type"]:
        sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
        sizes |= {"cross_attention_dim": 16, "caption_channels": 32}
    else:
        sizes = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 4}
        sizes |= {"cross_attention_dim": 32, "attention_head_dim": 4, "layers_per_block": 1}
    teacher["network"] |= sizes | {"sample_size": 8}
    small = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
    monkeypatch.setattr("harness.teachers.pipelines.STABLE_DIFFUSION_VAE", VAE | small)
    raw["students"][student]["settings"]["batch"] = 2
    raw["students"][student] |= {"lora": {"rank": 2}} if lora else {}
    raw["training"]["budget"] = [{"unit": "images", "amount": 2}]
    raw["training"] |= {"precision": "fp32", "snapshots": {}}
    raw["device"] = "cpu"
    return parse_experiment(raw, name, files=False)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("name", "student"), [("t2i-sd15-dmd", "dmd"), ("t2i-pixart-sim", "sim")])
def test_a_text_to_image_step_of_narrow_networks(name, student, lora, tmp_path, monkeypatch):
    experiment = narrow(name, student, lora, monkeypatch)
    inputs = dry_run_inputs(experiment, student, images=4)
    before = [p.clone() for p in inputs.teacher.parameters()]
    run = assemble(experiment.student_run(student, 0), inputs, tmp_path, "step")
    trainer, memory = Trainer(run), SavedTensorMemory()
    with memory.track(trainer.all_networks.values()):
        trainer.step()
    assert all(count == 0 for count in trainer.nonfinite.values()) and memory.current == 0
    after = inputs.teacher.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained = trainer.trainable["student"]
    assert any(p.detach().abs().sum() > 0 for p in trained)
    # Only DMD's regression needs decoded pixels.
    assert ("lpips" in trainer.frozen) == (student == "dmd")
    assert isinstance(inputs.teacher.codec, Codec) == (student == "dmd")


def test_gradient_checkpointing_changes_no_number_and_saves_memory(tmp_path, monkeypatch):
    weights, peaks = [], []
    for checkpointing in (True, False):
        experiment = narrow("t2i-pixart-sim", "sim", False, monkeypatch)
        update = {"gradient_checkpointing": checkpointing}
        experiment = replace(experiment, training=experiment.training.model_copy(update=update))
        torch.manual_seed(0)
        inputs = dry_run_inputs(experiment, "sim", images=4)
        run = assemble(
            experiment.student_run("sim", 0), inputs, tmp_path / str(checkpointing), "step"
        )
        trainer, memory = Trainer(run), SavedTensorMemory()
        with memory.track(trainer.all_networks.values()):
            trainer.step()
        weights.append([p.detach() for p in trainer.trainable["student"]])
        peaks.append(memory.peak)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert peaks[0] < 0.8 * peaks[1]


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-small-fast", "fashion"])
def test_experiments_that_train_their_teacher(name):
    experiment = load_experiment(ROOT / "configs" / f"{name}.yaml", files=False)
    assert experiment.name == name
    assert len(experiment.evaluation.extractors) >= 2
    # GDD's discriminator network does not score.
    assert set(experiment.students["gdd"].requirements.backbones) <= {"tf_efficientnet_lite0"}
    assert experiment.students["gdd"].requirements.features not in experiment.evaluation.extractors
    budgets = {str(student.budget) for student in experiment.students.values()}
    assert len(budgets) == 1
    seeds = {"cifar10-small-fast": [0]}.get(name, [0, 1, 2])
    assert experiment.training.seeds == seeds
