"""One iteration of training, for students, teachers and feature networks alike."""

import contextlib
import copy
import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from harness.context import Context
from harness.errors import UserError, did_you_mean
from harness.kernels import has_fused_pass
from harness.method import OptimizerConfig, Phase
from harness.streams import Stream
from harness.training.distributed import processes
from harness.training.ledger import Ledger, measure
from harness.training.log import RunningMeans
from harness.training.run import TrainingRun


class NonFiniteError(UserError):
    """Too many consecutive steps with a non-finite loss or gradient."""


def replace_nonfinite_(gradients: list[Tensor], together: bool) -> None:
    """Replace NaN by 0 and infinities by ±1e5 in place, as SiD's code. together: in one copy of all
    of them, instead of by one operation for each, which would keep a GPU waiting."""
    values = {"nan": 0.0, "posinf": 1e5, "neginf": -1e5}
    if not together or not gradients:
        for gradient in gradients:
            torch.nan_to_num_(gradient, **values)
        return
    # One-dimensional views of dense tensors, in the order of their memory.
    views = [g.as_strided((g.numel(),), (1,)) for g in gradients]
    joined = torch.cat(views).nan_to_num_(**values)
    torch._foreach_copy_(views, list(joined.split([len(view) for view in views])))


class InPrecision(nn.Module):
    """A network that runs in its own precision inside another one; its inputs become float32."""

    def __init__(self, network: nn.Module, autocast: torch.autocast):
        super().__init__()
        del self.training  # the network's own mode counts
        self.network, self.autocast = network, autocast

    def forward(self, *inputs, **extras):
        with self.autocast:
            inputs = (
                x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
            )
            return self.network(*inputs, **extras)

    def __getattr__(self, name: str):
        own = self.__dict__["_modules"]["network"]
        return own if name == "network" else getattr(own, name)


class Trainer:
    """Trains the networks of a `TrainingRun` in phases, one iteration per `step()`.

    networks, frozen: on the device. ema: the averaged main network. ledger: costs up to now.
    metrics: losses, gradient norms and the methods' own values since the last tick. iteration: the
    number of iterations. updates: optimiser steps per network. nonfinite: such steps per phase.

    The host never waits for the device within an iteration. Only the device knows whether a step
    was finite; the optimiser skips a non-finite step there. The host counts all steps as taken, and
    `settle` corrects its counts before anything is decided by them.

    Hooks for other kinds of loop: `build_optimizer`, `update`, `apply_gradients`, `optimizer_step`
    and `update_ema`.
    """

    def __init__(self, run: TrainingRun):
        self.run, self.loop, self.device = run, run.loop, run.device
        self.processes = processes()
        self.share = self.processes.share(run.batch)
        frozen = {name: self._place(net).eval() for name, net in run.frozen.items()}
        self.frozen = {name: net.requires_grad_(False) for name, net in frozen.items()}
        self.networks = {name: self._place(net).train() for name, net in run.networks.items()}
        self.all_networks = {**self.frozen, **self.networks}
        self.trainable = {
            name: [p for p in net.parameters() if p.requires_grad]
            for name, net in self.networks.items()
        }
        # Frozen parameters by id: shared with the average and not part of the state.
        parameters = [p for net in self.networks.values() for p in net.parameters()]
        self._constant = {id(p): p for p in parameters if not p.requires_grad}
        self.ema = copy.deepcopy(self.networks[run.main], dict(self._constant))
        self.ema.requires_grad_(False).eval()
        self._averaged = [p for p in self.ema.parameters() if id(p) not in self._constant]
        self.optimizers: dict[str, Optimizer] = {}
        configs = {phase.network: phase.optimizer for phase in run.phases}
        for phase in run.phases:
            name = phase.network
            named = {
                name: self.networks,
                **dict.fromkeys([*phase.modes, *phase.precision], self.all_networks),
            }
            for other, known in named.items():
                if other not in known:
                    message = f"{run.name}: phase {phase.name!r} names unknown network {other!r}"
                    raise UserError(message + did_you_mean(other, known), "unknown-name")
            if configs[name] != phase.optimizer:
                raise ValueError(f"phases give network {name!r} two optimisers")
            if name not in self.optimizers:
                self.optimizers[name] = self.build_optimizer(self.trainable[name], configs[name])
        self.iteration, self.ledger = 0, copy.deepcopy(run.ledger)
        self.updates = dict.fromkeys(self.optimizers, 0)
        self.nonfinite = {phase.name: 0 for phase in run.phases}
        # On the device, since the last `settle`: how many steps were non-finite, and how many in
        # the longest and in the current run of consecutive ones.
        self._counters = {name: torch.zeros(3, device=self.device) for name in self.nonfinite}
        self.metrics = RunningMeans()
        self._calls = {phase.name: self._networks_in(phase) for phase in run.phases}

    def _place(self, net: nn.Module) -> nn.Module:
        """Put a network on the device; convolutions follow the memory format of their weights. In
        float32 with PyTorch's group norm, a GPU was slower with channels-last memory."""
        if self.loop.gradient_checkpointing:
            for part in net.modules():
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        channels_last = self.loop.channels_last
        if channels_last is None:
            on_gpu = self.device.startswith("cuda") and self.loop.precision == "bf16"
            channels_last = on_gpu and has_fused_pass(net)
        if channels_last:
            return net.to(self.device, memory_format=torch.channels_last)
        return net.to(self.device)

    def _autocast(self, precision: str) -> torch.autocast:
        kind = "cuda" if self.device.startswith("cuda") else "cpu"  # not "meta"
        return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")

    def _networks_in(self, phase: Phase) -> dict[str, nn.Module]:
        """The networks as a phase calls them: some in another precision than the run's."""
        own = self.loop.precision
        others = {name: p for name, p in phase.precision.items() if p != own}
        return self.all_networks | {
            name: InPrecision(self.all_networks[name], self._autocast(p))
            for name, p in others.items()
        }

    def build_optimizer(self, parameters: list[Tensor], config: OptimizerConfig) -> Optimizer:
        """Fused Adam, or AdamW with weight decay."""
        kind = AdamW if config.weight_decay else Adam
        settings = config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
        return kind(parameters, **settings, fused=True)

    def _tensors(self) -> dict[str, Tensor]:
        """The weights and buffers that training changes."""
        return {
            f"{name}/{key}": tensor.detach()
            for name, net in [*self.networks.items(), ("ema", self.ema)]
            for key, tensor in net.state_dict(keep_vars=True).items()
            if id(tensor) not in self._constant
        }

    def state_dict(self) -> dict:
        """Everything that training continues from: `tensors` by name, and JSON-like counts. It
        waits for the device."""
        self.settle()
        tensors = self._tensors()
        for name, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{i}/{k}": v for k, v in state.items()}
        return {
            "step": self.iteration,
            "updates": self.updates,
            "ledger": self.ledger.model_dump(),
            "nonfinite": self.nonfinite,
            "consecutive": {name: int(counts[2]) for name, counts in self._counters.items()},
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict()`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state["tensors"][name])
        moments: dict[str, dict] = {name: defaultdict(dict) for name in self.optimizers}
        for key, tensor in state["tensors"].items():
            if key.startswith("optimizer/"):
                _, name, i, entry = key.split("/")
                weight = self.trainable[name][int(i)]
                if tensor.shape == weight.shape:
                    # Fused optimisers read moments in the memory order of the weights.
                    tensor = torch.empty_like(weight).copy_(tensor)
                moments[name][int(i)][entry] = tensor
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments[name]})
        self.iteration, self.updates = state["step"], dict(state["updates"])
        self.ledger = Ledger(**state["ledger"])
        self.nonfinite = dict(state["nonfinite"])
        for name, count in state["consecutive"].items():
            self._counters[name][2] = count

    def step(self) -> None:
        """Run one iteration: all phases that are due, and the update of the average."""
        run, step, images = self.run, self.iteration, self.ledger.images
        micro = math.gcd(run.micro_batch, len(self.share))
        contexts = [
            Context(self.all_networks, run.data, run.seed, step, range(i, i + micro), self.device)
            for i in (step * run.batch + start for start in self.share[::micro])
        ]
        for context in contexts[1:]:
            context.first = False
        due = [phase for phase in run.phases if phase.due(step)]
        updates = [
            (phase, repeat, self._variant(phase, repeat, due))
            for phase in due
            for repeat in range(phase.repeat)
        ]
        # A new variant is measured together with the whole iteration: its backward pass may go
        # through graphs that another phase made.
        measuring = any(variant not in self.ledger.costs for _, _, variant in updates)
        for i, (phase, repeat, variant) in enumerate(updates):
            later = [other for other, again, _ in updates[i + 1 :] if again == repeat]
            images_of = phase.batch(run.main)
            sharing = [other for other in later if other.batch(run.main) == images_of]
            of_main = [other for other in sharing if other.network == run.main]
            # Generated images carry a graph to the student only if its own update will use it.
            # With several micro-batches all graphs would wait for it, so images are made again.
            whole = len(contexts) == 1
            with_graph = phase.network == run.main or (whole and bool(of_main))
            for context in contexts:
                context.enter(phase.name, repeat, images_of, with_graph)
            self.update(phase, repeat, contexts, variant, measuring)
            if phase.network == run.main:
                self.ledger.images += run.batch
            if not (whole and of_main):
                for context in contexts:
                    context.release(keep=bool(sharing) and not of_main)
        self.update_ema(self.ledger.images - images)
        self.iteration += 1

    def _variant(self, phase: Phase, repeat: int, due: list[Phase]) -> str:
        """Name everything that decides an update's cost: the phase, and the phases that run in the
        same iteration, because they share generated images."""
        parts = [phase.name]
        if phase.repeat > 1:
            parts.append("first" if repeat == 0 else "again")
        if any(other.every > 1 for other in self.run.phases):
            parts.append("with " + "+".join(other.name for other in due))
        return "/".join(filter(None, parts))

    def update(
        self, phase: Phase, repeat: int, contexts: list[Context], variant: str, measuring: bool
    ) -> None:
        """Compute the gradient of a phase's loss over the micro-batches, and update its network.
        variant: names the cost of this update in the ledger; `measuring`: measure it."""
        run = self.run
        for name, net in self.all_networks.items():
            if net.training != phase.training(name):
                net.train(phase.training(name))
        for name, parameters in self.trainable.items():
            # The student stays trainable: another network's phase may generate its images.
            if name != run.main:
                for parameter in parameters:
                    parameter.requires_grad_(name == phase.network)
        # Only dropout uses torch's own generator. Its numbers depend on how the batch is split
        # into micro-batches and processes.
        stream = Stream(run.seed, phase.name, self.iteration, repeat, "dropout")
        if not self.processes.first:
            stream = stream.child(f"process{self.processes.rank}")
        torch.manual_seed(stream.key[0])
        total = torch.zeros((), device=self.device)
        with contextlib.ExitStack() as stack:
            if measuring:
                cost = stack.enter_context(measure(self.all_networks, self.processes.size))
                self.ledger.costs.setdefault(variant, cost)
            for context in contexts:
                context.networks = self._calls[phase.name]
                with self._autocast(self.loop.precision):
                    loss = phase.loss(context) / len(contexts)
                loss.backward()
                total += loss.detach()
        self.ledger.add(self.ledger.costs[variant])
        self.apply_gradients(phase, total)
        for context in contexts:
            for name, value in context.logs.items():
                self.metrics.add(name, value)
            context.logs.clear()

    def apply_gradients(self, phase: Phase, loss: Tensor) -> None:
        """Average gradients over processes, clip them, and step; skip a non-finite step, or replace
        its non-finite gradients."""
        name, config = phase.network, phase.optimizer
        optimizer, parameters = self.optimizers[name], self.trainable[name]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.processes.sum_([*gradients, loss], 1 / self.processes.size)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        nonfinite = (~torch.isfinite(norm + loss)).float()
        skipped = nonfinite
        if config.nonfinite == "replace":
            skipped = torch.zeros_like(nonfinite)
            replace_nonfinite_(gradients, together=not self.device.startswith("cpu"))
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm, foreach=True)
        self.updates[name] += 1
        for group in optimizer.param_groups:
            group["lr"] = config.rate(self.updates[name])
        self.optimizer_step(optimizer, skipped)
        optimizer.zero_grad(set_to_none=True)
        total, longest, current = self._counters[phase.name]
        total += nonfinite
        current.add_(1).mul_(nonfinite)
        torch.maximum(longest, current, out=longest)
        self.metrics.add(f"loss/{phase.name}", loss)
        self.metrics.add(f"grad_norm/{phase.name}", norm)

    def optimizer_step(self, optimizer: Optimizer, skipped: Tensor) -> None:
        """Step where `skipped` is 0, do nothing where it is 1; the fused kernel reads it."""
        optimizer.found_inf = skipped
        optimizer.step()

    def settle(self) -> None:
        """Read the counters and take skipped steps out of the host's counts. Raises
        `NonFiniteError` after too many consecutive non-finite steps of a phase."""
        counts = torch.stack(list(self._counters.values())).tolist()
        for phase, row in zip(self.run.phases, counts, strict=True):
            nonfinite, longest, _ = map(int, row)
            self._counters[phase.name][:2].zero_()
            self.nonfinite[phase.name] += nonfinite
            skipped = nonfinite if phase.optimizer.nonfinite == "skip" else 0
            self.updates[phase.network] -= skipped
            if phase.network == self.run.main:
                self.ledger.images -= skipped * self.run.batch
            if longest > self.loop.max_nonfinite:
                steps = f"{longest} consecutive non-finite steps in phase {phase.name!r}"
                place = f"up to step {self.iteration - 1} ({self.ledger.images} images)"
                raise NonFiniteError(f"{self.run.name}: {steps} {place}", "not-finite")

    def ema_decay(self, images: int) -> float:
        """Decay of the average over an iteration that added `images`, including skipped steps."""
        half_life = min(self.run.ema_half_life, self.ledger.images * self.run.ema_ramp_up)
        return 0.5 ** (images / half_life) if half_life > 0 else 0.0

    def update_ema(self, images: int) -> None:
        """Move the average by the images that the iteration added."""
        main, weight = self.run.main, 1 - self.ema_decay(images)
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self.trainable[main], weight)
            if buffers := list(self.ema.buffers()):
                torch._foreach_copy_(buffers, list(self.networks[main].buffers()))
