import numpy as np
import pytest
import torch
from PIL import Image

from rtk.config import DataConfig
from rtk.data import dataset, load
from rtk.errors import RtkError


def image(path, width=6, height=6, value=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(value or 0))
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


def tree(root, parts=("train", "test"), classes=("cat", "dog"), each=2, **options):
    for part in parts:
        for c, name in enumerate(classes):
            for i in range(each):
                image(root / part / name / f"{i:03}.png", value=100 * c + i, **options)
    return root


def read(path, **settings):
    return load(DataConfig(name=f"folder:{path}", **settings))


def refusal(path, **settings):
    with pytest.raises(RtkError) as error:
        read(path, **settings)
    return str(error.value)


def test_tree_with_splits(tmp_path):
    expected = image(tmp_path / "train" / "dog" / "deep" / "zz.png", value=5)
    data = read(tree(tmp_path, ("train", "test", "val")))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(data.train.images[4], expected)  # found below the class folder, sorted last
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.val is not None and len(data.val) == 4
    assert data.augment == "crop"


def test_val_alone_tests(tmp_path):
    data = read(tree(tmp_path, ("train", "val")))
    assert len(data.test) == 4
    assert data.val is None


@pytest.mark.parametrize("part", ["", "train"], ids=["bare", "train-only"])
def test_without_a_test_folder_every_fifth_of_a_class_tests(tmp_path, part):
    tree(tmp_path, (part,), each=11)
    (tmp_path / part / ".hidden").mkdir()
    (tmp_path / part / "cat" / "notes.txt").write_text("no image")
    data = read(tmp_path)
    assert len(data.train) == 18
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    for row, index in enumerate((4, 9)):
        expected = np.asarray(Image.open(tmp_path / part / "cat" / f"{index:03}.png"))
        assert torch.equal(
            data.test.images[row], torch.from_numpy(expected.copy()).permute(2, 0, 1)
        )


@pytest.mark.parametrize("size", [(9, 6), (5, 12), (7, 7), (4, 4)], ids=str)
def test_image_size_resizes_and_crops_as_torchvision(tmp_path, size):
    from torchvision.transforms import functional as F

    tree(tmp_path)
    image(tmp_path / "test" / "cat" / "zz.jpg", *size, value=9)
    data = read(tmp_path, image_size=5)
    source = Image.open(tmp_path / "test" / "cat" / "zz.jpg").convert("RGB")
    expected = F.pil_to_tensor(F.center_crop(F.resize(source, 5), 5))
    assert torch.equal(data.test.images[2], expected)


def test_grey_and_palette_images_become_rgb(tmp_path):
    tree(tmp_path)
    grey = image(tmp_path / "train" / "cat" / "a.png", mode="L")
    palette = image(tmp_path / "train" / "cat" / "b.png", mode="P")
    data = read(tmp_path)
    assert torch.equal(data.train.images[2], grey)
    assert torch.equal(data.train.images[3], palette)


def test_large_images_are_augmented_by_resized_crop(tmp_path):
    tree(tmp_path)
    assert read(tmp_path, image_size=64).augment == "crop"
    assert read(tmp_path, image_size=65).augment == "resized_crop"


def test_class_subset_and_relative_path(tmp_path, monkeypatch):
    tree(tmp_path / "root" / "pets")
    monkeypatch.setenv("RTK_DATA", str(tmp_path / "root"))
    assert read("pets[1]").classes == ("dog",)


def test_no_folder(tmp_path):
    assert f"no folder for folder:{tmp_path / 'no'}; tried" in refusal(tmp_path / "no")


def test_no_class_folder(tmp_path):
    assert "holds no class folder" in refusal(tmp_path)


def test_no_train_folder(tmp_path):
    assert "holds test but no train folder" in refusal(tree(tmp_path, ("test",)))


def test_empty_class_folder(tmp_path):
    tree(tmp_path)
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "test" / "emu").mkdir()
    message = refusal(tmp_path)
    assert f"class folder {tmp_path / 'train' / 'emu'} holds no image" in message


def test_class_folders_must_agree(tmp_path):
    tree(tmp_path)
    image(tmp_path / "test" / "emu" / "0.png")
    message = refusal(tmp_path)
    assert "do not agree (emu is in one only)" in message


def test_sizes_that_differ_need_image_size(tmp_path):
    tree(tmp_path)
    image(tmp_path / "test" / "cat" / "wide.png", width=9)
    message = refusal(tmp_path)
    assert "image sizes differ" in message and "(9, 6)" in message
    assert "set data.image_size" in message
    assert read(tmp_path, image_size=6).test.images.shape == (5, 3, 6, 6)


@pytest.mark.parametrize("image_size", [None, 6], ids=["own-size", "resized"])
def test_undecodable_image_is_named(tmp_path, image_size):
    tree(tmp_path, width=64, height=64)
    good = (tmp_path / "train" / "cat" / "000.png").read_bytes()
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(good[: len(good) // 2])
    message = refusal(tmp_path, image_size=image_size)
    assert f"{tmp_path / 'train' / 'cat' / 'bad.png'} cannot be decoded" in message
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"no image")
    assert "bad.png cannot be decoded" in refusal(tmp_path, image_size=image_size)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path):
    tree(tmp_path)
    pixels = np.full((6, 6), 40_000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "train" / "cat" / "deep.png")
    message = refusal(tmp_path)
    assert "deep.png" in message and "more than 8 bits a channel" in message


def test_too_few_images_for_a_test_split(tmp_path):
    assert "no class has 5 images" in refusal(tree(tmp_path, ("train",)))


def test_more_than_the_memory_limit_is_refused_before_decoding(tmp_path, monkeypatch):
    tree(tmp_path)
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"never opened")
    monkeypatch.setattr(dataset, "MAX_BYTES", 3 * 2**30)
    message = refusal(tmp_path, image_size=20_000)
    assert "9 images of 20000x20000 pixels need about 10.1 GiB" in message
    assert "more than 3 GiB; set a smaller data.image_size" in message
