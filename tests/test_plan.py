"""`harness plan`: the printed table. tests/test_paper_configs.py tests the counts."""

import pytest
import yaml

from harness.cli import main


def test_every_student_has_a_row(tiny, tmp_path, capsys):
    """Local files may be missing. A budget in seconds gives no number of images."""
    sid, gdd = tiny["students"]["sid"], tiny["students"]["gdd-i"]
    tiny["students"] = {"sid": sid | {"budget": [{"unit": "seconds", "amount": 5}]}, "gdd-i": gdd}
    tiny["teachers"]["edm"]["source"] = "missing.pkl"
    for key in ("images", "batch"):
        del tiny["teachers"]["edm"][key]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    assert main(["plan", "--configfile", str(tmp_path / "x.yaml"), "--tflops", "0.001"]) == 0
    header, _, *lines = (line for line in capsys.readouterr().out.splitlines() if "|" in line)
    names = [name.strip() for name in header.strip("|").split("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in cells}
    assert list(rows) == ["sid", "gdd-i"]
    sid, gdd = rows["sid"], rows["gdd-i"]
    assert sid["images"] == sid["PFLOPs"] == sid["hours"] == "–"
    assert sid["auxiliary (M)"] == sid["trained (M)"] == sid["parameters (M)"] == "0.02"
    # Two points of the grid (64 and 128 images) and the end; 17,961 float32 weights.
    assert sid["snapshots"] == "–" and gdd["snapshots"] == "3 x 71.8 kB"
    assert gdd["trained (M)"] == "0.01" and gdd["micro-batch"] == "16" and gdd["images"] == "160"
    work = 160 * float(gdd["GFLOPs/image"])
    assert float(gdd["PFLOPs"]) == pytest.approx(work / 1e6, rel=1e-3)
    assert float(gdd["hours"]) == pytest.approx(work / 3600, rel=1e-2)  # at one GFLOP/s
