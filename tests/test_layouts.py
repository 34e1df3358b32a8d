"""Layouts of images from elsewhere: class folders, tables, parquet, .npz files, the hub; resizing."""

import io
import json
import logging
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import registry as plugins
from harness.config.schema import DataSection, ResizeSection
from harness.data import datasets, decoding, registry
from harness.data.decoding import Decoder
from harness.data.image_sources import ImageSource
from harness.data.layouts.base import LAYOUTS, Listing
from harness.data.registry import data_source
from harness.errors import UserError
from harness.io.artifacts import sha256_file
from harness.validation import parse_experiment
from tests.test_config import problems, put
from tests.test_edm_data import images, named, png, with_labels, write

ROOT = Path(__file__).parent.parent
PIXELS = images(count=12, side=4)


def numbers(tensor) -> list[int]:
    """The positions of images in PIXELS."""
    known = {image.tobytes(): i for i, image in enumerate(PIXELS)}
    return [known[image.numpy().tobytes()] for image in tensor]


def read(source: Path, **keys):
    """Positions in PIXELS and labels of both parts, and the class names."""
    section = DataSection(name="x", source=str(source), **keys)
    train, held_out, names = data_source(section).read()
    parts = [
        dict(zip(numbers(p.pixels), p.labels.tolist(), strict=True)) for p in (train, held_out)
    ]
    assert len(parts[0]) == len(train) and len(parts[1]) == len(held_out)
    return *parts, names


def code(source: Path, **keys) -> tuple[str, str]:
    """The code and the message of the error of reading a source."""
    with pytest.raises(UserError) as error:
        read(source, **keys)
    assert "\n" not in str(error.value)
    return error.value.code, str(error.value)


def class_folders(labels: list[str], top: str = "") -> dict[str, bytes]:
    return {f"{top}{y}/{i:02d}.png": png(PIXELS[i]) for i, y in enumerate(labels)}


NAMES = ["cat", "dog", "a b"] * 4
CLASSES = {i: {"a b": 0, "cat": 1, "dog": 2}[name] for i, name in enumerate(NAMES)}
STRAY = dict.fromkeys(("Thumbs.db", "cat/README.txt", "LICENSE", ".git/x.png", "dog/._0.png"), b"")


@pytest.mark.parametrize(
    ("kind", "top"),
    [("set", ""), ("set", "photos/"), ("set.zip", ""), ("set.zip", "photos\\train\\")],
)
def test_class_folders_are_classes(tmp_path, caplog, kind, top):
    caplog.set_level(logging.INFO)
    files = class_folders(NAMES, top) | {f"{top}{name}": x for name, x in STRAY.items()}
    if "\\" in top:
        files = {name.replace("/", "\\"): x for name, x in files.items()}
    train, held_out, names = read(write(tmp_path / kind, files), held_out=0.25)
    assert train | held_out == CLASSES and names == ("a b", "cat", "dog")
    assert len(held_out) == 3 and len(set(held_out.values())) == 3
    lines = [line for line in caplog.messages if "not images: " in line]
    examples = (
        f"{top}{name}".replace("\\", "/") for name in ("LICENSE", "Thumbs.db", "cat/README.txt")
    )
    assert len(lines) == 1 and lines[0].endswith(f"not images: 5, such as {', '.join(examples)}")


def test_training_images_are_in_a_mixed_order(tmp_path):
    source = write(tmp_path / "set", class_folders(sorted(NAMES)))
    train, _, _ = data_source(DataSection(name="x", source=str(source), held_out=0)).read()
    for part in train.labels.split(3):
        assert sorted(part.tolist()) == [0, 1, 2]


def test_names_of_folders_that_are_numbers_are_in_their_order(tmp_path):
    labels = [str(i) for i in (10, 9, 2) * 4]
    train, held_out, names = read(write(tmp_path / "set", class_folders(labels)))
    assert names == ("2", "9", "10")
    assert train | held_out == {i: 2 - i % 3 for i in range(12)}


@pytest.mark.parametrize(("folder", "unused"), [("test", True), ("val", False), ("Testing", False)])
def test_test_folder_is_held_out(tmp_path, caplog, folder, unused):
    files = class_folders(NAMES, "train/")
    moved = {name.replace("train/", f"{folder}/"): files.pop(name) for name in list(files)[:3]}
    extra = {"validation/cat/x.png": png(PIXELS[0])} if unused else {}
    source = write(tmp_path / "set", files | moved | extra)
    train, held_out, _ = read(source)
    assert sorted(held_out) == [0, 1, 2] and sorted(train) == list(range(3, 12))
    assert train | held_out == CLASSES
    assert ("1 validation images are not used" in caplog.text) == unused
    assert code(source, held_out=0.5)[0] == "split"
    assert len(read(source, labels=False)[1]) == 3
    write(source, {f"{folder}/bird/x.png": png(PIXELS[0])})
    assert code(source)[0] == "unknown-class"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_table_gives_labels(tmp_path, form):
    rows = [{"file_name": f"a/{i}.png", "label": NAMES[i], "other": "x, y"} for i in range(12)]
    if form == "csv":
        lines = ["file_name,label,other", *(f'{r["file_name"]},{r["label"]},"x, y"' for r in rows)]
    else:
        lines = map(json.dumps, rows)
    files = {f"a/{i}.png": png(image) for i, image in enumerate(PIXELS)}
    source = write(tmp_path / "set", files)
    (source / f"metadata.{form}").write_text("\ufeff" * (form == "csv") + "\n".join(lines))
    train, held_out, names = read(source)
    assert train | held_out == CLASSES and names == ("a b", "cat", "dog")
    assert code(source, label_column="class")[0] == "label-column"
    assert code(source, label_column="other")[0] == "one-class"
    (source / "a" / "more.png").write_bytes(png(PIXELS[0]))
    found, message = code(source)
    assert found == "labels" and "a/more.png" in message


@pytest.mark.parametrize(
    ("table", "expected", "named"),
    [
        ("file_name,text\n0.png,a cat, red\n", "labels", "put texts with commas in quotes"),
        (f"file_name,label\n0.png,{10**30}\n", "label-range", "0..65535"),  # no list of names
    ],
)
def test_faulty_rows_of_a_table_are_named(tmp_path, table, expected, named):
    files = {"0.png": png(PIXELS[0]), "metadata.csv": table.encode()}
    found, message = code(write(tmp_path / "set", files))
    assert found == expected and named in message


def test_texts_of_a_table_are_lines_of_prompts(tmp_path):
    prompts = [f"a drawing of a {name}" for name in ("dog", "a b", "cat")]
    (tmp_path / "p.txt").write_text("\n".join([*prompts, prompts[0]]))
    rows = "".join(f"{i}.png,a drawing of a {NAMES[i]}\n" for i in range(12))
    files = {f"{i}.png": png(image) for i, image in enumerate(PIXELS)}
    source = write(tmp_path / "set", files | {"metadata.csv": f"file_name,text\n{rows}".encode()})
    train, held_out, names = read(source, prompts=str(tmp_path / "p.txt"))
    assert train | held_out == {i: (2, 0, 1)[i % 3] for i in range(12)} and names == ()
    (tmp_path / "p.txt").write_text("\n".join(prompts[:2]))
    assert code(source, prompts=str(tmp_path / "p.txt"))[0] == "unknown-class"


@pytest.mark.contract
@pytest.mark.parametrize("columns", ["bytes and names", "as datasets writes them", "shards"])
def test_parquet_files_are_read(tmp_path, columns):
    import pyarrow
    from pyarrow import parquet

    files, metadata = [png(image) for image in PIXELS], None
    table = {"img": files, "label": NAMES, "size": [0.5] * 12}
    if columns != "bytes and names":
        labels = [("dog", "cat", "a b").index(name) for name in NAMES]
        table = {"image": [{"bytes": x, "path": None} for x in files], "label": labels}
        features = {"image": {"_type": "Image"}}
        features["label"] = {"_type": "ClassLabel", "names": ["dog", "cat", "a b"]}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(table).replace_schema_metadata(metadata)
    source = tmp_path / "set.parquet"
    if columns == "shards":
        source = tmp_path / "set"
        (source / "data").mkdir(parents=True)
        (source / "README.md").touch()
        for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-0")):
            parquet.write_table(table[4 * i : 4 * i + 4], source / "data" / f"{name}.parquet")
    else:
        parquet.write_table(table, source, row_group_size=5)
    train, held_out, names = read(source)
    if columns == "bytes and names":
        assert names == ("a b", "cat", "dog") and train | held_out == CLASSES
    else:  # the schema's order
        assert names == ("dog", "cat", "a b")
        assert train | held_out == {i: (1, 0, 2)[i % 3] for i in range(12)}
        named = pyarrow.table({"image": table["image"], "label": NAMES})  # names, not numbers
        parquet.write_table(named.replace_schema_metadata(metadata), tmp_path / "named.parquet")
        assert read(tmp_path / "named.parquet")[2] == names
    if columns == "shards":
        assert sorted(held_out) == [8, 9, 10, 11]
        shutil.copytree(source / "data", source / "other")
        assert code(source)[0] == "subsets"
    assert (
        code(tmp_path / "set.parquet" if source.is_file() else source / "data", label_column="x")[0]
        == "label-column"
    )


@pytest.mark.contract
def test_parquet_errors_name_the_row_or_the_package(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "set.parquet"

    def write_table(**columns):
        parquet.write_table(pyarrow.table(columns), source)

    write_table(image=[png(PIXELS[0]), None], label=[0, 1])
    assert code(source)[0] == "damaged" and "row 1" in code(source)[1]
    write_table(image=[png(PIXELS[0]), b"text"], label=[0, 1])
    assert code(source) == ("image-format", f"{source}: row 1 is not a PNG, JPEG or WebP file")
    write_table(image=[png(PIXELS[0])] * 2, label=[0, None])
    assert code(source)[0] == "labels"
    write_table(image=[png(PIXELS[0])] * 2, weight=[0.5, 1.0])
    assert code(source)[0] == "no-labels" and "weight" in code(source)[1]
    write_table(a=[b"x"], b=[b"x"])
    assert code(source)[0] == "image-format"
    twice = pyarrow.table([[b"x"], [0], [1]], names=["image", "label", "label"])
    parquet.write_table(twice, source)
    assert code(source)[0] == "damaged"
    source.write_bytes(b"PAR1 and not more")
    assert code(source)[0] == "damaged"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert code(source)[0] == "missing-package" and "[parquet]" in code(source)[1]


@pytest.mark.parametrize("compressed", [False, True])
def test_samples_of_adm_are_read(tmp_path, compressed):
    save, source = (np.savez_compressed if compressed else np.savez), tmp_path / "samples.npz"
    labels = np.arange(12) % 3
    save(source, PIXELS.transpose(0, 2, 3, 1), labels)
    train, held_out, names = read(source)
    assert train | held_out == dict(enumerate(labels)) and names == ("0", "1", "2")
    save(source, PIXELS.transpose(0, 2, 3, 1), mu=np.zeros(3))
    assert code(source)[0] == "no-labels"
    assert sorted(read(source, labels=False, held_out=0)[0]) == list(range(12))
    for arrays, expected in (
        ([PIXELS], "image-format"),  # channels first
        ([PIXELS.transpose(0, 2, 3, 1) / 255], "image-format"),
        ([np.array([{}], dtype=object)], "image-format"),
        ([PIXELS.transpose(0, 2, 3, 1), labels[:5]], "labels"),
        ([PIXELS.transpose(0, 2, 3, 1), labels.astype(object)], "image-format"),
    ):
        save(source, *arrays)
        assert code(source)[0] == expected
    header = io.BytesIO()  # of more images than memory can hold
    facts = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 4, 4, 3)}
    np.lib.format.write_array_header_1_0(header, facts)
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(48))
    assert code(source)[0] == "damaged"
    np.savez(source, mu=np.zeros(3))
    assert code(source)[0] == "no-images"
    source.write_bytes(source.read_bytes()[:-9])
    assert code(source)[0] == "damaged"


def test_repository_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch, tiny):
    """Its files are links to blobs, and equal files are links to one blob."""
    repository, commit = tmp_path / "datasets--me--photos", "0123456789" * 4
    folder = repository / "snapshots" / commit
    for i, name in enumerate(
        ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", ".gitattributes")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(i % 3)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(png(PIXELS[i % 3]))
        (folder / name).symlink_to(blob)
    asked = []
    monkeypatch.setattr(registry, "snapshot", lambda *facts: asked.append(facts) or folder)
    keys = {"name": "photos", "source": "me/photos", "revision": commit}
    train, _, names = data_source(DataSection(**keys, held_out=0)).read()
    assert sorted(numbers(train.pixels)) == [0, 0, 1, 2] and names == ("cat", "dog")
    assert asked[0][:3] == ("me/photos", commit, "dataset") and "*.parquet" in asked[0][3]
    experiment = parse_experiment(put(tiny, "data", keys) and tiny, "x")
    assert experiment.data_files() == [] and experiment.data_fingerprint["revision"] == commit
    for other, key in (
        ({"revision": "main"}, "data.revision"),
        ({"source": "https://x.org/x.zip"}, "data.revision"),
        ({"sha256": "0" * 64}, "data.sha256"),
        ({"revision": None}, "data.source"),
    ):
        found = problems(put(tiny, "data", {k: v for k, v in (keys | other).items() if v}) and tiny)
        assert [problem.key for problem in found] == [key]
    assert "add its commit hash as revision" in found[0].message


# -- decoding -----------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_resize_modes(kind):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, 5:35] = np.arange(30, dtype=np.uint8)[:, None, None] * 8
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(pixels), kind, **options)
    exact = Decoder(ResizeSection(size=30))(content, "x")  # the crop alone
    assert np.abs(exact.astype(int) - pixels[:, 5:35]).max() <= (3 if kind == "JPEG" else 0)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crop = image.crop((5, 0, 35, 30)).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(Decoder(ResizeSection(size=8))(content, "x"), np.asarray(crop))
    whole = image.resize((8, 8), Image.Resampling.LANCZOS)
    stretched = Decoder(ResizeSection(mode="lanczos", size=8))(content, "x")
    assert np.array_equal(stretched, np.asarray(whole))
    for resize in (None, ResizeSection(mode="none", size=30)):
        with pytest.raises(UserError, match="x is 40 x 30 pixels") as error:
            Decoder(resize)(content, "x")
        assert error.value.code == "shape"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_as_its_exif_data_say(orientation):
    """The corners are grey levels. Orientation n: stored row 0 and column 0 are these sides."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 240, 160, 80
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),  # shown after a quarter turn clockwise
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=100, exif=exif)
    assert np.abs(Decoder()(content, "x")[:, :, 0].astype(int) - upright).max() < 3


def test_lossless_conversions_and_others():
    grey, colour = Image.fromarray(PIXELS[0, 0]), Image.fromarray(PIXELS[0].transpose(1, 2, 0))
    opaque = colour.copy()
    opaque.putalpha(255)
    palette = colour.quantize(colors=16)
    for image, expected in ((opaque, colour), (palette, palette.convert("RGB")), (grey, grey)):
        decoded = Decoder()(encoded(image, "PNG"), "x")
        assert np.array_equal(decoded.squeeze(), np.asarray(expected))
    for kind, key in (("RGB", (9, 9, 9)), ("L", 9)):  # one transparent colour, not an alpha channel
        file = io.BytesIO()
        Image.new(kind, (4, 4), key).save(file, "PNG", transparency=key)
        with pytest.raises(UserError, match="transparent"):
            Decoder()(file.getvalue(), "x")
    transparent = colour.copy()
    transparent.putalpha(254)
    for image, kind in ((transparent, "PNG"), (colour.convert("CMYK"), "JPEG"), (colour, "GIF")):
        with pytest.raises(UserError) as error:
            Decoder()(encoded(image, kind), "x")
        assert error.value.code == "image-format"


@pytest.mark.parametrize("first", ["grey", "colour"])
def test_grey_images_among_colours_become_rgb(tmp_path, caplog, first):
    caplog.set_level(logging.INFO)
    grey = PIXELS[:3, :1]
    files = [*map(png, grey), *map(png, PIXELS[3:])]
    files = files if first == "grey" else files[::-1]
    source = write(tmp_path / "set", {f"{i:02d}.png": x for i, x in enumerate(files)})
    train, _, _ = data_source(
        DataSection(name="x", source=str(source), labels=False, held_out=0)
    ).read()
    expected = [np.repeat(image, 3, axis=0) for image in grey] + list(PIXELS[3:])
    found = sorted(image.numpy().tobytes() for image in train.pixels)
    assert found == sorted(image.tobytes() for image in expected)
    assert "3 grey images became RGB" in caplog.text


def test_unreadable_images_are_named(tmp_path):
    source = write(tmp_path / "set", class_folders(NAMES))
    for name, content, expected in (
        ("cat/x.gif", b"", "image-format"),
        ("cat/x.jpg", encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "damaged"),
        ("cat/x.webp", b"text", "image-format"),
        ("cat/x.JPG", encoded(Image.new("RGB", (5, 4)), "JPEG"), "shape"),
    ):
        (source / name).write_bytes(content)
        found, message = code(source)
        assert found == expected and name in message
        (source / name).unlink()
    (source / "cat" / "x.png").write_bytes(png(images(1, side=6)[0]))
    assert "set data.resize: {mode: center-crop, size: 64}" in code(source)[1]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (class_folders(["cat"] * 12), "one-class"),
        (class_folders(NAMES) | {"x.png": png(PIXELS[0])}, "no-labels"),
        ({f"{i}.png": png(x) for i, x in enumerate(PIXELS)}, "no-labels"),
        ({"README.md": b""}, "no-images"),
        (class_folders(NAMES, "train/") | class_folders(NAMES, "training/") | class_folders(NAMES, "test/"), "split"),
    ],
)  # fmt: skip
def test_folders_that_are_no_data_set(tmp_path, files, expected):
    assert code(write(tmp_path / "set", files))[0] == expected
    two = write(tmp_path / "two", class_folders(NAMES))
    assert code(two, num_classes=2)[0] == "num-classes"
    assert code(two, label_column="label")[0] == "label-column"
    with pytest.raises(UserError) as error:
        ImageSource(tmp_path / "none.parquet")
    assert error.value.code == "missing-file"


@pytest.mark.parametrize("inside", ["dataset.json", ""])
def test_zip_with_one_folder_on_top_is_read(tmp_path, inside):
    files = (
        with_labels(named(PIXELS), [i % 3 for i in range(12)]) if inside else class_folders(NAMES)
    )
    source = write(tmp_path / "set.zip", {f"cifar10/{name}": x for name, x in files.items()})
    train, held_out, _ = read(source)
    assert train | held_out == ({i: i % 3 for i in range(12)} if inside else CLASSES)
    (tmp_path / "repository").mkdir()
    shutil.move(source, tmp_path / "repository" / "data.zip")  # the only file
    assert read(tmp_path / "repository")[0] == train


def test_stray_file_beside_labelled_images_is_ignored(tmp_path):
    files = with_labels(named(PIXELS), [i % 3 for i in range(12)])
    source = write(tmp_path / "set", files | {"Thumbs.db": b"", "00000/README.txt": b""})
    train, held_out, _ = read(source)
    assert train | held_out == {i: i % 3 for i in range(12)}


def test_images_of_a_class_by_class_index_are_mixed(tmp_path):
    source = write(tmp_path / "set", with_labels(named(PIXELS), [i // 4 for i in range(12)]))
    train, _, _ = data_source(DataSection(name="x", source=str(source), held_out=0)).read()
    assert [sorted(part.tolist()) for part in train.labels.split(3)] == [[0, 1, 2]] * 4


# -- experiments --------------------------------------------------------------------------------


def test_resize_is_recorded_where_it_is_set(tmp_path):
    source = write(tmp_path / "set", class_folders(NAMES))
    for keys, text in (
        ({}, None),
        ({"resize": {"size": 2}}, "centred square, Lanczos to 2 x 2 pixels"),
    ):
        section = DataSection(name="x", source=str(source), **keys)
        record = datasets.prepare(section, tmp_path / "data")
        assert record.resize == text == datasets.load(tmp_path / "data").resize
        assert ("resize" in json.loads((tmp_path / "data" / "data.json").read_text())) == bool(text)


def test_renamed_class_changes_the_hash_of_the_data(tmp_path):
    """Captions contain the names."""
    source, hashes = write(tmp_path / "set", class_folders(NAMES)), set()
    for name in ("cat", "cats"):
        (source / "cat").rename(source / name)
        section = DataSection(name="x", source=str(source))
        hashes.add(datasets.prepare(section, tmp_path / "data").sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"name": "x", "source": "flat"}, "data.labels"),
        ({"name": "x", "source": "set", "resize": {"size": 8}, "resolution": 4}, "data.resolution"),
        ({"name": "x", "source": "set", "resize": {"size": 4096}}, "data.resize.size"),
        ({"name": "x", "source": "set", "resize": {"mode": "crop", "size": 8}}, "data.resize.mode"),
        ({"name": "digits", "resize": {"size": 8}}, "data.resize"),
        ({"name": "digits", "revision": "0" * 40}, "data.revision"),
    ],
)
def test_errors_of_the_section_name_their_key(tmp_path, monkeypatch, tiny, section, key):
    monkeypatch.chdir(tmp_path)
    write(Path("set"), class_folders(NAMES))
    write(Path("flat"), {f"{i}.png": png(x) for i, x in enumerate(PIXELS)})
    put(tiny, "data", section)
    assert key in [problem.key for problem in problems(tiny)]


def test_unlabelled_images_are_reported_before_anything_runs(tmp_path, monkeypatch, tiny):
    """Flat folders are: their labels are missing. Networks that train on labels then are."""
    monkeypatch.chdir(tmp_path)
    write(Path("flat"), {f"{i}.png": png(x) for i, x in enumerate(PIXELS)})
    put(tiny, "data", {"name": "x", "source": "flat", "labels": False})
    assert {p.key for p in problems(tiny)} >= {f"features.{name}" for name in tiny["features"]}


PLUGIN = """
from harness.data.layouts.base import LAYOUTS, Layout, Listing, file_contents


@LAYOUTS.register("list")
class ListLayout(Layout):
    description = "names in a list"

    @classmethod
    def accepts(cls, files):
        return "list.txt" in files.sizes

    def parts(self, files, label_column):
        names = files.read("list.txt").decode().split()
        labels = [name[0] for name in names]
        return {"train": Listing(names, file_contents(files, names), labels)}
"""


def test_layout_of_a_plugin_is_found(tmp_path, monkeypatch, tiny):
    for owner, name in ((LAYOUTS, "_entries"), (LAYOUTS, "_sources"), (plugins, "_plugins")):
        list(LAYOUTS)  # imports the package
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    put(tiny, "plugins", [str(tmp_path / "plugin.py")])
    files = {f"{'ab'[i % 2]}{i}.png": png(image) for i, image in enumerate(PIXELS)}
    listed = " ".join(list(files)[:6]).encode()
    source = write(tmp_path / "set", files | {"list.txt": listed})
    put(tiny, "data", {"name": "x", "source": str(source)})
    fingerprint = parse_experiment(tiny, "x").data_fingerprint
    assert fingerprint["plugin"] == sha256_file(tmp_path / "plugin.py")
    train, held_out, names = read(source)
    assert train | held_out == {i: i % 2 for i in range(6)} and names == ("a", "b")
    (source / "list.txt").write_bytes(b"\xff")
    found, message = code(source)
    assert found == "plugin" and str(tmp_path / "plugin.py") in message
    with pytest.raises(ValueError, match="is not a subclass of Layout"):
        LAYOUTS.register("other")(Listing)
