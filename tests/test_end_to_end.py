"""One command makes every result: the fast tests' only run of the workflow."""

import pandas as pd
import pytest

from tests.conftest import Workspace

REPORT = [
    *("report.html", "manifest.json", "tables/metrics.csv"),
    *(f"tables/comparison.{kind}" for kind in ("csv", "md", "tex")),
    *(f"tables/pairwise.{kind}" for kind in ("csv", "md")),
    *(f"tables/agreement.{kind}" for kind in ("csv", "md")),
    *(
        f"figures/{name}.{kind}"
        for name in ("quality_vs_images", "quality_vs_compute", "samples", "nearest_neighbours")
        for kind in ("png", "pdf")
    ),
    *(f"figures/training_health.{kind}" for kind in ("png", "pdf")),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workspace:
    """The tiny experiment with one student, run by Snakemake."""
    workspace = Workspace.create(tmp_path_factory.mktemp("end-to-end") / "project")
    config = workspace.config()
    config["students"] = {"sid": config["students"]["sid"]}
    del config["features"]["tiny-critic"]
    for section in config["features"].values():
        section["images"] = 640
    config["evaluation"] |= {"sampling_seeds": [0]}
    config["training"] |= {"budget": [{"unit": "images", "amount": 64}], "snapshots": {}}
    workspace.write_config(config)
    workspace.last_run = workspace.snakemake()
    return workspace


def test_one_command_makes_every_result_and_leaves_nothing_to_do(run):
    done = run.last_run
    assert done.returncode == 0, done.stdout + done.stderr
    missing = [name for name in REPORT if not (run.results / name).stat().st_size]
    assert missing == []
    table = pd.read_csv(run.results / "tables" / "comparison.csv")
    assert list(table.student) == ["teacher", "teacher-1step", "floor", "sid"]
    assert "sid" in done.stdout and "results/tiny/figures" in done.stdout
    assert (run.results / "logs" / "students" / "sid" / "seed0.log").read_text()
    assert list(run.results.rglob("*.tmp")) == []
    again = run.snakemake()
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
