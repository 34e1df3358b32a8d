"""`OneStepPipeline`: exported students in diffusers' terms."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import harness
from harness.denoiser import one_step, to_pixels
from harness.networks import build_denoiser
from harness.networks.registry import BACKBONES
from harness.students.pipeline import OneStepPipeline

SMALL = {"model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8]}
UNET = {
    "type": "UNet2DModel",
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
NETWORKS = {
    "ncsnpp": {"type": "SongUNet", **SMALL, **NCSNPP, "resample_filter": [1, 3, 3, 1]},
    "adm": {"type": "DhariwalUNet", **SMALL},
    "unet": UNET,
    "plug-in": {"type": "ConvNet"},
}
PLUGIN = Path(__file__).parent / "data" / "example" / "convnet.py"
SIGMA = 2.5


def denoiser_of(name: str, num_classes: int = 10):
    if name == "plug-in":
        harness.load_plugin(PLUGIN)
    torch.manual_seed(0)
    denoiser = build_denoiser(NETWORKS[name], (3, 16, 16), num_classes).eval()
    for parameter in denoiser.parameters():  # layers of zeros would hide what precedes them
        if parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.requires_grad_(False)


def pipeline_of(name: str, num_classes: int = 10) -> OneStepPipeline:
    denoiser = denoiser_of(name, num_classes)
    settings = denoiser.preconditioning, denoiser.precondition
    return OneStepPipeline(denoiser.backbone, SIGMA, *settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines of all networks."""
    root = tmp_path_factory.mktemp("students")
    for name in NETWORKS:
        pipeline_of(name).save_pretrained(root / name)
    return root


@pytest.fixture
def pipe():
    return pipeline_of("plug-in")


@pytest.fixture
def unconditional():
    return pipeline_of("unet", num_classes=0)


def noise(count: int = 2, seed: int = 0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", NETWORKS)
def test_loaded_student_generates_the_same_images(name, folders, monkeypatch):
    module = type(denoiser_of(name).backbone).__module__
    if name != "plug-in":  # a new process has not imported the network's module
        monkeypatch.delitem(sys.modules, module)
    pipe = OneStepPipeline.from_pretrained(folders / name)
    images = pipe(class_labels=[1, 9], latents=noise(), output_type="pt").images
    with torch.no_grad():
        expected = one_step(denoiser_of(name), noise(), torch.tensor([1, 9]), SIGMA)
    assert torch.equal(images, (expected / 2 + 0.5).clip(0, 1))


def test_networks_of_the_harness_and_of_plugins_are_found_under_one_name(folders):
    """diffusers does not import the module that a folder names."""
    for name in NETWORKS:
        library, network = json.loads((folders / name / "model_index.json").read_text())["network"]
        assert library == ("diffusers" if name == "unet" else "harness")
        assert (
            library == "diffusers" or getattr(harness, network) is BACKBONES[network].model_class()
        )
    with pytest.raises(AttributeError):
        _ = harness.Unknown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("how", ["load", "convert"])
def test_half_precision_is_close_to_float32(name, dtype, how, folders):
    if how == "load":
        pipe = OneStepPipeline.from_pretrained(folders / name, torch_dtype=dtype)
    else:
        pipe = OneStepPipeline.from_pretrained(folders / name).to(dtype)
    seen = set()
    for layer in pipe.network.modules():
        if type(layer).__name__ == "Conv2d":
            layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    options = {"class_labels": [1, 9], "latents": noise(), "output_type": "pt"}
    images = pipe(**options).images
    expected = pipeline_of(name)(**options).images
    assert pipe.network.dtype == dtype and seen == {dtype} and images.dtype == torch.float32
    error = (images - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < (3e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.parametrize("how", ["load", "convert"])
def test_fourier_frequencies_stay_in_float32(how, folders):
    exact = pipeline_of("ncsnpp").network.map_noise.freqs
    if how == "load":
        options = {"torch_dtype": torch.bfloat16}
        network = OneStepPipeline.from_pretrained(folders / "ncsnpp", **options).network
    else:
        network = pipeline_of("ncsnpp").network.bfloat16()
    assert network.map_layer0.weight.dtype == torch.bfloat16
    assert torch.equal(network.map_noise.freqs, exact)


def test_an_image_depends_on_its_own_noise_only(pipe):
    def images(count, generator):
        labels = list(range(count))
        return pipe(class_labels=labels, generator=generator, output_type="pt").images

    one, many = (images(count, torch.Generator().manual_seed(5)) for count in (1, 4))
    assert torch.allclose(one, many[:1], atol=1e-6)
    listed = images(3, generators(3, 5, 5))
    alone = pipe(class_labels=1, generator=generators(5), output_type="pt").images
    assert torch.allclose(listed[1:2], alone, atol=1e-6) and not torch.equal(listed[0], listed[1])
    torch.manual_seed(5)  # the default generator
    assert torch.allclose(images(1, None), one, atol=1e-6)


@pytest.mark.parametrize(
    "labels", [[3, 3], (3, 3), torch.tensor([3, 3]), np.array([3, 3]), 3, torch.tensor(3)]
)
def test_labels_are_an_integer_a_list_or_a_tensor(pipe, labels):
    images = pipe(class_labels=labels, latents=noise(), output_type="pt").images
    expected = pipe(class_labels=[3, 3], latents=noise(), output_type="pt").images
    assert torch.equal(images, expected)


def test_number_of_images(pipe, unconditional):
    assert len(pipe(class_labels=3, batch_size=3).images) == 3
    assert len(pipe(class_labels=3, generator=generators(1, 2)).images) == 2
    assert len(unconditional().images) == 1 and len(unconditional(batch_size=3).images) == 3
    assert len(unconditional(generator=generators(1, 2)).images) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "class_labels: the student is class-conditional; give labels from 0 to 9"),
        ({"class_labels": 10}, "class_labels: 10 is not between 0 and 9"),
        ({"class_labels": [3, -1]}, "class_labels: -1 is not between 0 and 9"),
        ({"class_labels": 1.5}, "class_labels: 1.5 is not an integer"),
        ({"class_labels": ["cat"]}, "class_labels: ['cat'] is not an integer"),
        ({"class_labels": [[1], [2]]}, "class_labels: [[1], [2]] is not an integer"),
        ({"class_labels": True}, "class_labels: True is not an integer"),
        ({"class_labels": [1, 2], "batch_size": 3}, "batch_size 3, class_labels 2"),
        ({"class_labels": 1, "batch_size": 0}, "batch_size: expected at least one image, not 0"),
        ({"class_labels": 1, "batch_size": 2.0}, "batch_size: expected a number of images"),
        ({"class_labels": 1, "generator": 3}, "generator: expected a torch.Generator or a list"),
        ({"class_labels": 1, "latents": [0.0]}, "latents: expected a tensor, not list"),
        ({"class_labels": [1, 2], "generator": generators(1)}, "class_labels 2, generator 1"),
        ({"class_labels": 1, "output_type": "latent"}, "output_type 'latent' is not one of pil"),
        ({"class_labels": 1, "latents": torch.zeros(1, 3, 8, 8)}, "expected (B, 3, 16, 16)"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(pipe, options, message):
    with pytest.raises(ValueError) as error:
        pipe(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_labels_of_an_unconditional_student_are_rejected(unconditional):
    with pytest.raises(ValueError, match="the student is unconditional; give batch_size instead"):
        unconditional(class_labels=[0])


def test_output_types(pipe):
    options = {"class_labels": [1, 2], "latents": noise()}
    tensor = pipe(**options, output_type="pt").images
    array = pipe(**options, output_type="np").images
    assert array.dtype == np.float32 and np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    (pictures,) = pipe(**options, return_dict=False)
    with torch.no_grad():  # the pixels that are scored
        pixels = to_pixels(one_step(denoiser_of("plug-in"), noise(), torch.tensor([1, 2]), SIGMA))
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert np.array_equal(np.stack(pictures), pixels.permute(0, 2, 3, 1).numpy())


def test_pipeline_without_weights_or_of_another_dtype_is_rejected(pipe):
    with pytest.raises(ValueError, match="float64 is not supported"):
        pipe.to(torch.float64)(class_labels=1)
    with pytest.raises(ValueError, match="meta device"):
        pipe.to("meta")(class_labels=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_images_on_a_gpu_are_those_of_the_cpu(name, dtype):
    """A generator on the CPU gives the same noise on every device."""
    images = [
        pipeline_of(name)
        .to(device, dtype)(class_labels=[1, 9], generator=generators(1, 2), output_type="pt")
        .images
        for device in ("cpu", "cuda")
    ]
    assert images[1].is_cuda
    bound = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    assert float((images[0] - images[1].cpu()).abs().max()) < bound
