"""Checks of the section `evaluation` and of the metrics in `claims`."""

from collections.abc import Collection, Iterator, Mapping

from harness.config.schema import DataSection, EvaluationSection, ExperimentFile, Names
from harness.data.registry import has_captions
from harness.errors import Problem, did_you_mean
from harness.evaluation.feature_set import DENSITY_NEIGHBOURS, GROUPS
from harness.evaluation.references import statistics_extractor
from harness.evaluation.registry import METRICS, defined_for
from harness.evaluation.selection import criterion_in
from harness.features.base import provides
from harness.features.inception import DIM
from harness.io.downloads import source_problems

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


def check(file: ExperimentFile, names: Names, files: bool) -> list[Problem]:
    """Errors in `evaluation` and in the metrics of `claims` (see `harness.validation.CHECKS`)."""
    evaluation, data, features = file.evaluation, file.data, file.features
    extractors = evaluation.extractors if evaluation else []
    provided = {name: provides(features[name]) for name in extractors if name in features}
    problems = []
    if evaluation is not None:
        problems += _check_samples(evaluation)
        problems += _check_extractors(extractors, data, provided, set(names["features"]))
        problems += _check_statistics(evaluation, data, provided, files)
        main = "evaluation.main_metric", evaluation.main_metric
        found = list(_check_metric(*main, data, provided, evaluation.statistics is not None))
        # Without errors in these, the criterion of a selection is known.
        if not found and data is not None and provided.keys() == {*extractors}:
            found += _check_selection(evaluation, data, provided)
        problems += found
    for i, claim in enumerate(file.claims):
        if claim.metric is not None:
            problems += _check_metric(f"claims.{i}.metric", claim.metric, data, provided)
    return problems


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
    # Inception with several resizes is one network.
    networks = {"inception" if "inception" in provided.get(n, ()) else n for n in extractors}
    if len(networks) < 2 and (data is None or data.has_images):
        message = "name at least two networks; a lead in one may vanish in another's features"
        yield Problem(key, "too-few", message)
    if data is not None and any("fid-patch" in outputs for outputs in provided.values()):
        size = data.image_shape[1] if data.image_shape else data.resolution
        if size and size < PATCH_SIZE:
            message = f"resize: patch needs images of {PATCH_SIZE} pixels, not {size}"
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
