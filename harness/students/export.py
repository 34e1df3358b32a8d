"""Export students as diffusers pipelines with a model card: as a `OneStepPipeline`, or, if the
teacher is a text-to-image pipeline, as a pipeline of its class with a one-step scheduler."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from harness.config.jobs import StudentRun, TeacherJob
from harness.config.schema import ImportedTeacher
from harness.data import datasets
from harness.denoiser import one_step
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, read_json, read_text, write_json
from harness.io.records import ScoreRecord, StudentRecord, TeacherRecord
from harness.networks import BACKBONES, denoiser_record, load_denoiser
from harness.networks.vp import VPDenoiser
from harness.teachers.pipelines import PipelineFolder

LARGE_SIGMA = 200.0  # above it, DDIM's step is more precise for predicted velocities


def one_step_scheduler(student: VPDenoiser, sigma_init: float) -> SchedulerMixin:
    """A stock scheduler whose only step goes from the level of `sigma_init` to the clean image: its
    schedule ends at that level, where a one-step "trailing" schedule begins.

    Euler's scheduler starts at σ n, as the student does. For predicted velocities its step
    subtracts numbers of size σ, which leaves an error of about 1e-7 σ: 5e-4 at 4096, the last
    level of a zero-terminal-SNR schedule. DDIM's step computes the clean image itself, but starts
    at n instead of σ n / sqrt(1 + σ²), a relative difference of 1 / (2 σ²).
    """
    level = student.level(sigma_init)
    time = int(student.time(torch.tensor([level])))
    betas = EulerDiscreteScheduler(**student.schedule).betas[: time + 1].double()
    options = {"prediction_type": student.prediction, "timestep_spacing": "trailing"}
    options["steps_offset"] = 1  # no effect, but Stable Diffusion's pipeline warns of other values
    scheduler_class: type[SchedulerMixin] = EulerDiscreteScheduler
    if student.prediction == "v_prediction" and level > LARGE_SIGMA:
        scheduler_class, options = DDIMScheduler, options | {"clip_sample": False}
        # The last of a zero-terminal-SNR schedule is 1, for which no level is finite.
        betas[-1] = 1 - 1 / (1 + level**2) / (1 - betas[:-1]).prod()
    return scheduler_class(num_train_timesteps=time + 1, trained_betas=betas.tolist(), **options)


def export_student(run: StudentRun, teacher: TeacherJob, scores: Path, folder: Path) -> None:
    """Write a finished student and its model card to a new or empty folder, all or nothing.
    `scores`: the run's score file, which need not exist."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists; choose a new or empty folder", "exists")
    model, record = run.folder / "model", StudentRecord.read(run.folder / "student.json")
    denoiser = load_denoiser(model, record.sha256, owner=run.folder)
    sigma_init = denoiser_record(model)["sigma_init"]
    with atomic_folder(folder) as temporary:
        if isinstance(denoiser, VPDenoiser):
            _write_stock(denoiser, sigma_init, teacher, temporary)
        elif denoiser.text_width:
            encoder = "needs the experiment's own text encoder, which is not part of a pipeline"
            message = "text-to-image students can be exported if their teacher is a pipeline"
            raise UserError(f"{run.student.name} {encoder}; {message}", "not-exportable")
        else:
            pipeline = OneStepPipeline(denoiser.backbone, sigma_init, **denoiser.precondition)
            pipeline.save_pretrained(temporary, safe_serialization=True)
        model_card(run, teacher, record, scores).save(temporary / "README.md")


def _write_stock(student: VPDenoiser, sigma_init: float, teacher: TeacherJob, folder: Path) -> None:
    """Write a student as a copy of its teacher's pipeline, which must not have changed."""
    source = PipelineFolder(Path(teacher.section.source).expanduser())
    imported = TeacherRecord.read(teacher.folder / "teacher.json").imported
    if source.sha256() != imported["sha256"]:
        message = f"is not the pipeline that teacher {teacher.name} was imported from"
        raise UserError(f"{source.folder} {message}", "checksum")
    write_pipeline(student, sigma_init, source, folder)


def write_pipeline(
    student: VPDenoiser, sigma_init: float, source: PipelineFolder, folder: Path
) -> None:
    """Copy a pipeline, with a student as its network and a one-step scheduler, and without a safety
    checker."""
    copied = ("text_encoder", "tokenizer", "vae")
    for part in copied:
        shutil.copytree(source.folder / part, folder / part)
    student.backbone.save_pretrained(folder / source.network, safe_serialization=True)
    scheduler = one_step_scheduler(student, sigma_init)
    scheduler.save_pretrained(folder / "scheduler")
    index = read_json(source.folder / "model_index.json")
    parts = (*copied, source.network)
    new = {key: value for key, value in index.items() if key.startswith("_") or key in parts}
    new["scheduler"] = ["diffusers", type(scheduler).__name__]
    if "safety_checker" in index:
        new |= {key: [None, None] for key in ("safety_checker", "feature_extractor")}
        new["requires_safety_checker"] = False
    write_json(folder / "model_index.json", new)


CARD = """\
---
{{ card_data }}
---

# {{ record.student }}: a one-step student of {{ teacher }}

Distilled with `{{ record.method }}` ({{ record.paper }}), training seed {{ record.seed }} of the
experiment `{{ record.experiment }}`. It generates an image in one network evaluation.

```python
{% if dataset.prompts %}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{{ name }}")
image = pipe("a lighthouse at dusk", num_inference_steps=1, guidance_scale=0).images[0]
{%- else %}from harness import OneStepPipeline

pipe = OneStepPipeline.from_pretrained("{{ name }}")
images = pipe({{ "class_labels=[0, 1]" if dataset.num_classes else "num_images=4" }}).images
{%- endif %}
```

| | |
|---|---|
| teacher | {{ teacher }}, weights sha256 {{ record.inputs.teacher }} |
| data | {{ data }} |
| training | {{ "{:,}".format(record.ledger.images) }} images, \
{{ "%.3g" % (record.ledger.flops / 1e12) }} TFLOPs |
| parameters | {{ "{:,}".format(record.parameters) }} |
| weights | sha256 {{ record.sha256 }} |

## Scores

{% if scores %}Means over sampling seeds, and the smallest and largest value. A score depends on the
feature network (`extractor`), the number of samples and the protocol (reference images,
quantisation, resize, library): compare only values for which all three are equal. Distances such as
`fd`, `fid` and `kd` are better when lower.

{{ scores }}{% else %}These weights have not been scored.{% endif %}

Deviations from the paper: {{ record.deviations | join("; ") or "none" }}.

{% if base_model %}The weights were initialised from the teacher, so its licence \
({{ license or "see its source" }}) applies.
{%- else %}The weights were trained from this data only.{% endif %}
"""


def model_card(
    run: StudentRun, teacher: TeacherJob, record: StudentRecord, scores: Path
) -> ModelCard:
    """The model card of an exported student: its origin, its cost, and its scores, which are also
    in the machine-readable `model-index` of the Hugging Face hub."""
    from tabulate import tabulate

    dataset, data = datasets.load(run.data, images=False), teacher.data_section.name
    task = "text-to-image" if dataset.prompts else "unconditional-image-generation"
    rows = _mean_scores(scores, record.sha256)
    table = tabulate(rows, "keys", "pipe", floatfmt=".4g")
    results = [
        EvalResult(task, data, data, row.pop("metric"), row.pop("mean"), metric_args=row)
        for row in rows
    ]
    card_data = ModelCardData(
        model_name=f"{run.experiment}-{run.student.name}",
        library_name="diffusers",
        pipeline_tag=task,
        tags=["one-step-diffusion", record.method],
        eval_results=results or None,
    )
    origin = teacher.name
    if isinstance(teacher.section, ImportedTeacher):
        source = Path(teacher.section.source)
        origin += f" ({source.name})"
        card_data.base_model, readme = source.name, source.expanduser() / "README.md"
        if readme.is_file():
            text = read_text(readme)
            card_data.license = ModelCard(text, ignore_metadata_errors=True).data.license
    return ModelCard.from_template(
        card_data,
        template_str=CARD,
        name=card_data.model_name,
        teacher=origin,
        record=record,
        dataset=dataset,
        data=data,
        scores=table,
    )


def _mean_scores(path: Path, sha256: str) -> list[dict]:
    """Final scores of weights `sha256`: mean, smallest and largest value over sampling seeds."""
    import pandas

    columns = ["metric", "extractor", "num_samples", "protocol"]
    record, rows = ScoreRecord.read_optional(path), []
    if record is not None and record.weights == sha256:
        rows = next(entry for entry in record.entries if entry.final).rows
    frame = pandas.DataFrame([row.model_dump() for row in rows], columns=[*columns, "value"])
    groups = frame.dropna(subset="value").groupby(columns, sort=False).value
    table = groups.agg(["mean", "min", "max", "count"]).reset_index()
    return table.rename(columns={"count": "sampling_seeds"}).to_dict("records")
