import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from rtk.config import DataConfig
from rtk.data import CATALOGUE, DATA_SETS, dataset, load
from rtk.errors import RtkError


def test_unknown_set_names_the_nearest_and_the_path_forms():
    with pytest.raises(RtkError) as error:
        load(DataConfig(name="cifar-10"))
    message = str(error.value)
    assert "unknown data set 'cifar-10'" in message
    assert "did you mean 'cifar10'?" in message
    assert "npz:PATH" in message and "folder:PATH" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "unknown data set ''"),
        ("npz", "write npz:PATH"),
        ("npz:", "write npz:PATH"),
        ("folder:", "write folder:PATH"),
        ("digits:/a", "digits takes no path"),
        ("nzp:/a.npz", "unknown data set 'nzp'"),
    ],
)
def test_bad_names(name, words):
    with pytest.raises(RtkError) as error:
        load(DataConfig(name=name))
    assert words in str(error.value)


def test_registered_sets():
    others = {"digits", "folder", "npz", "gaussian-noise", "uniform-noise"}
    named = {name for name, entry in CATALOGUE.items() if not entry.segmentation}
    assert set(DATA_SETS.names()) == named | others


@pytest.mark.parametrize("size", [5, 8, 32], ids=["down", "same", "up"])
def test_image_size_resizes_by_antialiased_bilinear(size):
    plain = load(DataConfig(name="digits"))
    resized = load(DataConfig(name="digits", image_size=size))
    for a, b in ((plain.train, resized.train), (plain.test, resized.test)):
        expected = interpolate(a.images.double(), (size, size), mode="bilinear", antialias=True)
        assert b.images.dtype == torch.uint8
        assert b.images.shape == (len(a), 3, size, size)
        # A double and a float may round a value at .5 to different integers.
        assert (b.images.double() - expected).abs().max() <= 0.5 + 1e-3
        assert torch.equal(a.labels, b.labels)


def test_image_size_of_oblong_images_gives_squares(tmp_path):
    images = np.zeros((1, 6, 3, 3), np.uint8)
    values = {
        f"{p}_{k}": v
        for p in ("train", "test")
        for k, v in (("images", images), ("labels", np.zeros(1, int)))
    }
    np.savez(tmp_path / "a.npz", **values)
    data = load(DataConfig(name=f"npz:{tmp_path / 'a.npz'}", image_size=4))
    assert data.train.images.shape == (1, 3, 4, 4)


def test_an_enlargement_that_needs_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(dataset, "MAX_BYTES", 10**6)
    with pytest.raises(RtkError, match=r"1797 images of 32x32 .* GiB .*data\.image_size"):
        load(DataConfig(name="digits", image_size=32))
