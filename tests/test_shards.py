"""The tensor store and the typed records."""

import json

import pytest
import torch

from harness.errors import UserError
from harness.io import shards as shards_module
from harness.io.artifacts import read_json
from harness.io.records import FeatureRecord, ScoreEntry, ScoreRecord, ScoreRow
from harness.io.shards import TensorShards
from harness.reporting.manifest import read_manifest


def _part(start: int, rows: int) -> dict[str, torch.Tensor]:
    x = torch.arange(start, start + rows, dtype=torch.float16)
    return {"x": x[:, None].repeat(1, 3), "y": torch.arange(start, start + rows)}


def _filled(folder) -> TensorShards:
    store = TensorShards(folder)
    for start, rows in ((0, 4), (4, 3), (7, 1)):
        store.append(_part(start, rows), seconds=start)
    return store


def test_shards_are_joined_in_order(tmp_path):
    store = _filled(tmp_path)
    index = store.finish(pairs=8)
    assert index["pairs"] == 8
    assert [record["seconds"] for record in TensorShards(tmp_path).records] == [0, 4, 7]
    loaded = TensorShards(tmp_path).load()
    assert torch.equal(loaded["y"], torch.arange(8))
    assert loaded["x"].dtype == torch.float16
    assert sum(len(part["x"]) for part in store) == 8


def test_rows_are_looked_up_across_shards(tmp_path, monkeypatch):
    _filled(tmp_path).finish()
    index = torch.tensor([7, 0, 5, 0, 3])
    for limit in (1 << 30, 0):
        monkeypatch.setattr(shards_module, "MAX_HASHED_BYTES", limit)
        rows = TensorShards(tmp_path).rows(index)
        assert torch.equal(rows["y"], index)
        assert torch.equal(rows["x"], index[:, None].half().repeat(1, 3))
    assert TensorShards(tmp_path).rows(index[:0])["x"].shape == (0, 3)
    with pytest.raises(IndexError):
        TensorShards(tmp_path).rows(torch.tensor([8]))


def test_tensors_of_a_shard_may_differ_in_rows(tmp_path):
    store = TensorShards(tmp_path)
    store.append({"features": torch.ones(5, 2), "pixels": torch.ones(2, 1)}, count=5)
    store.append({"features": torch.zeros(4, 2)}, count=4)
    loaded = store.load()
    assert {name: len(tensor) for name, tensor in loaded.items()} == {"features": 9, "pixels": 2}


def test_writing_resumes_at_the_first_incomplete_shard(tmp_path):
    _filled(tmp_path)
    damaged = tmp_path / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    store = TensorShards(tmp_path)
    assert [store.has(n) for n in range(4)] == [True, False, True, False]
    assert len(store.records) == 1
    store.append(_part(4, 3), seconds=4)
    assert len(store.records) == 3
    assert torch.equal(store.load()["y"], torch.arange(8))


def test_shards_may_be_written_in_any_order(tmp_path):
    first, second = TensorShards(tmp_path), TensorShards(tmp_path)
    second.write(1, _part(4, 4))
    assert len(first.records) == 0
    first.write(0, _part(0, 4))
    assert torch.equal(TensorShards(tmp_path).load()["y"], torch.arange(8))


def test_damaged_shard_names_the_folder_to_delete(tmp_path):
    _filled(tmp_path / "store").finish()
    path = tmp_path / "store/shard-00001.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    for read in (lambda s: s.load(), lambda s: s.rows(torch.tensor([4]))):
        with pytest.raises(UserError) as error:
            read(TensorShards(tmp_path / "store", owner=tmp_path))
        assert error.value.code == "damaged"
        assert f"delete {tmp_path} and" in str(error.value)


def test_a_new_shard_invalidates_the_index(tmp_path):
    store = _filled(tmp_path)
    before = store.finish()["sha256"]
    store.append(_part(8, 2))
    with pytest.raises(UserError) as error:
        _ = store.index
    assert error.value.code == "missing-file"
    assert store.finish()["sha256"] != before
    assert torch.equal(store.rows(torch.tensor([9]))["y"], torch.tensor([9]))


def _score_record() -> ScoreRecord:
    row = ScoreRow(
        metric="fd", extractor="cnn", num_samples=9, value=0.1 + 0.2, protocol="p", leave_out=[1.5]
    )
    entry = ScoreEntry(snapshot="s", final=True, grid=["images"], rows=[row])
    return ScoreRecord(
        weights="w",
        fingerprint="f",
        tf32=False,
        entries=[entry],
        protocols={"p": {"settings": None}},
        dimensions={"cnn": 2},
    )


def test_record_round_trip_is_exact(tmp_path):
    record = _score_record()
    record.write(tmp_path / "seed0.json")
    again = ScoreRecord.read(tmp_path / "seed0.json")
    assert again == record
    assert again.entries[0].rows[0].value == 0.1 + 0.2
    assert ScoreRecord.read_optional(tmp_path / "seed1.json") is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda value: value | {"format": 1}, "format"),
        (lambda value: {k: v for k, v in value.items() if k != "format"}, "damaged"),
        (lambda value: {k: v for k, v in value.items() if k != "weights"}, "damaged"),
        (lambda value: value | {"unknown": 1}, "damaged"),
        (lambda value: [value], "damaged"),
    ],
)
def test_unreadable_records_are_rejected(tmp_path, change, code):
    path = tmp_path / "seed0.json"
    _score_record().write(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as error:
        ScoreRecord.read(path)
    assert error.value.code == code


def test_missing_and_truncated_records_are_rejected(tmp_path):
    with pytest.raises(UserError) as error:
        FeatureRecord.read(tmp_path / "features.json")
    assert error.value.code == "missing-file"
    (tmp_path / "features.json").write_text('{"format": ')
    with pytest.raises(UserError) as error:
        FeatureRecord.read(tmp_path / "features.json")
    assert error.value.code == "damaged"


def test_json_with_a_byte_order_mark_is_read_and_other_encodings_are_refused(tmp_path):
    """Editors on Windows write the mark, and UTF-16."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "caf\xc3\xa9"}\r\n')
    assert read_json(path) == {"a": "café"} == read_manifest(path)
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes('{"a": "café"}'.encode(encoding))
        with pytest.raises(UserError) as error:
            read_json(path)
        assert error.value.code == "damaged" and "\n" not in str(error.value)
