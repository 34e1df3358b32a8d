"""`exact`: every difference from the run behind a published number is found and named."""

import re
from dataclasses import replace

import pytest

from harness.config import schema
from harness.config.experiment import Paths
from harness.discriminators.class_table import CLASS_TABLE_SHA256
from harness.io.artifacts import write_json
from harness.io.records import DataRecord
from harness.method import METHODS
from harness.reporting.published import tables as paper
from harness.reporting.published.exact import (
    NETWORKS,
    PUBLISHED,
    evaluation_differences,
    training_differences,
)
from harness.reporting.published.match import concerning, is_stochastic, network, runs_of
from tests.conftest import ROOT
from tests.reports import write_run
from tests.test_paper import paper_experiment, rows_of, scores

EXACT = ["cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64", "imagenet64"]


def match_of(experiment) -> dict[str, set[str]]:
    """Student -> its setting matches, as if all were scored."""
    names = [*experiment.students, *experiment.reference_rows]
    rows = [(name, 0, "fid-edm", 2.0) for name in names]
    rows += [(*row, {"final": False, "selected": 20}) for row in rows]
    table = scores(*rows)
    rows = paper.paper_table(experiment, table)
    rows = rows[rows.setting_match != ""]
    return {
        name: set(group.setting_match)
        for name, group in rows.groupby(rows.note.str.extract("(\\S+) of ", expand=False))
    }


@pytest.mark.parametrize("name", EXACT)
def test_exact_requires_all_published_settings(name):
    """GDD's students, the teachers and, on CIFAR-10, SiD's students of configs/paper are exact.
    SIM's settings were never published, DMD's code was not, and SiD's has fp16 at 64 pixels."""
    matches = match_of(paper_experiment(name))
    assert matches.pop("sim", {"unknown"}) == {"unknown"}
    exact = {row for row, match in matches.items() if match == {"exact"}}
    changed = ("dmd",) if name.startswith("cifar10") else ("dmd", "sid")
    others = {row for row in matches if row.split("-")[0] in changed}
    assert exact and exact | others == matches.keys() and exact.isdisjoint(others), matches
    assert all(matches[row] == {"changed"} for row in others)
    matches = match_of(paper_experiment(f"{name}-scaled"))
    assert all(match == {"scaled"} for match in matches.values())


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"training": {"settings": {"lr": 2e-5}}}, ["lr"]),
        ({"students": {"sid": {"settings": {"t_max": 0.9, "alpha": 1.0}}}}, ["t_max"]),
        ({"students": {"sid": {"budget": [{"unit": "images", "amount": 256}]}}}, ["budget"]),
        ({"students": {"sid": {"budget": [{"unit": "flops", "amount": 5e8}]}}}, ["budget"]),
        ({"students": {"sid": {"teacher": "ve"}}}, ["network (ve instead of vp)"]),
        ({"teachers": {"vp": {"network": {"model_channels": 64, "num_blocks": 3}}}},
         ["network (model_channels 64 instead of 128, num_blocks 3 instead of 4)"]),
        ({"teachers": {"vp": {"network": {"attn_resolutions": [16, 8]}}}},
         ["network (attn_resolutions [16, 8] instead of [16])"]),
        ({"teachers": {"vp": {"network": {"encoder_type": "residual"}}}},
         ["network (encoder_type residual instead of standard)"]),
        ({"teachers": {"vp": {"network": {"channel_mult": [1, 2, 2]}}}},
         ["network (channel_mult [1, 2, 2] instead of [2, 2, 2])"]),
        ({"data": {"held_out": 0.1}}, ["held_out (0.1 instead of 0)"]),
        ({"students": {"sid": {"precision": "bf16"}}}, ["precision (bf16 instead of fp32)"]),
        ({"training": {"tf32": True}}, ["tf32"]),
        ({"evaluation": {"precision": "bf16"}}, ["evaluation.precision (bf16 instead of fp32)"]),
        ({"students": {"sid": {"settings": {"generator_dropout": 0.0}}}}, ["generator_dropout"]),
        ({"students": {"sid": {"settings": {"labels": "uniform"}}}}, ["labels"]),
        ({"students": {"sid": {"settings": {"ema_half_life": 0}}}}, ["ema_half_life"]),
        ({"evaluation": {"num_samples": 2000}}, []),
    ],
)  # fmt: skip
def test_a_student_with_other_settings_is_not_exact(overrides, changed):
    experiment = paper_experiment("cifar10-uncond", **overrides)
    entries = concerning(experiment.paper)
    entries = [e for e in entries if e["paper"] == "SiD" and "sid" in runs_of(experiment, e)]
    assert entries and all(training_differences(experiment, "sid", e) == changed for e in entries)
    table = scores(("sid", 0, "fid-edm", 2.0, {"num_samples": experiment.evaluation.num_samples}))
    rows = rows_of(paper.paper_table(experiment, table), "SiD", "SiD")
    assert set(rows[rows.reproduced != ""].setting_match) == {"changed"}
    if changed:
        note = f"different from the published run: {changed[0]};"
        assert rows.note.str.contains(note, regex=False).any()


def entry_of(experiment, row: str) -> dict:
    """A published FID of a row of an experiment."""
    entries = [e for e in concerning(experiment.paper) if e["metric"] == "FID"]
    return next(e for e in entries if row in runs_of(experiment, e))


def test_a_teacher_trained_here_is_not_exact():
    experiment = paper_experiment("cifar10-uncond")
    section = schema.TrainedTeacher(network=dict(experiment.teachers["vp"].network), images=1)
    experiment = replace(experiment, teachers={**experiment.teachers, "vp": section})
    for row in ("sid", "teacher/vp"):
        entry = entry_of(experiment, row)
        assert training_differences(experiment, row, entry) == ["teacher (trained here)"]


@pytest.mark.parametrize("name", EXACT)
def test_published_networks_and_statistics_are_those_of_the_experiments(name):
    """An imported network's config.json has all arguments, with the labels and the resolution."""
    experiment = paper_experiment(name)
    dataset = PUBLISHED[experiment.paper.dataset]
    assert experiment.evaluation.statistics == f"datasets/fid-refs/{dataset.statistics}"
    conditional = experiment.paper.conditioning == "cond"
    assert (experiment.data.num_classes or 0) == conditional * dataset.classes
    kinds = {network(experiment, teacher) for teacher in experiment.teachers}
    assert kinds == set(dataset.kinds) <= NETWORKS.keys()
    for teacher in experiment.teachers.values():
        assert teacher.sampler.steps == dataset.steps


def test_an_imported_network_is_compared_by_all_arguments(tmp_path):
    """config.json takes precedence over the experiment, and has what the data decide."""
    experiment = paper_experiment("cifar10-cond")
    experiment = replace(experiment, paths=Paths(tmp_path))
    official = NETWORKS["vp"] | PUBLISHED["CIFAR-10"].network
    official |= {"_class_name": "SongUNet", "_diffusers_version": "0", "in_channels": 3}
    for change, expected in (
        ({}, []),
        ({"label_dim": 0}, ["network (label_dim 0 instead of 10)"]),
        ({"img_resolution": 64}, ["network (img_resolution 64 instead of 32)"]),
        ({"label_dropout": 0.1}, ["network (label_dropout 0.1 instead of 0)"]),
        ({"channel_mult_emb": 2}, ["network (channel_mult_emb 2 instead of 4)"]),
        ({"augment_dim": 0}, ["network (augment_dim 0 instead of 9)"]),
    ):
        folder = experiment.paths.teacher("vp")
        write_json(folder / "config.json", official | {"label_dim": 10} | change)
        for row in ("sid", "teacher/vp"):
            assert training_differences(experiment, row, entry_of(experiment, row)) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma_max": 60.0}, "sigma_max 60 instead of 80"),
        ({"sigma_min": 0.01}, "sigma_min 0.01 instead of 0.002"),
        ({"rho": 5.0}, "rho 5 instead of 7"),
        ({"guidance": 2.0}, "guidance 2 instead of 1"),
    ],
)
def test_samplers_of_teachers_and_pairs_are_compared(change, text):
    experiment = paper_experiment("cifar10-cond", teachers={"vp": {"sampler": change}})
    differences = {
        row: training_differences(experiment, row, entry_of(experiment, row))
        for row in ("teacher/vp", "dmd", "sid")
    }
    expected = {"teacher/vp": [f"sampler ({text})"], "dmd": [f"sampler of the pairs ({text})"]}
    assert differences == expected | {"sid": []}


def test_churn_is_compared_where_the_sampler_is_stochastic():
    experiment = paper_experiment("imagenet64")
    entry = entry_of(experiment, "teacher")
    assert is_stochastic(entry) and training_differences(experiment, "teacher", entry) == []
    changed = {"teachers": {"adm": {"sampler": {"s_max": None, "s_noise": 1.0}}}}
    found = training_differences(paper_experiment("imagenet64", **changed), "teacher", entry)
    assert found == ["sampler (s_max None instead of 50, s_noise 1 instead of 1.003)"]


@pytest.mark.parametrize(
    ("metric", "overrides", "expected"),
    [
        ("fid-edm", {}, []),
        ("fid-legacy-tensorflow", {}, []),  # the same resize
        ("fid-clean", {}, ["metric (fid-clean instead of fid-edm)"]),
        ("fid-edm", {"statistics": "https://example.org/refs/cifar10-32x32.npz"}, []),
        ("fid-edm", {"statistics": "datasets/fid-refs/ffhq-64x64.npz"},
         ["statistics (ffhq-64x64.npz instead of cifar10-32x32.npz)"]),
        ("fid-edm", {"statistics": None},
         ["statistics (those of the images instead of cifar10-32x32.npz)"]),
    ],
)  # fmt: skip
def test_detector_and_reference_are_those_of_the_paper(metric, overrides, expected):
    overrides = overrides | {"statistics_sha256": "0" * 64 if "https" in str(overrides) else None}
    experiment = paper_experiment("cifar10-uncond", evaluation=overrides)
    for row in ("gdd-i", "sid", "teacher/vp"):
        assert evaluation_differences(experiment, entry_of(experiment, row), metric) == expected
    table = scores(
        *(("gdd-i", 0, metric, 2.0, {"final": f, "selected": 20}) for f in (True, False))
    )
    table = rows_of(paper.paper_table(experiment, table), "GDD", "GDD-I")
    row = table[table.reproduced != ""].iloc[0]
    assert row.setting_match == ("changed" if expected else "exact")
    assert all(phrase in row.note for phrase in expected)


def test_held_out_counts_only_where_it_divides_the_training_images(tmp_path):
    """CIFAR-10's official files hold out the test set, which papers do not train on either."""
    data = {"name": "cifar10", "source": "none.tar.gz", "held_out": None}
    experiment = paper_experiment("cifar10-uncond", data=data)
    experiment = replace(experiment, paths=Paths(tmp_path))
    entry = entry_of(experiment, "sid")
    for registered, expected in ((False, ["held_out (0.2 instead of 0)"]), (True, [])):
        DataRecord(
            name="cifar10", registered=registered, class_names=[], train_images=50_000,
            held_out_images=10_000, image_shape=[3, 32, 32], images_sha256="0", sha256="0",
        ).write(tmp_path / "data" / "data.json")  # fmt: skip
        assert training_differences(experiment, "sid", entry) == expected


def test_another_class_table_is_not_exact(tmp_path):
    experiment = paper_experiment("imagenet64")
    experiment = replace(experiment, paths=Paths(tmp_path))
    entry = entry_of(experiment, "gdd-i")
    for sha256, expected in (
        (CLASS_TABLE_SHA256, []),
        ("0" * 64, ["class_table (not the authors' table)"]),
    ):
        write_run(experiment, "gdd-i", 0, inputs={"class_table": sha256})
        assert training_differences(experiment, "gdd-i", entry) == expected


STATUSES = {"same", "setting", "negligible", "stricter", "deviation", "gate"}


def test_every_row_of_fidelity_has_a_status_and_settings_name_their_keys():
    """docs/fidelity.md: a row whose status is `setting` names a key that an experiment can set, and
    that decides a training run, the evaluation, or a teacher's sampler."""
    keys = {
        field for method in ("sid", "dmd", "gdd") for field in METHODS[method].Config.model_fields
    }
    sections = (schema.StudentSection, schema.EvaluationSection, schema.TrainingSection)
    keys |= {field for section in sections for field in section.model_fields}
    keys |= {"data.held_out", "teachers.<name>.sampler"}
    keys |= {f"evaluation.{field}" for field in schema.EvaluationSection.model_fields}
    rows = (ROOT / "docs" / "fidelity.md").read_text().splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "|" in row]
    rows = [row for row in rows if row[0].strip("-") and row[-1] not in ("status", "")]
    assert len(rows) > 50
    for what, _, here, status in rows:
        assert re.match(r"\w+", status)[0] in STATUSES, what
        named = {name.split(":")[0] for name in re.findall("`([^`]+)`", here)}
        assert status != "setting" or named & keys, (what, named)
