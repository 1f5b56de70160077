import warnings

import numpy as np
import pytest
import torch

from rtk.config import DataConfig
from rtk.data import load
from rtk.errors import RtkError


def arrays(shape=(4, 4, 3), train=6, test=3, classes=3):
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }


def write(path, **values):
    np.savez(path, **values)
    return path


def read(path, **settings):
    return load(DataConfig(name=f"npz:{path}", **settings))


def refusal(path):
    with pytest.raises(RtkError) as error:
        read(path)
    return str(error.value)


def test_rgb_arrays_come_back_channels_first(tmp_path):
    values = arrays()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(write(tmp_path / "a.npz", **values))
    assert torch.equal(
        data.train.images, torch.from_numpy(values["train_images"]).permute(0, 3, 1, 2)
    )
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.classes == ("0", "1", "2")
    assert data.val is None
    assert data.augment == "crop"
    assert data.name == f"npz:{tmp_path / 'a.npz'}"


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)], ids=["NHW", "NHW1"])
def test_grey_is_repeated_and_said_once(tmp_path, shape):
    values = arrays(shape)
    with pytest.warns(UserWarning, match="repeated to 3 channels") as caught:
        data = read(write(tmp_path / "a.npz", **values))
    assert len(caught) == 1
    grey = torch.from_numpy(values["test_images"]).reshape(3, 4, 5)
    for channel in range(3):
        assert torch.equal(data.test.images[:, channel], grey)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8"], ids=str)
def test_medmnist_column_labels_of_any_integer_type(tmp_path, dtype):
    values = arrays()
    values["train_labels"] = values["train_labels"].astype(dtype)[:, None]
    data = read(write(tmp_path / "a.npz", **values))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train.labels.dtype == torch.int64


def test_val_and_class_names(tmp_path):
    values = arrays() | {
        "val_images": np.full((1, 4, 4, 3), 7, np.uint8),
        "val_labels": np.array([2]),
        "class_names": np.array(["cat", "dog", "hen"]),
    }
    data = read(write(tmp_path / "a.npz", **values))
    assert data.classes == ("cat", "dog", "hen")
    assert data.val is not None
    assert data.val.labels.tolist() == [2]
    assert (data.val.images == 7).all()


def test_relative_path_as_given_and_under_the_root(tmp_path, monkeypatch):
    (tmp_path / "root" / "sub").mkdir(parents=True)
    write(tmp_path / "root" / "sub" / "a.npz", **arrays())
    monkeypatch.chdir(tmp_path)
    assert len(read("root/sub/a.npz").train) == 6
    assert len(read("sub/a.npz", root="root").train) == 6
    message = refusal("sub/b.npz")
    assert "tried sub/b.npz and " in message and message.count("sub/b.npz") >= 3


def test_compressed_archives_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **arrays())
    assert len(read(tmp_path / "a.npz").train) == 6


def test_no_file(tmp_path):
    assert f"no file for npz:{tmp_path / 'no.npz'}; tried {tmp_path / 'no.npz'}" in refusal(
        tmp_path / "no.npz"
    )


def test_not_an_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"hello")
    assert "is not an npz file, or is truncated" in refusal(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    assert "is not an npz file" in refusal(tmp_path / "b.npy")


def test_every_truncation_and_flipped_bytes_are_refused(tmp_path):
    whole = write(tmp_path / "a.npz", **arrays()).read_bytes()
    damaged = tmp_path / "b.npz"
    for length in range(0, len(whole), 97):
        damaged.write_bytes(whole[:length])
        assert "truncated" in refusal(damaged)
    for place in (100, 200, 400):  # the header and the values of the first array
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert "damaged" in refusal(damaged)


@pytest.mark.parametrize("gone", ["train_images", "train_labels", "test_images", "test_labels"])
def test_missing_array_lists_what_was_found(tmp_path, gone):
    values = arrays() | {"train_masks": np.zeros(2)}
    del values[gone]
    message = refusal(write(tmp_path / "a.npz", **values))
    assert f"has no array {gone}; expected train_images" in message
    assert "found " + ", ".join(values) in message


def test_val_images_need_val_labels(tmp_path):
    values = arrays() | {"val_images": np.zeros((1, 4, 4, 3), np.uint8)}
    assert "has no array val_labels" in refusal(write(tmp_path / "a.npz", **values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_images": np.zeros((6, 4, 4, 3), np.float32)}, "float32, expected uint8; scale"),
        ({"train_images": np.zeros((6, 4, 4, 3), np.int64)}, "int64, expected uint8; store"),
        ({"train_images": np.zeros((6, 3, 4, 4), np.uint8)}, "channels last"),
        ({"test_images": np.zeros((0, 4, 4, 3), np.uint8)}, "test_images are empty"),
        ({"train_labels": np.zeros(6)}, "train_labels are float64, expected integers"),
        ({"train_labels": np.zeros((6, 14), np.int64)}, "one class an image"),
        ({"train_labels": np.array([0, 1])}, "lengths differ: 6 train_images, 2 train_labels"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, "negative value -1"),
        ({"train_labels": np.array([0, 1, 3, 0, 1, 3])}, "not contiguous"),
        ({"test_labels": np.array([0, 1, 3])}, "test labels reach 3, beyond the 3 classes"),
        ({"class_names": np.array(["a", "b"])}, "beyond the 2 classes"),
        ({"class_names": np.zeros(3)}, "expected strings"),
        ({"test_images": np.zeros((3, 5, 4, 3), np.uint8)}, "(4, 4) and test images (5, 4)"),
        ({"train_labels": np.array([{}] * 6)}, "object array (a pickle"),
    ],
    ids=[
        "float-images",
        "int-images",
        "channels-first",
        "empty",
        "float-labels",
        "multi-label",
        "lengths",
        "negative",
        "gap",
        "unknown-test-label",
        "few-names",
        "names-dtype",
        "sizes",
        "pickle",
    ],
)
def test_wrong_arrays_are_refused(tmp_path, change, words):
    message = refusal(write(tmp_path / "a.npz", **(arrays() | change)))
    assert words in message
    assert "a.npz" in message


def test_a_path_in_brackets_is_a_path_and_may_have_a_subset(tmp_path):
    path = write(tmp_path / "odd[0-1].npz", **arrays())
    path = path.rename(tmp_path / "odd.npz[0-1]")
    assert read(path).classes == ("0", "1", "2")
    assert read(f"{path}[2]").classes == ("2",)
