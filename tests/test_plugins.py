"""Plug-ins: classes from a file outside the repository."""

import shutil

import pandas as pd
import pytest

from harness.errors import UserError
from harness.validation import parse_experiment
from tests.conftest import DATA, Workspace

FILE = DATA / "example" / "plugins.py"


def with_plugins(config: dict, path) -> dict:
    """The tiny experiment with every class of the plug-in file."""
    return config | {
        "plugins": [str(path)],
        "data": {"name": "stripes"},
        "features": {
            "cnn": {"type": "cnn", "images": 1280, "width": 8},
            "raw-pixels": {"type": "raw-pixels"},
        },
        "teachers": {
            "conv": {
                "network": {"type": "ConvNet", "width": 8},
                "images": 640,
                "batch": 64,
                "sampler": {"steps": 3},
            }
        },
        "students": {"example": {"method": "teacher-output"}},
        "training": {"seeds": [0], "budget": [{"unit": "images", "amount": 64}]},
        "evaluation": {
            "num_samples": 100,
            "sampling_seeds": [0],
            "extractors": ["cnn", "raw-pixels"],
        },
    }


@pytest.mark.workflow
def test_one_file_adds_a_class_of_every_kind(tmp_path):
    plugins = tmp_path / "elsewhere" / "plugins.py"
    plugins.parent.mkdir()
    shutil.copy(FILE, plugins)
    workspace = Workspace.create(tmp_path / "project")
    workspace.write_config(with_plugins(workspace.config(), plugins))
    done = workspace.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(workspace.results / "tables" / "metrics.csv")
    student = table[(table.student == "example") & (table.status == "ok")]
    assert set(student.extractor) == {"cnn", "raw-pixels"}
    assert set(student[student.metric == "mean-brightness"].extractor) == {"raw-pixels"}
    assert student[student.metric == "mean-brightness"].value.between(0, 1).all()


def test_plugin_file_enters_the_fingerprints_that_depend_on_it(tiny, tmp_path, registries):
    experiment = parse_experiment(with_plugins(tiny, FILE), "x", tmp_path)
    assert set(experiment.plugin_hashes) == {"data", "features.raw-pixels", "teachers.conv"}
    assert "plugin" in experiment.features_fingerprint("raw-pixels")
    assert "plugin" not in experiment.features_fingerprint("cnn")
    assert experiment.student_run("example", 0).method_source == (FILE.resolve(),)


def test_missing_or_broken_plugin_is_a_user_error(tiny, tmp_path, registries):
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no')\n")
    for path, code in ((tmp_path / "none.py", "missing-file"), (broken, "plugin")):
        with pytest.raises(UserError) as error:
            parse_experiment(tiny | {"plugins": [str(path)]}, "x")
        assert error.value.code == code
