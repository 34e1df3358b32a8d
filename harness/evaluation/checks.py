"""Checks of the section `evaluation` and of the metrics in `claims`."""

import math
from collections.abc import Collection, Iterator, Mapping

from harness.config.schema import DataSection, EvaluationSection, ExperimentFile, Names
from harness.data.registry import data_source, has_captions
from harness.errors import Problem, UserError, did_you_mean
from harness.evaluation.feature_set import DENSITY_NEIGHBOURS, GROUPS
from harness.evaluation.references import statistics_extractor
from harness.evaluation.registry import METRICS, Metric, defined_for
from harness.evaluation.selection import criterion_in
from harness.features.base import provides
from harness.features.inception import DIM
from harness.io.downloads import source_problems

KEPT_BYTES = 2 << 30  # of the images that are in memory at once
PATCH_SIZE = 299  # pixels of a patch FID

Provided = Mapping[str, Collection[str]]  # extractor -> what it provides


def minimum_samples(neighbours: int) -> tuple[int, int]:
    """Minimum numbers of reference images and of samples for all metrics to be defined: enough
    nearest neighbours exist, and no group of the jackknife is empty."""
    return max(neighbours, DENSITY_NEIGHBOURS) + 1, max(neighbours + 1, GROUPS)


def small_sample_warning(extractor: str, dim: int, count: int, floor: int | None) -> str:
    """Warning for sample sets no larger than the feature dimension, whose covariance is singular.
    `floor`: number of real images of the floor, if there is one."""
    advice = f"compare with the floor at n = {floor:,}" if floor else "there is no floor"
    return (
        f"{count:,} samples for {dim:,} features of {extractor}: the Fréchet distance is mostly "
        f"bias; {advice}"
    )


def check_pixels(metric: Metric, size: int) -> None:
    """Raise a `UserError` if a metric needs all pixels at once and the samples have more than
    KEPT_BYTES. size: their bytes."""
    if metric.stores_pixels and size > KEPT_BYTES:
        sizes = f"{size / 2**30:.1f} GiB of pixels; the limit is {KEPT_BYTES / 2**30:.0f} GiB"
        remedy = "define it by register_per_image, or lower evaluation.num_samples"
        raise UserError(f"metric {metric.name!r} needs {sizes}; {remedy}", "too-large")


def check(file: ExperimentFile, names: Names, files: bool) -> list[Problem]:
    """Errors in `evaluation` and in the metrics of `claims` (see `harness.validation.CHECKS`)."""
    evaluation, data, features = file.evaluation, file.data, file.features
    extractors = evaluation.extractors if evaluation else []
    provided = {name: provides(features[name]) for name in extractors if name in features}
    ranking = {f"claims.{i}.metric": c.metric for i, c in enumerate(file.claims) if c.metric}
    if evaluation is None:
        return [p for use in ranking.items() for p in _check_metric(*use, data, provided)]
    problems = [
        *_check_samples(evaluation),
        *_check_extractors(extractors, data, provided, set(names["features"])),
        *_check_statistics(evaluation, data, provided, files),
    ]
    main = "evaluation.main_metric", evaluation.main_metric
    found = list(_check_selected(evaluation, data, provided, ranking))
    found += _check_metric(*main, data, provided, evaluation.statistics is not None)
    # Without errors in these, the criterion of a selection is known.
    if not found and data is not None and provided.keys() == {*extractors}:
        found += _check_selection(evaluation, data, provided)
    problems += found
    for key, name in ranking.items():
        problems += _check_metric(key, name, data, provided)
    return problems


def _check_selected(
    evaluation: EvaluationSection,
    data: DataSection | None,
    provided: Provided,
    ranking: Mapping[str, str],
) -> Iterator[Problem]:
    """Check `evaluation.metrics`: its names, that an extractor has each metric, and that it lists
    the metrics that rank students. ranking: the metric of each claim, by its key."""
    key, selection = "evaluation.metrics", evaluation.metrics
    complete = provided.keys() == {*evaluation.extractors}
    for name in selection or ():
        if name not in METRICS:
            message = f"unknown metric {name!r}{did_you_mean(name, METRICS)}"
            yield Problem(key, "unknown-name", message)
        elif complete and (reason := _unserved(METRICS[name], data, provided)):
            yield Problem(key, "unsupported", reason)
    if selection is not None:
        for use, name in {"evaluation.main_metric": evaluation.main_metric, **ranking}.items():
            if name not in selection:
                message = f"{name!r} is not in evaluation.metrics; add it there"
                yield Problem(use, "not-selected", message)
    shape = _image_shape(data)
    for metric in defined_for(provided.values(), selection) if shape else ():
        try:
            check_pixels(metric, evaluation.num_samples * math.prod(shape))
        except UserError as error:
            yield Problem(key, error.code, str(error))


def _unserved(metric: Metric, data: DataSection | None, provided: Provided) -> str | None:
    """Why no extractor has a metric, in words; None if one has it."""
    if "attributes_correct" in metric.needs and data is not None and not has_captions(data):
        return f"{metric.name!r} needs captions; this data set has none"
    if any(map(metric.applies_to, provided.values())):
        return None
    if "pixels" in metric.requires:
        remedy = "add one of type pixels to features and to evaluation.extractors"
        return f"{metric.name!r} needs an extractor of pixels; {remedy}"
    names = ", ".join(metric.requires)
    return f"no extractor provides what {metric.name!r} requires ({names})"


def _image_shape(data: DataSection | None) -> tuple[int, int, int] | None:
    """The shape of the samples, if it is known before the data set is read."""
    try:
        return data and data_source(data).image_shape
    except UserError:
        return None


def _check_samples(evaluation: EvaluationSection) -> Iterator[Problem]:
    seeds, minimum = evaluation.sampling_seeds, minimum_samples(evaluation.neighbours)[1]
    if evaluation.num_samples < minimum:
        message = f"too few; with neighbours {evaluation.neighbours} the metrics need {minimum}"
        yield Problem("evaluation.num_samples", "too-few", message)
    if len(set(seeds)) < len(seeds):
        yield Problem("evaluation.sampling_seeds", "duplicate", "duplicate seed")
    if (evaluation.snapshot_seeds or 0) > len(seeds):
        message = f"{evaluation.snapshot_seeds} is more than the {len(seeds)} sampling_seeds"
        yield Problem("evaluation.snapshot_seeds", "too-many", message)
    if evaluation.selection_seed in seeds:
        message = f"{evaluation.selection_seed} is also a sampling seed; select by other noise"
        yield Problem("evaluation.selection_seed", "duplicate", message)
    if None not in (evaluation.selection_seed, evaluation.snapshot_seeds):
        message = "not allowed together with selection_seed, which scores all snapshots"
        yield Problem("evaluation.snapshot_seeds", "conflict", message)


def _check_extractors(
    extractors: list[str], data: DataSection | None, provided: Provided, names: set[str]
) -> Iterator[Problem]:
    key = "evaluation.extractors"
    for name in extractors:
        if name not in names:
            message = f"{name!r} is not under features{did_you_mean(name, names)}"
            yield Problem(key, "unknown-name", message)
    # Inception with several resizes is one network; pixels are none.
    networks = {
        "inception" if "inception" in provided.get(name, ()) else name
        for name in extractors
        if "features" in provided.get(name, ("features",))
    }
    if len(networks) < 2 and (data is None or data.has_images):
        message = "name at least two networks; a lead in one may vanish in another's features"
        if len(networks) < len(set(extractors) & names):
            message += " (one network with several resizes counts once, pixels do not count)"
        yield Problem(key, "too-few", message)
    patch = any("fid-patch" in outputs for outputs in provided.values())
    if patch and data is not None and data.size and data.size < PATCH_SIZE:
        message = f"resize: patch needs images of {PATCH_SIZE} pixels, not {data.size}"
        yield Problem(key, "too-small", message)


def _check_statistics(
    evaluation: EvaluationSection, data: DataSection | None, provided: Provided, files: bool
) -> Iterator[Problem]:
    key, statistics = "evaluation.statistics", evaluation.statistics
    if statistics is not None:
        if provided and not any("inception" in outputs for outputs in provided.values()):
            yield Problem(key, "unsupported", "needs an extractor of type inception")
        yield from source_problems(key, statistics, evaluation.statistics_sha256, required=files)
    elif evaluation.statistics_sha256 is not None:
        yield Problem(f"{key}_sha256", "unused", "not allowed without evaluation.statistics")
    elif data is not None and not data.has_images and data.prompts is None:
        yield Problem(key, "missing-key", "missing; this data set has no images to compare with")


def _check_selection(
    evaluation: EvaluationSection, data: DataSection, provided: Provided
) -> Iterator[Problem]:
    """The metric that selects snapshots must have a number."""
    if evaluation.selection_seed is None:
        return
    chosen = criterion_in(evaluation, provided)
    metric, what = chosen.metric, f"selects by {chosen.metric.name} in {chosen.extractor}, which"
    owner = statistics_extractor(provided) if evaluation.statistics else None
    reference = {need for need in metric.needs if need.startswith("reference.")}
    if chosen.extractor == owner:
        reference.discard("reference.statistics")
    if reference and not data.has_images:
        message = f"{what} has no real images or statistics to compare with"
        yield Problem("evaluation.selection_seed", "no-criterion", message)
    least = metric.samples_per_dim * DIM
    if "inception" in provided[chosen.extractor] and chosen.num_samples < least:
        message = f"{what} needs num_samples of at least {least:,}, not {chosen.num_samples:,}"
        yield Problem("evaluation.selection_seed", "no-criterion", message)


def _check_metric(
    key: str, name: str, data: DataSection | None, provided: Provided, statistics: bool = True
) -> Iterator[Problem]:
    """Check a metric that ranks students. `statistics`: whether reference statistics are given."""
    if name not in METRICS:
        message = f"unknown metric {name!r}{did_you_mean(name, METRICS)}"
        yield Problem(key, "unknown-name", message)
        return
    metric, captioned = METRICS[name], data is not None and has_captions(data)
    without_images = data is not None and data.prompts is not None and not data.has_images
    if metric.higher_is_better is None:
        message = f"{name!r} is a diagnostic without a preferred direction"
        yield Problem(key, "diagnostic", message)
    elif "attributes_correct" in metric.needs and not captioned:
        message = f"{name!r} needs captions; this data set has none"
        yield Problem(key, "needs-captions", message)
    elif provided and "pixels" in metric.requires and _unserved(metric, data, provided):
        yield Problem(key, "unsupported", _unserved(metric, data, provided))
    elif provided and not any(map(metric.applies_to, provided.values())):
        known = sorted(
            other.name
            for other in defined_for(provided.values())
            if other.higher_is_better is not None
            and (captioned or "attributes_correct" not in other.needs)
        )
        message = f"no extractor provides {name!r}; available: {', '.join(known)}"
        yield Problem(key, "unsupported", message)
    elif without_images and not statistics and "reference." in " ".join(metric.needs):
        message = f"{name!r} compares with real images or statistics; there are none"
        yield Problem(key, "needs-images", message)
