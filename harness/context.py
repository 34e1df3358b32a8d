"""What a phase's loss sees: networks, named random numbers, data and generated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, each_part, one_step, to_model_space
from harness.streams import PAIR_NOISE, Stream
from harness.teachers.text_embeddings import Embeddings


@dataclass
class Generated:
    """A generated batch: `x = G(z, condition)`, `(B, C, H, W)` in the model's space."""

    x: Tensor
    z: Tensor
    condition: Condition


class Context:
    """What a phase's loss may see: networks, this iteration's randomness, data, and its images.

    All draws are named: the same name within one phase and iteration gives the same numbers, and
    sample `index[i]` (a number that counts through the whole run) gets the same numbers whatever
    the batch is split into.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        sources: Sources,
        seed: int,
        step: int,
        samples: range,
        device: str | torch.device = "cpu",
    ):
        """`samples`: their numbers; what is drawn of them comes on `device`."""
        self.networks, self.step, self._samples = networks, step, samples
        self.index = self._index_on(device)
        self.logs: dict[str, Tensor] = {}
        self._sources, self._seed = sources, seed
        self._phase: tuple[str, int] = ("", 0)
        self._with_graph = True
        self._generated: dict[tuple[str, int], Generated] = {}

    def __len__(self) -> int:
        return len(self.index)

    def enter(self, phase: str, repeat: int, with_graph: bool) -> None:
        """Called by the trainer as a phase begins; `with_graph`: this iteration's student update
        can use the images generated in this phase."""
        self._phase, self._with_graph = (phase, repeat), with_graph

    def forget_generated(self) -> None:
        """Called by the trainer when the student has changed."""
        self._generated.clear()

    def _stream(self, name: str) -> Stream:
        return Stream(self._seed, *self._phase, name)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Standard normal `(B, *shape)`."""
        return self._stream(name).normal(self.index, shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform on [0, 1], `(B, *shape)`."""
        return self._stream(name).uniform(self.index, shape)

    def noised(self, x: Tensor, sigma: Tensor, name: str = "noise") -> Tensor:
        """`x + sigma n` with fresh standard normal n; `sigma` `(B,)`."""
        return x + sigma.view(-1, *[1] * (x.dim() - 1)) * self.normal(name, tuple(x.shape[1:]))

    def generated(self, stream: str = "shared") -> Generated:
        """Images of the student for fresh noise and conditions.

        Phases that name the same stream share one batch as long as the student has not been
        updated in between. The gradient to the student is kept where its update can use it.
        """
        key = stream, self._phase[1]
        if key not in self._generated:
            noise = Stream(self._seed, "generated", *key)
            z = noise.normal(self.index, self._sources.shape)
            numbers = self._index_on("cpu") if self._sources.embeddings else self.index
            condition = self._sources.condition(numbers, noise, self.index.device)
            with torch.set_grad_enabled(self._with_graph):
                x = one_step(self.networks["student"], z, condition, self._sources.sigma_init)
            self._generated[key] = Generated(x, z, condition)
        return self._generated[key]

    def real(self, name: str = "real") -> tuple[Tensor, Condition]:
        """Real training images, pixels in [-1, 1], and their conditions."""
        index = self._index_on(self._sources.pixels.device)
        return self._sources.real(index, self._stream(name), self.index.device)

    def pairs(self, name: str = "pairs") -> tuple[Tensor, Tensor, Condition]:
        """The teacher's noise, images and conditions: `z`, `x`, `condition`."""
        index = self._index_on(self._sources.pair_tensors["x"].device)
        return self._sources.pairs(index, self._stream(name), self.index.device)

    def _index_on(self, device: str | torch.device) -> Tensor:
        """Made where it is needed: a copy would wait for the device."""
        return torch.arange(self._samples.start, self._samples.stop, device=device)

    def log(self, name: str, value: Tensor) -> None:
        """Record a scalar; the trainer reads it back every tick."""
        self.logs[name] = value.detach()


@dataclass
class Sources:
    """Where a run's data and conditions come from.

    Tensors lie on the run's device or, if they are large, on the host: the chosen images alone are
    brought to the device, and uint8 ones to the model's space. A condition is known by its number:
    a class label, or the number of a prompt with its `embeddings`, and then everything that is
    chosen from lies on the host, where they are read.
    """

    shape: tuple[int, int, int]  # of what the denoiser denoises: images, or latents
    num_classes: int  # or prompts; 0: nothing is asked for
    sigma_init: float
    pixels: Tensor | None = None  # uint8 (N, C, H, W)
    labels: Tensor | None = None  # int64 (N,)
    pair_tensors: dict[str, Tensor] | None = None  # x and, with classes, condition
    embeddings: Embeddings | None = None

    def _asked(self, numbers: Tensor, device: str | torch.device) -> Condition:
        condition = self.embeddings(numbers) if self.embeddings else numbers
        return each_part(lambda part: _moved(part, device), condition)

    def condition(
        self, index: Tensor, stream: Stream, device: str | torch.device = "cpu"
    ) -> Condition:
        """`index` lies on the device, or on the host if there are embeddings."""
        if not self.num_classes:
            return None
        # A child, since the stream's own numbers are the noise of the same samples.
        return self._asked(stream.child("label").integers(index, self.num_classes), device)

    def real(
        self, index: Tensor, stream: Stream, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Condition]:
        """`index` lies beside the data."""
        chosen = stream.integers(index, len(self.pixels))
        condition = self._asked(self.labels[chosen], device) if self.num_classes else None
        return to_model_space(_moved(self.pixels[chosen], device)), condition

    def pairs(
        self, index: Tensor, stream: Stream, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor, Condition]:
        """`z`, `x`, condition; `index` lies beside the data."""
        tensors = self.pair_tensors
        chosen = stream.integers(index, len(tensors["x"]))
        z = PAIR_NOISE.normal(_moved(chosen, device), self.shape)
        condition = None
        if self.num_classes:
            condition = self._asked(tensors["condition"][chosen], device)
        return z, _moved(tensors["x"][chosen], device), condition


def _moved(tensor: Tensor, device: str | torch.device) -> Tensor:
    """On the device; from pinned memory, so that the host need not wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
