"""The scoring stage: one job for all snapshots of a run, one for a teacher and the floor.

A score file holds rows; each row is one number: metric, extractor, sample count, value, standard
error, protocol hash and flag. The protocols themselves stand beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from harness import data as datasets
from harness.artifacts import digest, read_json, save_tensors, write_json
from harness.config import Experiment
from harness.data import Dataset
from harness.evaluation.extractors import Extractor, Observer, load_extractor
from harness.evaluation.metrics import METRICS, Metric, Reference, Views
from harness.networks import denoiser_record, load_denoiser
from harness.sampling import heun_generator, one_step_generator, sample

QUANTISATION = "uint8: x * 127.5 + 128, clipped"
SCHEMA = 1

Blocks = Iterator[tuple[Tensor, Tensor]]


def over_subsets(metric: Metric, parts: list[Views]) -> tuple[float, float]:
    """Mean over disjoint subsets with the error that their spread shows; one subset has its own.

    At the held-out size one subset alone would be as noisy as the floor it is compared with.
    """
    values = [metric.compute(part) for part in parts]
    if len(values) == 1:
        return values[0]
    t = torch.tensor([value for value, _ in values], dtype=torch.float64)
    return t.mean().item(), (t.std() / len(t) ** 0.5).item()


class Scorer:
    """Scores streams of images against an experiment's reference: the training part."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.dataset: Dataset = datasets.load(experiment.data_dir())
        self.extractors: list[Extractor] = [
            load_extractor(name, experiment.features_dir(name), self.dataset)
            for name in experiment.evaluation.extractors
        ]
        train = self.dataset.train
        self._reference = {
            e.name: Reference(
                torch.cat(
                    [
                        e.see(p, y)["features"]
                        for p, y in zip(
                            train.pixels.split(256), train.labels.split(256), strict=True
                        )
                    ]
                )
            )
            for e in self.extractors
        }
        self.protocols: dict[str, dict] = {}

    @property
    def reference(self) -> str:
        return f"{self.dataset.name}-train{len(self.dataset.train)}"

    def counts(self) -> list[int]:
        """The main sample count and the size of the held-out part, at which the floor stands (where
        there is such a part)."""
        main, held_out = self.experiment.evaluation.num_samples, len(self.dataset.held_out)
        return list(dict.fromkeys([main, held_out or main]))

    def _protocol(self, metric: str, extractor: Extractor, count: int) -> str:
        """Register the record that identifies a number; returns its hash."""
        from harness import __version__

        evaluation, settings = self.experiment.evaluation, dict(METRICS[metric].settings)
        if metric in ("precision", "recall"):
            settings["k"] = evaluation.neighbours
        record = {
            "metric": metric,
            "settings": settings,
            "extractor": extractor.name,
            "extractor_sha256": extractor.hashes,
            "num_samples": count,
            "subsets": "all disjoint ones of this size, averaged",
            "reference": self.reference,
            "reference_sha256": self.dataset.sha256,
            "quantisation": QUANTISATION,
            "resize": "none",
            "sampling": f"image i from (seed {evaluation.sampling_seed}, i), balanced labels",
            "library": f"harness {__version__}",
        }
        name = digest(record)
        self.protocols[name] = record
        return name

    def score(
        self, blocks: Blocks, counts: list[int], against: list[str] | None = None
    ) -> list[dict]:
        """Rows for the images in `blocks` (uint8 pixels, labels), at each of `counts`.

        `against`: feature networks that the generator was trained on; their rows are flagged.
        """
        observer = Observer(self.extractors)
        for pixels, labels in blocks:
            observer.add(pixels, labels)
        rows = []
        for extractor in self.extractors:
            views = observer.views(
                extractor.name,
                self._reference[extractor.name],
                self.experiment.evaluation.neighbours,
            )
            flag = "trained-on-extractor" if extractor.name in (against or []) else ""
            for count in counts:
                parts = views.disjoint(count)
                for metric in METRICS.values():
                    if any(getattr(views, need) is None for need in metric.needs):
                        continue
                    value, stderr = over_subsets(metric, parts)
                    rows.append(
                        {
                            "metric": metric.name,
                            "extractor": extractor.name,
                            "num_samples": count,
                            "value": value,
                            "stderr": stderr,
                            "protocol": self._protocol(metric.name, extractor, count),
                            "flag": flag,
                        }
                    )
        return rows

    def generated(self, generate: Callable, device: str) -> Blocks:
        """Quantised samples of a generator, on the host, as the protocol says."""
        d, evaluation = self.dataset, self.experiment.evaluation
        stream = sample(
            generate,
            max(self.counts()),
            d.image_shape,
            d.num_classes,
            evaluation.sampling_seed,
            device,
        )
        for images, labels in stream:
            if labels is None:  # as `Images` has them
                labels = torch.zeros(len(images), dtype=torch.int64)
            yield datasets.to_pixels(images).cpu(), labels


def keeping(blocks: Blocks, count: int, kept: dict[str, Tensor]) -> Blocks:
    """Pass blocks on and keep the first `count` images and labels for the figures."""
    pixels, labels = [], []
    for p, y in blocks:
        if sum(map(len, pixels)) < count:
            pixels.append(p)
            labels.append(y)
        yield p, y
    kept |= {"pixels": torch.cat(pixels)[:count], "labels": torch.cat(labels)[:count]}


def _finish(path: Path, record: dict, scorer: Scorer, kept: dict[str, Tensor]) -> None:
    """The samples for figures first, the declared file last: it names their hash."""
    file = path.with_suffix(".samples.safetensors")
    record["samples"] = {"file": file.name, "sha256": save_tensors(file, kept)}
    write_json(path, {"schema": SCHEMA, **record, "protocols": scorer.protocols})


def score_run(experiment: Experiment, student: str, seed: int) -> None:
    """Score every snapshot of a run; write `scores/<student>/seed<k>.json`."""
    run_dir = experiment.run_dir(student, seed)
    run = read_json(run_dir / "student.json")
    scorer = Scorer(experiment)
    device, entries, kept = experiment.device, [], {}
    for snapshot in run["snapshots"]:
        folder = run_dir / "snapshots" / snapshot["name"]
        denoiser = load_denoiser(folder, snapshot["sha256"], device, owner=run_dir)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        blocks = scorer.generated(generate, device)
        if snapshot is run["snapshots"][-1]:
            blocks = keeping(blocks, experiment.evaluation.grid_samples, kept)
        entries.append(
            {
                "snapshot": snapshot["name"],
                "final": snapshot is run["snapshots"][-1],
                "grid": snapshot["grid"],
                "sha256": snapshot["sha256"],
                "nfe": 1,
                "ema": snapshot["ema_half_life"],
                "images": snapshot["ledger"]["images"],
                "flops": snapshot["ledger"]["flops"],
                "seconds": snapshot["ledger"]["seconds"],
                "rows": scorer.score(blocks, scorer.counts(), run["trained_against"]),
            }
        )
        print(f"{student}/seed{seed}: scored {snapshot['name']}", file=sys.stderr, flush=True)
    record = {"student": student, "method": run["method"], "seed": seed, "weights": run["sha256"]}
    record["spec"] = digest(experiment.score_spec())
    record |= {"contended": run["contended"], "entries": entries}
    _finish(experiment.score_path(student, seed), record, scorer, kept)


def score_references(experiment: Experiment, teacher: str) -> None:
    """Score a teacher with its sampler and with one step, and the floor: real held-out images, if
    any are held out."""
    folder = experiment.teacher_dir(teacher)
    sampler = experiment.teachers[teacher].sampler.model_dump()
    scorer, device, kept = Scorer(experiment), experiment.device, {}
    record = read_json(folder / "teacher.json")
    denoiser = load_denoiser(folder, record["sha256"], device)
    many = keeping(
        scorer.generated(heun_generator(denoiser, sampler), device),
        experiment.evaluation.grid_samples,
        kept,
    )
    one = scorer.generated(one_step_generator(denoiser, sampler["sigma_max"]), device)
    held_out = scorer.dataset.held_out
    real = zip(held_out.pixels.split(256), held_out.labels.split(256), strict=True)
    common = {"snapshot": "", "final": True, "grid": [], "sha256": record["sha256"]}
    # Nothing is known of how an imported teacher was trained.
    common |= {"ema": getattr(experiment.teachers[teacher], "ema_half_life", None)}
    common |= {key: record.get("ledger", {}).get(key) for key in ("images", "flops", "seconds")}
    nothing = dict.fromkeys(("ema", "images", "flops", "seconds", "sha256"))
    rows = [
        ("teacher", 2 * sampler["steps"] - 1, many, scorer.counts()),
        ("teacher-1step", 1, one, scorer.counts()),
        ("floor", None, real, [len(held_out)]),
    ]
    entries = []
    for name, nfe, blocks, counts in rows if len(held_out) else rows[:-1]:
        entry = common | {"student": name, "nfe": nfe, "rows": scorer.score(blocks, counts)}
        entries.append(entry | (nothing if name == "floor" else {}))
        print(f"{teacher}: scored {name}", file=sys.stderr, flush=True)
    _finish(
        experiment.reference_score_path(teacher),
        {
            "teacher": teacher,
            "method": None,
            "seed": None,
            "weights": record["sha256"],
            "spec": digest(experiment.reference_score_spec(teacher)),
            "entries": entries,
        },
        scorer,
        kept,
    )
