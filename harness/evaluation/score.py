"""The scoring stage: one job for all snapshots of a run, one for a teacher and the floor.

A score file holds rows; each row is one number: sampling seed, metric, extractor, sample count,
value, standard error, estimates that leave one group of samples out, protocol hash and flag. The
protocols themselves stand beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from harness import SCORES_FORMAT
from harness import data as datasets
from harness.artifacts import (
    digest,
    load_tensors,
    read_json,
    run_lock,
    save_tensors,
    sha256_file,
    write_json,
)
from harness.config import Experiment
from harness.data import Dataset, Images
from harness.downloads import fetch
from harness.errors import UserError
from harness.evaluation.extractors import Extractor, Observer, load_extractor
from harness.evaluation.frechet import Moments, load_statistics
from harness.evaluation.metrics import (
    INCEPTION,
    METRICS,
    PAIRWISE_LIMIT,
    Estimate,
    Metric,
    Reference,
    Views,
    few_samples,
    fewest,
)
from harness.evaluation.neighbours import nearest
from harness.networks import denoiser_record, inception, load_denoiser
from harness.processes import processes
from harness.prompts import Embeddings, load_embeddings
from harness.sampling import heun_generator, one_step_generator, sample
from harness.streams import Stream

# Of a teacher's samples, those kept to be scored by other libraries: enough for full-rank
# covariances of Inception's features.
KEPT = 5000
CLOSEST = 10  # pairs in the figure of nearest neighbours
QUANTISATION = "uint8: x * 127.5 + 128, clipped"

Blocks = Iterator[tuple[Tensor, Tensor]]


def over_subsets(metric: Metric, parts: list[Views]) -> Estimate:
    """Mean over disjoint subsets with the error that their spread shows; one subset has its own.

    At the held-out size one subset alone would be as noisy as the floor it is compared with. The
    groups that are left out are the subsets.
    """
    estimates = [metric.estimate(part) for part in parts]
    if len(estimates) == 1:
        return estimates[0]
    t = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    left = (t.sum() - t) / (len(t) - 1)
    return Estimate(t.mean().item(), (t.std() / len(t) ** 0.5).item(), tuple(left.tolist()))


class Closest:
    """Of the images that stream by, those that come nearest to a training image."""

    def __init__(self, reference: Reference, train: Images):
        self.reference, self.train = reference, train
        self.pixels, self.distance, self.neighbour = torch.empty(0), torch.empty(0), torch.empty(0)

    def add(self, pixels: Tensor, features: Tensor) -> None:
        distance, neighbour = (t.cpu() for t in nearest(features, self.reference.features))
        if len(self.pixels):
            pixels = torch.cat([self.pixels, pixels])
            distance = torch.cat([self.distance, distance])
            neighbour = torch.cat([self.neighbour, neighbour])
        best = distance.argsort(stable=True)[:CLOSEST]
        self.pixels, self.distance = pixels[best], distance[best]
        self.neighbour = neighbour[best]

    def tensors(self) -> dict[str, Tensor]:
        """`closest` images, nearest first, the `closest_training` images, and their distances:
        over the median of the held-out images', where there is one."""
        unit = self.reference.typical_nearest or 1.0
        index = self.reference.index[self.neighbour]
        return {
            "closest": self.pixels,
            "closest_training": self.train.pixels[index],
            "closest_distance": self.distance / unit,
        }


class Scorer:
    """Scores streams of images against an experiment's reference: the training part."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.first = experiment, processes().first
        self.dataset: Dataset = datasets.load(experiment.data_dir())
        datasets.check_sizes(self.dataset, fewest(experiment.evaluation.neighbours))
        self.extractors: list[Extractor] = [
            load_extractor(experiment, name, self.dataset)
            for name in experiment.evaluation.extractors
            if self.first  # other processes help to make samples
        ]
        available = [e for e in self.extractors if not e.unavailable]
        self.statistics, self.statistics_sha256 = self._published_statistics()
        self._reference = {e.name: self._reference_of(e) for e in available}
        # The features in which the figure of nearest neighbours looks, if it can.
        self.pairs_in = available[0].name if available and len(self.dataset.train) else None
        self.protocols: dict[str, dict] = {}
        self.dimensions: dict[str, int] = {}  # how many features each extractor gives

    def _published_statistics(self) -> tuple[tuple[Tensor, Tensor] | None, str | None]:
        """The mean and covariance that an FID compares with, where the experiment names a file of
        them, and the file's sha256."""
        evaluation = self.experiment.evaluation
        if evaluation.statistics is None:
            return None, None
        path = fetch(evaluation.statistics, evaluation.statistics_sha256)
        return load_statistics(path, inception.DIM), sha256_file(path)

    def _reference_of(self, extractor: Extractor) -> Reference:
        """What an extractor sees of the real images. It is the same for all generators, so the
        first job that scores keeps it beside the extractor, and the others read it."""
        published = self.statistics if extractor.kind == "inception" else None
        if not len(self.dataset.train):
            return Reference(None, published)
        folder = self.experiment.features_dir(extractor.name)
        key = {"extractor": extractor.hashes, "kind": extractor.kind, "resize": extractor.resize}
        key |= {"data": self.dataset.sha256, "draw": PAIRWISE_LIMIT, "moments": published is None}
        key |= {"torch": torch.__version__, "device": self.experiment.device}
        path = folder / f"reference-{digest(key)}.safetensors"
        with run_lock(folder):
            record = path.with_suffix(".json")
            try:
                tensors = load_tensors(path, read_json(record)["sha256"])
            except UserError:  # not there yet, or damaged
                tensors = self._see_reference(extractor, moments=published is None)
                write_json(record, {"sha256": save_tensors(path, tensors)})
        own = (tensors["mean"], tensors["covariance"]) if "mean" in tensors else None
        return Reference(
            tensors["features"], published or own, tensors.get("held_out"), tensors["index"]
        )

    def _see_reference(self, extractor: Extractor, moments: bool) -> dict[str, Tensor]:
        """Features of the training part: of a large one those of a fixed draw, and with `moments`
        the mean and covariance of all, which are summed while it streams by; and of the held-out
        part, if there is one."""
        train, held, parts, sums = self.dataset.train, self.dataset.held_out, [], None
        everything = torch.arange(len(train))
        drawn = Stream(0, "reference").uniform(everything).argsort()[:PAIRWISE_LIMIT].sort().values
        for index in (everything if moments else drawn).split(256):
            features = extractor.see(train.pixels[index], train.labels[index])["features"]
            parts.append(features[torch.isin(index, drawn)])
            if moments and len(drawn) < len(train):
                sums = sums + Moments.of(features) if sums else Moments.of(features)
        tensors = {"features": torch.cat(parts), "index": drawn}
        if sums:
            tensors |= dict(zip(("mean", "covariance"), sums.statistics(), strict=True))
        if len(held):
            seen = [extractor.see(*block)["features"] for block in held.blocks()]
            tensors["held_out"] = torch.cat(seen)
        return tensors

    def pairs_record(self) -> dict:
        """What the nearest neighbours of a figure are: in which features, among how many images, in
        which unit their distances are."""
        if self.pairs_in is None:
            return {}
        reference = self._reference[self.pairs_in]
        return {
            "pairs_in": self.pairs_in,
            "pairs_among": len(reference.features),
            "pairs_unit": "held-out median" if reference.typical_nearest else "features",
        }

    def _reference_record(self, metric: Metric, extractor: Extractor) -> dict:
        """What of a protocol says what the metric compares with."""
        if self.statistics and extractor.kind == "inception" and "statistics" in metric.needs:
            return {
                "reference": f"{self.dataset.name}-statistics",
                "reference_sha256": self.statistics_sha256,
            }
        train = len(self.dataset.train)
        record = {"reference": f"{self.dataset.name}-train{train}"}
        if metric.limit and train > metric.limit:
            record["reference_draw"] = f"{metric.limit} images, always the same"
        return record | {"reference_sha256": self.dataset.sha256}

    def counts(self) -> list[int]:
        """The main sample count, and the one at which the floor stands."""
        return list(dict.fromkeys([self.experiment.evaluation.num_samples, self.floor_count]))

    @property
    def floor_count(self) -> int:
        """The size of the held-out part, or the main sample count if that is smaller: the floor is
        then the mean over disjoint parts of it."""
        main, held_out = self.experiment.evaluation.num_samples, len(self.dataset.held_out)
        return min(main, held_out or main)

    def _protocol(self, metric: Metric, extractor: Extractor, count: int) -> str:
        """Register the record that identifies a number; returns its hash."""
        from importlib.metadata import version

        from harness import __version__

        evaluation, settings = self.experiment.evaluation, dict(metric.settings)
        library = f"harness {__version__}"
        if extractor.kind in INCEPTION:
            library += f", torch-fidelity {version('torch-fidelity')}"
        if metric.name in ("precision", "recall"):
            settings["k"] = evaluation.neighbours
        record = {
            "metric": metric.name,
            "settings": settings,
            "extractor": extractor.name,
            "extractor_sha256": extractor.hashes,
            "num_samples": count,
            "subsets": "all disjoint ones of this size, averaged",
            **self._reference_record(metric, extractor),
            "quantisation": QUANTISATION,
            "resize": extractor.resize,
            **extractor.details,
            "sampling": "image i from (sampling seed, i), balanced labels; every seed by itself",
            "sampling_seeds": evaluation.sampling_seeds,
            "library": library,
        }
        name = digest(record)
        self.protocols[name] = record
        return name

    def score(
        self,
        blocks: Blocks,
        counts: list[int],
        against: Collection[str] = (),
        pretraining: Collection[str] = (),
        final: bool = True,
        kept: dict[str, Tensor] | None = None,
    ) -> list[dict]:
        """Rows for the images in `blocks` (uint8 pixels, labels), at each of `counts`.

        `final`: whether they are a run's last, which get every metric. `against`: feature networks
        that the generator was trained on; `pretraining`: what such networks had been trained on.
        The rows of an extractor that is one of them, or shares that with one, are flagged.
        `kept`: gets the images that come nearest to the training images in the first extractor.
        Other processes than the first make their share of the images, and have no rows.
        """
        if not self.first:
            for _ in blocks:
                pass
            return []
        available = [e for e in self.extractors if not e.unavailable]
        observer = Observer(available, self.dataset.captions)
        closest = None
        if kept is not None and self.pairs_in:
            closest = Closest(self._reference[self.pairs_in], self.dataset.train)
        for pixels, labels in blocks:
            seen = observer.add(pixels, labels)
            if closest:
                closest.add(pixels, seen[self.pairs_in]["features"])
        if closest:
            kept |= closest.tensors()
        rows = []
        for extractor in self.extractors:
            views = None
            if not extractor.unavailable:
                views = observer.views(
                    extractor.name,
                    self._reference[extractor.name],
                    self.experiment.evaluation.neighbours,
                )
            flag = ""
            if {extractor.name, extractor.same_as} & set(against):
                flag = "trained-on-extractor"
            elif set(extractor.pretraining) & set(pretraining):
                flag = "shares-pretraining"
            if views is not None and extractor.name not in self.dimensions:
                dim = self.dimensions[extractor.name] = views.features.shape[1]
                floor = self.floor_count if len(self.dataset.held_out) else None
                for count in (count for count in counts if count <= dim):
                    told = few_samples(extractor.name, dim, count, floor)
                    print(f"warning: {told}", file=sys.stderr)
            for metric, count in self._measurements(extractor, views, counts, final):
                value = stderr = None
                left: tuple[float, ...] = ()
                lacking = extractor.unavailable or next(
                    filter(None, map(extractor.missing.get, metric.needs)), None
                )
                if lacking is None:
                    value, stderr, left = over_subsets(metric, views.disjoint(count))
                row = {
                    "metric": metric.name,
                    "extractor": extractor.name,
                    "num_samples": count,
                    "value": value,
                    "stderr": stderr,
                    "leave_out": left,
                    "protocol": self._protocol(metric, extractor, count),
                    "flag": flag,
                }
                if value is None:
                    row["status"] = f"unavailable ({lacking})"
                rows.append(row)
        return rows

    def _measurements(
        self, extractor: Extractor, views: Views | None, counts: list[int], final: bool
    ) -> list[tuple[Metric, int]]:
        """Each metric that applies to an extractor, with the sample counts it is computed at.
        `views` None: the extractor is unavailable, and its metrics are those that would apply."""

        def applies(metric: Metric) -> bool:
            if extractor.kind not in metric.extractors or (metric.final_only and not final):
                return False
            if views is None:
                there = {
                    "reference_features": len(self.dataset.train) > 0,
                    "held_out_features": len(self.dataset.held_out) > 0,
                }
                return all(there.get(need, True) for need in metric.needs)
            return all(
                need in extractor.missing or getattr(views, need) is not None
                for need in metric.needs
            )

        names = [name for name, metric in METRICS.items() if applies(metric)]
        wanted = dict.fromkeys((name, METRICS[name].count(n)) for n in counts for name in names)
        dim = 0 if views is None else views.features.shape[1]
        return [
            (METRICS[name], n) for name, n in wanted if n >= METRICS[name].samples_per_dim * dim
        ]

    def generated(
        self, generate: Callable, device: str, seed: int, embeddings: Embeddings | None = None
    ) -> Blocks:
        """Quantised samples of a generator for one sampling seed, on the host, as the protocol
        says. `embeddings`: of its teacher's prompts, if it has some."""
        d, count = self.dataset, max(self.counts())
        stream = sample(generate, count, d.image_shape, d.num_conditions, seed, device, embeddings)
        for images, labels in stream:
            if bad := (~images.isfinite().flatten(1).all(dim=1)).sum().item():
                raise UserError(f"{bad} of {len(images)} generated images hold NaN or infinity")
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
    if pixels:
        kept |= {"pixels": torch.cat(pixels)[:count], "labels": torch.cat(labels)[:count]}


def _finish(path: Path, record: dict, scorer: Scorer, kept: dict[str, Tensor]) -> None:
    """The samples for figures first, the declared file last: it names their hash."""
    if not scorer.first:
        return
    file = path.with_suffix(".samples.safetensors")
    record["samples"] = {"file": file.name, "sha256": save_tensors(file, kept)}
    record["samples"] |= scorer.pairs_record()
    record |= {"protocols": scorer.protocols, "dimensions": scorer.dimensions}
    write_json(path, {"schema": SCORES_FORMAT, **record})


def score_run(experiment: Experiment, student: str, seed: int) -> None:
    """Score every snapshot of a run; write `scores/<student>/seed<k>.json`."""
    run_dir = experiment.run_dir(student, seed)
    run = read_json(run_dir / "student.json")
    scorer = Scorer(experiment)
    device, entries, kept = experiment.device, [], {}
    embeddings = load_embeddings(experiment.teacher_dir(run["teacher"]))
    for snapshot in run["snapshots"]:
        folder = run_dir / "snapshots" / snapshot["name"]
        denoiser = load_denoiser(folder, snapshot["sha256"], device, owner=run_dir)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        final, rows = snapshot is run["snapshots"][-1], []
        for sampling_seed in experiment.evaluation.seeds_of_snapshot(final):
            blocks = scorer.generated(generate, device, sampling_seed, embeddings)
            if shown := final and not kept:
                blocks = keeping(blocks, experiment.evaluation.grid_samples, kept)
            scored = scorer.score(
                blocks,
                scorer.counts(),
                run["trained_against"],
                run["pretraining"],
                final=final,
                kept=kept if shown else None,
            )
            rows += [{"sample_seed": sampling_seed} | row for row in scored]
        entries.append(
            {
                "snapshot": snapshot["name"],
                "final": final,
                "grid": snapshot["grid"],
                "sha256": snapshot["sha256"],
                "nfe": 1,
                "ema": snapshot["ema_half_life"],
                "images": snapshot["ledger"]["images"],
                "flops": snapshot["ledger"]["flops"],
                "seconds": snapshot["ledger"]["seconds"],
                "rows": rows,
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
    sampler = experiment.teachers[teacher].sampler
    scorer, device, kept = Scorer(experiment), experiment.device, {}
    record = read_json(folder / "teacher.json")
    denoiser = load_denoiser(folder, record["sha256"], device)
    embeddings = load_embeddings(folder)
    many = heun_generator(denoiser, sampler.settings())
    one = one_step_generator(denoiser, sampler.sigma_max)
    whole: dict[str, Tensor] = {}  # of the first sampling seed's, for other libraries
    held_out = scorer.dataset.held_out
    common = {"snapshot": "", "final": True, "grid": [], "sha256": record["sha256"]}
    # Nothing is known of how an imported teacher was trained.
    common |= {"ema": getattr(experiment.teachers[teacher], "ema_half_life", None)}
    common |= {key: record.get("ledger", {}).get(key) for key in ("images", "flops", "seconds")}
    nothing = dict.fromkeys(("ema", "images", "flops", "seconds", "sha256"))
    entries = []

    def add(name: str, nfe: int | None, rows: list[dict]) -> None:
        entry = common | {"student": name, "nfe": nfe, "rows": rows}
        entries.append(entry | (nothing if name == "floor" else {}))
        print(f"{teacher}: scored {name}", file=sys.stderr, flush=True)

    for name, nfe, generate in (
        ("teacher", sampler.nfe, many),
        ("teacher-1step", 1, one),
    ):
        rows = []
        for seed in experiment.evaluation.sampling_seeds:
            blocks = scorer.generated(generate, device, seed, embeddings)
            if shown := not kept:
                blocks = keeping(blocks, experiment.evaluation.grid_samples, kept)
                blocks = keeping(blocks, min(experiment.evaluation.num_samples, KEPT), whole)
            scored = scorer.score(blocks, scorer.counts(), kept=kept if shown else None)
            rows += [{"sample_seed": seed} | row for row in scored]
        add(name, nfe, rows)
    if len(held_out):
        pairs: dict[str, Tensor] = {}
        rows = scorer.score(held_out.blocks(), [scorer.floor_count], kept=pairs)
        kept |= {f"floor_{name}": tensor for name, tensor in pairs.items()}
        add("floor", None, [{"sample_seed": None} | row for row in rows])
    if not scorer.first:
        return
    file = experiment.reference_score_path(teacher).with_suffix(".kept.safetensors")
    _finish(
        experiment.reference_score_path(teacher),
        {
            "kept": {"file": file.name, "sha256": save_tensors(file, whole)},
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
