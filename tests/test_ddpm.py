"""`DDPMPipeline` and `DDIMPipeline` folders as teachers, compared with diffusers."""

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler

from harness import OneStepPipeline
from harness.cli import main
from harness.denoiser import guided, one_step
from harness.errors import UserError
from harness.io.artifacts import read_json
from harness.networks import load_denoiser, save_denoiser
from harness.networks.vp import schedule_sigmas
from harness.teachers import sources
from harness.teachers.ddpm import DDPMFolder
from harness.validation import parse_experiment
from tests.ddpm import ddpm
from tests.test_config import mistakes, problems, put
from tests.test_pipelines import euler, relative

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders of a conditional (10 classes) and an unconditional pipeline."""
    root = tmp_path_factory.mktemp("ddpm")
    ddpm(10).save_pretrained(root / "labelled")
    ddpm().save_pretrained(root / "plain")
    return root


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved / "labelled", tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("folder", "data", "message"),
    [
        ("plain", {"name": "x", "source": ".", "resize": {"size": 16}}, "generates images of 8 x 8 pixels, but data x has 16 x 16; set data.resize.size: 8"),
        ("plain", {"name": "x", "source": ".", "resolution": 32}, "generates images of 8 x 8 pixels, but data x has 32 x 32"),
        ("plain", {"name": "digits"}, "has no class labels, but the data has; set data.labels: false"),
    ],
)  # fmt: skip
def test_images_and_classes_are_compared_before_anything_runs(saved, tiny, folder, data, message):
    tiny["data"], tiny["teachers"] = data, {"edm": {"source": str(saved / folder)}}
    found = [p.message for p in problems(tiny) if p.key == "teachers.edm.source"]
    assert found[:1] == [message]


def flatten(folder: Path) -> Path:
    """All files in the folder itself, as in google/ddpm-cifar10-32."""
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    return folder


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def ddim(unet, scheduler, x, labels) -> list[torch.Tensor]:
    """The trajectory of diffusers' deterministic sampler."""
    states = []
    for time in scheduler.timesteps:
        output = unet(x, time, class_labels=labels).sample[:, :1]
        x = scheduler.step(output, time, x, eta=0.0).prev_sample
        states.append(x)
    return states


TRAINED = {"num_train_timesteps": 20, "trained_betas": [0.001 * 1.3**i for i in range(20)]}
CASES = [
    (0, "epsilon", False, {}),
    (0, "v_prediction", False, {"beta_schedule": "squaredcos_cap_v2"}),
    (0, "sample", False, {"beta_schedule": "scaled_linear"}),
    (10, "epsilon", True, TRAINED),
    (10, "v_prediction", False, {"rescale_betas_zero_snr": True}),
    (11, "sample", False, {}),
]


@pytest.mark.contract
@pytest.mark.parametrize(("classes", "prediction", "learned", "schedule"), CASES)
def test_denoiser_follows_the_trajectory_of_ddim(classes, prediction, learned, schedule, tmp_path):
    """Also with learned variance, whose half of the output has no effect on DDIM."""
    pipe = ddpm(classes, prediction, learned, **schedule)
    pipe.save_pretrained(tmp_path)
    data_classes = min(classes, 10)
    denoiser = DDPMFolder(tmp_path).denoiser(data_classes)
    labels = torch.tensor([3, 7]) if classes else None
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(5)
    expected = ddim(pipe.unet, scheduler, noise(), labels)
    sigmas = denoiser.log_sigmas.exp()[scheduler.timesteps].float()
    levels = torch.cat([sigmas, torch.zeros(1)])
    ours = euler(denoiser, noise() * (1 + sigmas[0] ** 2).sqrt(), labels, levels)
    scaled = [x / (1 + s**2).sqrt() for x, s in zip(ours, levels[1:], strict=True)]
    assert max(map(relative, scaled, expected)) < 1e-4
    sha256 = save_denoiser(denoiser, tmp_path / "saved")
    again = load_denoiser(tmp_path / "saved", sha256)
    with torch.no_grad():
        x, sigma = noise(), torch.tensor([0.3, 5.0])
        assert torch.equal(again(x, sigma, labels), denoiser(x, sigma, labels))


@pytest.mark.contract
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules_have_the_bits_of_diffusers(name, rescale):
    config = {"num_train_timesteps": 300, "beta_schedule": name, "beta_start": 0.002}
    config |= {"rescale_betas_zero_snr": rescale}
    alphas = DDIMScheduler(**config).alphas_cumprod.double()[: 299 if rescale else 300]
    sigmas = schedule_sigmas(config)
    assert torch.equal(sigmas[: len(alphas)], ((1 - alphas) / alphas).sqrt())


def test_both_layouts_are_one_teacher(saved, folder):
    flat = DDPMFolder(flatten(folder))
    nested = DDPMFolder(saved / "labelled")
    assert flat.sha256() == nested.sha256() and flat.network_config() == nested.network_config()
    (folder / "model_index.json").unlink()
    shutil.copy(  # a variant, which is not read
        folder / "diffusion_pytorch_model.safetensors",
        folder / "diffusion_pytorch_model.fp16.safetensors",
    )
    bare = DDPMFolder(folder)
    assert bare.sha256() == nested.sha256()
    states = [f.denoiser(10).backbone.state_dict() for f in (flat, nested, bare)]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_guidance_needs_a_label_for_the_unconditional_score(tmp_path):
    ddpm(11).save_pretrained(tmp_path)
    x, sigma, labels = noise(), torch.tensor([0.3, 5.0]), torch.tensor([3, 7])
    with torch.no_grad():
        ten = DDPMFolder(tmp_path).denoiser(10)
        null = ten(x, sigma, torch.tensor([10, 10]))
        assert torch.equal(ten(x, sigma), null)
        expected = null + 3 * (ten(x, sigma, labels) - null)
        assert relative(guided(ten, 3.0)(x, sigma, labels), expected) < 1e-5
        eleven = DDPMFolder(tmp_path).denoiser(11)
        with pytest.raises(UserError, match="no label for an unconditional score"):
            guided(eleven, 3.0)(x, sigma, labels)


# -- folders that are rejected --------------------------------------------------------------------


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(read_json(path) | values))


def as_pickle(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def as_variant(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (as_pickle, "weights", "save_pretrained(FOLDER, safe_serialization=True)"),
        (as_variant, "weights", "diffusion_pytorch_model.safetensors"),
        (lambda f: (f / SCHEDULER).unlink(), "missing-file", "scheduler_config.json"),
        (lambda f: (f / UNET).unlink(), "missing-file", "config.json"),
        (lambda f: change(f / SCHEDULER, _class_name="EDMEulerScheduler"), "scheduler", "EDMEuler"),
        (lambda f: change(f / SCHEDULER, prediction_type="flow"), "scheduler", "flow"),
        (lambda f: change(f / SCHEDULER, beta_schedule="sigmoid"), "scheduler", "sigmoid"),
        (lambda f: change(f / UNET, _class_name="UNet1DModel"), "unknown-name", "UNet1DModel"),
        (lambda f: change(f / SCHEDULER, trained_betas=[-0.1] * 9), "scheduler", "increasing"),
        (lambda f: change(f / SCHEDULER, num_train_timesteps=0), "scheduler", "out of bounds"),
        (lambda f: (f / SCHEDULER).write_text("[]"), "invalid-value", "expected an object"),
        (lambda f: (f / UNET).write_text("[]"), "invalid-value", "expected an object"),
        (lambda f: change(f / "model_index.json", scheduler=5), "invalid-value", "not 5"),
    ],
)
def test_invalid_folder_is_rejected_when_the_experiment_is_read(tiny, folder, damage, code, named):
    damage(folder)
    put(tiny, "teachers.ddpm", {"source": str(folder)})
    (found,) = problems(tiny)
    assert (found.key, found.code) == ("teachers.ddpm.source", code) and named in found.message


@pytest.mark.parametrize(
    ("values", "classes", "named"),
    [
        ({"time_embedding_type": "fourier"}, 10, "time_embedding_type 'fourier'"),
        ({"class_embed_type": "timestep"}, 10, "class_embed_type 'timestep'"),
        ({"sample_size": [8, 16]}, 10, "sample_size [8, 16]"),
        ({}, 7, "num_class_embeds 10, but 7 classes"),
        ({}, 0, "num_class_embeds 10, but 0 classes"),
    ],
)
def test_network_without_a_wrapper_is_rejected(folder, monkeypatch, values, classes, named):
    unet = DDPMFolder(folder).load(ddpm().unet.__class__, "unet")
    unet.register_to_config(**values)
    monkeypatch.setattr(DDPMFolder, "load", lambda *_: unet)
    with pytest.raises(UserError) as error:
        DDPMFolder(folder).denoiser(classes)
    assert error.value.code == "network" and named in str(error.value)


def test_network_beside_a_pipeline_names_the_pipeline(tiny, saved):
    put(tiny, "teachers.ddpm", {"source": str(saved / "labelled" / "unet")})
    (message,) = mistakes(tiny)
    assert f"set source to the pipeline's folder, {saved / 'labelled'}" in message
    assert "delete" not in message


# -- repositories ---------------------------------------------------------------------------------


def test_repository_is_downloaded_in_parts(tiny, saved, monkeypatch, tmp_path):
    """Configs when the experiment is read; weights, as safetensors, by the teacher's stage."""
    cache, requests = tmp_path / "cache", []

    def snapshot(repository, revision, kind, patterns):
        assert (repository, revision, kind) == ("google/ddpm", COMMIT, "model")
        requests.append(patterns)
        for path in sorted((saved / "labelled").rglob("*")):
            name = str(path.relative_to(saved / "labelled"))
            if path.is_file() and any(fnmatchcase(name, pattern) for pattern in patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return cache

    cached = lambda *_: cache if cache.exists() else None  # noqa: E731
    monkeypatch.setattr("harness.io.hub.snapshot", snapshot)
    monkeypatch.setattr("harness.config.schema.cached_snapshot", cached)
    section = {"source": "google/ddpm", "revision": COMMIT}
    put(tiny, "teachers", {"ddpm": section})
    experiment = parse_experiment(tiny, "tiny.yaml")
    assert requests == [["*.json"]] and not list(cache.rglob("*.safetensors"))
    teacher = experiment.teachers["ddpm"]
    assert sources.kind_of(teacher) == "ddpm" and teacher.sampler.sigma_max > 100
    assert experiment.teacher_fingerprint("ddpm")["teacher"]["revision"] == COMMIT
    sources.download(teacher)
    assert DDPMFolder(cache).sha256() == DDPMFolder(saved / "labelled").sha256()
    patterns = [pattern for request in requests for pattern in request]
    for other in ("unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors", "unet/x.ckpt"):
        assert not any(fnmatchcase(other, pattern) for pattern in patterns)
    assert any(fnmatchcase("unet/diffusion_pytorch_model-00001-of-00002.safetensors", p)
               for p in patterns)  # fmt: skip


def test_revision_is_checked(tiny):
    put(tiny, "teachers.ddpm", {"source": "google/ddpm", "revision": "main"})
    assert [problem.key for problem in problems(tiny)] == ["teachers.ddpm.revision"]
    put(tiny, "teachers.ddpm", {"source": "google/ddpm"})
    assert "add its commit hash as revision" in str(mistakes(tiny))


# -- settings and stages --------------------------------------------------------------------------


def test_sampler_has_the_levels_of_the_schedule_by_default(tiny, saved):
    put(tiny, "teachers", {"ddpm": {"source": str(saved / "labelled")}})
    sampler = parse_experiment(tiny, "x").teachers["ddpm"].sampler
    assert sampler.sigma_max == pytest.approx(157.4, rel=1e-3)
    assert sampler.sigma_min == pytest.approx(0.01, rel=1e-3)
    tiny["teachers"]["ddpm"]["sampler"] = {"sigma_max": 80.0}
    sampler = parse_experiment(tiny, "x").teachers["ddpm"].sampler
    assert sampler.sigma_max == 80 and sampler.sigma_min == pytest.approx(0.01, rel=1e-3)
    tiny["teachers"]["ddpm"]["sampler"] = {"sigma_max": 0.005}  # below the default sigma_min
    (found,) = problems(tiny)
    assert (found.key, found.code) == ("teachers.ddpm.sampler", "invalid-value")
    tiny["teachers"]["ddpm"]["sampler"] = {"sigma_max": 200.0}
    (found,) = problems(tiny)
    assert (found.key, found.code) == ("teachers.ddpm.sampler.sigma_max", "noise-level")


def run(experiment: dict, *stages: str) -> None:
    Path("x.yaml").write_text(yaml.safe_dump(experiment))
    for stage in stages:
        assert main([*stage.split(), "--configfile", "x.yaml"]) == 0, stage


def test_teacher_of_other_images_is_rejected_by_the_stage(saved):
    """Of data whose size is unknown until they are read."""
    with pytest.raises(UserError) as error:
        DDPMFolder(saved / "plain").check(SimpleNamespace(name="ddpm"), (1, 16, 16))
    expected = "teacher ddpm generates 1x8x8 images, but the data has 1x16x16 images"
    assert str(error.value) == expected


def test_teacher_of_images_that_are_not_square_is_rejected(folder):
    change(folder / UNET, sample_size=[8, 16])
    with pytest.raises(UserError) as error:
        DDPMFolder(folder).check(SimpleNamespace(name="ddpm"), (1, 8, 8))
    assert "sample_size [8, 16] is not the width of square images" in str(error.value)


@pytest.mark.slow
def test_students_of_a_ddpm_pipeline_go_through_all_stages(tiny, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "labelled", "pipeline")
    tiny["teachers"] = {"ddpm": {"source": "pipeline", "sampler": {"steps": 3}}}
    students = {"sid": {"method": "sid", "lora": {"rank": 2}}, "gdd-i": tiny["students"]["gdd-i"]}
    tiny["students"] = students | {"dmd": tiny["students"]["dmd"]}
    tiny["training"]["settings"] = {"batch": 16, "width": 8}
    tiny["evaluation"]["num_samples"] = 100
    run(tiny, "data", *(f"features tiny-{name}" for name in ("cnn", "clip", "critic")))
    run(tiny, "teacher ddpm", "pairs ddpm_n64_steps3")
    for student in tiny["students"]:
        run(tiny, f"train {student} 0", f"score {student} 0")
    run(tiny, "score-references ddpm", "report", "plan")
    results = Path("results/tiny")
    record = read_json(results / "students" / "sid" / "seed0" / "student.json")
    assert record["settings"]["augment"] == record["settings"]["dropout"] == 0
    assert "augment 0 instead of 0.12 (UNet2DModel has no augmentation labels)" in str(record)
    assert read_json(results / "teachers" / "ddpm" / "teacher.json")["warnings"]  # random weights
    student = load_denoiser(results / "students" / "gdd-i" / "seed0" / "model")
    assert type(student).__name__ == "DDPMDenoiser" and student.num_classes == 10
    run(tiny, "export gdd-i 0 exported")
    z, labels = noise(), torch.tensor([3, 7])
    pipe = OneStepPipeline.from_pretrained("exported")
    images = pipe(class_labels=labels, latents=z, output_type="pt").images
    with torch.no_grad():
        expected = one_step(student, z, labels, 80.0)
    assert (images - (expected / 2 + 0.5).clip(0, 1)).abs().max() < 1e-2
