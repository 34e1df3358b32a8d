"""`harness compare`: several experiments in one table, each column with one protocol."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from harness.cli import main
from harness.errors import UserError
from harness.io.artifacts import digest
from harness.reporting.collect import COLUMNS, SCHEMA
from harness.reporting.compare import labels, print_comparison, read_results

PROTOCOL = {
    "metric": "fd",
    "extractor": "cnn",
    "extractor_sha256": {"weights": "a" * 64},
    "num_samples": 400,
    "quantisation": "uint8",
}


def write(root, name="digits", values=None, protocol=PROTOCOL, manifest=True, **columns):
    """An experiment's folder as the report stage leaves it. `values`: student -> one per seed."""
    rows = []
    for student, numbers in (values or {"teacher": [0.5], "sid": [1.0, 2.0]}).items():
        for seed, value in enumerate(numbers):
            real = student == "teacher"
            for images in [None] if real else [100, 200]:
                row = dict.fromkeys(COLUMNS) | {
                    "schema": SCHEMA, "experiment": name, "student": student,
                    "seed": None if real else seed, "images": images, "flops": 3e12, "seconds": 7,
                    "sample_seed": 0, "metric": "fd", "extractor": "cnn", "num_samples": 400,
                    "value": value if images != 100 else 99.0, "protocol": digest(protocol),
                    "status": "ok",
                }  # fmt: skip
                rows.append(row | columns)
    (root / "tables").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(root / "tables" / "metrics.csv", index=False)
    if manifest:
        record = {
            "commit": "c" * 40,
            "device": {"used": "cpu", "processor": "a machine"},
            "packages": {"torch": "2.15.0"},
            "protocols": {digest(protocol): protocol},
        }
        (root / "manifest.json").write_text(json.dumps(record))
    return root


def compare(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err.strip().splitlines()[-1]


def cells(text, title):
    """The rows of the table under a heading, as lists of texts."""
    lines = text.split(f"## {title}")[1].strip().splitlines()
    rows = []
    for line in lines:
        if line.startswith("#"):
            break
        if line.startswith("|") and not line.startswith("|:"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_columns_with_one_protocol_are_compared(tmp_path, capsys):
    a = write(tmp_path / "a", "one")
    b = write(tmp_path / "b", "two", {"teacher": [0.5], "sid": [4.0], "sim": [6.0, 8.0]})
    code, text, _ = compare(capsys, a, b, "--out", tmp_path / "out.csv")
    assert code == 0 and "Different protocols" not in text
    assert cells(text, "fd_n400_cnn ↓") == [
        ["", "one", "two"],
        ["teacher", "0.500", "0.500"],
        ["sid", "1.50 ± 0.71", "4.00"],  # the last weights, not the snapshots (99)
        ["sim", "–", "7.00 ± 1.41"],
    ]
    assert cells(text, "training, seconds")[2] == ["sid", "7", "7"]
    assert "| processor | a machine | a machine |" in " ".join(text.split())
    table = pd.read_csv(tmp_path / "out.csv").set_index("student")
    assert table["one"]["sid"] == 1.5 and table["two"]["sid"] == 4.0
    assert table["two_std"]["sim"] == pytest.approx(2**0.5) and table["two_seeds"]["sim"] == 2
    assert pd.isna(table["one"]["sim"]) and set(table.protocol) == {digest(PROTOCOL)}


def test_a_table_of_an_earlier_version_has_no_devices(tmp_path):
    path = write(tmp_path / "a") / "tables" / "metrics.csv"
    assert read_results(tmp_path / "a").final.device.isna().all()
    table = pd.read_csv(path).drop(columns="device")
    table.to_csv(path, index=False)
    assert read_results(tmp_path / "a").final.device.isna().all()
    table.assign(device="NVIDIA H200").to_csv(path, index=False)
    assert set(read_results(tmp_path / "a").final.device) == {"NVIDIA H200"}


def test_two_protocols_are_never_in_one_column(tmp_path, capsys):
    other = PROTOCOL | {"extractor_sha256": {"weights": "b" * 64}, "quantisation": "none"}
    a = write(tmp_path / "a", "one")
    b = write(tmp_path / "b", "two", protocol=other)
    code, text, _ = compare(capsys, a, b, "--out", tmp_path / "out.csv")
    assert code == 0
    assert (
        "**Different protocols, not comparable:** fd_n400_cnn: extractor_sha256.weights is "
        "aaaaaaaa… in one and bbbbbbbb… in two; quantisation is uint8 in one and none in two."
    ) in text.splitlines()
    hashes = [digest(PROTOCOL)[:8], digest(other)[:8]]
    assert cells(text, "fd_n400_cnn ↓")[0] == [
        "", f"one (protocol {hashes[0]})", f"two (protocol {hashes[1]})",
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == 4 and table[["one", "two"]].notna().sum(axis=1).eq(1).all()


@pytest.mark.parametrize("rows", [slice(4, None), slice(1, None)])
def test_a_folder_with_mixed_protocols_in_a_column_is_rejected(tmp_path, capsys, rows):
    """Within a student, whose seeds would be averaged, or between students."""
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    path = a / "tables" / "metrics.csv"
    table = pd.read_csv(path)
    table.loc[table.index[rows], "protocol"] = "f" * 16
    table.to_csv(path, index=False)
    code, out, line = compare(capsys, a, b)
    assert (code, out) == (2, "") and f"{path}: column fd_n400_cnn" in line
    with pytest.raises(UserError) as error:
        read_results(a)
    assert error.value.code == "mixed-protocols"


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\xff"])
def test_a_damaged_manifest_is_rejected(tmp_path, capsys, text):
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    path = a / "manifest.json"
    path.write_text(text, encoding="latin-1")
    code, out, line = compare(capsys, a, b)
    assert (code, out) == (2, "") and f"{path} is damaged (" in line
    assert "delete this file" in line


@pytest.mark.parametrize(
    ("column", "text", "kind"),
    [("value", "about 2", "a number"), ("value", "inf", "a number"), ("stderr", "x", "a number"),
     ("images", "many", "a number"), ("flops", "x", "a number"), ("seconds", "x", "a number"),
     ("num_samples", "400 or so", "an integer"), ("seed", "1.5", "an integer"),
     ("sample_seed", "x", "an integer"), ("nfe", "one", "an integer")],
)  # fmt: skip
def test_invalid_numbers_are_rejected_with_their_row(tmp_path, capsys, column, text, kind):
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    path = a / "tables" / "metrics.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[3, column] = text
    table.to_csv(path, index=False)
    code, out, line = compare(capsys, a, b)
    assert (code, out) == (2, "")
    assert f"{path}: {column} in row 4 is {text!r}, not {kind};" in line


def test_names_may_look_like_numbers(tmp_path, capsys):
    a, b = (write(tmp_path / n, n, {"7": [1.0, 2.0]}, extractor="3") for n in ("one", "two"))
    code, text, _ = compare(capsys, a, b)
    assert code == 0 and "## fd_n400_3 ↓" in text and "| 7  | 1.50 ± 0.71 |" in text


def test_results_of_one_experiment_are_labelled_by_folder(tmp_path, capsys):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    _, text, _ = compare(capsys, a, b)
    assert cells(text, "fd_n400_cnn ↓")[0] == ["", str(a), str(b)]
    assert code_of(labels, [read_results(a)] * 2) == "duplicate"


def test_sampling_seeds_count_once_per_training_seed(tmp_path, capsys):
    a = write(tmp_path / "a", "one")
    path = a / "tables" / "metrics.csv"
    table = pd.read_csv(path)
    again = table.assign(sample_seed=1, value=table.value + 2)
    pd.concat([table, again]).to_csv(path, index=False)
    _, text, _ = compare(capsys, a, write(tmp_path / "b", "two"))
    assert cells(text, "fd_n400_cnn ↓")[2] == ["sid", "2.50 ± 0.71", "1.50 ± 0.71"]


def test_missing_manifests_and_failed_runs_are_reported(tmp_path, capsys):
    other = PROTOCOL | {"num_samples": 1}
    a = write(tmp_path / "a", "one")
    b = write(tmp_path / "b", "two", protocol=other, manifest=False)
    _, text, _ = compare(capsys, a, b)
    assert f"fd_n400_cnn: protocol {digest(other)} of two is unknown" in text
    write(tmp_path / "c", "three", metric=None, num_samples=None, status="failed (out of memory)")
    _, text, _ = compare(capsys, a, tmp_path / "c")
    assert "three: sid: failed (out of memory)" in text


def code_of(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return error.value.code


def test_invalid_folders_and_tables_are_rejected(tmp_path, capsys):
    good, old = write(tmp_path / "good"), write(tmp_path / "old", schema=0)
    code, out, line = compare(capsys, good, tmp_path / "nowhere")
    assert (code, out) == (2, "") and f"{tmp_path}/nowhere does not exist" in line
    assert code_of(read_results, tmp_path) == "missing-file"
    assert code_of(read_results, old) == "schema"
    table = old / "tables" / "metrics.csv"
    for text in (f"schema,experiment\n{SCHEMA},digits\n", "", ",".join(COLUMNS) + "\n"):
        table.write_text(text)
        assert code_of(read_results, old) == "damaged"
    assert code_of(print_comparison, [good], None) == "arguments"
    assert code_of(print_comparison, [good, old], tmp_path) == "arguments"  # --out is a folder


def more(folder, *rows):
    """Add rows to a folder's metrics.csv: copies of the first one with other fields."""
    path = folder / "tables" / "metrics.csv"
    table = pd.read_csv(path)
    table = table[table.student == "sid"]
    extra = [table.assign(**row, protocol=digest({**PROTOCOL, **row})) for row in rows]
    pd.concat([pd.read_csv(path), *extra]).to_csv(path, index=False)


def headings(text):
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


COSTS = ["images that received a generator update", "training compute, TFLOPs", "training, seconds"]


def test_each_experiment_is_shown_at_its_own_largest_sample_count(tmp_path, capsys):
    """A small experiment is not dropped, whatever the others' sample counts are."""
    a, b = write(tmp_path / "a", "large"), write(tmp_path / "b", "small", num_samples=100)
    more(a, {"num_samples": 50_000}, {"num_samples": 200})
    _, text, _ = compare(capsys, a, b)
    assert headings(text) == ["fd_n50000_cnn ↓", "fd_n100_cnn ↓", *COSTS]
    assert cells(text, "fd_n100_cnn ↓")[-1] == ["sid", "–", "1.50 ± 0.71"]
    assert cells(text, "fd_n50000_cnn ↓")[-1] == ["sid", "1.50 ± 0.71", "–"]


def test_headline_columns_are_shown_unless_others_are_chosen(tmp_path, capsys):
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    for folder in (a, b):
        more(
            folder,
            {"metric": "recall"},
            {"metric": "recall", "extractor": "clip"},
            {"metric": "kd"},
            {"metric": "kd", "num_samples": 100},
            {"metric": "fd", "extractor": "clip"},
        )
    _, text, _ = compare(capsys, a, b)
    assert headings(text) == ["fd_n400_cnn ↓", "recall_n400_cnn ↑", "fd_n400_clip ↓", *COSTS]
    assert "Not shown: 3 columns of recall, kd (`--metric NAME`, `--all`)." in text
    _, text, _ = compare(capsys, a, b, "--metric", "kd", "--metric", "recall")
    assert headings(text) == ["recall_n400_cnn ↑", "recall_n400_clip ↑", "kd_n400_cnn ↓", *COSTS]
    _, text, _ = compare(capsys, a, b, "--all", "--out", tmp_path / "all.csv")
    assert len(headings(text)) == 6 + 3 and "Not shown" not in text
    assert pd.read_csv(tmp_path / "all.csv").column.nunique() == 6
    code, out, line = compare(capsys, a, b, "--metric", "recal")
    assert (code, out) == (2, "") and line.endswith(
        "--metric recal: no experiment has this metric; did you mean 'recall'?"
    )


def test_an_experiment_without_headline_metrics_shows_all(tmp_path, capsys):
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two", metric="sharpness")
    _, text, _ = compare(capsys, a, b)
    assert headings(text)[:2] == ["fd_n400_cnn ↓", "sharpness_n400_cnn"]
