import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def test_throughput_prints_a_row_for_each_student():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.throughput", "--iterations", "1"),
            *("--configfile", "tests/data/tiny.yaml", "--students", "sid", "gdd"),
            *("--compare", "channels_last", "plain"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[0].strip() for row in rows] == ["sid", "gdd"]
    for row in rows:
        assert float(row[2]) > 0 and float(row[3]) > 0
        assert 0 < float(row[4].strip(" %")) < 100 or row[4].strip() == "0%"
        assert float(row[5]) > 0 and float(row[6]) > 0  # relative speed
    assert "matmul peak" in done.stdout


def test_evaluation_prints_both_ratios():
    sizes = ("--dim", "64", "--images", "40", "--size", "8", "--repeats", "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluation", *sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "|" in line][2:]
    assert len(rows) == 3
    for row in rows:
        assert float(row[3]) > 0 and float(row[4]) < 1e-4


def test_gpu_benchmark_runs_on_a_cpu(tmp_path):
    """With tiny networks and little time: what it has no time for is listed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path, "--limit", "40"]
    done = subprocess.run([*command, "--profile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert not results.get("failed") and results["machine"].keys() >= {"device", "date", "torch"}
    fused, plain, *_ = results["training"]
    assert fused["student"] == plain["student"] == "sid" and plain["pass"] == "plain"
    assert fused["images/s"] > 0 and fused["GFLOP/image"] == plain["GFLOP/image"]
    assert results["kernels"] and results["left out"]
    text = (tmp_path / "gpu.md").read_text()
    assert "NVIDIA H200" in text and "not measured here" in text and text in done.stdout
