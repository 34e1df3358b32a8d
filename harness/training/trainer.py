"""The one training loop: it runs phases and owns everything around them.

Optimisers, mixed precision, accumulation, gradient hygiene, EMA, the ledger, snapshots and exact
resume live here, for students, teachers and feature networks alike.

The host never waits for the device within an iteration. Whether a step was finite is known on the
device alone, where the optimiser leaves such a step out; counts on the host assume that all were,
and are settled at each tick and before anything is decided by them.

A run's folder is keyed by a hash of everything that decides its weights except where it stops, so
a longer budget continues it and any other change starts a new one beside it:

    state.json + state-<step>.safetensors   where to resume
    snapshots/images-<n>/                   exported EMA weights, snapshot.json
    train.csv                               one row per tick
"""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.context import Context, Sources
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import (
    atomic_folder,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
    write_text,
)
from harness.method import OptimizerConfig, Phase
from harness.streams import Stream
from harness.training.distributed import processes
from harness.training.ledger import UNITS, Cost, Ledger, measure, peak_memory

STATE_FORMAT = 1


@dataclass
class TrainingRun:
    """One network trained by phases. `main` is the network that is averaged and exported."""

    name: str  # for messages: "sid/seed0"
    folder: Path  # keyed by `key`
    key: str
    seed: int
    networks: dict[str, nn.Module]  # trained
    frozen: dict[str, nn.Module]  # only passed through
    main: str
    phases: list[Phase]
    sources: Sources
    batch: int
    budget: list[dict]
    export: Callable[[nn.Module, Path], dict]  # (EMA network, folder) -> record
    ledger: Ledger = field(default_factory=Ledger)  # with charges
    micro_batch: int | None = None
    ema_half_life: int = 0
    ema_ramp_up: float = 0.05
    snapshot_grid: dict[str, dict] = field(default_factory=dict)  # unit -> {first, per_octave}
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    tick_images: int = 1024
    checkpoint_seconds: float = 15.0
    max_nonfinite: int = 20
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())


@dataclass
class Outcome:
    """`stop`: the limit that ended the run. `snapshots`: records, the last is the end."""

    stop: dict
    ledger: Ledger
    snapshots: list[dict]
    nonfinite: dict[str, int]


class NonFiniteError(UserError):
    """Too many consecutive steps with a non-finite loss or gradient."""


def grid_index(amount: float, first: float, per_octave: float) -> int:
    """How many points of the grid `first * 2**(k / per_octave)` lie at or below `amount`."""
    if amount < first:
        return 0
    return math.floor(math.log2(amount / first) * per_octave + 1e-9) + 1


class Guard:
    """What happened to the steps of one phase since their counts were last settled, on the device:
    how many were not finite, how many of these came one after the other up to now, and at most."""

    def __init__(self, device: str):
        self.lost, self.row, self.longest = (torch.zeros((), device=device) for _ in range(3))

    def add(self, lost: Tensor) -> None:
        self.lost += lost
        self.row.add_(1).mul_(lost)
        torch.maximum(self.longest, self.row, out=self.longest)


class Trainer:
    def __init__(self, run: TrainingRun):
        self.run = run
        self.processes = processes()
        self.share = self.processes.share(run.batch)
        self.networks = {name: self._place(net) for name, net in run.networks.items()}
        self.frozen = {name: self._place(net).eval() for name, net in run.frozen.items()}
        for net in self.frozen.values():
            net.requires_grad_(False)
        for net in self.networks.values():
            net.train()
        # Weights that never change are their own average, and no part of a saved state.
        main = self.networks[run.main]
        held = {id(p): p for p in main.parameters() if not p.requires_grad}
        self.ema = copy.deepcopy(main, held).requires_grad_(False).eval()
        if run.compile:
            for net in (*self.networks.values(), *self.frozen.values()):
                if isinstance(net, Denoiser):  # others are differentiated twice, by R1
                    net.compile(dynamic=False)
        pairs = zip(self.ema.parameters(), main.parameters(), strict=True)
        self._averaged = tuple(zip(*[pair for pair in pairs if pair[1].requires_grad], strict=True))
        self._held = {
            name: {key for key, p in net.named_parameters() if not p.requires_grad}
            for name, net in self.networks.items()
        }
        self._held["ema"] = self._held[run.main]
        self.trainable = {
            name: [p for p in net.parameters() if p.requires_grad]
            for name, net in self.networks.items()
        }
        self.configs = self._optimizer_configs()
        self.optimizers = {
            name: self._build_optimizer(self.trainable[name], config)
            for name, config in self.configs.items()
        }
        self.step, self.ledger = 0, copy.deepcopy(run.ledger)
        self.updates = dict.fromkeys(self.optimizers, 0)
        self.nonfinite = {phase.name: 0 for phase in run.phases}
        self.consecutive = {phase.name: 0 for phase in run.phases}
        self.snapshots: list[dict] = []
        self._guards = {phase.name: Guard(run.device) for phase in run.phases}
        self._sums: dict[str, Tensor] = {}  # of what was recorded and finite since the last tick
        self._counts: dict[str, Tensor] = {}

    # -- building -------------------------------------------------------------------------------

    def _place(self, net: nn.Module) -> nn.Module:
        """Put a network on the device; convolutions follow the memory format of their weights."""
        if self.run.gradient_checkpointing:
            for part in net.modules():
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        if self.run.channels_last:
            return net.to(self.run.device, memory_format=torch.channels_last)
        return net.to(self.run.device)

    def _optimizer_configs(self) -> dict[str, OptimizerConfig]:
        configs: dict[str, OptimizerConfig] = {}
        for phase in self.run.phases:
            if phase.network not in self.networks:
                raise ValueError(f"phase {phase.name!r} updates unknown network {phase.network!r}")
            if configs.setdefault(phase.network, phase.optimizer) != phase.optimizer:
                raise ValueError(f"phases give network {phase.network!r} two optimisers")
        return configs

    def _build_optimizer(self, parameters: list[Tensor], config: OptimizerConfig):
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        return kind(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    # -- state ----------------------------------------------------------------------------------

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, net in [*self.networks.items(), ("ema", self.ema)]:
            held = self._held[name]
            tensors |= {f"{name}/{k}": v for k, v in net.state_dict().items() if k not in held}
        for name, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{i}/{k}": v for k, v in state.items()}
        return tensors

    def save(self) -> None:
        """Write the state; the old one goes only when the new one is whole."""
        if not self.processes.first:
            return
        folder = self.run.folder
        file = f"state-{self.step:08d}.safetensors"
        sha256 = save_tensors(folder / file, self._state_tensors())
        write_json(
            folder / "state.json",
            {
                "format": STATE_FORMAT,
                "run": self.run.name,
                "key": self.run.key,
                "file": file,
                "sha256": sha256,
                "step": self.step,
                "updates": self.updates,
                "ledger": self.ledger.to_json(),
                "nonfinite": self.nonfinite,
                "consecutive": self.consecutive,
                "snapshots": self.snapshots,
            },
        )
        for old in folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()

    def load(self) -> bool:
        """Continue from the saved state, if there is one. Damaged or foreign state is refused."""
        folder = self.run.folder
        path = folder / "state.json"
        if not path.exists():
            return False
        state = read_json(path, owner=folder)
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError(f"{path} was written by another version; delete {folder} to start over")
        if state["key"] != self.run.key:
            raise UserError(
                f"{path} belongs to another run ({state['run']}, key {state['key']}); "
                f"delete {folder} to start {self.run.name} over"
            )
        tensors = load_tensors(
            folder / state["file"], state["sha256"], self.run.device, owner=folder
        )
        for name, net in [*self.networks.items(), ("ema", self.ema)]:
            prefix = f"{name}/"
            found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            own = net.state_dict()
            net.load_state_dict({key: own[key] for key in self._held[name]} | found)
        for name, optimizer in self.optimizers.items():
            record = optimizer.state_dict()
            record["state"] = {}
            prefix = f"optimizer/{name}/"
            for k, v in tensors.items():
                if k.startswith(prefix):
                    i, entry = k[len(prefix) :].split("/")
                    record["state"].setdefault(int(i), {})[entry] = v
            optimizer.load_state_dict(record)
        self.step, self.updates = state["step"], state["updates"]
        self.ledger = Ledger.from_json(state["ledger"])
        self.nonfinite, self.consecutive = state["nonfinite"], state["consecutive"]
        for name, row in self.consecutive.items():
            self._guards[name].row.fill_(row)
        self.snapshots = state["snapshots"]
        self._trim_csv()
        return True

    # -- one iteration --------------------------------------------------------------------------

    def _iteration(self) -> None:
        run, share = self.run, self.share
        micro = math.gcd(run.micro_batch or len(share), len(share))
        first, images = self.step * run.batch, self.ledger.images
        everything = {**self.frozen, **self.networks}
        contexts = [
            Context(
                everything,
                run.sources,
                run.seed,
                self.step,
                range(first + start, first + start + micro),
                run.device,
            )
            for start in share[::micro]
        ]
        due = [phase for phase in run.phases if self.step % phase.every == 0]
        updates = [
            (phase, repeat, self._variant(phase, repeat, due))
            for phase in due
            for repeat in range(phase.repeat)
        ]
        # A new variant is measured with all that runs beside it: its backward pass may go through
        # what another phase made.
        measuring = any(variant not in self.ledger.costs for _, _, variant in updates)
        for phase, repeat, variant in updates:
            # Images made now carry a graph to the student only if its own update will use it; with
            # several micro-batches they would all have to be held, so they are made again instead.
            later = due[due.index(phase) :] if len(contexts) == 1 else [phase]
            with_graph = any(other.network == run.main for other in later)
            for context in contexts:
                context.enter(phase.name, repeat, with_graph)
            self._update(phase, repeat, contexts, variant, measuring)
            if phase.network == run.main:
                self.ledger.images += run.batch
            if phase.network == run.main or len(contexts) > 1:
                for context in contexts:
                    context.forget_generated()
        self._update_ema(self.ledger.images - images)
        self.step += 1

    def _variant(self, phase: Phase, repeat: int, due: list[Phase]) -> str:
        """A name for everything that makes an update of this phase cost what it costs: the phase's
        own variants, and which others run beside it (they share generated images)."""
        parts = [phase.name, phase.variant(self.step)]
        if phase.repeat > 1:
            parts.append("first" if repeat == 0 else "again")
        if any(other.every > 1 for other in self.run.phases):
            parts.append("with " + "+".join(other.name for other in due))
        return "/".join(filter(None, parts))

    def _update(
        self, phase: Phase, repeat: int, contexts: list[Context], variant: str, measuring: bool
    ) -> None:
        """Gradient of the phase's loss over the batch, and one step of its network's optimiser."""
        run = self.run
        for name, parameters in self.trainable.items():
            # The student's images may be made in another network's phase: it always stays open.
            if name != run.main:
                self.networks[name].train(name == phase.network)
                for parameter in parameters:
                    parameter.requires_grad_(name == phase.network)
        # For dropout alone, which takes its numbers from torch's own generator: with several
        # micro-batches or processes they depend on the split.
        stream = Stream(run.seed, phase.name, self.step, repeat, "dropout")
        if not self.processes.first:
            stream = stream.child(f"process{self.processes.rank}")
        torch.manual_seed(stream.key[0])
        everything = {**self.frozen, **self.networks}
        total = torch.zeros((), device=run.device)
        with self._measured(everything) if measuring else contextlib.nullcontext() as cost:
            for context in contexts:
                with self._precision():
                    loss = phase.loss(context) / len(contexts)
                loss.backward()
                total += loss.detach()
        if variant not in self.ledger.costs:
            self.ledger.costs[variant] = cost * self.processes.size
        self.ledger.add(self.ledger.costs[variant])
        self._apply(phase, total)
        for context in contexts:
            for name, value in context.logs.items():
                self._record(name, value)
            context.logs.clear()

    @contextlib.contextmanager
    def _measured(self, networks: dict[str, nn.Module]) -> Iterator[Cost]:
        """Count operations; compiled networks run as they are written meanwhile."""
        eager = torch.compiler.set_stance("force_eager") if self.run.compile else None
        with eager or contextlib.nullcontext(), measure(networks) as cost:
            yield cost

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.run.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.run.device.split(":")[0], torch.bfloat16)

    def _apply(self, phase: Phase, loss: Tensor) -> None:
        """One step of the optimiser, which leaves it out if something is not finite."""
        name, config = phase.network, self.configs[phase.network]
        optimizer, parameters = self.optimizers[name], self.trainable[name]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.processes.average_([*gradients, loss])
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        lost = (~torch.isfinite(norm + loss)).float()
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm, foreach=True)
        self.updates[name] += 1
        for group in optimizer.param_groups:
            group["lr"] = config.rate(self.updates[name])
        self._step(optimizer, lost)
        optimizer.zero_grad(set_to_none=True)
        self._guards[phase.name].add(lost)
        self._record(f"loss/{phase.name}", loss)
        self._record(f"grad_norm/{phase.name}", norm)

    def _step(self, optimizer: torch.optim.Optimizer, lost: Tensor) -> None:
        """`lost`: 1 leaves the step out, 0 takes it; fused optimisers look on the device."""
        optimizer.found_inf = lost
        optimizer.step()

    def _settle(self) -> None:
        """Take back what the host counted of steps that were left out; too many in a row end the
        run."""
        names = list(self._guards)
        guards = [torch.stack([g.lost, g.row, g.longest]) for g in self._guards.values()]
        for name, counts in zip(names, torch.stack(guards).tolist(), strict=True):
            lost, row, longest = map(int, counts)
            self._guards[name].lost.zero_()
            self._guards[name].longest.zero_()
            phase = next(phase for phase in self.run.phases if phase.name == name)
            self.nonfinite[name] += lost
            self.consecutive[name] = row
            self.updates[phase.network] -= lost
            if phase.network == self.run.main:
                self.ledger.images -= lost * self.run.batch
            if longest > self.run.max_nonfinite:
                raise NonFiniteError(
                    f"{self.run.name}: {longest} consecutive non-finite steps in phase {name!r} up "
                    f"to step {self.step - 1} ({self.ledger.images} images); last good snapshot: "
                    f"{self._last_snapshot()}"
                )

    def _ema_decay(self, images: int) -> float:
        """A step that was left out counts here, too: the average closes in on the same weights."""
        run = self.run
        half_life = min(run.ema_half_life, self.ledger.images * run.ema_ramp_up)
        return 0.5 ** (images / half_life) if half_life > 0 else 0.0

    def _update_ema(self, images: int) -> None:
        """Move the average by the images that the iteration added."""
        with torch.no_grad():
            torch._foreach_lerp_(*self._averaged, 1 - self._ema_decay(images))
            main = self.networks[self.run.main]
            for a, b in zip(self.ema.buffers(), main.buffers(), strict=True):
                a.copy_(b)

    # -- snapshots, ticks -----------------------------------------------------------------------

    def _grid_position(self) -> dict[str, int]:
        return {
            unit: grid_index(self.ledger.amount(unit), grid["first"], grid["per_octave"])
            for unit, grid in self.run.snapshot_grid.items()
        }

    def _last_snapshot(self) -> str:
        if not self.snapshots:
            return "none yet"
        return str(self.run.folder / "snapshots" / self.snapshots[-1]["name"])

    def _snapshot(self, grid: list[str], before: dict[str, float]) -> None:
        """Export the averaged weights. `grid`: the units whose grid this point lies on; `before`:
        what was spent one iteration earlier, which tells whether a budget ends exactly here."""
        name = f"images-{self.ledger.images:09d}"
        if any(other["name"] == name for other in self.snapshots):
            name += f"-step-{self.step}"  # compute went on without a student's update
        if not self.processes.first:
            self.snapshots.append({"name": name, "grid": grid})
            return
        with atomic_folder(self.run.folder / "snapshots" / name) as folder:
            record = self.run.export(self.ema, folder)
            record |= {"name": name, "grid": grid, "step": self.step, "before": before}
            record |= {"ledger": self.ledger.to_json(), "ema_half_life": self.run.ema_half_life}
            write_json(folder / "snapshot.json", record)
        self.snapshots.append(record)

    def _record(self, name: str, value: Tensor) -> None:
        finite = value.isfinite()
        self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, 0.0)
        self._counts[name] = self._counts.get(name, 0.0) + finite.float()

    def _row(self, elapsed: float, images: int) -> dict[str, float]:
        """The averages since the last tick; the only place where losses are read back."""
        names = list(self._sums)
        totals = torch.stack([*self._sums.values(), *self._counts.values()]).float()
        self.processes.sum_([totals])
        sums, counts = totals.view(2, -1).tolist()
        means = {
            name: total / count if count else math.nan
            for name, total, count in zip(names, sums, counts, strict=True)
        }
        self._sums.clear()
        self._counts.clear()
        rate = images / elapsed if elapsed > 0 else 0.0
        return {
            "step": self.step,
            "images": self.ledger.images,
            "flops": self.ledger.flops,
            "seconds": round(self.ledger.seconds, 3),
            "images_per_second": round(rate, 2),
            **{f"nonfinite/{k}": v for k, v in self.nonfinite.items()},
            **means,
        }

    @property
    def _csv(self) -> Path:
        return self.run.folder / "train.csv"

    def _append_csv(self, row: dict) -> None:
        """Append a row; a column that appears late (a term that runs seldom) widens the table."""
        rows = []
        if self._csv.exists():
            with open(self._csv, newline="") as file:
                reader = csv.DictReader(file)
                header = list(reader.fieldnames or [])
                if set(row) <= set(header):
                    rows = None
                else:
                    rows = list(reader)
                    header += [k for k in row if k not in header]
        else:
            header = list(row)
        if rows is None:
            with open(self._csv, "a", newline="") as file:
                csv.DictWriter(file, header).writerow(row)
        else:
            self._write_csv(header, [*rows, row])

    def _write_csv(self, header: list[str], rows: list[dict]) -> None:
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, header)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._csv, text.getvalue())

    def _trim_csv(self) -> None:
        """Drop rows beyond the state that is resumed: they will be written again."""
        if not self._csv.exists() or not self.processes.first:
            return
        with open(self._csv, newline="") as file:
            reader = csv.DictReader(file)
            rows = []
            for row in reader:
                step = row.get("step") or ""
                if step.isdigit() and int(step) <= self.step and None not in row.values():
                    rows.append(row)
            self._write_csv(list(reader.fieldnames or []), rows)

    # -- the loop -------------------------------------------------------------------------------

    def _already_beyond(self) -> Outcome | None:
        """The outcome of a budget that the saved state has reached or passed, if a snapshot lies
        exactly where that budget ends."""
        for i, record in enumerate(self.snapshots):
            if not (self.run.folder / "snapshots" / record["name"] / "snapshot.json").exists():
                return None
            ledger = Ledger.from_json(record["ledger"])
            stop = ledger.reached(self.run.budget)
            if stop is not None:
                late = any(record["before"][x["unit"]] >= x["amount"] for x in self.run.budget)
                return None if late else Outcome(stop, ledger, self._final_list(i), self.nonfinite)
        return None

    def _final_list(self, last: int) -> list[dict]:
        """Snapshots on the grid up to number `last`, which is kept even if it lies beside it."""
        return [r for r in self.snapshots[:last] if r["grid"]] + [self.snapshots[last]]

    def fit(self) -> Outcome:
        """Train until the budget is spent, continuing from the saved state if there is one."""
        run = self.run
        run.folder.mkdir(parents=True, exist_ok=True)
        resumed = self.load()
        self.processes.wait()  # all read the same state before the first writes another
        if not resumed:
            self._trim_csv()
        else:
            if self.ledger.reached(run.budget):
                outcome = self._already_beyond()
                if outcome is not None:
                    return outcome
                raise _Restart
            self._say(f"resumed at {self.ledger.images} images from {run.folder / 'state.json'}")
        self._check_cost_of_start()
        with self._progress() as bar:
            self._loop(bar)
        return Outcome(
            self.ledger.reached(run.budget),
            self.ledger,
            self._final_list(len(self.snapshots) - 1),
            self.nonfinite,
        )

    def _check_cost_of_start(self) -> None:
        limit = self.ledger.reached(self.run.budget)
        if limit is not None:
            raise UserError(
                f"{self.run.name}: what is charged before training (teacher pairs) already spends "
                f"the budget of {limit['amount']:g} {limit['unit']}; raise it or use fewer pairs"
            )

    def _loop(self, bar) -> None:
        run = self.run
        tick_steps = max(1, run.tick_images // run.batch)
        saved = time.monotonic()
        tick_seconds, tick_images = 0.0, self.ledger.images
        position = self._grid_position()
        while True:
            started, seconds = time.perf_counter(), self.ledger.seconds
            before = {unit: self.ledger.amount(unit) for unit in UNITS}
            self._iteration()
            self._count_seconds(seconds, started)
            ticked = self.step % tick_steps == 0
            if ticked or self._grid_position() != position or self.ledger.reached(run.budget):
                added = self.ledger.images - before["images"]
                self._settle()  # waits for the device
                before["images"] = min(before["images"], self.ledger.images - added)
                self._count_seconds(seconds, started)
            tick_seconds += self.ledger.seconds - seconds
            now, done = self._grid_position(), self.ledger.reached(run.budget) is not None
            crossed = [unit for unit in now if now[unit] > position[unit]]
            position = now
            if ticked or done:
                self.ledger.peak_memory = max(self.ledger.peak_memory, peak_memory(run.device))
                row = self._row(tick_seconds, self.ledger.images - tick_images)
                if self.processes.first:
                    self._append_csv(row)
                    self._report(bar, row)
                tick_seconds, tick_images = 0.0, self.ledger.images
            if crossed or done:
                self._snapshot(crossed, before)
            if done or (ticked and time.monotonic() - saved >= run.checkpoint_seconds):
                self.save()
                saved = time.monotonic()
            if done:
                return

    def _count_seconds(self, before: float, started: float) -> None:
        """The time since `started`, by the first process's clock where a limit depends on it."""
        self.ledger.seconds = before + time.perf_counter() - started
        if any(limit["unit"] == "seconds" for limit in self.run.budget):
            self.ledger.seconds = self.processes.agree(self.ledger.seconds)

    # -- telling --------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if not self.processes.first:
            return
        print(f"{self.run.name}: {text}", file=sys.stderr, flush=True)

    def _spent(self) -> float:
        """Fraction of the budget that is spent."""
        return max(self.ledger.amount(x["unit"]) / x["amount"] for x in self.run.budget)

    @contextlib.contextmanager
    def _progress(self):
        if not self.run.progress or not self.processes.first:
            yield None
            return
        from tqdm import tqdm

        with tqdm(
            total=1.0,
            desc=self.run.name,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}",
        ) as bar:
            yield bar

    def _report(self, bar, row: dict) -> None:
        losses = " ".join(f"{k[5:]} {v:.4g}" for k, v in row.items() if k.startswith("loss/"))
        lost = sum(self.nonfinite.values())
        text = f"{row['images_per_second']:.0f} img/s, {losses}" + (
            f", {lost} non-finite" if lost else ""
        )
        if bar is not None:
            bar.n = min(1.0, self._spent())
            bar.set_postfix_str(text)
        else:
            self._say(f"{100 * self._spent():5.1f} %  {row['images']} images  {text}")


class _Restart(Exception):
    """The budget ends before the saved state, and no snapshot lies at its end."""


def train(make: Callable[[], TrainingRun]) -> Outcome:
    """Run what `make` builds to the end of its budget.

    `make` is called again if the budget was shortened to a point that no snapshot holds: the run
    then starts over, which is said, and gives the weights that it would have given at once.
    """
    run = make()
    try:
        return Trainer(run).fit()
    except _Restart:
        if processes().first:
            print(
                f"{run.name}: the saved state is beyond the shortened budget and no snapshot lies "
                "at its end; training again from the start",
                file=sys.stderr,
            )
            shutil.rmtree(run.folder)
        processes().wait()
        return Trainer(make()).fit()


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
