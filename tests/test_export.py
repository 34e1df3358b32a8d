"""Exported students: diffusers pipelines that generate the harness's images."""

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline

import harness
from harness.denoiser import one_step
from harness.io.artifacts import read_json
from harness.networks import load_denoiser
from harness.sampling import noise_and_labels
from harness.students.export import one_step_scheduler, write_pipeline
from harness.students.pipeline import OneStepPipeline
from harness.teachers.pipelines import PipelineFolder
from tests import pipelines


def test_exported_student_generates_the_same_images(finished, tmp_path):
    folder = tmp_path / "sid"
    arguments = ["export", "sid", "0", str(folder), "--configfile", "configs/tiny.yaml"]
    done = finished.run("harness", *arguments)
    assert done.returncode == 0, done.stderr
    pipe = harness.OneStepPipeline.from_pretrained(folder)
    assert isinstance(pipe, OneStepPipeline)
    z, labels = noise_and_labels(torch.arange(6), (1, 8, 8), 10, seed=0)
    images = pipe(class_labels=labels, latents=z, output_type="pt").images
    run = finished.results / "students" / "sid" / "seed0"
    student = load_denoiser(run / "model", read_json(run / "student.json")["sha256"])
    with torch.no_grad():
        expected = one_step(student, z, labels, 2.5)
    assert torch.equal(images, (expected / 2 + 0.5).clip(0, 1))
    pictures = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images
    assert [p.size for p in pictures] == [(8, 8)] * 2 and pictures[0].mode == "L"


def test_model_card_has_origin_and_scores(finished, tmp_path):
    folder = tmp_path / "dmd"
    arguments = ["export", "dmd", "0", str(folder), "--configfile", "configs/tiny.yaml"]
    assert finished.run("harness", *arguments).returncode == 0
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "onestep-harness" and "dmd" in head["tags"]
    record = read_json(finished.results / "students" / "dmd" / "seed0" / "student.json")
    for text in (record["sha256"], record["inputs"]["teacher"], "arXiv 2311.18828", "| fd "):
        assert text in card
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert {"fd", "precision"} <= {metric["type"] for metric in metrics}
    assert {"extractor", "num_samples", "protocol", "sampling_seeds"} <= set(metrics[0]["args"])
    # A folder with files is not overwritten.
    again = finished.run("harness", *arguments)
    assert again.returncode == 2 and "already exists" in again.stderr
    assert (folder / "README.md").read_text() == card
    assert not any(path.suffix in (".bin", ".pkl", ".py") for path in folder.rglob("*"))


def test_pixart_under_the_name_of_its_publication_is_exported(tmp_path):
    """Its config.json and model_index.json name `Transformer2DModel`."""
    teacher = tmp_path / "teacher"
    pipelines.pixart().save_pretrained(teacher)
    for path in (teacher / "model_index.json", teacher / "transformer" / "config.json"):
        text = path.read_text()
        assert "PixArtTransformer2DModel" in text
        path.write_text(text.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    source = PipelineFolder(teacher)
    student, encoder = source.denoiser(), source.text_encoder()
    assert type(student.backbone).__name__ == "PixArtTransformer2DModel"
    write_pipeline(student, 14.0, source, tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"guidance_scale": 0, "output_type": "latent", "use_resolution_binning": False}
    prompt = ["a red seven"]
    latents = stock(prompt, latents=z.clone(), num_inference_steps=1, **options).images
    with torch.no_grad():
        expected = one_step(student, z, encoder.encode(prompt), 14.0)
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.contract
@pytest.mark.parametrize("sigma_init", [2.5, 14.0])
@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.pixart])
def test_stock_pipeline_matches_the_one_step_student(make, sigma_init, tmp_path):
    """One step without guidance; diffusers loads the pipeline without the harness."""
    pipe = make()
    pipe.save_pretrained(tmp_path / "teacher")
    folder = PipelineFolder(tmp_path / "teacher")
    student, encoder = folder.denoiser(), folder.text_encoder()
    pipe.scheduler = one_step_scheduler(student, sigma_init)
    pipe.save_pretrained(tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {} if "Stable" in type(stock).__name__ else {"use_resolution_binning": False}
    latents = stock(
        "a red seven",
        latents=z.clone(),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="latent",
        **options,
    ).images
    with torch.no_grad():
        expected = one_step(student, z, encoder.encode(["a red seven"]), sigma_init)
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-5
    assert student.level(sigma_init) == pytest.approx(sigma_init, rel=0.02)


@pytest.mark.parametrize("sigma_init", [14.0, 318.0, 2250.0, 4096.0])
def test_stock_pipeline_starts_at_every_level_of_a_zero_terminal_snr(sigma_init, tmp_path):
    """The last level is that of an SNR of zero, where a scheduler's would be infinite."""
    pipe = pipelines.stable_diffusion("v_prediction")
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **schedule)
    pipe.save_pretrained(tmp_path / "teacher")
    source = PipelineFolder(tmp_path / "teacher")
    student, encoder = source.denoiser(), source.text_encoder()
    write_pipeline(student, sigma_init, source, tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    prompts = ["a red seven", "two dogs"]
    images = stock(prompts, latents=z.clone(), **options).images
    level = student.level(sigma_init)
    with torch.no_grad():
        latents = one_step(student, z, encoder.encode(prompts), level)
        expected = (source.codec()(latents) / 2 + 0.5).clip(0, 1)
    assert expected.std() > 0.01
    assert float((images - expected).abs().max()) < 1e-5
    alpha = float(stock.scheduler.alphas_cumprod[-1])
    assert ((1 - alpha) / alpha) ** 0.5 == pytest.approx(level, rel=1e-4)
    assert level == pytest.approx(sigma_init, rel=0.02)
