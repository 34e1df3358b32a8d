"""Official pickles become denoiser folders, and nothing in them is run."""

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
from harness.networks import build_denoiser, denoiser_record, load_denoiser, save_denoiser
from harness.teachers import edm_pickle as import_edm
from harness.teachers.edm_pickle import read_edm_pickle
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
def test_an_official_pickle_becomes_a_folder(official, tmp_path, name, protocol):
    file = write(tmp_path / "network.pkl", official(name), protocol)
    assert main(["import-edm", str(file), str(tmp_path / "net")]) == 0
    denoiser, data = load_denoiser(tmp_path / "net"), golden(name)
    labels = torch.from_numpy(data["labels"]) if "labels" in data else None
    extras = {"augment_labels": torch.from_numpy(data["augment_labels"])} if labels is None else {}
    x, sigma = torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"]).float()
    assert error(denoiser(x, sigma, labels, **extras), data["output"]) < 1e-5
    assert denoiser_record(tmp_path / "net")["imported"]["file"] == "network.pkl"


def test_gdd_students_keep_their_preconditioning(official, tmp_path):
    file = write(tmp_path / "gdd.pkl", official("ncsnpp", class_name="GDDPrecond"))
    import_edm.import_edm(file, tmp_path / "net")
    assert load_denoiser(tmp_path / "net").epsilon == 0.002


class Call:
    """A pickle of this calls `function(*arguments)` when it is loaded the ordinary way."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def inner_attack(marker, protocol=2):
    """Tensor data whose own pickle is hostile."""
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
        (inner_attack, "refused: it holds tensor data that cannot be read: it asks for io.open"),
        (lambda marker: inner_attack(marker, 4), "cannot be read: it is damaged or holds other"),
    ],
)
def test_a_hostile_pickle_is_refused_and_not_run(official, tmp_path, capsys, hostile, named):
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
    """A pickle of this makes what `made` is, and then sets `state` on it."""

    def __init__(self, made, state):
        self.made, self.state = made, state

    def __reduce__(self):
        return (*self.made.__reduce_ex__(2)[:2], self.state)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_no_state_is_set_on_tensors_and_records(official, tmp_path):
    """A tensor's own would let it reach beyond its data."""
    beyond = (torch.zeros(4).storage(), 0, (3,), (1000,))
    for made in (torch.zeros(4), torch.nn.Parameter(torch.zeros(4)), Persistent("Conv2d")):
        for state in (beyond, (None, {"value": 1}), {"value": 1}):
            file = write(tmp_path / "x.pkl", official("ncsnpp") | {"more": Stated(made, state)})
            with pytest.raises(UserError, match="it holds a state where such a file sets none"):
                read_edm_pickle(file)


@pytest.mark.parametrize("name", import_edm._ALLOWED, ids=".".join)
def test_no_file_changes_what_the_next_one_is_read_with(tmp_path, name):
    """A pickle may set attributes of the very functions and classes that it names."""
    stand_in = import_edm._ALLOWED[name]
    for state in ((None, {"poison": 1}), {"poison": 1}):
        # PROTO 2, GLOBAL name, the state, BUILD, STOP
        build = b"\x80\x02c%s\n%s\n" % tuple(part.encode() for part in name)
        (tmp_path / "x.pkl").write_bytes(build + pickle.dumps(state, 2)[2:-1] + b"b.")
        with pytest.raises(UserError, match=r"a state where|\(TypeError: "):
            read_edm_pickle(tmp_path / "x.pkl")
        assert not hasattr(stand_in, "poison")


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
        (lambda official: official("ncsnpp", label_dim=0), "do not ask for"),
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
        (lambda official: official("ncsnpp", dropout=torch.zeros(1)), "as dropout, which no"),
        (lambda official: official("ncsnpp", dropout=Persistent("Linear")), "as dropout, which no"),
        (lambda official: official("ncsnpp", sigma_data="0.5"), "'0.5' as sigma_data"),
        (lambda official: official("ncsnpp", class_name="\x1b[31m\nEDM"), "a [31m EDM, but only"),
        (
            lambda official: {"ema": torch.zeros(1).expand(4)},
            "a tensor that is larger than its data",
        ),
        (lambda official: strip(official("ncsnpp"), "map_layer1"), "no tensor map_layer1.weight"),
        (lambda official: {"net": 1}, "no entry 'ema'"),
        (lambda official: {"ema": [1]}, "'ema' of type list"),
        (lambda official: [], "no entry 'ema'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(official, tmp_path, make, message):
    file = write(tmp_path / "odd.pkl", make(official))
    with pytest.raises(UserError) as caught:
        read_edm_pickle(file)
    assert message in str(caught.value) and str(caught.value).isprintable()


def parameters(content, layer):
    model = content["ema"].meta["state"]["_modules"]["model"]
    return model.meta["state"]["_modules"][layer].meta["state"]["_parameters"]


def test_tensors_of_any_layout_and_type_become_weights_of_their_own(official, tmp_path):
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


def test_a_truncated_or_missing_file_is_one_line(official, tmp_path):
    file = write(tmp_path / "whole.pkl", official("ncsnpp"))
    content = file.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pkl").write_bytes(content[:end])
        with pytest.raises(UserError, match="damaged or no EDM pickle") as caught:
            read_edm_pickle(tmp_path / "cut.pkl")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_edm_pickle(tmp_path / "none.pkl")


def test_an_import_takes_the_place_of_a_former_import_alone(official, tmp_path, capsys):
    file, net = write(tmp_path / "network.pkl", official("ncsnpp")), tmp_path / "net"
    assert main(["import-edm", str(file), str(net)]) == 0
    again = write(tmp_path / "gdd.pkl", official("ncsnpp", class_name="GDDPrecond"))
    assert main(["import-edm", str(again), str(net)]) == 0
    assert denoiser_record(net)["imported"]["file"] == "gdd.pkl"

    def refused(folder):
        before = {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")}
        assert main(["import-edm", str(file), str(folder)]) == 2
        line = f"error: {folder} exists and is no former import alone; name another"
        assert capsys.readouterr().err.splitlines()[-1] == line
        assert {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")} == before

    (tmp_path / "link").symlink_to(net)
    refused(tmp_path / "link")
    refused(file)
    (net / "runs").mkdir()  # as a teacher's folder has them
    refused(net)
    save_denoiser(read_edm_pickle(file), tmp_path / "run", {"imported": {"source": "x.pkl"}})
    refused(tmp_path / "run")


def test_a_teacher_of_other_images_is_refused_before_anything_is_written(
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
    for source, labels in (("big", 0), ("big.pkl", 5)):
        tiny["teachers"]["other"]["source"] = source
        assert stage("teacher", "other") == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: teacher other makes 3x16x16 images with {labels} labels, but data digits has "
            "1x8x8 images with 10 labels"
        )
        assert written() == before
