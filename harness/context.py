"""What a phase's loss works with: networks, named random numbers, data and generated images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, map_condition, one_step, to_model_space
from harness.streams import PAIR_NOISE, Stream


@dataclass(frozen=True)
class LabelLaw:
    """Draws labels as often as they occur in the data. ends: cumulative counts by label, `(K,)`,
    where labels are drawn; images: their sum."""

    ends: Tensor
    images: int

    @classmethod
    def of(cls, counts: Sequence[int], device: str | torch.device) -> "LabelLaw":
        return cls(torch.tensor(counts).cumsum(0).to(device), sum(counts))

    def draw(self, stream: Stream, index: Tensor) -> Tensor:
        """Labels int64 `(B,)`: of random images, in the order of their labels."""
        return torch.searchsorted(self.ends, stream.integers(index, self.images), right=True)


@dataclass
class TrainingData:
    """Real images, teacher pairs and conditions that a run draws from. A condition is stored as a
    class label, or as the number of a prompt, which `embeddings` maps to the condition on the host.

    Tensors lie on the run's device, or on the host if they are large or there are embeddings; only
    the drawn rows move to the device, images as uint8.
    """

    shape: tuple[int, int, int]  # (C, H, W) in the model's space
    num_classes: int  # or the number of prompts; 0: unconditional
    sigma_init: float
    pixels: Tensor | None = None  # uint8 (N, C, H, W)
    labels: Tensor | None = None  # int64 (N,)
    pair_tensors: dict[str, Tensor] | None = None  # x and, with classes, condition
    embeddings: Callable[[Tensor], Condition] | None = None
    label_law: LabelLaw | None = None  # of the student's labels; None: uniform


@dataclass
class GeneratedBatch:
    """A generated batch: `x = G(z, condition)`, `(B, C, H, W)` in the model's space."""

    x: Tensor
    z: Tensor
    condition: Condition


class Context:
    """Networks, random numbers, data and generated images of one micro-batch in one iteration.

    Random draws are named: within one phase and iteration, the same name gives the same numbers.
    They depend on a sample's `index` in the run, not on the split into micro-batches and processes.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        data: TrainingData,
        seed: int,
        step: int,
        samples: range,
        device: str | torch.device = "cpu",
    ):
        """`samples`: indices of the micro-batch; everything is drawn on `device`."""
        self.networks, self.step, self.samples = networks, step, samples
        self.first = True  # whether this is the process's first micro-batch of the iteration
        self.index = self._index_on(device)
        self.logs: dict[str, Tensor] = {}
        self._data, self._seed = data, seed
        self.enter("", 0)
        self._generated: dict[tuple, GeneratedBatch] = {}
        self._given: dict[tuple, bool] = {}  # whether a batch's condition was given

    def __len__(self) -> int:
        return len(self.index)

    def enter(
        self, phase: str, repeat: int, batch: tuple = ("shared",), with_graph: bool = True
    ) -> None:
        """Begin a phase (called by the trainer). batch: of generated images, `Phase.batch`.
        `with_graph`: keep generated images' graph."""
        self._phase, self._with_graph = (phase, repeat), with_graph
        self._images = *batch, repeat

    def release(self, keep: bool = False) -> None:
        """Drop the graph of the phase's generated images, and the images unless `keep` (called by
        the trainer)."""
        batch = self._generated.pop(self._images, None)
        if keep and batch is not None:
            self._generated[self._images] = replace(batch, x=batch.x.detach())

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

    def generated(self, condition: Condition = None) -> GeneratedBatch:
        """Generate the phase's batch of images (`Phase.images`) from fresh noise, and from fresh
        conditions if none is given. Phases that share the batch get the same images, with a graph
        if the student's update can use it; all of them give the same condition, or none."""
        if self._given.setdefault(self._images, condition is not None) != (condition is not None):
            message = f"phases share the generated images {self._images[0]!r}: give all of them "
            raise ValueError(message + "the same condition, or none")
        if self._images not in self._generated:
            name, repeat = self._images[0], self._images[-1]
            noise, data = Stream(self._seed, "generated", name, repeat), self._data
            z = noise.normal(self.index, data.shape)
            if condition is None and data.num_classes:
                # A child, since the stream itself gives the noise of the same samples.
                condition = self._embed(self._labels(noise.child("label")))
            with torch.set_grad_enabled(self._with_graph):
                x = one_step(self.networks["student"], z, condition, data.sigma_init)
            self._generated[self._images] = GeneratedBatch(x, z, condition)
        return self._generated[self._images]

    def _labels(self, stream: Stream) -> Tensor:
        data = self._data
        index = self._index_on("cpu") if data.embeddings else self.index
        if data.label_law:
            return data.label_law.draw(stream, index)
        return stream.integers(index, data.num_classes)

    def real(self, name: str = "real", shared: bool = False) -> tuple[Tensor, Condition]:
        """Draw real training images, `(B, C, H, W)` pixels in [-1, 1], with their conditions.
        `shared`: all phases of the iteration draw the same images."""
        pixels = self._data.pixels
        rows = self._rows(name, pixels, shared)
        return to_model_space(self._to_device(pixels[rows])), self._condition_of(rows)

    def real_condition(self, name: str = "real", shared: bool = False) -> Condition:
        """The conditions of the images that `real` draws."""
        return self._condition_of(self._rows(name, self._data.pixels, shared))

    def _condition_of(self, rows: Tensor) -> Condition:
        return self._embed(self._data.labels[rows] if self._data.num_classes else None)

    def pairs(self, name: str = "pairs") -> tuple[Tensor, Tensor, Condition]:
        """Draw teacher pairs: noise `z`, image `x`, `condition`."""
        images, labels = self._data.pair_tensors["x"], self._data.pair_tensors.get("condition")
        rows = self._rows(name, images)
        z = PAIR_NOISE.normal(self._to_device(rows), self._data.shape)
        numbers = labels[rows] if self._data.num_classes else None
        return z, self._to_device(images[rows]), self._embed(numbers)

    def _rows(self, name: str, stored: Tensor, shared: bool = False) -> Tensor:
        """Draw rows of a stored tensor, where it lies."""
        stream = Stream(self._seed, "shared", 0, name) if shared else self._stream(name)
        return stream.integers(self._index_on(stored.device), len(stored))

    def _embed(self, numbers: Tensor | None) -> Condition:
        """The condition of these numbers, on the device."""
        embeddings = self._data.embeddings if numbers is not None else None
        return map_condition(self._to_device, embeddings(numbers) if embeddings else numbers)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device, from pinned memory so that the host does not wait."""
        if tensor.device.type == "cpu" and self.index.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.index.device, non_blocking=True)

    def _index_on(self, device: str | torch.device) -> Tensor:
        """The indices, created on the device: a copy would wait for it."""
        return torch.arange(self.samples.start, self.samples.stop, device=device)

    def log(self, name: str, value: Tensor) -> None:
        """Record a scalar for train.csv; the trainer averages it over each tick."""
        self.logs[name] = value.detach()
