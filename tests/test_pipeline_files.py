"""Pipelines whose files are incomplete, damaged, or of a kind that is not supported."""

import inspect
import json
import shutil
import struct
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.io.artifacts import LFS_POINTER, load_tensors
from harness.io.downloads import fetch
from harness.networks.vp import SCHEDULERS, ZERO_SNR_SCHEDULERS, read_scheduler, schedule_sigmas
from harness.teachers import tokenizers
from harness.teachers.pipelines import PipelineFolder
from harness.teachers.tokenizers import load_tokenizer
from tests import pipelines
from tests.test_config import problems, put

PROMPTS = ["a red cat", "a big dog", ""]
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 492265168\n"
NETWORKS = {"sd": "unet", "px": "transformer"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    pipelines.stable_diffusion().save_pretrained(root / "sd")
    pipelines.pixart().save_pretrained(root / "px")
    return root


@pytest.fixture(params=["sd", "px"])
def folder(request, saved, tmp_path) -> Path:
    """A copy of a pipeline's folder."""
    return shutil.copytree(saved / request.param, tmp_path / request.param)


@pytest.fixture
def sd(saved, tmp_path) -> Path:
    return shutil.copytree(saved / "sd", tmp_path / "sd")


def fails(call) -> tuple[str, str]:
    """The code and the message of a user's error."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return error.value.code, str(error.value)


def text_encoder(folder: Path):
    return PipelineFolder(folder).text_encoder()


# -- tokenizers -----------------------------------------------------------------------------------


def test_prompts_have_different_embeddings_or_the_tokenizer_is_rejected(folder):
    a, b, empty = text_encoder(folder).encode(PROMPTS)["embeddings"]
    assert not (torch.equal(a, b) or torch.equal(a, empty))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    code, message = fails(lambda: text_encoder(folder))
    assert code == "missing-file" and f"{folder / 'tokenizer'}: tokenizer.json, or" in message
    assert ("vocab.json and merges.txt" if folder.name == "sd" else "spiece.model") in message


def test_tokenizer_without_its_settings_is_rejected(folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    code, message = fails(lambda: text_encoder(folder))
    assert code == "missing-file" and "tokenizer_config.json" in message


def test_tokenizer_with_another_vocabulary_is_rejected(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    part = list(whole["model"]["vocab"])[:40]
    if isinstance(whole["model"]["vocab"], dict):
        part = {token: i for i, token in enumerate(part)}
    whole["model"]["vocab"] = part
    path.write_text(json.dumps(whole))
    code, message = fails(lambda: text_encoder(folder))
    assert code == "tokenizer" and str(folder / "tokenizer") in message
    path.write_text("{")
    assert fails(lambda: text_encoder(folder))[0] == "damaged"


def test_tokenizer_of_an_unknown_form_is_rejected(saved, monkeypatch):
    """Another version of the library may describe a byte-pair encoding by other keys."""
    model = {"type": "BPE", "vocabulary": {}}
    monkeypatch.setattr(tokenizers, "json", SimpleNamespace(loads=lambda _: {"model": model}))
    folder = saved / "sd" / "tokenizer"
    code, message = fails(lambda: load_tokenizer(folder, "clip", 514))
    assert code == "damaged" and str(folder) in message


def test_tokenizer_without_its_merges_is_rejected(saved, tmp_path):
    """An empty or cut merges.txt splits words into letters."""
    shutil.copy(saved / "sd" / "tokenizer" / "tokenizer_config.json", tmp_path)
    base = json.loads((saved / "sd" / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = dict(base["model"]["vocab"])
    for token in ("ca", "cat</w>"):
        vocabulary[token] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = load_tokenizer(tmp_path, "clip", len(vocabulary))
    assert tokenizer("cat").input_ids[1:-1] == [vocabulary["cat</w>"]]
    merges.write_text("#version: 0.2\nc a\n")
    code, message = fails(lambda: load_tokenizer(tmp_path, "clip", len(vocabulary)))
    assert code == "tokenizer" and "merges.txt" in message
    merges.unlink()
    assert fails(lambda: load_tokenizer(tmp_path, "clip", len(vocabulary)))[0] == "missing-file"


def field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3, value])


def sentencepiece_model(vocabulary: list[tuple[str, float]]) -> bytes:
    """A SentencePiece model of kind unigram."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # control and unknown; others are normal
    pieces = (
        field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kinds.get(piece, 1)))
        for piece, score in vocabulary
    )
    # Ids of the unknown piece, end and padding in the trainer's settings; there is no start.
    ids = b"".join(bytes([0xC0 | n, 0x02, i]) for n, i in ((0, 2), (0x10, 1), (0x18, 0)))
    return b"".join(pieces) + field(2, field(3, 1) + ids) + field(3, field(1, b"identity"))


def only_spiece(saved: Path, folder: Path) -> Path:
    """PixArt's tokenizer as it is published, without tokenizer.json."""
    shutil.copytree(saved / "px" / "tokenizer", folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(sentencepiece_model(model["vocab"]))
    return folder


def test_missing_packages_for_sentencepiece_are_named(saved, tmp_path, monkeypatch):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(tokenizers, "version", absent)
    folder = only_spiece(saved, tmp_path / "tokenizer")
    code, message = fails(lambda: load_tokenizer(folder, "t5", 98))
    assert code == "missing-package" and "pip install sentencepiece protobuf" in message


def test_sentencepiece_model_gives_the_ids_of_tokenizer_json(saved, tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    ours = load_tokenizer(only_spiece(saved, tmp_path / "tokenizer"), "t5", 98)
    expected = load_tokenizer(saved / "px" / "tokenizer", "t5", 98)
    assert ours(PROMPTS).input_ids == expected(PROMPTS).input_ids
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x05")
    assert fails(lambda: load_tokenizer(tmp_path / "tokenizer", "t5", 98))[0] == "damaged"


# -- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEuler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas",
        ),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"prediction_type": "sample"}, "sample"),
        ({"timestep_type": "continuous"}, "continuous"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"trained_betas": [0.1, 0.5, 1.0]}, "zero terminal SNR"),
    ],
)
def test_unsupported_scheduler_is_rejected(sd, changes, named):
    path = sd / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, message = fails(lambda: PipelineFolder(sd))
    assert code == "scheduler" and str(path) in message and named in message


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, "x"], [0.1, 1.5, 0.1], [0.1, float("nan")]])
def test_schedule_without_increasing_levels_is_rejected(sd, betas):
    path = sd / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_betas": betas}))
    job = SimpleNamespace(name="sd", data_section=SimpleNamespace(has_images=True))
    code, message = fails(lambda: PipelineFolder(sd).check(job, (3, 16, 16)))
    assert code == "scheduler" and str(path.parent) in message


def test_scheduler_of_the_index_is_checked_too(sd, tiny):
    path = sd / "model_index.json"
    index = json.loads(path.read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    path.write_text(json.dumps(index))
    assert fails(lambda: PipelineFolder(sd))[0] == "scheduler"
    put(tiny, "teachers.sd", {"source": str(sd)})  # before any stage
    assert ("teachers.sd.source", "scheduler") in [(p.key, p.code) for p in problems(tiny)]


def test_pipeline_with_another_scheduler_is_another_teacher(sd):
    """Its defaults may differ: σ of the last timestep is 157 in DDIM, 14.6 in Heun."""
    index, config = sd / "model_index.json", sd / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text())
    for key in ("beta_start", "beta_end", "beta_schedule"):
        del settings[key]
    config.write_text(json.dumps(settings))
    whole, same = json.loads(index.read_text()), PipelineFolder(sd)
    index.write_text(json.dumps(whole | {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}))
    other = PipelineFolder(sd)
    assert same.schedule != other.schedule and same.sha256() != other.sha256()
    assert same.sha256("text_encoder") == other.sha256("text_encoder")
    del whole["scheduler"]
    index.write_text(json.dumps(whole))
    assert PipelineFolder(sd).sha256() == same.sha256()  # the class of the config


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_that_ignores_zero_terminal_snr_is_rejected(kind):
    """diffusers ignores keys that a class does not have."""
    applies = kind in ZERO_SNR_SCHEDULERS
    if not hasattr(getattr(diffusers, kind), "_backends"):
        assert applies == ("rescale_betas_zero_snr" in getattr(diffusers, kind)().config)
    assert read_scheduler(kind, ZERO_SNR | {"rescale_betas_zero_snr": False})
    if applies:
        assert schedule_sigmas(read_scheduler(kind, ZERO_SNR)[0])[-1] > 4000
    else:
        with pytest.raises(ValueError, match=f"{kind} ignores rescale_betas_zero_snr: true"):
            read_scheduler(kind, ZERO_SNR)


def test_absent_keys_of_a_schedule_are_the_defaults_of_its_class():
    for kind, defaults in SCHEDULERS.items():
        if hasattr(getattr(diffusers, kind), "_backends"):  # needs a package that is not installed
            continue
        signature = inspect.signature(getattr(diffusers, kind).__init__).parameters
        assert tuple(signature[k].default for k in ("beta_start", "beta_end")) == defaults
        schedule, prediction = read_scheduler(kind, {})
        assert prediction == signature["prediction_type"].default
        scheduler = getattr(diffusers, kind)()
        alphas = scheduler.alphas_cumprod.double()
        assert torch.equal(schedule_sigmas(schedule), ((1 - alphas) / alphas).sqrt())
    assert schedule_sigmas(read_scheduler("HeunDiscreteScheduler", {})[0])[-1] < 30
    assert schedule_sigmas(read_scheduler("DDIMScheduler", {})[0])[-1] > 150


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"trained_betas": [0.1, 0.5, 1.0], "rescale_betas_zero_snr": False},
        {},  # here the level before the last is 15406
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_zero_terminal_snr_ends_at_a_finite_level(changes):
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} | changes
    sigmas = schedule_sigmas(read_scheduler("DDIMScheduler", config)[0])
    assert sigmas.isfinite().all() and (sigmas.diff() > 0).all()
    # The last alpha is 2^-24 in diffusers, whatever the others are.
    last, before = (2**24 - 1) ** 0.5, float(sigmas[-2])
    expected = last if before < last else 2 * before
    assert float(sigmas[-1]) == pytest.approx(expected, rel=1e-6)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "network", "vae"])
def test_git_lfs_pointer_in_place_of_weights_is_named(folder, part):
    part = NETWORKS[folder.name] if part == "network" else part
    path = next((folder / part).glob("*.safetensors"))
    path.write_bytes(POINTER)
    code, message = fails(lambda: PipelineFolder(folder))
    assert code == "lfs-pointer" and str(path) in message


def test_git_lfs_pointer_is_no_file_of_tensors_and_no_prompts(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(POINTER)
    for read in (load_tensors, lambda path: fetch(str(path), None)):
        code, message = fails(lambda read=read: read(path))
        assert code == "lfs-pointer" and str(path) in message


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_incomplete_weights_are_rejected(folder, part):
    """Both libraries give missing weights random values."""
    pipeline, path = PipelineFolder(folder), next((folder / part).glob("*.safetensors"))
    whole = path.read_bytes()

    def read():
        pipeline.text_encoder() if part == "text_encoder" else pipeline.codec()

    read()
    path.write_bytes(whole[:-40])
    code, message = fails(read)
    assert code == "damaged" and str(path.parent) in message
    path.write_bytes(whole)
    tensors = load_file(path)
    name = sorted(key for key in tensors if key.endswith("weight"))[0]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    code, message = fails(read)
    assert code == "damaged" and str(path.parent) in message


def test_linked_parts_are_read_and_a_link_without_a_target_is_named(saved, sd, tmp_path):
    original = PipelineFolder(sd).sha256()
    shutil.move(sd / "vae", tmp_path / "elsewhere")
    (sd / "vae").symlink_to(tmp_path / "elsewhere")
    weights = next((sd / "unet").glob("*.safetensors"))
    blob = shutil.move(weights, tmp_path / "blob")  # as in the cache of the Hugging Face hub
    weights.symlink_to(blob)
    assert PipelineFolder(sd).sha256() == original
    Path(blob).unlink()
    code, message = fails(lambda: PipelineFolder(sd))
    assert code == "dangling-link" and str(weights) in message


def weights_of(folder: Path) -> list[Path]:
    parts = (NETWORKS[folder.name], "text_encoder", "vae")
    return [next((folder / part).glob("*.safetensors")) for part in parts]


def outputs(folder: Path) -> list[torch.Tensor]:
    """A denoised latent, its pixels and a text embedding."""
    pipeline = PipelineFolder(folder)
    condition = pipeline.text_encoder().encode(PROMPTS[:1])
    denoiser, codec = pipeline.denoiser(condition), pipeline.codec()
    parameters = [*denoiser.parameters(), *codec.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    x = torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8)
    with torch.no_grad():
        x = denoiser(x, torch.ones(1), condition)
        return [x, codec(x), condition["embeddings"]]


def test_float16_weights_are_read_as_float32(folder):
    expected = outputs(folder)
    for path in weights_of(folder):
        halves = {key: value.half() for key, value in load_file(path).items()}
        save_file(halves, path, {"format": "pt"})
    for found, value in zip(outputs(folder), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value, rtol=0.03, atol=0.03)


def test_sharded_weights_are_read(folder):
    expected = outputs(folder)
    pipeline = PipelineFolder(folder)
    for part, model in (
        (NETWORKS[folder.name], pipeline.denoiser().backbone),
        ("text_encoder", pipeline.text_encoder().network),
        ("vae", pipeline.codec().vae),
    ):
        next((folder / part).glob("*.safetensors")).unlink()
        model.save_pretrained(folder / part, max_shard_size="60KB")
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    for found, value in zip(outputs(folder), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_cut_prompt_keeps_the_token_that_ends_it(sd):
    encoder = text_encoder(sd)
    long, whole = encoder.encode(["a " * 300, "a " * 75])["embeddings"]
    assert torch.equal(long, whole)
    assert encoder.truncated(["a " * 300, "a " * 75, "a"]) == 1
