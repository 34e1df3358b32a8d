"""Students as diffusers pipelines with a model card: nothing of a run is needed to use them.

A student with EDM's preconditioning becomes a `OneStepPipeline`. One of a text-to-image pipeline
becomes such a pipeline again, of diffusers' own class: `one_step_scheduler` is what that needs to
give the student's image in its one step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.denoiser import EDMDenoiser, one_step
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, read_json
from harness.networks import ARCHITECTURES, denoiser_record, load_denoiser
from harness.networks.vp import VPDenoiser
from harness.teachers.pipelines import PipelineFolder

# What a student's pipeline takes over from its teacher's.
OTHER_PARTS = ("text_encoder", "tokenizer", "vae")


def one_step_scheduler(student: VPDenoiser, sigma_init: float) -> EulerDiscreteScheduler:
    """A stock scheduler whose only step goes from the level of `sigma_init` to the clean image.

    Its schedule ends at that level, so that the first of one step, "trailing", is there.
    """
    schedule = EulerDiscreteScheduler(**student.schedule)
    sigma = torch.tensor([student.level(sigma_init)])
    time = int(student.time(sigma))
    return EulerDiscreteScheduler(
        num_train_timesteps=time + 1,
        trained_betas=schedule.betas[: time + 1].tolist(),
        prediction_type=student.prediction,
        timestep_spacing="trailing",
    )


class OneStepOutput(BaseOutput):
    """`images`: PIL images, or with `output_type="pt"` floats `(B, C, H, W)` in [0, 1]."""

    images: list | Tensor


class OneStepPipeline(DiffusionPipeline):
    """A one-step student with EDM's preconditioning: `pipe(class_labels=[3, 7]).images`.

    `network`: the backbone; the rest is its preconditioning (`harness.denoiser.EDMDenoiser`) and
    the noise level at which the student is evaluated.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        sigma_init: float = 80.0,
        sigma_data: float = 0.5,
        epsilon: float = 0.0,
        num_classes: int = 0,
    ):
        super().__init__()
        self.register_modules(network=network)
        self.register_to_config(
            sigma_init=sigma_init, sigma_data=sigma_data, epsilon=epsilon, num_classes=num_classes
        )

    @property
    def denoiser(self) -> EDMDenoiser:
        config = self.config
        _, denoiser_class = ARCHITECTURES[type(self.network).__name__]()
        settings = (config.num_classes, config.sigma_data, config.epsilon)
        return denoiser_class(self.network, *settings).eval()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor | None = None,
        num_images: int = 1,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> OneStepOutput:
        """One image for each of `class_labels` (of a student with classes; drawn if there are
        none given), or `num_images`. `latents`: standard normal `(B, C, H, W)`."""
        denoiser, classes = self.denoiser, self.config.num_classes
        if class_labels is None and classes:
            count = num_images if latents is None else len(latents)
            class_labels = torch.randint(classes, (count,), generator=generator)
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels)
            if not classes:
                raise ValueError("this student has no classes")
            if class_labels.min() < 0 or class_labels.max() >= classes:
                raise ValueError(f"class_labels run from 0 to {classes - 1}")
            num_images = len(class_labels)
        if latents is None:
            latents = torch.randn(num_images, *denoiser.image_shape, generator=generator)
        condition = None if class_labels is None else class_labels.to(self.network.device)
        x = one_step(denoiser, latents.to(self.network.device), condition, self.config.sigma_init)
        images = (x / 2 + 0.5).clip(0, 1).cpu()
        if output_type == "pt":
            return OneStepOutput(images=images)
        return OneStepOutput(images=_pil(images))


def _pil(images: Tensor) -> list:
    """Quantised as everything that is scored here: `x * 127.5 + 128`, clipped."""
    from PIL import Image

    pixels = (images * 255 + 0.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p.squeeze(2) if p.shape[2] == 1 else p) for p in pixels]


def export_student(experiment: Experiment, student: str, seed: int, folder: Path) -> None:
    """Write a finished student and its model card to `folder`, whole or not at all. What is there
    already is left alone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a new or an empty folder")
    run_dir = experiment.run_dir(student, seed)
    record = read_json(run_dir / "student.json")
    denoiser = load_denoiser(run_dir / "model", record["sha256"], owner=run_dir)
    sigma_init = denoiser_record(run_dir / "model")["sigma_init"]
    card = model_card(experiment, student, seed, record)
    if isinstance(denoiser, VPDenoiser):
        source = _source(experiment, experiment.teacher_of(student))
        with atomic_folder(folder) as temporary:
            _write_stock(denoiser, sigma_init, source, temporary)
            (temporary / "README.md").write_text(card)
        return
    if denoiser.text_width:
        raise UserError(
            f"{student} reads captions by a network of this experiment, which is no part of a "
            "pipeline; students of diffusers' own text-to-image pipelines can be exported"
        )
    pipeline = OneStepPipeline(denoiser.backbone, sigma_init, **denoiser.precondition)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").write_text(card)


def _source(experiment: Experiment, teacher: str) -> PipelineFolder:
    """The pipeline that a teacher came from, whose other parts a student keeps."""
    folder = Path(experiment.teachers[teacher].source).expanduser()
    pipeline = PipelineFolder(folder)
    known = read_json(experiment.teacher_dir(teacher) / "teacher.json")["imported"]["sha256"]
    if pipeline.sha256() != known:
        raise UserError(f"{folder} is not the pipeline that teacher {teacher} was imported from")
    return pipeline


def _write_stock(
    student: VPDenoiser, sigma_init: float, source: PipelineFolder, folder: Path
) -> None:
    """The source's folder with the student in the place of its network and a scheduler of one
    step. Parts that a student has no use for (a safety checker) stay behind."""
    import json
    import shutil

    for part in OTHER_PARTS:
        shutil.copytree(source.folder / part, folder / part)
    student.backbone.save_pretrained(folder / source.network, safe_serialization=True)
    one_step_scheduler(student, sigma_init).save_pretrained(folder / "scheduler")
    index = read_json(source.folder / "model_index.json")
    kept = {key: value for key, value in index.items() if key.startswith("_")}
    kept |= {part: index[part] for part in (*OTHER_PARTS, source.network)}
    kept |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    if source.network == "unet":
        none = {"safety_checker": [None, None], "feature_extractor": [None, None]}
        kept |= none | {"requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n")


CARD = """\
---
library_name: diffusers
pipeline_tag: {task}
tags: [one-step-diffusion, {method}]
{origin}---

# {student}: a one-step student of {teacher}

Made by `{method}` ({paper}) in the experiment `{experiment}`, training seed {seed}. One network
evaluation per image.

```python
{usage}
```

| | |
|---|---|
| teacher | {teacher}, weights sha256 {teacher_sha256} |
| data | {data} |
| budget spent | {images:,} images, {tflops:.3g} TFLOPs |
| parameters | {parameters:,} |
| weights | sha256 {sha256} |

## Scores

{scores}

Deviations from the paper: {deviations}.

{licence}
"""

USAGE = """\
from harness import OneStepPipeline

images = OneStepPipeline.from_pretrained("{folder}")({call}).images"""

STOCK_USAGE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
image = pipe("a lighthouse at dusk", num_inference_steps=1, guidance_scale=0).images[0]"""


def model_card(experiment: Experiment, student: str, seed: int, record: dict) -> str:
    """README.md of an exported student: where it comes from, what it cost, how it scores."""
    teacher = experiment.teacher_of(student)
    source = getattr(experiment.teachers[teacher], "source", None)
    dataset = datasets.load(experiment.data_dir(), images=False)
    folder, said = f"{experiment.name}-{student}", ""
    call = "class_labels=[0, 1]" if dataset.num_classes else "num_images=4"
    usage, task = USAGE.format(folder=folder, call=call), "unconditional-image-generation"
    origin = "" if source is None else f"base_model: {Path(source).name}\n"
    if dataset.prompts:
        usage, task = STOCK_USAGE.format(folder=folder), "text-to-image"
    if source is not None:
        said = _licence(Path(source).expanduser())
        origin += f"license: {said}\n" if said else ""
    licence = (
        "Weights were trained here from nothing but the data."
        if source is None
        else f"These weights began as the teacher's, whose licence ({said or 'see its source'}) "
        "holds for them."
    )
    return CARD.format(
        student=student,
        method=record["method"],
        paper=record["paper"],
        experiment=experiment.name,
        seed=seed,
        teacher=teacher if source is None else f"{teacher} ({Path(source).name})",
        teacher_sha256=record["inputs"]["teacher"],
        data=experiment.data.name,
        images=record["ledger"]["images"],
        tflops=record["ledger"]["flops"] / 1e12,
        parameters=record["parameters"],
        sha256=record["sha256"],
        origin=origin,
        task=task,
        usage=usage,
        licence=licence,
        scores=_scores(experiment, student, seed, record["sha256"]),
        deviations="; ".join(record["deviations"]) or "none",
    )


def _licence(source: Path) -> str | None:
    """What the card in a model's folder says, if there is one."""
    import re

    card = source / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def _scores(experiment: Experiment, student: str, seed: int, sha256: str) -> str:
    """The scores of these weights as a table: mean over sampling seeds, and the range of these."""
    path = experiment.score_path(student, seed)
    record = read_json(path) if path.exists() else {"weights": None}
    if record["weights"] != sha256:
        return "Not scored."
    entry = next(e for e in record["entries"] if e["final"])
    values: dict[tuple, list[float]] = {}
    for row in entry["rows"]:
        if row["value"] is not None:
            key = (row["metric"], row["num_samples"], row["extractor"], row["protocol"])
            values.setdefault(key, []).append(row["value"])
    lines = [
        "| metric | samples | extractor | protocol | mean | of sampling seeds |",
        "|" + 6 * "---|",
    ]
    for (metric, count, extractor, protocol), found in values.items():
        spread = f"{min(found):.4g} to {max(found):.4g} ({len(found)})"
        mean = f"{sum(found) / len(found):.4g}"
        lines.append(f"| {metric} | {count:,} | {extractor} | {protocol} | {mean} | {spread} |")
    return "\n".join(lines)
