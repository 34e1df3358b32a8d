"""The table of class vectors is read without executing anything in its file."""

import hashlib
import pickle

import pytest
import torch
from torch import nn

from harness.discriminators import class_table
from harness.discriminators.class_table import CLASS_TABLE_SHA256, load_class_table
from harness.errors import UserError
from harness.io.artifacts import save_tensors
from harness.streams import seeded
from harness.students.inputs import fetch_pretrained
from harness.validation import parse_experiment
from tests.test_config import problems
from tests.test_workflow import jobs


@pytest.fixture
def embedding():
    with seeded(0):
        return nn.Embedding(1000, 320)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_class_table_is_read_from_the_authors_format(embedding, tmp_path, protocol):
    file = tmp_path / "tf_efficientnet_lite0.pkl"
    file.write_bytes(pickle.dumps({"embed": embedding}, protocol))
    table, sha256 = load_class_table(file)
    assert torch.equal(table, embedding.weight) and table.dtype == torch.float32
    assert not table.requires_grad and table.is_contiguous()
    save_tensors(tmp_path / "table.safetensors", {"any": embedding.weight})
    again, same = load_class_table(tmp_path / "table.safetensors")
    assert torch.equal(again, table) and same == sha256
    values = embedding.weight.detach().numpy().tobytes()
    assert sha256 == hashlib.sha256(values).hexdigest() != CLASS_TABLE_SHA256


def test_table_from_an_address_must_be_the_authors_file(tmp_path, monkeypatch):
    monkeypatch.setattr(class_table, "fetch", lambda *source: source)
    address = "https://example.org/table.pkl"
    assert class_table.table_file(address) == (address, class_table.FILE_SHA256)
    assert class_table.table_file("table.pkl") == ("table.pkl", None)


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def inner_call(marker):
    """Tensor data with a hostile inner pickle."""
    return Call(torch.storage._load_from_bytes, pickle.dumps(Call(open, str(marker), "w"), 2))


@pytest.mark.parametrize(
    "hostile",
    [
        lambda marker: Call(open, str(marker), "w"),
        lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
        inner_call,
        lambda marker: nn.Linear(2, 2),
    ],
)
def test_hostile_class_table_is_rejected_and_not_executed(embedding, tmp_path, hostile):
    marker = tmp_path / "executed"
    for content in ({"embed": hostile(marker)}, {"embed": embedding, "more": hostile(marker)}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 4))
        with pytest.raises(UserError, match=r"x\.pkl rejected: ") as raised:
            load_class_table(tmp_path / "x.pkl")
        assert raised.value.code == "rejected" and "\n" not in str(raised.value)
        assert not marker.exists()


def test_other_files_are_not_class_tables(embedding, tmp_path):
    def code(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as raised:
            load_class_table(tmp_path / name)
        return raised.value.code

    whole = pickle.dumps({"embed": embedding})
    assert code("none.pkl") == code("none.safetensors") == "missing-file"
    assert code("cut.pkl", whole[: len(whole) // 2]) == "damaged"
    assert code("cut.safetensors", b"text") == "damaged"
    assert code("small.pkl", pickle.dumps({"embed": nn.Embedding(10, 320)})) == "class-table"
    assert code("empty.pkl", pickle.dumps({})) == "rejected"
    assert code("list.pkl", pickle.dumps([1])) == "rejected"
    assert code("text.pkl", pickle.dumps({"embed": "text"})) == "rejected"
    save_tensors(tmp_path / "two.safetensors", {"a": embedding.weight, "b": torch.zeros(2)})
    assert code("two.safetensors") == "class-table"
    with torch.no_grad():
        embedding.weight[3, 4] = float("nan")
    assert code("nan.pkl", pickle.dumps({"embed": embedding})) == "class-table"


# -- as an input of a student ---------------------------------------------------------------------


@pytest.fixture
def conditional(tiny) -> dict:
    """The tiny experiment with GDD's own discriminator."""
    settings = {"discriminator": "authors", "backbones": ["tf_efficientnet_lite0"]}
    settings |= {"ghost_batch": 1, "class_table": "table.safetensors"}
    tiny["students"] = {"gdd": {"method": "gdd", "settings": settings}, "sid": {"method": "sid"}}
    del tiny["features"]["tiny-critic"], tiny["training"]["settings"]["width"]
    return tiny


def test_class_table_file_must_exist_and_an_address_needs_no_hash(conditional):
    (problem,) = problems(conditional)
    assert (problem.key, problem.code) == ("students.gdd.settings.class_table", "missing-file")
    for source in ("https://example.org/table.pkl", "random"):
        conditional["students"]["gdd"]["settings"]["class_table"] = source
        experiment = parse_experiment(conditional, "x")
        assert experiment.class_table_files("gdd") == []


def test_class_tables_are_read_before_any_work(conditional, embedding, tmp_path, monkeypatch):
    table, fetched = tmp_path / "table.safetensors", []
    monkeypatch.setattr(class_table, "fetch", lambda *source: fetched.append(source) or table)
    monkeypatch.setattr("harness.features.timm_backbones.weights_file", lambda name: None)
    settings = conditional["students"]["gdd"]["settings"]
    settings["class_table"] = "https://example.org/table.pkl"
    students = parse_experiment(conditional, "x").students.values()
    save_tensors(table, {"any": embedding.weight})
    fetch_pretrained(students)
    assert fetched == [("https://example.org/table.pkl", class_table.FILE_SHA256)]
    save_tensors(table, {"any": embedding.weight[:10]})
    with pytest.raises(UserError, match=r"table\.safetensors: a class table of .* \(10, 320\)"):
        fetch_pretrained(students)


@pytest.mark.slow
def test_class_table_is_an_input_of_the_training_job(conditional, embedding, empty_workspace):
    save_tensors(empty_workspace.root / "table.safetensors", {"any": embedding.weight})
    empty_workspace.write_config(conditional)
    done = empty_workspace.snakemake("-n")
    assert done.returncode == 0, done.stdout + done.stderr
    train = {name: block for name, block in jobs(done.stdout).items() if name.startswith("train")}
    assert {name for name, block in train.items() if "table.safetensors" in block} == {
        "train gdd 0"
    }
    assert "train sid 0" in train
