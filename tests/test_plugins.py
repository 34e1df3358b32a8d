"""Plug-ins: classes from files outside the repository, errors in them, and docs/extending.md."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.config.schema import DataSection
from harness.data.datasets import Dataset, prepare
from harness.data.registry import Images
from harness.errors import UserError
from harness.evaluation.accumulator import FeatureAccumulator
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.features.base import load_extractor, make_features, new_extractor, parse_settings
from harness.io.records import FeatureRecord
from harness.registry import load_plugin
from harness.validation import load_experiment, parse_experiment
from tests.conftest import DATA, ROOT, Workspace

EXAMPLE = DATA / "example"
NAMES = ("stripes", "convnet", "teacher_output", "raw_pixels", "metrics")


def with_plugins(config: dict, folder: Path) -> dict:
    """The tiny experiment with every class of the plug-in files in a folder."""
    return config | {
        "plugins": [str(folder / f"{name}.py") for name in NAMES],
        "data": {"name": "stripes"},
        "features": {
            "cnn": {"type": "cnn", "images": 1280, "width": 8},
            "raw": {"type": "raw-pixels"},
            "pixels": {"type": "pixels"},
        },
        "teachers": {
            "conv": {
                "network": {"type": "ConvNet", "width": 8},
                "images": 640,
                "batch": 64,
                "sampler": {"steps": 3},
            }
        },
        "students": {"example": {"method": "teacher-output"}},
        "training": {"seeds": [0], "budget": [{"unit": "images", "amount": 64}]},
        "evaluation": {
            "num_samples": 100,
            "sampling_seeds": [0],
            "extractors": ["cnn", "raw", "pixels"],
            "metrics": ["fd", "accuracy", "energy-distance", "saturation", "direction"],
        },
    }


@pytest.mark.workflow
def test_one_file_adds_a_class_of_every_kind(tmp_path):
    plugins = tmp_path / "elsewhere"
    shutil.copytree(EXAMPLE, plugins)
    workspace = Workspace.create(tmp_path / "project")
    workspace.write_config(with_plugins(workspace.config(), plugins))
    done = workspace.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(workspace.results / "tables" / "metrics.csv")
    assert set(table.status) == {"ok"}
    found = {"cnn": {"fd", "accuracy", "energy-distance"}, "raw": {"fd", "energy-distance"}}
    found["pixels"] = {"saturation", "direction"}
    for student in ("example", "teacher", "floor"):
        rows = table[table.student == student]
        assert {name: set(rows[rows.extractor == name].metric) for name in found} == found
        assert rows[rows.metric == "direction"].stderr.notna().all()
    assert (table[(table.metric == "direction") & (table.student == "floor")].value > 95).all()
    assert (table[table.metric == "saturation"].value == 0).all()  # grey
    comparison = pd.read_csv(workspace.results / "tables" / "comparison.csv")
    assert "direction_n100_pixels" in comparison
    page = (workspace.results / "report.html").read_text()
    assert "Stripes as in the text (%)\u00a0↑" in page


def test_plugin_file_enters_the_fingerprints_that_depend_on_it(tiny, tmp_path, registries):
    experiment = parse_experiment(with_plugins(tiny, EXAMPLE), "x", tmp_path)
    assert set(experiment.plugin_hashes) == {"data", "features.raw", "teachers.conv"}
    assert "plugin" in experiment.features_fingerprint("raw")
    assert "plugin" not in experiment.features_fingerprint("cnn")
    method = (EXAMPLE / "teacher_output.py").resolve()
    assert experiment.student_run("example", 0).method_source == (method,)


def test_missing_or_broken_plugin_is_a_user_error(tiny, tmp_path, registries):
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no')\n")
    for path, code in ((tmp_path / "none.py", "missing-file"), (broken, "plugin")):
        with pytest.raises(UserError) as error:
            parse_experiment(tiny | {"plugins": [str(path)]}, "x")
        assert error.value.code == code


def plugin(tmp_path, text: str) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import none_such\n", "line 1: ModuleNotFoundError"),
        ("x = 1\ndef f(:\n", "SyntaxError"),
        ("raise SystemExit(2)\n", "line 1: SystemExit"),
        (
            "from harness.features.base import FEATURES\n"
            "@FEATURES.register('own')\n"
            "class Own:\n    pass\n",
            "feature network 'own' is not a subclass of FeatureExtractor",
        ),
        (
            "from harness.features.base import FEATURES, PretrainedExtractor\n"
            "@FEATURES.register('own')\n"
            "class Own(PretrainedExtractor):\n"
            "    def outputs(self, x): return {}\n",
            "feature network 'own' does not define load_network",
        ),
        (
            "from harness.features.base import FEATURES, PretrainedExtractor\n"
            "@FEATURES.register('own')\n"
            "class Own(PretrainedExtractor):\n"
            "    def outputs(self, x): return {}\n"
            "    def load_network(self, path): return None\n",
            "has no class Settings",
        ),
        (
            "from typing import Literal\n"
            "from harness.features.base import *\n"
            "from harness.features.base import FEATURES\n"
            "@FEATURES.register('own')\n"
            "class Own(PretrainedExtractor):\n"
            "    class Settings(PretrainedSettings):\n"
            "        type: Literal['other']\n"
            "    def outputs(self, x): return {}\n"
            "    def load_network(self, path): return None\n",
            "use Literal['own']",
        ),
        (
            "from harness.evaluation.registry import register\n"
            "@register('own', 'Own', 'higher')\n"
            "def own(features): return 0.0\n",
            "use True, False or None",
        ),
        (
            "from harness.evaluation.registry import register\n"
            "@register('own', 'Own', True, requires='pixels')\n"
            "def own(features): return 0.0\n",
            "use a tuple of names",
        ),
        (
            "from harness.evaluation.registry import register\n"
            "@register('own', 'Own', True, needs=('reference.feature',))\n"
            "def own(features): return 0.0\n",
            "needs 'reference.feature'; known: reference.features, reference.statistics",
        ),
        (
            "from harness.evaluation.registry import register\n"
            "@register('fd', 'Own', True)\n"
            "def own(features): return 0.0\n",
            "metric 'fd' is already registered",
        ),
        (
            "from harness.networks.registry import BACKBONES\n"
            "@BACKBONES.register('own')\n"
            "class Own:\n    pass\n",
            "network 'own' is not a subclass of Backbone",
        ),
        (
            "from harness.data.registry import DATASETS\n"
            "@DATASETS.register('own')\n"
            "class Own:\n    pass\n",
            "data set 'own' is not a subclass of DataSource",
        ),
    ],
)
def test_faulty_plugin_is_refused_in_one_line_with_its_file(tmp_path, registries, text, reason):
    path = plugin(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_plugin(path)
    assert error.value.code == "plugin"
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert reason in str(error.value)


NETWORK = """
from typing import Literal
import torch
from harness.config.schema import FeatureSettings
from harness.features.base import FEATURES, FeatureExtractor
from harness.io.records import FeatureRecord

@FEATURES.register("own")
class Own(FeatureExtractor):
    class Settings(FeatureSettings):
        type: Literal["own"]
    provided = frozenset({"features", "fd", "brightness"})
    def make(self, job): pass
    def load(self, record, folder, dataset, device): pass
    def extract(self, pixels, labels=None):
        features = torch.zeros(len(pixels), 2)
        BODY
"""
METRIC = """
from harness.evaluation.registry import register
@register("own-brightness", "Brightness", None, requires=("brightness",))
def brightness(features):
    return features.outputs["brightness"].mean()
"""


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("return {'features': features[1:]}", "outputs", "of shape (3, 2) for 4 images"),
        ("return {'features': features[:, 0]}", "outputs", "not (B, D) floats"),
        ("return {'features': features.long()}", "outputs", "not (B, D) floats"),
        ("return {'brightness': features[:, 0]}", "outputs", "no 'features'"),
        ("return {'features': features / 0}", "not-finite", "are not finite"),
        ("return {'features': features, 'brightness': features[:, 0] / 0}", "not-finite", "finite"),
        ("return {'features': undefined}", "plugin", "NameError"),
        ("return {'features': features}", "plugin", "KeyError: 'brightness'"),
    ],
)
def test_faulty_outputs_are_refused_in_one_line_with_their_file(
    tmp_path, registries, body, code, reason
):
    path = plugin(tmp_path, NETWORK.replace("BODY", body) + METRIC)
    load_plugin(path)
    extractor = new_extractor("x", parse_settings({"type": "own"}))
    accumulator = FeatureAccumulator([extractor])
    with pytest.raises(UserError) as error:
        accumulator.add(torch.zeros(4, 1, 2, 2).byte(), None)
        METRICS["own-brightness"].estimate(accumulator.feature_set("x", Reference(None), 3))
    assert error.value.code == code
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert reason in str(error.value)


def test_a_network_is_tried_before_anything_is_trained(tiny, tmp_path, registries, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (EXAMPLE / "raw_pixels.py").read_text()
    tiny |= {"plugins": [str(plugin(tmp_path, code.replace("flatten(1)", "flatten()")))]}
    tiny["features"]["own"] = {"type": "raw-pixels"}
    experiment = parse_experiment(tiny, "x.yaml")
    prepare(experiment.data, experiment.paths.data)
    with pytest.raises(UserError, match=r"of shape \(128,\) for 2 images"):
        make_features(experiment.feature_job("own"))


def test_an_own_file_of_weights_with_another_hash_is_an_error(tiny, tmp_path, registries):
    load_plugin(EXAMPLE / "resnet18.py")
    (tmp_path / "net.pt").write_bytes(b"x")
    settings = {"type": "resnet18", "weights": str(tmp_path / "net.pt"), "sha256": "0" * 64}
    job = replace(
        parse_experiment(tiny, "x").feature_job("tiny-cnn"), settings=parse_settings(settings)
    )
    with pytest.raises(UserError, match=r"net\.pt has sha256 .*, expected 0000"):
        make_features(job)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("images.to(torch.uint8)[:, None]", "images[:, None]", "torch.float32 (1280, 1, 8, 8)"),
        ("images.to(torch.uint8)[:, None]", "images.to(torch.uint8)", "(1280, 8, 8)"),
        ("index % 2,", "(index % 2).float(),", "labels torch.float32"),
        ("index % 2,", "index % 3,", "labels 0 to 2 for 2 class names"),
        ("index = ", "indices = ", "NameError"),
    ],
)
def test_faulty_data_set_is_refused_in_one_line_with_its_file(
    tmp_path, registries, old, new, reason
):
    code = (EXAMPLE / "stripes.py").read_text()
    assert old in code
    path = plugin(tmp_path, code.replace(old, new))
    load_plugin(path)
    with pytest.raises(UserError) as error:
        prepare(DataSection(name="stripes"), tmp_path / "data")
    assert error.value.code == "plugin"
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert reason in str(error.value)


def test_blocks_with_different_outputs_are_refused(tmp_path, registries):
    body = "return {'features': torch.zeros(len(pixels), len(pixels))}"
    load_plugin(plugin(tmp_path, NETWORK.replace("BODY", body)))
    accumulator = FeatureAccumulator([new_extractor("x", parse_settings({"type": "own"}))])
    accumulator.add(torch.zeros(4, 1, 2, 2).byte(), None)
    with pytest.raises(UserError) as error:
        accumulator.add(torch.zeros(3, 1, 2, 2).byte(), None)
    assert error.value.code == "outputs" and "(4,) and (3,)" in str(error.value)


def test_metric_may_return_a_number(tmp_path, registries):
    body = "return {'features': features, 'brightness': features[:, 0] + 7}"
    load_plugin(plugin(tmp_path, NETWORK.replace("BODY", body) + METRIC))
    accumulator = FeatureAccumulator([new_extractor("x", parse_settings({"type": "own"}))])
    accumulator.add(torch.zeros(4, 1, 2, 2).byte(), None)
    estimate = METRICS["own-brightness"].estimate(accumulator.feature_set("x", Reference(None), 3))
    assert estimate.value == 7 and isinstance(estimate.value, float)


def test_error_in_the_code_of_a_plugin_is_not_blamed_on_the_weights(tmp_path, registries):
    code = (EXAMPLE / "resnet18.py").read_text().replace("read_weights(path)", "undefined")
    load_plugin(plugin(tmp_path, code))
    (tmp_path / "x.pth").write_bytes(b"")
    settings = parse_settings({"type": "resnet18", "weights": str(tmp_path / "x.pth")})
    record = FeatureRecord(name="x", settings=settings.model_dump())
    record.write(tmp_path / "x" / "features.json")
    with pytest.raises(UserError, match="undefined") as error:
        load_extractor(tmp_path / "x", None)
    assert error.value.code == "plugin" and str(tmp_path / "plugin.py") in str(error.value)


# -- docs/extending.md --------------------------------------------------------------------------


def test_python_in_the_documentation_is_the_content_of_tested_files():
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") == 5
    for path, code in blocks:
        assert code == (ROOT / path).read_text(), path


def test_experiments_in_the_documentation_are_valid(tmp_path, registries):
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```yaml\n# configs/(\S+)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```yaml") == 4
    shutil.copy(ROOT / "configs" / "digits.yaml", tmp_path)
    for name, content in blocks:
        (tmp_path / name).write_text(content)
        experiment = load_experiment(tmp_path / name, files=False)
        assert f"{experiment.name}.yaml" == name


# -- torchvision's resnet18 ---------------------------------------------------------------------


@pytest.mark.contract
@pytest.mark.parametrize("file", ["resnet18.pth", "resnet18.safetensors", "parallel.pth"])
def test_resnet18_features_equal_torchvisions(tmp_path, registries, monkeypatch, file):
    import numpy as np
    import torchvision
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    weights = network.state_dict()
    if file.endswith("safetensors"):
        save_file(weights, tmp_path / file)
    elif file == "parallel.pth":
        parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
        torch.save({"state_dict": parallel, "epoch": 3}, tmp_path / file)
    else:
        torch.save(weights, tmp_path / file)
    monkeypatch.setenv("HOME", str(tmp_path))
    load_plugin(EXAMPLE / "resnet18.py")
    settings = parse_settings({"type": "resnet18", "weights": f"~/{file}"})
    FeatureRecord(name="x", settings=settings.model_dump()).write(tmp_path / "x" / "features.json")
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    none = Images(pixels[:0], torch.empty(0).long())
    extractor = load_extractor(tmp_path / "x", Dataset("x", none, none, ("a", "b"), ""))
    features = extractor.extract(pixels)["features"]

    # Pillow's bicubic resize is at most one of 255 levels away.
    resized = torch.stack(
        [
            torch.from_numpy(
                np.array(Image.fromarray(image.movedim(0, -1).numpy()).resize((224, 224), 3))
            ).movedim(-1, 0)
            for image in pixels
        ]
    )
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    captured = []
    network.fc.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        network(normalise(resized.float() / 255))
    assert features.shape == (2, 512)
    torch.testing.assert_close(features, captured[0], rtol=5e-3, atol=5e-3)
