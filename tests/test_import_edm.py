"""Official pickles become denoiser folders, and nothing in them is executed."""

import json
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import yaml

from harness.cli import main
from harness.errors import UserError
from harness.io import pickles
from harness.io.artifacts import read_json
from harness.networks import build_denoiser, denoiser_record, load_denoiser, save_denoiser
from harness.teachers import edm_pickle
from harness.teachers.edm_pickle import pickled_network, read_edm_pickle
from harness.validation import parse_experiment
from tests.test_denoiser import tiny_denoiser
from tests.test_edm_networks import error, golden

BOOKKEEPING = {"training": False, "_backward_hooks": OrderedDict(), "_is_full_backward_hook": None}


class Persistent:
    """Pickles as the official persistent classes do: a function, its one argument, no state."""

    def __init__(self, class_name: str, **state):
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('executed')"}
        self.meta = meta | {"class_name": class_name, "state": BOOKKEEPING | state}

    def __reduce_ex__(self, protocol):
        return (
            sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            (self.meta,),
            None,
        )


def modules(weights: dict[str, torch.Tensor], class_name="Conv2d", **state) -> Persistent:
    """A tree of records that holds `weights` under their dotted names."""
    own, below = {}, {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = tensor
        else:
            own[name] = tensor
    children = OrderedDict()
    for name, inside in below.items():
        if name in ("enc", "dec"):
            children[name] = torch.nn.ModuleDict()
            children[name].__dict__["_modules"] = {
                k: modules({n[len(k) + 1 :]: t for n, t in inside.items() if n.startswith(k + ".")})
                for k in dict.fromkeys(n.split(".")[0] for n in inside)
            }
        else:
            children[name] = modules(inside)
    buffers = {k: v for k, v in own.items() if k in ("resample_filter", "freqs")}
    parameters = {k: torch.nn.Parameter(v, False) for k, v in own.items() if k not in buffers}
    return Persistent(
        class_name,
        _parameters=parameters,
        _buffers={"resample_filter": None} | buffers,
        _modules=children,
        skip_scale=np.float64(0.5),
        **state,
    )


@pytest.fixture
def official(monkeypatch):
    """The names that official pickles refer to, while this test writes one."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the official loader must not be called")

    persistence = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    def make(name: str, class_name="EDMPrecond", **changes) -> dict:
        data = golden(name)
        settings = json.loads(str(data["init_kwargs"])) | changes
        weights = {
            k.removeprefix("weight/model."): torch.from_numpy(v)
            for k, v in data.items()
            if k.startswith("weight/")
        }
        model = modules(weights, settings["model_type"], _init_kwargs={}, _init_args=())
        network = Persistent(
            class_name, _init_args=(), _init_kwargs=settings, _modules=OrderedDict(model=model)
        )
        return {"ema": network, "augment_pipe": None, "dataset_kwargs": {"path": "x"}}

    return make


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_official_pickle_is_converted(official, tmp_path, name, protocol):
    file = write(tmp_path / "network.pkl", official(name), protocol)
    assert main(["import-edm", str(file), str(tmp_path / "net")]) == 0
    denoiser, data = load_denoiser(tmp_path / "net"), golden(name)
    labels = torch.from_numpy(data["labels"]) if "labels" in data else None
    extras = {"augment_labels": torch.from_numpy(data["augment_labels"])} if labels is None else {}
    x, sigma = torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"]).float()
    assert error(denoiser(x, sigma, labels, **extras), data["output"]) < 1e-5
    assert denoiser_record(tmp_path / "net")["imported"]["file"] == "network.pkl"


@pytest.mark.parametrize("protocol", [2, 4])
def test_network_of_a_pickle_is_read_without_its_weights(
    official, tmp_path, monkeypatch, tiny, protocol
):
    content = official("ddpmpp")
    numbers = torch.zeros(500_000)  # more than any number of the network
    content["augment_pipe"] = modules({"w": numbers})
    path, skipped = write(tmp_path / "a.pkl", content, protocol), []
    read = pickles._WithoutTensors.read
    monkeypatch.setattr(
        pickles._WithoutTensors, "read", lambda f, n: skipped.append(n > f.LONG) or read(f, n)
    )
    found, config = pickled_network(path), read_edm_pickle(path).backbone.config
    assert any(skipped) and found.pop("type") == "SongUNet"
    assert found == {key: config[key] for key in found} and "augment_dim" in found
    tiny["teachers"] = {"edm": {"source": str(path)}}
    student = parse_experiment(tiny, "x").students["sim"]
    assert student.settings.augment == 0  # as the experiment says


def test_gdd_student_keeps_its_preconditioning(official, tmp_path):
    file = write(tmp_path / "gdd.pkl", official("ncsnpp", class_name="GDDPrecond"))
    edm_pickle.import_edm(file, tmp_path / "net")
    assert load_denoiser(tmp_path / "net").epsilon == 0.002


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def inner_attack(marker, protocol=2):
    """Tensor data with a hostile inner pickle."""
    inner = pickle.dumps(Call(open, str(marker), "w"), protocol)
    return Call(torch.storage._load_from_bytes, inner)


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (lambda marker: Call(open, str(marker), "w"), "open"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
        (lambda marker: Call(getattr, "x", "y"), "builtins.getattr"),
        (lambda marker: Call(torch.load, str(marker)), "torch.serialization.load"),
        (lambda marker: np.zeros(2), "_reconstruct"),
        (inner_attack, "rejected: it contains unreadable tensor data"),
        (lambda marker: inner_attack(marker, 4), "rejected: it contains unreadable tensor data"),
    ],
)
def test_hostile_pickle_is_rejected_and_not_executed(official, tmp_path, capsys, hostile, named):
    marker = tmp_path / "executed"
    for place in ("beside", "ema"):
        content = official("ncsnpp")
        content["loss_fn" if place == "beside" else "ema"] = hostile(marker)
        file = write(tmp_path / "hostile.pkl", content)
        assert main(["import-edm", str(file), str(tmp_path / "net")]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and "hostile.pkl" in message and named in message
        assert not marker.exists() and not (tmp_path / "net").exists()


class Stated:
    """Pickles as a target object and a `state` to set on it."""

    def __init__(self, target, state):
        self.target, self.state = target, state

    def __reduce__(self):
        return (*self.target.__reduce_ex__(2)[:2], self.state)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_state_of_tensors_and_records_is_rejected(official, tmp_path):
    """With other state a tensor could read beyond its data."""
    beyond = (torch.zeros(4).storage(), 0, (3,), (1000,))
    for target in (torch.zeros(4), torch.nn.Parameter(torch.zeros(4)), Persistent("Conv2d")):
        for state in (beyond, (None, {"value": 1}), {"value": 1}):
            file = write(tmp_path / "x.pkl", official("ncsnpp") | {"more": Stated(target, state)})
            with pytest.raises(UserError, match="state for an object that has none"):
                read_edm_pickle(file)


@pytest.mark.parametrize("name", edm_pickle._ALLOWED, ids=".".join)
def test_pickle_cannot_change_the_reader(tmp_path, name):
    """A pickle may set attributes of the functions and classes that it names."""
    target = edm_pickle._ALLOWED[name]
    for state in ((None, {"poison": 1}), {"poison": 1}):
        # PROTO 2, GLOBAL name, the state, BUILD, STOP
        build = b"\x80\x02c%s\n%s\n" % tuple(part.encode() for part in name)
        (tmp_path / "x.pkl").write_bytes(build + pickle.dumps(state, 2)[2:-1] + b"b.")
        with pytest.raises(UserError, match=r"state for an object|\(TypeError: "):
            read_edm_pickle(tmp_path / "x.pkl")
        assert not hasattr(target, "poison")


def strip(content, name):
    model = content["ema"].meta["state"]["_modules"]["model"]
    del model.meta["state"]["_modules"][name]
    return content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda official: official("ncsnpp", class_name="VPPrecond"), "a VPPrecond, but only"),
        (lambda official: official("ncsnpp", model_type="EDM2"), "a backbone EDM2, but only"),
        (lambda official: official("ncsnpp", num_blocks=2), "no tensor"),
        (lambda official: official("ncsnpp", label_dim=0), "does not belong to its settings"),
        (lambda official: official("ncsnpp", model_channels=32), "of shape"),
        (lambda official: official("ncsnpp", encoder_type="skip"), "encoder_type must be one of"),
        (
            lambda official: official("ncsnpp", colour="red"),
            "a setting colour, which SongUNet does",
        ),
        (lambda official: official("ncsnpp", type="UNet2DModel"), "a setting type, which"),
        (lambda official: official("ncsnpp", _x=1), "a setting _x, which"),
        (lambda official: official("ncsnpp", in_channels=3), "a setting in_channels, which"),
        (lambda official: official("ncsnpp", num_blocks=10**9), "1000000000 as num_blocks"),
        (lambda official: official("ncsnpp", num_blocks=4096), "fewer tensors than its settings"),
        (lambda official: official("ncsnpp", num_blocks=True), "True as num_blocks"),
        (lambda official: official("ncsnpp", model_channels=10**9), "1000000000 as model_channels"),
        (lambda official: official("ncsnpp", attn_resolutions=[0.5]), "[0.5] as attn_resolutions"),
        (lambda official: official("ncsnpp", dropout="0.1"), "'0.1' as dropout"),
        (lambda official: official("ncsnpp", dropout=float("nan")), "nan as dropout"),
        (lambda official: official("ncsnpp", dropout=torch.zeros(1)), "as dropout, unlike"),
        (lambda official: official("ncsnpp", dropout=Persistent("Linear")), "as dropout, unlike"),
        (lambda official: official("ncsnpp", sigma_data="0.5"), "'0.5' as sigma_data"),
        (lambda official: official("ncsnpp", class_name="\x1b[31m\nEDM"), "a [31m EDM, but only"),
        (
            lambda official: {"ema": torch.zeros(1).expand(4)},
            "a tensor larger than its data",
        ),
        (lambda official: strip(official("ncsnpp"), "map_layer1"), "no tensor map_layer1.weight"),
        (lambda official: {"net": 1}, "no entry 'ema'"),
        (lambda official: {"ema": [1]}, "'ema' of type list"),
        (lambda official: [], "no entry 'ema'"),
    ],
)
def test_unexpected_content_is_rejected_by_name(official, tmp_path, make, message):
    file = write(tmp_path / "odd.pkl", make(official))
    with pytest.raises(UserError) as error:
        read_edm_pickle(file)
    assert message in str(error.value) and str(error.value).isprintable()


def parameters(content, layer):
    model = content["ema"].meta["state"]["_modules"]["model"]
    return model.meta["state"]["_modules"][layer].meta["state"]["_parameters"]


def test_weights_are_independent_contiguous_float32_copies(official, tmp_path):
    content = official("ncsnpp")
    first, second = parameters(content, "map_layer0"), parameters(content, "map_layer1")
    weight = second["weight"].detach()
    second["weight"] = torch.nn.Parameter(weight.double().t().contiguous().t())
    second["bias"] = first["bias"]
    denoiser = read_edm_pickle(write(tmp_path / "odd.pkl", content))
    assert not any(t.is_meta for t in (*denoiser.parameters(), *denoiser.buffers()))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in denoiser.parameters())
    save_denoiser(denoiser, tmp_path / "net")
    backbone = load_denoiser(tmp_path / "net").backbone
    assert torch.equal(backbone.map_layer1.weight, weight)
    assert torch.equal(backbone.map_layer1.bias, first["bias"])


def test_truncated_or_missing_file_is_a_one_line_error(official, tmp_path):
    file = write(tmp_path / "network.pkl", official("ncsnpp"))
    content = file.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pkl").write_bytes(content[:end])
        with pytest.raises(UserError) as error:
            read_edm_pickle(tmp_path / "cut.pkl")
        assert error.value.code == "damaged" and "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        read_edm_pickle(tmp_path / "none.pkl")
    assert error.value.code == "missing-file"


def test_page_or_state_of_a_training_in_place_of_a_pickle_is_named(tmp_path):
    """What a browser saves under the name of a file that it may not download, and files of
    `torch.save` in both formats."""
    file = tmp_path / "edm-cifar10.pkl"
    file.write_text("<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>")
    contents = [file.read_bytes()]
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"net": {"weight": torch.ones(2)}, "optimizer_state": {}}, file, **options)
        contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_edm_pickle(file)
        assert error.value.code in ("damaged", "rejected")
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_import_replaces_only_an_earlier_import(official, tmp_path, capsys):
    file, net = write(tmp_path / "network.pkl", official("ncsnpp")), tmp_path / "net"
    assert main(["import-edm", str(file), str(net)]) == 0
    again = write(tmp_path / "gdd.pkl", official("ncsnpp", class_name="GDDPrecond"))
    assert main(["import-edm", str(again), str(net)]) == 0
    assert denoiser_record(net)["imported"]["file"] == "gdd.pkl"

    def assert_rejected(folder):
        before = {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")}
        assert main(["import-edm", str(file), str(folder)]) == 2
        assert "was not created by import-edm" in capsys.readouterr().err
        assert {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")} == before

    (tmp_path / "link").symlink_to(net)
    assert_rejected(tmp_path / "link")
    assert_rejected(file)
    (net / "runs").mkdir()  # as in a teacher's folder
    assert_rejected(net)
    save_denoiser(read_edm_pickle(file), tmp_path / "run", {"imported": {"source": "x.pkl"}})
    assert_rejected(tmp_path / "run")


def test_teacher_of_other_images_is_rejected_before_anything_is_written(
    official, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def stage(*arguments):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        return main([*arguments, "--configfile", "x.yaml"])

    def written():
        files = [p for p in (tmp_path / "results").rglob("*") if p.name != "failure.json"]
        return {p: p.lstat().st_mtime_ns for p in files if not p.is_dir()}

    save_denoiser(tiny_denoiser(), tmp_path / "fits")
    small = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    save_denoiser(build_denoiser({"type": "SongUNet", **small}, (3, 16, 16), 0), tmp_path / "big")
    write(tmp_path / "big.pkl", official("ncsnpp"))
    tiny["teachers"] = {"other": {"source": "fits"}}
    assert stage("data") == stage("teacher", "other") == 0
    before = written()
    assert tmp_path / "results/tiny/teachers/other/teacher.json" in before
    for source, message in (
        ("big", "generates images of 16 x 16 pixels, but data digits has 8 x 8"),
        ("big.pkl", "other generates 3x16x16 images in 5 classes, but data digits has 1x8x8"),
    ):
        tiny["teachers"]["other"]["source"] = source
        assert stage("teacher", "other") == 2
        assert message in capsys.readouterr().err
        assert written() == before


def test_keys_that_a_section_does_not_name_are_compared_too(tiny, tmp_path, monkeypatch, capsys):
    """A VE checkpoint is not accepted where the experiment describes a VP network."""
    monkeypatch.chdir(tmp_path)
    small = {"type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    ve = small | {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
    for name, network in (("vp", small), ("ve", ve)):
        save_denoiser(build_denoiser(network, (1, 8, 8), 10), tmp_path / name)

    def stage(*arguments):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        return main([*arguments, "--configfile", "x.yaml"])

    tiny["teachers"] = {"vp": {"source": "ve", "network": small}}
    assert stage("data") == 0
    assert stage("teacher", "vp") == 2
    message = (
        "teachers.vp.network.embedding_type: the imported network has 'fourier', not 'positional'"
    )
    assert message in capsys.readouterr().err
    tiny["teachers"]["vp"]["source"] = "vp"
    assert stage("teacher", "vp") == 0
    sha256 = read_json(tmp_path / "results/tiny/teachers/vp/teacher.json")["imported"]["sha256"]
    assert f"imported vp, sha256 {sha256}" in capsys.readouterr().err
