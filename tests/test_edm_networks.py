"""EDM's networks against outputs of the official implementation (tests/data)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from harness.denoiser import set_dropout
from harness.errors import UserError
from harness.freezing import freeze
from harness.networks import BACKBONES, build_denoiser, load_denoiser, save_denoiser
from harness.networks.backbones.edm import OneHotDenoiser
from harness.networks.edm_unet import GroupNorm, UNetBlock
from harness.sampling import heun
from tests.conftest import DATA


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def golden_denoiser(data: dict[str, np.ndarray]) -> OneHotDenoiser:
    settings = json.loads(str(data["init_kwargs"]))
    denoiser = from_official(settings)
    weights = {
        k.removeprefix("weight/").replace("model.", "backbone.", 1): torch.from_numpy(v)
        for k, v in data.items()
        if k.startswith("weight/")
    }
    denoiser.load_state_dict(weights)
    return denoiser.eval()


def from_official(settings: dict) -> OneHotDenoiser:
    settings = dict(settings)
    shape = (settings.pop("img_channels"), *[settings.pop("img_resolution")] * 2)
    labels, kind = settings.pop("label_dim", 0), settings.pop("model_type")
    settings.pop("use_fp16", None)
    return build_denoiser({"type": kind, **settings}, shape, labels)


def error(value: torch.Tensor, reference: np.ndarray) -> float:
    reference = torch.from_numpy(reference)
    return float((value.detach() - reference).abs().max() / reference.abs().max())


@pytest.mark.contract
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_match_the_official_networks(name, layout):
    data = golden(name)
    denoiser = golden_denoiser(data).to(memory_format=layout)
    assert sum(p.numel() for p in denoiser.parameters()) == int(data["parameters"])
    x = torch.from_numpy(data["x"]).contiguous(memory_format=layout).requires_grad_()
    sigma = torch.from_numpy(data["sigma"]).float()
    labels = torch.from_numpy(data["labels"]) if "labels" in data else None
    extras = (
        {"augment_labels": torch.from_numpy(data["augment_labels"])}
        if "augment_labels" in data
        else {}
    )
    output = denoiser(x, sigma, labels, **extras)
    assert error(output, data["output"]) < 1e-5
    (output * torch.from_numpy(data["v"])).sum().backward()
    assert error(x.grad, data["grad_x"]) < 1e-4
    with torch.no_grad():
        if labels is None:
            plain = denoiser(x, sigma)
            assert error(plain, data["output_without_augment"]) < 1e-5
            zeros = denoiser(x, sigma, augment_labels=torch.zeros(3, 9))
            assert error(zeros, data["output_without_augment"]) < 1e-5
        else:
            assert error(denoiser(x, sigma), data["output_without_labels"]) < 1e-5
            null = denoiser(x, sigma, denoiser.null_condition(3))
            assert error(null, data["output_without_labels"]) < 1e-5
            vectors = denoiser(x, sigma, torch.from_numpy(data["labels_onehot"]).float())
            assert error(vectors, data["output"]) < 1e-5


def test_saved_network_is_loaded_with_its_epsilon(tmp_path):
    data = golden("ncsnpp")
    denoiser = golden_denoiser(data)
    denoiser.epsilon = 0.002
    save_denoiser(denoiser, tmp_path)
    again = load_denoiser(tmp_path)
    assert again.epsilon == 0.002
    x, sigma = torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"]).float()
    assert torch.equal(denoiser(x, sigma), again(x, sigma))


def test_consistency_preconditioning_is_the_identity_at_epsilon():
    denoiser = golden_denoiser(golden("ddpmpp"))
    denoiser.epsilon = 0.002
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(denoiser(x, torch.full((2,), 0.002)), x, atol=1e-7)
    exact = denoiser(x, torch.full((2,), 80.0))
    denoiser.epsilon = 0.0
    edm = denoiser(x, torch.full((2,), 80.0))
    assert 0 < (exact - edm).abs().max() / edm.abs().max() < 5e-5


def sha256_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_official_configurations_have_the_official_names_shapes_and_frozen_fractions():
    """The sha256 of ordered names and shapes, for nine official files."""
    official = json.loads((DATA / "edm_state_dicts.json").read_text())
    for name, entry in official.items():
        with torch.device("meta"):
            denoiser = from_official(entry["init_kwargs"])
        state = denoiser.backbone.state_dict()
        lines = [f"model.{k} {list(v.shape)}" for k, v in state.items()]
        assert len(lines) == entry["tensors"], name
        assert sha256_of(lines) == entry["names_and_shapes"], name
        fraction = freeze(denoiser, "innate")
        assert round(fraction, 6) == entry["frozen_fraction"], name
        frozen = [n for n, p in denoiser.named_parameters() if not p.requires_grad]
        frozen = sorted(n.replace("backbone.", "model.", 1) for n in frozen)
        assert sha256_of(frozen) == entry["innate_names"], name


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
def test_new_network_is_nearly_the_skip_connection(kind):
    """The last layer is (nearly) zero, so D(x) = c_skip x, but gradients are not zero."""
    torch.manual_seed(0)
    settings = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
    denoiser = build_denoiser({"type": kind, "attn_resolutions": [8], **settings}, (3, 16, 16), 10)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    output = denoiser(x, sigma, torch.tensor([1, 2]))
    c_skip = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1)
    assert torch.allclose(output, c_skip * x, atol=1e-4)
    output.square().mean().backward()
    assert BACKBONES[kind].model_class().__name__ == kind
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser.parameters())


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("initial", [0, 0.1])
def test_set_dropout_changes_every_block(kind, initial):
    settings = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "dropout": initial}
    denoiser = build_denoiser({"type": kind, **settings}, (1, 8, 8), 0)
    set_dropout(denoiser, 0.3)
    blocks = [module for module in denoiser.modules() if isinstance(module, UNetBlock)]
    assert blocks and {block.dropout for block in blocks} == {0.3}


def test_dropout_of_a_network_without_dropout_is_refused():
    set_dropout(nn.Linear(2, 2), 0.0)
    with pytest.raises(UserError, match="no layer with dropout"):
        set_dropout(nn.Linear(2, 2), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_networks_compile_without_a_graph_break(name):
    """In training mode, with dropout and bfloat16 autocast."""
    denoiser = golden_denoiser(golden(name)).train()
    set_dropout(denoiser, 0.1)
    x, sigma = torch.randn(2, *denoiser.image_shape), torch.tensor([0.5, 2.0])
    labels = torch.tensor([1, 2]) if denoiser.num_classes else None
    with torch.autocast("cpu", torch.bfloat16):
        report = torch._dynamo.explain(denoiser)(x, sigma, labels)
    assert report.graph_break_count == 0, report.break_reasons


def test_group_norm_returns_the_dtype_of_its_input():
    norm = GroupNorm(32, 1e-5)
    x = 3 + torch.randn(2, 32, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low, full = norm(x.bfloat16()), norm(x)
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    torch.testing.assert_close(low.float(), full, atol=0.03, rtol=0)


def test_heun_matches_the_official_trajectory():
    data = golden("edm_heun")
    denoiser, sigmas = golden_denoiser(golden("ddpmpp")), []

    def recording(x, sigma, condition):
        sigmas.append(float(sigma[0]))
        return denoiser(x, sigma, condition)

    with torch.no_grad():
        images = heun(recording, torch.from_numpy(data["latents"]), steps=int(data["num_steps"]))
    assert error(images, data["images"]) < 1e-5
    np.testing.assert_allclose(sigmas, data["evaluated_sigmas"], rtol=1e-6)
