"""Files of reference statistics as other projects write them."""

import pickle

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.evaluation.frechet import load_statistics

MU, SIGMA = np.arange(3.0), np.eye(3)


def rejected(path) -> str:
    with pytest.raises(UserError) as error:
        load_statistics(path)
    message = str(error.value)
    # numpy's own message recommends to unpickle the file.
    assert "\n" not in message and "pickle" not in message.replace(str(path), "")
    return message


def test_dictionaries_and_pickles_are_rejected_without_advice_to_unpickle(tmp_path):
    contents = {"mu": MU, "sigma": SIGMA}
    np.save(tmp_path / "dictionary.npy", contents)
    np.save(tmp_path / "array.npy", MU)
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": contents}))
    (tmp_path / "page.npz").write_text("<!DOCTYPE html><title>Sign in</title>")
    for name in ("dictionary.npy", "array.npy", "edm2.pkl", "page.npz"):
        assert "numpy.savez(path, mu=mu, sigma=sigma)" in rejected(tmp_path / name)
    np.savez(tmp_path / "objects.npz", mu=np.array([contents]), sigma=SIGMA)
    assert "Python objects" in rejected(tmp_path / "objects.npz")


@pytest.mark.parametrize("keys", [("mean", "cov"), ("ref_mean", "ref_cov")])
def test_other_names_of_the_arrays_are_named(tmp_path, keys):
    np.savez(tmp_path / "s.npz", **dict(zip(keys, (MU, SIGMA), strict=True)))
    assert f"it contains {keys[0]}, {keys[1]}" in rejected(tmp_path / "s.npz")


def test_mean_with_a_batch_dimension_is_rejected(tmp_path):
    np.savez(tmp_path / "s.npz", mu=MU[None], sigma=SIGMA)
    assert "expected mu (D,)" in rejected(tmp_path / "s.npz")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_statistics_beside_images_are_read_in_double_precision(tmp_path, dtype):
    """ADM's reference batches have images in arr_0 as well."""
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "s.npz", images, mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    mean, covariance = load_statistics(tmp_path / "s.npz", 3)
    assert torch.equal(mean, torch.from_numpy(MU)) and torch.equal(
        covariance, torch.eye(3).double()
    )
