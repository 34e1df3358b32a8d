"""Feature networks trained in the workflow, and the stage that trains or fetches any of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from harness.config.jobs import FeatureJob
from harness.config.schema import FeatureSettings, Positive
from harness.context import Context, TrainingData
from harness.data import datasets
from harness.data.datasets import Dataset, Images, placed
from harness.denoiser import to_model_space
from harness.features.base import FEATURES, FeatureExtractor, full_precision, parse_settings
from harness.io.artifacts import damaged, digest, link, load_tensors, save_tensors
from harness.io.locks import run_lock
from harness.io.records import FeatureRecord
from harness.method import OptimizerConfig, Phase
from harness.streams import seeded
from harness.training.loop import train
from harness.training.run import TrainingRun, loop_settings

WEIGHTS = "features.safetensors"


def make_features(job: FeatureJob) -> FeatureRecord:
    """Train or fetch a feature network: leaves `features/<name>/` with its `features.json`."""
    return FEATURES[job.settings.type].make(job)


class TrainedSettings(FeatureSettings):
    images: Positive
    batch: Positive = 128
    lr: float = Field(2e-3, gt=0)
    width: Positive = 32
    seed: int = Field(0, ge=0)


class TrainedExtractor(FeatureExtractor):
    """A feature network trained on the training part of the data set.

    A subclass gives `build`, `loss`, `correct` and `outputs`. Its loss sees the network as
    `context.networks["features"]`.
    """

    trained = True

    @classmethod
    def prepare_training(cls, network: nn.Module, dataset: Dataset) -> None:
        """Fill the buffers of a fresh network that depend on the data set."""

    @classmethod
    @abstractmethod
    def loss(cls, settings: FeatureSettings) -> Callable[[Context], Tensor]:
        """The training loss, a function of a context."""

    @classmethod
    def optimizer(cls, settings: FeatureSettings) -> OptimizerConfig:
        return OptimizerConfig(lr=settings.lr)

    @classmethod
    def training_images(cls, dataset: Dataset) -> Images:
        """Images with the labels that the loss needs."""
        return dataset.train

    @classmethod
    @abstractmethod
    def correct(cls, network: nn.Module, x: Tensor, labels: Tensor, dataset: Dataset) -> Tensor:
        """Whether the network recognises each of the images `x` in [-1, 1], bool `(B,)`."""

    @classmethod
    def train_head(cls, network: nn.Module, dataset: Dataset, folder: Path) -> dict | None:
        """Train a head on the finished network, write its weights and return its record."""
        return None

    @abstractmethod
    def outputs(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Outputs for images in [-1, 1]."""

    @torch.no_grad()
    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        with full_precision():
            outputs = self.outputs(to_model_space(pixels.to(self.device)), labels)
        return {name: output.cpu() for name, output in outputs.items()}

    @classmethod
    def make(cls, job: FeatureJob) -> FeatureRecord:
        settings, folder = job.settings, job.folder
        dataset = datasets.load(job.data)
        run_id = digest([job.fingerprint, dataset.sha256])

        def start() -> TrainingRun:
            with seeded(settings.seed):
                network = cls.build(settings, dataset)
            cls.prepare_training(network, dataset)
            return TrainingRun(
                name=f"features {job.name}",
                folder=folder / "runs" / run_id,
                run_id=run_id,
                seed=settings.seed,
                networks={"features": network},
                frozen={},
                main="features",
                phases=[
                    # The name belongs to the random streams.
                    Phase("classify", "features", cls.loss(settings), cls.optimizer(settings))
                ],
                data=TrainingData(
                    dataset.image_shape,
                    dataset.num_conditions,
                    sigma_init=0.0,
                    **placed(cls.training_images(dataset), job.device),
                ),
                batch=settings.batch,
                budget=[{"unit": "images", "amount": settings.images}],
                export=lambda ema, to: {"sha256": save_tensors(to / WEIGHTS, ema.state_dict())},
                ema_half_life=settings.images // 20,
                loop=loop_settings(
                    job.training,
                    job.device,
                    settings.batch,
                    tick_images=max(settings.images // 20, 1),
                ),
            )

        with run_lock(folder):
            outcome = train(start)
            final = folder / "runs" / run_id / "snapshots" / outcome.snapshots[-1]["name"]
            link(folder / WEIGHTS, final / WEIGHTS)
            facts = outcome.record(run_id)
            network = cls.load_network(settings, folder, facts["sha256"], dataset)
            record = FeatureRecord(
                name=job.name,
                settings=settings.model_dump(),
                held_out_accuracy=cls.held_out_accuracy(network, dataset),
                aesthetic=cls.train_head(network, dataset, folder),
                **facts,
            )
            record.write(folder / "features.json")
        return record

    @classmethod
    @torch.no_grad()
    def held_out_accuracy(cls, network: nn.Module, dataset: Dataset) -> float | None:
        """Share of held-out images that the network recognises; None if nothing is held out."""
        if not len(dataset.held_out):
            return None
        correct = [
            cls.correct(network, to_model_space(pixels), labels, dataset)
            for pixels, labels in dataset.held_out.blocks(1024)
        ]
        return torch.cat(correct).double().mean().item()

    @classmethod
    def load_network(
        cls, settings: FeatureSettings, folder: Path, sha256: str, dataset: Dataset
    ) -> nn.Module:
        """The trained network in a folder, frozen, in evaluation mode."""
        network = cls.build(settings, dataset)
        try:
            network.load_state_dict(load_tensors(folder / WEIGHTS, sha256, owner=folder))
        except RuntimeError as error:
            raise damaged(folder / WEIGHTS, str(error).splitlines()[-1].strip(), folder) from None
        return network.eval().requires_grad_(False)

    @classmethod
    def load(cls, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> Self:
        settings = parse_settings(record.settings)
        network = cls.load_network(settings, folder, record.sha256, dataset)
        return cls(record.name, settings, network.to(device), record.sha256)


def augmented(context: Context, x: Tensor) -> Tensor:
    """Random shifts by up to one pixel in each direction, and a little noise."""
    shift = (context.uniform("shift", (2,)) * 3).long().clamp_max(2)
    rows = shift[:, :1] + torch.arange(x.shape[2], device=x.device)
    columns = shift[:, 1:] + torch.arange(x.shape[3], device=x.device)
    padded = pad(x, (1, 1, 1, 1), value=-1.0)
    sample = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    shifted = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return shifted + 0.1 * context.normal("augment_noise", tuple(x.shape[1:]))
