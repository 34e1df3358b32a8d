"""Packs: their format, what they refuse, and how results are joined."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.io.artifacts import link, load_tensors, save_tensors, sha256_file
from harness.io.records import DataRecord
from harness.validation import parse_experiment
from harness.workflow.stages import Stage, all_stages
from tools import container, merge, mosaics, pack
from tools.container import MANIFEST, Manifest, Pack, write_parts

MOSAIC = {"file": "m.webp", "size": 1, "sha256": "s", "shard": "s", "tensor": "t", "first": 0}
CODE = {"commit": "a" * 40, "dirty": False, "sha256": "s"}


def make_pack(folder, contents, size=container.PART, **facts) -> Pack:
    """A pack of files with these contents (path -> bytes)."""
    (sources := folder.with_name(f"{folder.name}-sources")).mkdir()
    folder.mkdir()
    files = {}
    for number, (path, content) in enumerate(contents.items()):
        files[path] = sources / str(number)
        files[path].write_bytes(content)
    entries, parts = write_parts(folder, files, size)
    facts = {"kind": "results", "experiment": {"name": "x"}, "code": CODE} | facts
    Manifest(files=entries, parts=parts, **facts).write(folder / MANIFEST)
    return Pack(folder)


def contents(found: Pack, folder) -> dict[str, bytes]:
    found.extract(lambda path: folder / path)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def code_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    return error.value.code


# -- the format -------------------------------------------------------------------------------------


def test_files_are_split_into_parts_and_joined(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    files = {"data/x.bin": noise, "data/y.json": b"{}", "scores/empty.csv": b""}
    files["tables/z.bin"] = noise[::-1]
    found = make_pack(tmp_path / "p", files, size=3000)
    sizes = [part.size for part in found.manifest.parts]
    assert len(sizes) == 4 and max(sizes) == 3000 and sum(sizes) < 10_100
    found.verify()
    assert contents(found, tmp_path / "out") == files
    again = make_pack(tmp_path / "q", dict(reversed(files.items())), size=3000)
    for path in sorted(found.folder.iterdir()):
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


def damage_byte(folder):
    path = folder / "part-001.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def change(folder, edit):
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        lambda folder: (folder / "part-001.bin").unlink(),
        lambda folder: change(folder, lambda m: m["parts"].pop()),
        lambda folder: change(folder, lambda m: m["files"].pop("data/b.bin")),
        lambda folder: change(folder, lambda m: m["files"]["data/a.bin"].update(sha256="0" * 64)),
        lambda folder: change(folder, lambda m: m["files"]["data/a.bin"].update(size=10**9)),
        lambda folder: change(folder, lambda m: m["files"]["data/a.bin"].update(size=-1)),
        lambda folder: change(folder, lambda m: m["code"].clear()),
        lambda folder: change(folder, lambda m: m.update(origins=[{"pack": "p"}])),
        lambda folder: change(folder, lambda m: m.update(mosaics=[MOSAIC | {"shape": [3, 1]}])),
        lambda folder: change(folder, lambda m: m.update(mosaics=[MOSAIC | {"shape": [0] * 4}])),
        lambda folder: change(folder, lambda m: m["parts"][0].update(sha256="0" * 64)),
    ],
)
def test_a_damaged_pack_is_refused(tmp_path, damage):
    noise = np.random.default_rng(0).bytes(4000)
    make_pack(tmp_path / "p", {"data/a.bin": noise, "data/b.bin": noise[::-1]}, size=3000).verify()
    damage(tmp_path / "p")
    assert code_of(lambda: Pack(tmp_path / "p").verify()) == "damaged"


@pytest.mark.parametrize(
    "path",
    [
        *("../x", "/x", "data/../../x", "data//x", "data/./x", "data\\x", "C:/x", "", "data/"),
        *("data/.hidden", ".git/config", "harness/cli.py", "origins.json", "Snakefile"),
    ],
)
@pytest.mark.parametrize("where", ["files", "links", "targets", "parts"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, path, where):
    make_pack(tmp_path / "p", {"teachers/edm/runs/r/w.bin": b"x"})

    def edit(manifest):
        if where == "files":
            manifest["files"][path] = manifest["files"].popitem()[1]
        elif where == "parts":
            manifest["parts"][0]["file"] = "/".join(["..", path])
        else:
            names = ("teachers/edm/w.bin", path)
            manifest["links"] = dict([names if where == "targets" else names[::-1]])

    change(tmp_path / "p", edit)
    assert code_of(Pack, tmp_path / "p") == "unsafe"


@pytest.mark.parametrize(
    ("links", "code"),
    [
        ({"teachers/edm/w.bin": "teachers/other/w.bin"}, "unsafe"),
        ({"teachers/edm/w.bin": "teachers/edm/runs/r/missing.bin"}, "damaged"),
        ({"teachers/edm/runs": "teachers/edm/runs/r"}, "unsafe"),  # files would go through it
        ({"teachers/edm/w.bin": "teachers/edm/runs/r/w.bin"}, None),
    ],
)
def test_links_lead_only_to_runs_of_the_same_folder(tmp_path, links, code):
    files = {"teachers/edm/runs/r/w.bin": b"x"}
    if code is None:
        assert make_pack(tmp_path / "p", files, links=links).manifest.links == links
    else:
        assert code_of(make_pack, tmp_path / "p", files, links=links) == code


def test_a_name_is_not_a_file_and_a_folder(tmp_path):
    make_pack(tmp_path / "p", {"data/a": b"x"})
    change(tmp_path / "p", lambda m: m["files"].update({"data/a/b": m["files"]["data/a"]}))
    assert code_of(Pack, tmp_path / "p") == "unsafe"


def test_results_are_not_a_pack(tmp_path):
    """Their manifest is that of the report: the error does not ask to delete it."""
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"give a folder that tools\.pack wrote") as error:
        Pack(tmp_path)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("x", "y")])
def test_an_error_of_the_system_is_one_line(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(pack, "unpack", fail)
    assert pack.main(["unpack", "p"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_output_is_not_a_file(tmp_path, tiny):
    (out := tmp_path / "file").write_text("x")
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    assert code_of(pack.write_pack, experiment, out, False, False, False) == "exists"


# -- images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (50, 1, 8, 8), (23, 3, 5, 7), (7, 1, 1, 1)])
def test_mosaics_are_lossless_and_small(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    parts = list(mosaics.encode(pixels, limit=2000))
    assert all(len(content) <= 2000 or count == 1 for _, count, content in parts)
    firsts, counts, _ = zip(*parts, strict=True)
    assert sum(counts) == len(pixels) and list(firsts) == list(np.cumsum((0, *counts))[:-1])
    decoded = [mosaics.decode(c, (count, *shape[1:])) for _, count, c in parts]
    assert np.array_equal(np.concatenate(decoded), pixels)
    assert code_of(mosaics.decode, parts[0][2], (10 * shape[0], *shape[1:])) == "damaged"
    assert code_of(mosaics.decode, b"not a picture", shape) == "damaged"


def test_a_huge_mosaic_is_refused(monkeypatch):
    pixels = np.zeros((4, 3, 8, 8), np.uint8)
    ((_, _, content),) = mosaics.encode(pixels)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    assert code_of(mosaics.decode, content, pixels.shape) == "damaged"


# -- joining ----------------------------------------------------------------------------------------


def join(root, *packs) -> merge.Unpacking:
    work = merge.Unpacking(list(packs), root)
    work.check()
    work.write()
    return work


RUN = "students/sid/seed0"
SID = {f"{RUN}/student.json": b"{}", f"{RUN}/runs/r/train.csv": b"step\n"}
LINK = {f"{RUN}/train.csv": f"{RUN}/runs/r/train.csv"}


def snapshot(folder) -> dict:
    return {p: (p.lstat().st_mtime_ns, p.is_symlink() or p.is_dir() or p.read_bytes())
            for p in folder.rglob("*")}  # fmt: skip


def test_packs_are_joined_with_one_modification_time(tmp_path):
    root, other = tmp_path / "results", {"students/sim/seed0/student.json": b"{}"}
    a = make_pack(tmp_path / "a", SID, links=LINK)
    b = make_pack(tmp_path / "b", SID | other, links=LINK)
    join(root, a, b)
    assert (root / RUN / "train.csv").read_text() == "step\n"
    assert os.readlink(root / RUN / "train.csv") == "runs/r/train.csv"
    times = {path.stat().st_mtime for path in root.rglob("*.*") if path.is_file()}
    assert len(times) == 1
    before = snapshot(root)
    assert not join(root, a, b).new and snapshot(root) == before  # nothing is written again


def existing_file(root):
    (root / RUN / "student.json").write_text("[]")


def existing_link(root):
    link(root / RUN / "train.csv", root / RUN / "other.csv")


@pytest.mark.parametrize("change", [existing_file, existing_link])
def test_a_different_run_is_a_conflict_and_nothing_is_written(tmp_path, change):
    root = tmp_path / "results"
    (root / RUN).mkdir(parents=True)
    change(root)
    before = snapshot(root)
    files = SID | {"students/sim/seed0/student.json": b"{}"}
    with pytest.raises(UserError, match=RUN) as error:
        join(root, make_pack(tmp_path / "a", files, links=LINK))
    assert error.value.code == "conflict" and "sim" not in str(error.value)
    assert snapshot(root) == before


def test_two_packs_with_different_runs_conflict(tmp_path):
    a = make_pack(tmp_path / "a", SID)
    b = make_pack(tmp_path / "b", SID | {f"{RUN}/student.json": b"[]"})
    assert code_of(join, tmp_path / "results", a, b) == "conflict"
    assert not (tmp_path / "results").exists()


def test_nothing_is_written_through_a_link(tmp_path):
    root, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / "students").mkdir(parents=True)
    (root / "students" / "sid").symlink_to(elsewhere)
    assert code_of(join, root, make_pack(tmp_path / "a", SID)) == "unsafe"
    assert not list(elsewhere.iterdir())


def test_an_older_report_is_not_mixed_with_new_runs(tmp_path):
    """Tables are never a conflict: the report writes them again."""
    report = {"manifest.json": b"{}", "tables/metrics.csv": b"a\n"}
    root, a = tmp_path / "results", make_pack(tmp_path / "a", SID | report)
    join(root, a)
    assert (root / "tables/metrics.csv").read_text() == "a\n"
    other = {"students/sim/seed0/student.json": b"{}", "tables/metrics.csv": b"b\n"}
    join(root, make_pack(tmp_path / "b", other | {"manifest.json": b"[]"}))
    assert (root / "tables/metrics.csv").read_text() == "a\n"
    assert (root / "students/sim/seed0/student.json").exists()


def test_a_report_is_used_only_as_a_whole(tmp_path):
    """A table of a partial report would not belong to the manifest."""
    (root := tmp_path / "results" / "tables").mkdir(parents=True)
    (root / "metrics.csv").write_text("partial\n")
    report = {"manifest.json": b"{}", "tables/metrics.csv": b"a\n", "tables/agreement.md": b"x"}
    join(root.parent, make_pack(tmp_path / "a", SID | report))
    assert (root / "metrics.csv").read_text() == "partial\n"
    assert not (root.parent / "manifest.json").exists()
    assert (root / "agreement.md").read_text() == "x"


def test_a_pack_does_not_name_code_to_run(tmp_path, tiny):
    make_pack(tmp_path / "p", {}, experiment=tiny | {"plugins": ["students/evil.py"]})
    assert code_of(merge.unpack, [tmp_path / "p"], None, False) == "plugins"


def test_times_of_slices_are_joined(tmp_path):
    runs = [{"stage": "data", "device": device, "seconds": 1.0} for device in ("cpu", "gpu")]
    histories = [{"work": {str(n): n}, "runs": [run]} for n, run in enumerate(runs)]
    packs = [
        make_pack(tmp_path / str(n), SID | {merge.HISTORY: json.dumps(history).encode()})
        for n, history in enumerate(histories)
    ]
    join(tmp_path / "results", *packs)
    join(tmp_path / "results", *packs)
    joined = json.loads((tmp_path / "results" / merge.HISTORY).read_text())
    assert joined == {"work": {"0": 0, "1": 1}, "runs": runs}


def test_configuration_code_and_data_must_agree(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(merge, "code_facts", lambda: CODE)
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path / "results")
    number = iter(range(100))

    def check(raw=tiny, code=CODE, data="d", allow=False) -> str | None:
        facts = {"experiment": json.loads(json.dumps(raw)), "code": code, "data": data}
        packs = [
            make_pack(tmp_path / f"{next(number)}", {}, experiment=tiny, code=CODE, data="d"),
            make_pack(tmp_path / f"{next(number)}", {}, **facts),
        ]
        try:
            merge.check_alike(packs, experiment, allow)
        except UserError as error:
            assert "\n" not in str(error)
            return error.code
        return None

    assert check() is None
    assert check(raw=tiny | {"device": "cuda", "processes": 2}) is None  # of the machine
    longer = tiny | {"training": tiny["training"] | {"tick_images": 64}}
    assert check(raw=longer) == "configuration"
    assert check(data="e") == "data"
    assert check(code=CODE | {"commit": "b" * 40}) == "commit"
    assert check(code=CODE | {"sha256": "t"}) == "commit"  # modified, or without git
    assert check(code=CODE | {"commit": "b" * 40}, allow=True) is None
    assert check(code=CODE | {"commit": None}) is None  # unknown, but the same sources


def test_images_are_packed_and_rebuilt_bit_for_bit(tmp_path, tiny):
    """Two shards with parts of the training and the held-out images, and their labels."""
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path / "a")
    folder, random = experiment.paths.data, torch.Generator().manual_seed(0)
    facts = {"name": "digits", "registered": True, "class_names": [], "train_images": 40}
    facts |= {"held_out_images": 10, "image_shape": [1, 8, 8], "images_sha256": "i", "sha256": "d"}
    DataRecord.model_validate(facts).write(folder / "data.json")
    hashes = {}
    for number in range(2):
        sizes = {"train": 20 + number, "held_out": 10 * number}
        tensors = {f"{part}_labels": torch.arange(n) for part, n in sizes.items()}
        for part, n in sizes.items():
            shape = n, 1, 8, 8
            tensors[f"{part}_pixels"] = torch.randint(
                256, shape, generator=random, dtype=torch.uint8
            )
        name = f"data/images/shard-{number:05d}.safetensors"
        hashes[name] = save_tensors(experiment.paths.root / name, tensors)
    pack.write_pack(experiment, tmp_path / "p", images=True, students=False, pairs=False)
    found = Pack(tmp_path / "p")
    assert len(found.manifest.mosaics) == 3  # the first shard has no held-out images
    found.verify()
    join(tmp_path / "b", found)
    assert {name: sha256_file(tmp_path / "b" / name) for name in hashes} == hashes
    assert not list((tmp_path / "b").rglob("*.rest"))

    mosaic = tmp_path / "p" / found.manifest.mosaics[0].file
    mosaic.write_bytes(mosaic.read_bytes()[:-1])
    assert code_of(Pack(tmp_path / "p").verify) == "damaged"
    assert code_of(
        pack.write_pack, experiment, tmp_path / "p", images=True, students=False, pairs=False
    ) == "exists"  # fmt: skip


def test_weights_are_packed_in_the_precision_that_was_scored(tmp_path, tiny):
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    path = experiment.paths.root / RUN / "runs/r/snapshots/s" / pack.WEIGHTS
    weights = {"w": torch.linspace(0, 1, 7), "count": torch.arange(3)}
    save_tensors(path, weights)
    for precision, file in (("fp32", pack.WEIGHTS), ("bf16", pack.BF16_WEIGHTS)):
        tiny["evaluation"]["precision"] = precision
        selection = pack.Selection(parse_experiment(tiny, "tiny.yaml", tmp_path))
        selection._add_weights(path)
        ((name, source),) = selection.files.items()
        assert name == f"{RUN}/runs/r/snapshots/s/{file}"
        stored = load_tensors(source)
        assert stored["count"].equal(weights["count"])
        expected = weights["w"].bfloat16() if precision == "bf16" else weights["w"]
        assert stored["w"].equal(expected)
        selection.__exit__()


def test_a_run_without_scores_is_packed_with_all_weights(tmp_path, tiny, monkeypatch):
    """The next machine scores all snapshots: it needs the weights bit for bit."""
    tiny["evaluation"]["precision"] = "bf16"
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    stage, root = all_stages(experiment)["train sid 0"], experiment.paths.root
    snapshots = [SimpleNamespace(name=name) for name in ("a", "b")]
    record = SimpleNamespace(snapshots=snapshots, run_id="r")
    monkeypatch.setattr(pack.StudentRecord, "read", lambda path: record)
    monkeypatch.setattr(pack.Selection, "_training", lambda self, stage: None)
    weights = [f"{RUN}/runs/r/snapshots/{name}/{pack.WEIGHTS}" for name in "ab"]
    for name in weights:
        save_tensors(root / name, {"w": torch.ones(1)})
    for todo, expected in ({"score sid 0"}, {*weights}), (set(), set()):
        selection = pack.Selection(experiment)
        selection._todo = todo
        selection._add_run(stage)
        assert {name for name in selection.files if name.endswith("safetensors")} == expected
        selection.__exit__()


@pytest.mark.parametrize(
    ("todo", "packed"),
    [
        ({"train a 0", "train a 1"}, set()),  # generated again
        ({"train a 1"}, {"pairs.json", "r/shard"}),  # a 0 was trained on the same
        (set(), {"pairs.json"}),
    ],
)
def test_pairs_are_packed_where_a_student_is_trained_and_another_is_not(
    tmp_path, tiny, todo, packed
):
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    folder = experiment.paths.pairs("p")
    (folder / "r").mkdir(parents=True)
    (folder / "pairs.json").write_text('{"run_id": "r"}')
    (folder / "r" / "shard").write_text("x")
    pairs = Stage("pairs", ("p",), folder / "pairs.json", is_current=bool)
    runs = [Stage("train", ("a", str(n)), folder / "x", bool, needs=("pairs p",)) for n in (0, 1)]
    selection = pack.Selection(experiment)
    selection._all, selection._todo = {stage.name: stage for stage in (pairs, *runs)}, todo
    assert selection._add_pairs(pairs) == bool(packed)
    assert {path.relative_to(folder).as_posix() for path in selection.files.values()} == packed
    selection.__exit__()
