"""Feature networks trained in the workflow."""

import logging
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from harness.config.jobs import FeatureJob
from harness.config.schema import DataSection, FeatureSettings, Positive, Switches
from harness.context import Context, TrainingData
from harness.data import datasets
from harness.data.datasets import Dataset, Images, placed
from harness.denoiser import to_model_space
from harness.errors import Problem
from harness.features.aesthetic import train_head
from harness.features.base import NetworkExtractor
from harness.features.chance import network_warning
from harness.io.artifacts import damaged, digest, link, load_tensors, save_tensors
from harness.io.locks import run_lock
from harness.io.records import FeatureRecord
from harness.method import OptimizerConfig, Phase
from harness.streams import seeded
from harness.training.loop import train
from harness.training.run import TrainingRun, loop_settings
from harness.transfers import to_device

logger = logging.getLogger(__name__)

WEIGHTS = "features.safetensors"
LABELS_NEEDED = (
    "needs labels for training, but data.labels is false; use a network with published weights or "
    "one of your own (docs/data.md)"
)


class TrainedSettings(FeatureSettings):
    images: Positive
    batch: Positive = 128
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    width: Positive = 32
    seed: int = Field(0, ge=0)


class TrainedExtractor(NetworkExtractor):
    """A network trained on the training part; one that provides "aesthetic" also gets a head."""

    trained = True

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        if data is None:
            return
        key = f"features.{self.name}"
        if not data.has_images:
            yield Problem(key, "needs-images", "needs images for training; this data set has none")
        elif not data.labels:
            yield Problem(key, "needs-labels", LABELS_NEEDED)
        elif data.prompts is not None:
            message = "cannot be trained on prompts; use a pretrained network"
            yield Problem(key, "needs-labels", message)

    @abstractmethod
    def build(self, dataset: Dataset) -> nn.Module:
        """The network with random weights. One with feature maps works on the meta device, too."""

    def labelled(self, images: Images, dataset: Dataset) -> Images:
        """A part of the data set with the labels that `loss` and `correct` need."""
        return images

    @abstractmethod
    def loss(self, context: Context) -> Tensor:
        """The training loss of `context.networks["features"]`."""

    @abstractmethod
    def correct(self, x: Tensor, labels: Tensor) -> Tensor:
        """Whether the network recognises each of the images `x` in [-1, 1], bool `(B,)`."""

    def answers(self, dataset: Dataset) -> Tensor:
        """The answer that `correct` expects for each condition, int64 `(conditions,)`; conditions
        with equal answers are confused without an error."""
        return torch.arange(dataset.num_conditions)

    def chance(self, dataset: Dataset) -> float:
        """The accuracy of the best constant answer: its share of the training images."""
        counts = torch.tensor(dataset.label_counts, dtype=torch.float64)
        shares = torch.zeros(len(counts), dtype=torch.float64)
        shares.index_add_(0, self.answers(dataset), counts)
        return (shares.max() / counts.sum()).item()

    @abstractmethod
    def outputs(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Outputs for images in [-1, 1]."""

    def launch(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        return self.outputs(to_model_space(to_device(pixels, self.device)), labels)

    def make(self, job: FeatureJob) -> FeatureRecord:
        settings, folder = job.settings, job.folder
        dataset = datasets.load(job.data)
        run_id = digest([job.fingerprint, dataset.sha256])
        with seeded(settings.seed):
            network = self.build(dataset)
        optimizer = OptimizerConfig(lr=settings.lr, weight_decay=settings.weight_decay)
        images = placed(self.labelled(dataset.train, dataset), job.device)
        run = TrainingRun(
            name=f"features {job.name}",
            folder=folder / "runs" / run_id,
            run_id=run_id,
            seed=settings.seed,
            networks={"features": network},
            main="features",
            # The phase's name belongs to the random streams.
            phases=[Phase("classify", "features", self.loss, optimizer)],
            data=TrainingData(dataset.image_shape, dataset.num_conditions, 0.0, **images),
            batch=settings.batch,
            budget=[{"unit": "images", "amount": settings.images}],
            export=lambda ema, to: save_tensors(to / WEIGHTS, ema.state_dict()),
            ema_half_life=settings.images // 20,
            loop=loop_settings(job.training, Switches(), max(settings.images // 20, 1)),
            device=job.device,
        )
        with run_lock(folder):
            outcome = train(run)
            link(folder / WEIGHTS, run.snapshot(outcome.snapshots[-1]["name"]) / WEIGHTS)
            facts = {"settings": settings.model_dump(), **outcome.record(run_id)}
            record = FeatureRecord(name=job.name, **facts)
            TrainedExtractor.load(self, record, folder, dataset, "cpu")  # without a head
            record.held_out_accuracy = self.held_out_accuracy(dataset)
            if record.held_out_accuracy is not None:
                facts = record.held_out_accuracy, self.chance(dataset), len(dataset.held_out)
                if warning := network_warning(job.name, *facts):
                    logger.warning(warning)
            if "aesthetic" in self.provided:
                record.aesthetic = train_head(self.network, dataset, folder)
            record.write(folder / "features.json")
        return record

    @torch.no_grad()
    def held_out_accuracy(self, dataset: Dataset) -> float | None:
        """Share of held-out images that the network recognises; None if nothing is held out."""
        if not len(dataset.held_out):
            return None
        blocks = self.labelled(dataset.held_out, dataset).blocks(1024)
        correct = [self.correct(to_model_space(pixels), labels) for pixels, labels in blocks]
        return torch.cat(correct).double().mean().item()

    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        network, path = self.build(dataset), folder / WEIGHTS
        try:
            network.load_state_dict(load_tensors(path, record.sha256, owner=folder))
        except RuntimeError as error:
            raise damaged(path, str(error).splitlines()[-1].strip(), folder) from None
        self.network = network.eval().requires_grad_(False).to(device)


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
