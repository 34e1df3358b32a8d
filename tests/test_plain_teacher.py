"""A plain module from a plug-in file as a teacher: docs/teachers.md's example."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from harness.cli import main
from harness.denoiser import EDMDenoiser
from harness.errors import UserError
from harness.io.artifacts import load_tensors, read_json
from harness.networks import BACKBONES, build_denoiser, load_denoiser, save_denoiser
from harness.networks.plain import read_module
from harness.registry import load_plugin
from harness.validation import parse_experiment
from tests.conftest import DATA, ROOT
from tests.test_config import mistakes, put

FILE = DATA / "example" / "my_teacher.py"
NETWORK = {"type": "MyNet", "width": 8}


@pytest.fixture(scope="module", autouse=True)
def plugin():
    load_plugin(FILE)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return BACKBONES["MyNet"].denoisers[0].build(width=8).state_dict()


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.3, 5.0]), torch.tensor([3, 7])


def test_example_is_complete_in_the_documentation():
    text = (ROOT / "docs" / "teachers.md").read_text()
    assert FILE.read_text() in text


def test_module_is_denoised_by_its_own_preconditioning(tmp_path):
    """EDM's, so it equals `EDMDenoiser`; weights from safetensors and from torch's format."""
    save_file(weights(), tmp_path / "w.safetensors")
    torch.save(weights(), tmp_path / "w.pt")
    denoisers = [read_module(tmp_path / f"w.{form}", NETWORK) for form in ("safetensors", "pt")]

    class Reference(EDMDenoiser):
        def run_backbone(self, x, c_noise, condition):
            return self.backbone(x, c_noise, condition)

    reference = Reference(denoisers[0].backbone.module, 10)
    x, sigma, labels = images()
    for denoiser in denoisers:
        torch.testing.assert_close(denoiser(x, sigma, labels), reference(x, sigma, labels))


def test_module_is_saved_and_loaded(tmp_path):
    denoiser = build_denoiser(NETWORK, (1, 8, 8), 10)
    sha256 = save_denoiser(denoiser, tmp_path, {"sigma_init": 2.5})
    again = load_denoiser(tmp_path, sha256)
    assert torch.equal(again(*images()), denoiser(*images()))
    assert read_json(tmp_path / "config.json") == {"_class_name": "MyNet", "width": 8}
    assert read_json(tmp_path / "denoiser.json") == {"preconditioning": "own", "sigma_init": 2.5}


def test_tied_weights_are_saved(tmp_path):
    denoiser = build_denoiser(NETWORK, (1, 8, 8), 10)
    denoiser.backbone.module.tied = denoiser.backbone.module.first.weight
    denoiser.backbone.save_pretrained(tmp_path)
    saved = load_tensors(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["module.tied"], saved["module.first.weight"])


@pytest.mark.parametrize(
    ("content", "network", "named"),
    [
        (b"<html>", NETWORK, "is not a file of tensors"),
        ({"width": torch.ones(3)}, NETWORK, "Missing key"),
        (None, NETWORK | {"width": 16}, "size mismatch"),
        (None, NETWORK | {"depth": 2}, "unexpected keyword argument 'depth'"),
    ],
)
def test_file_that_does_not_fit_is_one_line(tmp_path, content, network, named):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(weights() if content is None else content, path)
    with pytest.raises(UserError) as error:
        read_module(path, network)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_output_of_another_shape_and_missing_label_are_named():
    denoiser = build_denoiser(NETWORK, (1, 8, 8), 10)
    denoiser.denoise = lambda module, x, sigma, condition: x[:, :, :4]
    with pytest.raises(UserError, match="denoise returned"):
        denoiser(*images())
    with pytest.raises(UserError, match="set null_label"):
        denoiser(*images()[:2])


@pytest.fixture
def experiment(tiny, tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    shutil.copy(FILE, tmp_path / "my_teacher.py")
    section = {"source": "w.safetensors", "network": NETWORK, "sampler": {"steps": 3}}
    tiny["teachers"] = {"mine": section}
    tiny["plugins"] = [str(FILE)]
    tiny["students"] = {"sid": {"method": "sid"}}
    tiny["training"]["settings"] = {"batch": 16}
    return tiny


def test_settings_that_the_module_cannot_serve(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = parse_experiment(experiment, "x")
    reason = "MyNet has no layers with dropout"
    assert loaded.students["sid"].adapted == {
        "augment": "MyNet has no augmentation labels",
        **{"dropout": reason, "generator_dropout": reason},
    }
    assert "plugin" in loaded.teacher_fingerprint("mine")
    put(experiment, "students.sid", {"method": "sid", "freeze": "innate"})
    put(experiment, "students.sid.settings", {"dropout": 0.1, "teacher_guidance": 2.0})
    found = mistakes(experiment)
    for key in ("freeze", "settings.dropout", "settings.teacher_guidance"):
        assert any(message.startswith(f"students.sid.{key}: ") for message in found)
    put(experiment, "students", {"sid": {"method": "sid"}})
    put(experiment, "teachers", {"mine": {"network": NETWORK, "images": 640}})
    assert mistakes(experiment) == ["teachers.mine.network.type: MyNet can only be imported"]


def test_students_train_from_a_module_and_resume(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*stages: str) -> None:
        Path("x.yaml").write_text(yaml.safe_dump(experiment))
        for stage in stages:
            assert main([*stage.split(), "--configfile", "x.yaml"]) == 0, stage

    run("data", "teacher mine", "train sid 0")
    folder = Path("results/tiny/students/sid/seed0")
    first = read_json(folder / "student.json")
    experiment["training"]["budget"] = [{"unit": "images", "amount": 192}]
    run("train sid 0")  # goes on
    record = read_json(folder / "student.json")
    assert record["run_id"] == first["run_id"] and record["ledger"]["images"] == 192
    student = load_denoiser(folder / "model", record["sha256"])
    assert type(student).__name__ == "MyNet" and student(*images()).isfinite().all()
