"""The training loop and the ledger, on a network small enough to count by hand."""

import csv
import gc
import json
import logging
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.config.schema import Grid, LoopSettings
from harness.context import Context, TrainingData
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import save_tensors
from harness.io.records import Cost
from harness.method import OptimizerConfig, Phase
from harness.training.checkpoint import load_checkpoint
from harness.training.ledger import Ledger, measure
from harness.training.loop import train
from harness.training.run import TrainingRun
from harness.training.trainer import NonFiniteError, Trainer

LOOP = LoopSettings(tick_images=16, checkpoint_seconds=0)
ADAM = OptimizerConfig(lr=1e-2)
# One image: 8 x 8 weights, forward and the gradient of the weights, multiply and add.
FLOPS_PER_IMAGE = 2 * 2 * 64


class Linear(Denoiser):
    """A "denoiser" of `(B, 1, 1, 8)` with 64 weights."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, sigma: Tensor, condition=None) -> Tensor:
        return self.layer(x.flatten(1)).view_as(x)


def loss(context: Context) -> Tensor:
    return (context.generated().x - 1).square().mean()


def run_of(folder, **settings) -> TrainingRun:
    """`settings`: of the run or of its loop."""
    options = {
        "name": "test/seed0",
        "folder": folder,
        "run_id": "k",
        "seed": 0,
        "networks": {"student": Linear()},
        "main": "student",
        "phases": [Phase("generator", "student", loss, ADAM)],
        "data": TrainingData((1, 1, 8), 0, 1.0),
        "batch": 8,
        "budget": [{"unit": "images", "amount": 64}],
        "export": lambda ema, to: save_tensors(to / "w.safetensors", ema.state_dict()),
    }
    loop = LoopSettings.model_fields.keys() & settings.keys()
    options["loop"] = LOOP.model_copy(update={name: settings.pop(name) for name in loop})
    return TrainingRun(**(options | settings))


def fit(folder, **settings):
    return train(run_of(folder, **settings))


def test_times_of_the_first_two_iterations_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path)
        fit(tmp_path, budget=[{"unit": "images", "amount": 128}])  # resumes
    lines = [r.getMessage() for r in caplog.records if "iteration" in r.getMessage()]
    assert [line.split()[0] for line in lines] == 2 * ["first", "second"]
    pattern = r"first iteration [\d.]+ s after the start of the process; it took [\d.]+ s"
    assert re.fullmatch(pattern, lines[0])


def test_ledger_counts_images_passes_and_operations(tmp_path):
    ledger = fit(tmp_path).ledger
    assert ledger.images == 64
    assert ledger.generated == 64
    assert ledger.passes == {"student": [64, 64]}
    assert ledger.flops == 64 * FLOPS_PER_IMAGE
    assert ledger.seconds > 0 and ledger.peak_memory > 0


def test_accumulation_equals_whole_batch(tmp_path):
    whole = fit(tmp_path / "a")
    parts = fit(tmp_path / "b", micro_batch=2)
    name = f"snapshots/{whole.snapshots[-1]['name']}/w.safetensors"
    a, b = (load_file(tmp_path / x / name)["layer.weight"] for x in "ab")
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert parts.ledger.flops == whole.ledger.flops


@pytest.mark.parametrize(
    ("limit", "images"),
    [
        ({"unit": "images", "amount": 40}, 40),
        ({"unit": "flops", "amount": 40 * FLOPS_PER_IMAGE}, 40),
        ({"unit": "flops", "amount": 40 * FLOPS_PER_IMAGE + 1}, 48),
    ],
)
def test_run_stops_at_first_step_that_reaches_a_limit(tmp_path, limit, images):
    far = {"unit": "seconds", "amount": 1e9}
    outcome = fit(tmp_path, budget=[far, limit])
    assert outcome.stop == limit
    assert outcome.ledger.images == images


def test_budget_in_seconds(tmp_path):
    outcome = fit(tmp_path, budget=[{"unit": "seconds", "amount": 0.2}])
    assert outcome.stop["unit"] == "seconds"
    last = outcome.snapshots[-1]
    assert last["before"]["seconds"] < 0.2 <= outcome.ledger.seconds


def test_charges_count_against_the_budget(tmp_path):
    ledger, cost = Ledger(), Cost(flops=32 * FLOPS_PER_IMAGE, passes={"teacher": [100, 0]})
    ledger.charge("pairs", cost, seconds=5.0)
    budget = [{"unit": "flops", "amount": 40 * FLOPS_PER_IMAGE}]
    outcome = fit(tmp_path / "a", ledger=ledger, budget=budget)
    assert outcome.ledger.images == 8
    assert outcome.ledger.passes["teacher"] == [100, 0]
    assert outcome.ledger.seconds > 5
    with pytest.raises(UserError) as error:
        fit(tmp_path / "b", ledger=ledger, budget=[{"unit": "seconds", "amount": 5}])
    assert error.value.code == "budget"


def test_snapshot_grid_does_not_depend_on_budget(tmp_path):
    grid = {"images": Grid(first=16), "flops": Grid(first=24 * FLOPS_PER_IMAGE)}
    short = fit(tmp_path / "a", snapshot_grid=grid, budget=[{"unit": "images", "amount": 56}])
    assert [s["ledger"]["images"] for s in short.snapshots] == [16, 24, 32, 48, 56]
    assert [s["grid"] for s in short.snapshots] == [
        ["images"],
        ["flops"],
        ["images"],
        ["flops"],
        [],
    ]
    longer = [{"unit": "images", "amount": 72}]
    extended = fit(tmp_path / "a", snapshot_grid=grid, budget=longer)
    at_once = fit(tmp_path / "b", snapshot_grid=grid, budget=longer)
    images = [s["ledger"]["images"] for s in extended.snapshots]
    assert images == [s["ledger"]["images"] for s in at_once.snapshots] == [16, 24, 32, 48, 64, 72]
    assert [s["sha256"] for s in extended.snapshots] == [s["sha256"] for s in at_once.snapshots]


def test_shortened_budget_gives_its_own_weights(tmp_path):
    grid = {"images": Grid(first=16)}
    fit(tmp_path / "a", snapshot_grid=grid, budget=[{"unit": "images", "amount": 72}])
    for amount in (32, 40):  # a snapshot exists at 32; at 40 the run starts over
        budget = [{"unit": "images", "amount": amount}]
        short = fit(tmp_path / "a", snapshot_grid=grid, budget=budget)
        fresh = fit(tmp_path / f"b{amount}", snapshot_grid=grid, budget=budget)
        assert short.ledger.images == amount
        assert short.snapshots[-1]["sha256"] == fresh.snapshots[-1]["sha256"]
        assert len(short.snapshots) == len(fresh.snapshots)


def test_a_budget_that_ends_at_a_pruned_snapshot_trains_nothing(tmp_path):
    grid = {"images": Grid(first=16)}
    settings = {"snapshot_grid": grid, "budget": [{"unit": "images", "amount": 72}]}
    whole = fit(tmp_path, **settings)
    for number in (16, 32):
        (tmp_path / "snapshots" / f"images-{number:09d}" / "w.safetensors").unlink()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    with pytest.raises(UserError) as error:
        fit(tmp_path, snapshot_grid=grid, budget=[{"unit": "images", "amount": 32}])
    message, folder = str(error.value), tmp_path / "snapshots" / "images-000000032"
    assert error.value.code == "pruned" and "\n" not in message
    assert f"{folder} has no weights" in message and f"delete {tmp_path} to train" in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == files
    # Pruned snapshots before the end matter to no weights.
    shorter = fit(tmp_path, snapshot_grid=grid, budget=[{"unit": "images", "amount": 64}])
    assert shorter.snapshots[-1]["sha256"] == whole.snapshots[-2]["sha256"]
    longer = fit(tmp_path, snapshot_grid=grid, budget=[{"unit": "images", "amount": 80}])
    assert [s["ledger"]["images"] for s in longer.snapshots] == [16, 32, 64, 80]
    fresh = fit(tmp_path / "b", snapshot_grid=grid, budget=[{"unit": "images", "amount": 80}])
    assert longer.snapshots[-1]["sha256"] == fresh.snapshots[-1]["sha256"]


def test_damaged_weights_at_the_end_of_a_budget_are_named(tmp_path):
    settings = {"budget": [{"unit": "images", "amount": 16}]}
    (last,) = fit(tmp_path, **settings).snapshots
    path = tmp_path / "snapshots" / last["name"] / "w.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError) as error:
        fit(tmp_path, **settings)
    message = str(error.value)
    assert error.value.code == "damaged" and "\n" not in message
    assert f"{path} is damaged" in message and f"delete {tmp_path} to train" in message


def test_shortened_flops_budget_does_not_use_a_later_snapshot(tmp_path):
    fit(tmp_path, budget=[{"unit": "images", "amount": 64}])
    budget = [{"unit": "flops", "amount": 33 * FLOPS_PER_IMAGE}]
    assert fit(tmp_path, budget=budget).ledger.images == 40


def test_points_of_a_grid():
    grid = Grid(first=16)
    assert [grid.index(x) for x in (0, 15, 16, 31, 32, 64)] == [0, 0, 1, 1, 2, 3]
    grid = Grid(first=16, per_octave=4)
    assert [grid.index(grid.point(k)) for k in range(1, 6)] == [1, 2, 3, 4, 5]
    grid = Grid(every=250_000)
    assert [grid.index(x) for x in (0, 249_999, 250_000, 5_000_192)] == [0, 0, 1, 20]
    assert [grid.point(k) for k in (1, 2, 20)] == [250_000, 500_000, 5_000_000]
    assert Grid(every=1e17).index(3e17) == 3


def test_a_linear_grid_has_a_snapshot_at_or_beyond_each_multiple(tmp_path):
    """Multiples of 20 images lie between iterations of 8; two of 6 lie in one iteration."""
    budget = [{"unit": "images", "amount": 64}]
    for every, expected in ((20, [24, 40, 64]), (32, [32, 64]), (6, [*range(8, 65, 8)])):
        grid = {"images": Grid(every=every)}
        outcome = fit(tmp_path / str(every), snapshot_grid=grid, budget=budget)
        assert [s["ledger"]["images"] for s in outcome.snapshots] == expected
    grid = {"images": Grid(every=20)}
    longer = [{"unit": "images", "amount": 88}]
    extended = fit(tmp_path / "20", snapshot_grid=grid, budget=longer)
    at_once = fit(tmp_path / "at-once", snapshot_grid=grid, budget=longer)
    assert [s["ledger"]["images"] for s in extended.snapshots] == [24, 40, 64, 80, 88]
    assert [s["sha256"] for s in extended.snapshots] == [s["sha256"] for s in at_once.snapshots]


def test_phases_repeat_skip_and_share_generated_images(tmp_path):
    """The critic updates twice per iteration, the student every second iteration."""
    batches = []

    def critic_loss(context: Context) -> Tensor:
        x = context.generated().x.detach()
        batches.append(x)
        return (context.networks["critic"](x, torch.ones(len(x))) - x).square().mean()

    outcome = fit(
        tmp_path,
        networks={"student": Linear(), "critic": Linear()},
        phases=[
            Phase("critic", "critic", critic_loss, ADAM, repeat=2, modes={"student": "train"}),
            Phase("generator", "student", loss, ADAM, every=2),
        ],
        budget=[{"unit": "images", "amount": 16}],
    )
    # Three iterations; the student is updated in 0 and 2, with the batch of repeat 0.
    assert outcome.ledger.images == 16
    assert outcome.ledger.passes["student"] == [6 * 8, 2 * 8]
    assert outcome.ledger.passes["critic"] == [6 * 8, 6 * 8]
    assert not torch.equal(batches[0], batches[1])


def nan_at(steps, optimizer=ADAM):
    def broken(context: Context) -> Tensor:
        value = loss(context)
        return value * float("nan") if context.step in steps else value

    return [Phase("generator", "student", broken, optimizer)]


def test_non_finite_gradients_are_replaced_and_counted(tmp_path):
    """As the codes of SiD and GDD do: NaN becomes 0, and the step counts."""
    replacing = ADAM.model_copy(update={"nonfinite": "replace"})
    outcome = fit(tmp_path / "a", phases=nan_at({1, 2, 5}, replacing), max_nonfinite=2)
    assert outcome.nonfinite == {"generator": 3}
    assert outcome.ledger.images == outcome.ledger.generated == 64
    state = load_file(tmp_path / "a" / "state-00000008.safetensors")
    assert state["optimizer/student/0/step"] == 8
    assert all(tensor.isfinite().all() for tensor in state.values())
    with pytest.raises(NonFiniteError):
        fit(tmp_path / "b", phases=nan_at({1, 2, 3}, replacing), max_nonfinite=2)


def test_non_finite_steps_are_skipped_counted_and_logged(tmp_path):
    outcome = fit(tmp_path, phases=nan_at({1, 2, 5}), max_nonfinite=2)
    assert outcome.nonfinite == {"generator": 3}
    assert outcome.ledger.images == 64 and outcome.ledger.generated == 11 * 8
    state = load_file(tmp_path / "state-00000011.safetensors")
    assert state["optimizer/student/0/step"] == 8
    with open(tmp_path / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["nonfinite/generator"] == "3"
    assert all(float(row["loss/generator"]) < 100 for row in rows if row["loss/generator"])


def test_skipped_step_changes_no_weight_optimizer_state_or_snapshot(tmp_path):
    grid = {"images": Grid(first=32)}
    whole = fit(tmp_path / "a", snapshot_grid=grid)
    broken = fit(tmp_path / "b", snapshot_grid=grid, phases=nan_at({4, 5}))
    assert whole.snapshots[0]["sha256"] == broken.snapshots[0]["sha256"]
    assert [s["ledger"]["images"] for s in broken.snapshots] == [32, 64]
    before = fit(tmp_path / "c", budget=[{"unit": "images", "amount": 32}])
    assert before.ledger.images == 32
    run = run_of(tmp_path / "c", phases=nan_at({4, 5}))
    trainer = Trainer(run)
    trainer.load_state_dict(load_checkpoint(run))
    tensors = trainer.state_dict()["tensors"]
    before = {name: v.clone() for name, v in tensors.items() if not name.startswith("ema/")}

    def unchanged() -> bool:
        after = trainer.state_dict()["tensors"]
        return all(torch.equal(v, after[name]) for name, v in before.items())

    trainer.step()
    assert unchanged() and trainer.nonfinite == {"generator": 1}
    trainer.step()
    trainer.step()
    assert not unchanged()


def test_too_many_non_finite_steps_stop_the_run(tmp_path):
    grid = {"images": Grid(first=16)}
    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path, phases=nan_at(set(range(3, 99))), max_nonfinite=2, snapshot_grid=grid)
    message = str(error.value)
    assert message.startswith("test/seed0: 3 consecutive non-finite steps in phase 'generator'")
    assert "images-000000016" in message and "\n" not in message


def test_phases_count_non_finite_steps_separately(tmp_path):
    """Counters are read at ticks, here every second step."""

    def critic_loss(context: Context) -> Tensor:
        x = context.generated().x.detach()
        return context.networks["critic"](x, torch.ones(len(x))).square().mean()

    def broken(context: Context) -> Tensor:
        return loss(context) * float("nan")

    with pytest.raises(NonFiniteError, match=r"4 .*'generator' up to step 3 \(0 images\)"):
        fit(
            tmp_path,
            networks={"student": Linear(), "critic": Linear()},
            phases=[
                Phase("critic", "critic", critic_loss, ADAM),
                Phase("generator", "student", broken, ADAM),
            ],
            max_nonfinite=2,
        )


def test_rows_after_the_saved_state_are_dropped(tmp_path):
    (tmp_path / "train.csv").write_text("step,images\n2,16\n,\n4,")
    fit(tmp_path)
    with open(tmp_path / "train.csv") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert steps == ["2", "4", "6", "8"]


class Killed(BaseException):
    pass


def test_resume_equals_uninterrupted(tmp_path):
    grid = {"images": Grid(first=16, per_octave=2)}
    whole = fit(tmp_path / "a", snapshot_grid=grid, checkpoint_seconds=0)
    for stop_at in (1, 3, 6):

        def dying(context: Context, stop_at=stop_at) -> Tensor:
            if context.step == stop_at:
                raise Killed
            return loss(context)

        folder = tmp_path / f"b{stop_at}"
        with pytest.raises(Killed):
            fit(folder, snapshot_grid=grid, phases=[Phase("generator", "student", dying, ADAM)])
        again = fit(folder, snapshot_grid=grid)
        assert [s["sha256"] for s in again.snapshots] == [s["sha256"] for s in whole.snapshots]
        assert again.ledger.flops == whole.ledger.flops
        columns = ("step", "images", "flops", "loss/generator", "grad_norm/generator")
        logs = []
        for path in (tmp_path / "a", folder):
            with open(path / "train.csv") as file:
                logs.append([[row[c] for c in columns] for row in csv.DictReader(file)])
        assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("damage", "code", "file"),
    [
        ("truncate", "damaged", "state-00000008.safetensors"),
        ("remove", "missing-file", "state-00000008.safetensors"),
        ("foreign", "other-run", "state.json"),
        ("garbage", "damaged", "state.json"),
        ("version", "format", "state.json"),
    ],
)
def test_damaged_or_foreign_state_is_rejected(tmp_path, damage, code, file):
    fit(tmp_path)
    tensors, record = tmp_path / "state-00000008.safetensors", tmp_path / "state.json"
    state = json.loads(record.read_text())
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "foreign":
        record.write_text(json.dumps(state | {"run_id": "other"}))
    elif damage == "garbage":
        record.write_text(record.read_text()[:50])
    else:
        record.write_text(json.dumps(state | {"format": 0}))
    with pytest.raises(UserError) as error:
        fit(tmp_path, budget=[{"unit": "images", "amount": 128}])
    assert error.value.code == code
    assert "\n" not in str(error.value) and str(tmp_path / file) in str(error.value)


def test_the_record_names_all_devices_of_a_run(tmp_path, monkeypatch):
    def record(folder, images):
        run = run_of(folder, budget=[{"unit": "images", "amount": images}])
        return train(run).record("r")["device_name"]

    assert record(tmp_path / "a", 32) == "cpu"
    monkeypatch.setattr("harness.training.run.device_name", lambda device: "NVIDIA H200")
    assert record(tmp_path / "b", 32) == "NVIDIA H200"
    assert record(tmp_path / "a", 64) == record(tmp_path / "a", 96) == "cpu and NVIDIA H200"


def test_average_follows_its_half_life(tmp_path):
    outcome = fit(tmp_path, ema_half_life=16, ema_ramp_up=1e9)
    states = load_file(tmp_path / "state-00000008.safetensors")
    assert outcome.ledger.images == 64
    start, ema = Linear().layer.weight.detach(), states["ema/layer.weight"]
    student = states["student/layer.weight"]
    assert not torch.equal(ema, student) and not torch.equal(ema, start)
    # Each step of Adam moves every weight by about lr in one direction. An average with decay d
    # per step lags d / (1 - d) steps behind; d = 0.5 ** (8 / 16).
    d = 0.5**0.5
    lag = (student - ema).abs().mean() / ((student - start).abs().mean() / 8)
    assert float(lag) == pytest.approx(d / (1 - d), rel=0.2)


def test_warm_up_and_clipping(tmp_path):
    slow = OptimizerConfig(lr=1e-2, warmup_steps=1000, clip=1e-9)
    fit(tmp_path, phases=[Phase("generator", "student", loss, slow)])
    moved = load_file(tmp_path / "state-00000008.safetensors")["student/layer.weight"]
    change = (moved - Linear().layer.weight.detach()).abs().max()
    # Rates 1e-5, 2e-5, ... 8e-5; with the gradient clipped to eps, Adam's steps are below the rate.
    assert 0 < change < 36e-5


def test_cosine_decay_ends_at_zero():
    config = OptimizerConfig(lr=1.0, warmup_steps=2, decay_steps=4)
    rates = [config.rate(update) for update in range(1, 7)]
    assert rates == pytest.approx([0.5, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0, 0.0])
    assert OptimizerConfig(lr=1.0).rate(10**9) == 1.0


def test_measure_follows_a_gradient_penalty_and_attention():
    q = torch.randn(2, 1, 4, 8, requires_grad=True)
    with measure({}) as cost:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert cost.flops >= 2 * (2 * 2 * 4 * 4 * 8)
    layer = nn.Conv2d(1, 1, 3)
    with measure({"critic": layer}) as cost:
        real = torch.randn(2, 1, 8, 8).requires_grad_()
        real = real.view_as(real)
        (gradient,) = torch.autograd.grad(layer(real).sum(), real, create_graph=True)
        gradient.square().sum().backward()
    assert cost.flops > 0
    assert cost.passes["critic"][0] == 2


def test_memory_and_state_do_not_grow_with_steps(tmp_path):
    tensors = {}

    def counting(context: Context) -> Tensor:
        if context.step in (100, 1000):
            gc.collect()
            tensors[context.step] = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        return loss(context)

    phases, sizes = [Phase("generator", "student", counting, ADAM)], []
    for steps in (1001, 101):
        folder, budget = tmp_path / str(steps), [{"unit": "images", "amount": 8 * steps}]
        fit(folder, phases=phases, budget=budget, checkpoint_seconds=1e9)
        sizes += [file.stat().st_size for file in folder.glob("state-*.safetensors")]
        assert steps == 101 or tensors[100] == tensors[1000]
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_metrics_average_finite_values(tmp_path):
    trainer = Trainer(run_of(tmp_path, phases=nan_at({1})))
    trainer.step()
    first = float(trainer.metrics["loss/generator"])
    trainer.step()
    assert trainer.metrics.collect(trainer.processes)["loss/generator"] == first
    assert len(trainer.metrics) == 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_optional_loggers_receive_each_tick(tmp_path, monkeypatch, name):
    rows = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "tensorboard" and purge_step == 1

        def add_scalar(self, key, value, step):
            rows.setdefault(step, {})[key] = value

        def flush(self):
            pass

        close = flush

    class Run:
        def log(self, row, step):
            rows[step] = row

        def finish(self):
            rows["finished"] = True

    def init(id, name, resume, **_):
        assert (id, name, resume) == ("k", "test/seed0", "allow")
        return Run()

    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    fit(tmp_path, loggers=("csv", name))
    assert [rows[n]["step"] for n in (16, 32, 48, 64)] == [2, 4, 6, 8]
    assert (tmp_path / "train.csv").exists() and ("finished" in rows) == (name == "wandb")


def test_missing_logger_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as error:
        fit(tmp_path, loggers=("wandb",))
    assert error.value.code == "missing-package"


def test_phase_of_an_unknown_network_is_rejected(tmp_path):
    message = "phase 'p' names unknown network 'critic'; known: student"
    with pytest.raises(UserError, match=message):
        Trainer(run_of(tmp_path, phases=[Phase("p", "critic", loss, ADAM)]))
