"""Checks of the section `evaluation` and of the metrics in `claims`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.config.schema import ClaimSection, DataSection, EvaluationSection, FeatureSettings
from harness.data.registry import has_captions
from harness.errors import Problem, did_you_mean
from harness.evaluation.estimates import GROUPS
from harness.evaluation.feature_set import DENSITY_NEIGHBOURS
from harness.evaluation.registry import METRICS, Metric
from harness.features.base import provides
from harness.io.downloads import source_problems

PATCH_SIZE = 299  # pixels of a patch FID


def minimum_samples(neighbours: int) -> tuple[int, int]:
    """The fewest reference images and the fewest samples with which every metric can be computed:
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


def check(
    evaluation: EvaluationSection | None,
    claims: Sequence[ClaimSection],
    data: DataSection | None,
    features: Mapping[str, FeatureSettings],
    feature_names: Iterable[str],
    files: bool = True,
) -> list[Problem]:
    """Errors in `evaluation` and in the metrics of `claims`.

    Sections with errors of their own are None, or missing in `features`; `feature_names` has all
    names. `files`: whether local files must exist.
    """
    extractors = evaluation.extractors if evaluation else []
    used = {name: features[name] for name in extractors if name in features}
    problems = []
    if evaluation is not None:
        problems += _check_samples(evaluation)
        problems += _check_extractors(evaluation, data, used, set(feature_names))
        problems += _check_statistics(evaluation, data, used, files)
        problems += _check_metric(
            "evaluation.main_metric",
            evaluation.main_metric,
            data,
            used,
            evaluation.statistics is not None,
        )
    for i, claim in enumerate(claims):
        if claim.metric is not None:
            problems += _check_metric(f"claims.{i}.metric", claim.metric, data, used)
    return problems


def _check_samples(evaluation: EvaluationSection) -> list[Problem]:
    problems, seeds = [], evaluation.sampling_seeds
    minimum = minimum_samples(evaluation.neighbours)[1]
    if evaluation.num_samples < minimum:
        message = f"too few; with neighbours {evaluation.neighbours} the metrics need {minimum}"
        problems.append(Problem("evaluation.num_samples", "too-few", message))
    if len(set(seeds)) < len(seeds):
        problems.append(Problem("evaluation.sampling_seeds", "duplicate", "duplicate seed"))
    if (evaluation.snapshot_seeds or 0) > len(seeds):
        message = f"{evaluation.snapshot_seeds} is more than the {len(seeds)} sampling_seeds"
        problems.append(Problem("evaluation.snapshot_seeds", "too-many", message))
    return problems


def _check_extractors(
    evaluation: EvaluationSection,
    data: DataSection | None,
    used: Mapping[str, FeatureSettings],
    names: set[str],
) -> list[Problem]:
    key, problems = "evaluation.extractors", []
    for name in evaluation.extractors:
        if name not in names:
            message = f"{name!r} is not under features{did_you_mean(name, names)}"
            problems.append(Problem(key, "unknown-name", message))
    inception = {name for name, settings in used.items() if "inception" in provides(settings)}
    # Inception with several resizes is one network.
    networks = set(evaluation.extractors) - inception | ({"inception"} if inception else set())
    if len(networks) < 2 and (data is None or data.has_images):
        message = "name at least two networks; a lead in one may vanish in another's features"
        problems.append(Problem(key, "too-few", message))
    if data is not None:
        size = data.image_shape[1] if data.image_shape else data.resolution
        patch = any("fid-patch" in provides(settings) for settings in used.values())
        if patch and size and size < PATCH_SIZE:
            message = f"resize: patch needs images of {PATCH_SIZE} pixels, not {size}"
            problems.append(Problem(key, "too-small", message))
    return problems


def _check_statistics(
    evaluation: EvaluationSection,
    data: DataSection | None,
    used: Mapping[str, FeatureSettings],
    files: bool,
) -> list[Problem]:
    key, statistics, problems = "evaluation.statistics", evaluation.statistics, []
    if statistics is not None:
        if used and not any("inception" in provides(settings) for settings in used.values()):
            problems.append(Problem(key, "unsupported", "needs an extractor of type inception"))
        problems += source_problems(key, statistics, evaluation.statistics_sha256, required=files)
    elif evaluation.statistics_sha256 is not None:
        message = "not allowed without evaluation.statistics"
        problems.append(Problem(f"{key}_sha256", "unused", message))
    elif data is not None and not data.has_images and data.prompts is None:
        message = "missing; this data set has no images to compare with"
        problems.append(Problem(key, "missing-key", message))
    return problems


def _check_metric(
    key: str,
    name: str,
    data: DataSection | None,
    used: Mapping[str, FeatureSettings],
    statistics: bool = True,
) -> list[Problem]:
    """A metric that ranks students: it has a direction, some extractor provides its inputs, and the
    data set has what it compares with. `statistics`: whether reference statistics are given."""
    if name not in METRICS:
        message = f"unknown metric {name!r}{did_you_mean(name, METRICS)}"
        return [Problem(key, "unknown-name", message)]
    metric, captioned = METRICS[name], data is not None and has_captions(data)

    def usable(other: Metric) -> bool:
        provided = any(other.applies_to(provides(settings)) for settings in used.values())
        return provided and (captioned or not other.needs_attributes)

    code, message = None, ""
    if metric.higher_is_better is None:
        code, message = "diagnostic", f"{name!r} is a diagnostic without a preferred direction"
    elif metric.needs_attributes and not captioned:
        code, message = "needs-captions", f"{name!r} needs captions; this data set has none"
    elif used and not usable(metric):
        others = [n for n in METRICS.names() if usable(METRICS[n])]
        ranking = [n for n in others if METRICS[n].higher_is_better is not None]
        code = "unsupported"
        message = f"no extractor provides {name!r}; available: {', '.join(ranking)}"
    elif (
        metric.needs_reference
        and not statistics
        and data is not None
        and data.prompts is not None
        and not data.has_images
    ):
        code = "needs-images"
        message = f"{name!r} compares with real images or statistics; there are none"
    return [Problem(key, code, message)] if code else []
