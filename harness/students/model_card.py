"""The model card of an exported student: its use, its origin, its cost and its scores."""

import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from harness import __version__
from harness.config.jobs import StudentRun, TeacherJob
from harness.config.schema import ImportedTeacher
from harness.data import datasets
from harness.denoiser import Denoiser
from harness.io.artifacts import read_text
from harness.io.hub import cached_snapshot
from harness.io.records import ScoreRecord, ScoreRow, StudentRecord
from harness.networks import BACKBONES

FLAGS = {
    "trained-on-extractor": "the student was trained against this feature network",
    "shares-pretraining": "the student was trained against a network pretrained on the same images",
    "contended": "other work ran on the machine while the student trained",
}
CARD = """\
---
{{ card_data }}
---

# {{ record.student }}: a one-step student of {{ teacher }}

Distilled with `{{ record.method }}` ({{ record.paper }}), experiment `{{ record.experiment }}`.
It generates an image in one network evaluation.

## Use

{% if stock %}The folder is a pipeline of diffusers' own class:

```sh
pip install "diffusers>={{ diffusers }}" transformers{{ packages }}
```

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{{ name }}")
image = pipe("{{ prompt }}", num_inference_steps=1, guidance_scale=0).images[0]
image.save("image.png")
```
{% else %}The pipeline's class is part of the package `onestep-harness` {{ version }}. Install it
from a copy of its source:

```sh
pip install path/to/onestep-harness
```

```python
import torch
{%- if plugin %}
import harness
{%- endif %}
from harness import OneStepPipeline
{%- if plugin %}

harness.load_plugin("{{ plugin }}")
{%- endif %}

pipe = OneStepPipeline.from_pretrained("{{ name }}")
generator = torch.Generator().manual_seed(0)
{%- if denoiser.num_classes %}
images = pipe(class_labels=[0, 1], generator=generator).images
{%- else %}
images = pipe(batch_size=2, generator=generator).images
{%- endif %}
images[0].save("image.png")
```
{% if plugin %}
The network `{{ network }}` is a plug-in, defined in `{{ plugin }}` (sha256 {{ plugin_sha256 }}).
{% endif %}
{%- if classes %}
Labels: {{ classes }}.
{% endif %}{% endif %}
Half precision and other devices: `pipe.to("cuda", torch.bfloat16)`.

## Training

| | |
|---|---|
{% for key, value in facts %}| {{ key }} | {{ value }} |
{% endfor %}
Deviations from the paper: {{ record.deviations | join("; ") or "none" }}.

## Scores

{% if scores %}Mean ± standard deviation over sampling seeds, of one training seed. A score depends
on the feature network (`extractor`), the number of samples and the protocol: compare only values
for which all three are equal. Distances such as `fd`, `fid` and `kd` are better when lower.

{{ scores }}
{% for flag, meaning in flags %}
`{{ flag }}`: {{ meaning }}.
{% endfor %}
The protocol, where the table does not list it:

{% for key, value in protocol %}* {{ key }}: {{ value }}
{% endfor %}{% else %}These weights have not been scored.
{% endif %}
## Licence

{% if imported %}The weights were initialised from the teacher, so its licence \
({{ license or "see its source" }}) applies.
{%- else %}The weights were trained from this data only.{% endif %}
"""


def model_card(
    run: StudentRun,
    teacher: TeacherJob,
    record: StudentRecord,
    denoiser: Denoiser,
    sigma_init: float,
    scores: Path,
    name: str,
) -> ModelCard:
    """The card of an export. Its metadata contain the scores as a `model-index`. scores: the run's
    score file, which need not exist. name: what a reader passes to `from_pretrained`."""
    dataset, data = datasets.load(run.data, images=False), teacher.data_section.name
    task = "text-to-image" if denoiser.text_width else "unconditional-image-generation"
    rows, protocols, contended = _final_scores(scores, record.sha256)
    columns, common = _split_protocols(protocols)
    table, results, flags = [], [], {"contended"} if contended else set()
    for row, values in rows:
        mean, std = statistics.fmean(values), statistics.stdev(values) if values[1:] else None
        size = {"extractor": row.extractor, "num_samples": row.num_samples}
        seeds = {"sampling_seeds": len(values)}
        spread = f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
        entry = {"metric": row.metric, **size, "value": spread, **seeds}
        entry |= {key: _text(protocols[row.protocol].get(key, "")) for key in columns}
        table.append(entry | {"protocol": row.protocol, "flag": row.flag})
        arguments = (
            size | seeds | {"protocol": row.protocol} | ({} if std is None else {"std": std})
        )
        results.append(EvalResult(task, data, data, row.metric, mean, metric_args=arguments))
        flags.update(row.flag.split())
    card_data = ModelCardData(
        model_name=f"{run.experiment}-{run.student.name}",
        # The hub's snippet for diffusers loads its own classes only.
        library_name="diffusers" if denoiser.text_width else "onestep-harness",
        pipeline_tag=task,
        tags=["one-step-diffusion", "distillation", record.method],
        eval_results=results or None,
    )
    origin, section = teacher.name, teacher.section
    imported = isinstance(section, ImportedTeacher)
    if imported:
        source, revision = section.source, getattr(section, "revision", None)
        origin += f" ({source if revision else Path(source).name})"
        card_data.license = _licence(source, revision)
        card_data.base_model = source if revision else None
    data_section = teacher.data_section
    if getattr(data_section, "revision", None):
        card_data.datasets = [data_section.source]
    network = type(denoiser.backbone).__name__
    plugin = BACKBONES.plugin(network)
    return ModelCard.from_template(
        card_data,
        template_str=CARD,
        name=name,
        teacher=origin,
        record=record,
        denoiser=denoiser,
        stock=bool(denoiser.text_width),
        prompt="a lighthouse at dusk",
        packages=" sentencepiece protobuf" if network.startswith("PixArt") else "",
        diffusers=version("diffusers"),
        version=__version__,
        network=network,
        plugin=plugin.name if plugin else None,
        plugin_sha256=BACKBONES.plugin_sha256(network),
        classes=", ".join(f"{i} = {label}" for i, label in enumerate(dataset.class_names[:20]))
        + (", …" if dataset.class_names[20:] else ""),
        facts=_facts(record, origin, data, denoiser, sigma_init),
        scores=_markdown(table),
        flags=[(flag, FLAGS[flag]) for flag in FLAGS if flag in flags],
        protocol=[(key, _text(value)) for key, value in common.items()],
        imported=imported,
        license=card_data.license and _text(card_data.license),
    )


def _facts(
    record: StudentRecord, teacher: str, data: str, denoiser: Denoiser, sigma_init: float
) -> list[tuple[str, str]]:
    """The rows of the table of training."""
    ledger, stop = record.ledger, record.stop
    facts = [
        ("teacher", f"{teacher}, weights sha256 {record.inputs['teacher']}"),
        ("data", data + (" (not used by the student)" if record.data_free else "")),
        ("training seed", str(record.seed)),
        ("budget", f"{stop.amount:,.10g} {stop.unit}" if stop else ""),
        (
            "spent",
            f"{ledger.images:,} images, {ledger.flops / 1e12:.3g} TFLOPs of all networks, "
            f"{ledger.seconds:,.0f} seconds on {record.device_name or record.device}",
        ),
        ("network evaluations per image (NFE)", str(record.nfe)),
        ("noise level σ of the input", f"{denoiser.level(sigma_init):g}"),
        ("parameters", f"{record.parameters:,}"),
        ("frozen layers", record.freeze if record.freeze != "none" else ""),
        ("trained against", ", ".join(record.trained_against)),
        ("networks in its losses were pretrained on", ", ".join(record.pretraining)),
        ("weights", f"sha256 {record.sha256}"),
    ]
    return [(key, value) for key, value in facts if value]


def _licence(source: str, revision: str | None) -> str | None:
    """The licence that a teacher's own model card names."""
    folder = cached_snapshot(source, revision) if revision else Path(source).expanduser()
    readme = folder / "README.md" if folder else None
    if readme is None or not readme.is_file():
        return None
    try:
        return ModelCard(read_text(readme), ignore_metadata_errors=True).data.license
    except Exception:  # a foreign file may fail in any way
        return None


def _final_scores(
    path: Path, sha256: str
) -> tuple[list[tuple[ScoreRow, list[float]]], dict[str, dict], bool]:
    """The final scores of weights `sha256`, at the largest number of samples: one row of each
    metric and extractor with its values over sampling seeds; the protocols; and whether the
    training was contended."""
    record = ScoreRecord.read_optional(path)
    if record is None or record.weights != sha256:
        return [], {}, False
    entry = next(e for e in record.entries if e.final and not e.selection)
    scored = [row for row in entry.rows if row.value is not None]
    largest: dict[tuple[str, str], int] = {}
    for row in scored:
        name = row.metric, row.extractor
        largest[name] = max(row.num_samples, largest.get(name, 0))
    groups: dict[tuple, tuple[ScoreRow, list[float]]] = {}
    for row in scored:
        name = row.metric, row.extractor
        if row.num_samples == largest[name]:
            groups.setdefault((*name, row.protocol), (row, []))[1].append(row.value)
    used = {row.protocol for row, _ in groups.values()}
    protocols = {key: value for key, value in record.protocols.items() if key in used}
    return list(groups.values()), protocols, record.contended


def _split_protocols(protocols: dict[str, dict]) -> tuple[list[str], dict[str, Any]]:
    """Keys whose values differ between protocols, and the other keys with their value. The weights
    of all feature networks are in one value."""
    shown = ("metric", "extractor", "extractor_sha256", "num_samples", "sampling_seeds")
    keys = dict.fromkeys(key for p in protocols.values() for key in p if key not in shown)
    differ = [key for key in keys if len({_text(p.get(key)) for p in protocols.values()}) > 1]
    common = {key: next(iter(protocols.values()))[key] for key in keys if key not in differ}
    weights = {p["extractor"]: p.get("extractor_sha256") for p in protocols.values()}
    seeds = next((p.get("sampling_seeds") for p in protocols.values()), None)
    return differ, common | {"sampling seeds": seeds, "sha256 of feature networks": weights}


def _text(value: object) -> str:
    """A value of a protocol in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _markdown(rows: list[dict[str, object]]) -> str:
    """A table without empty columns; "" for no rows."""

    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    if not rows:
        return ""
    columns = [key for key in rows[0] if any(row[key] != "" for row in rows)]
    lines = [line(columns), line("---" for _ in columns)]
    return "\n".join(lines + [line(row[key] for key in columns) for row in rows])
