import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from rtk.config import DataConfig
from rtk.data import CATALOGUE, DATA_SETS, FileSplit, load
from rtk.errors import RtkError

from .conftest import FAKES, classes_of, parts_of, sun397, write

GREY = ("mnist", "fashion-mnist")
IN_FILES = [name for name in FAKES if CATALOGUE[name].image_size is not None]
MIXED = ("caltech101", "caltech256")  # train and test are drawn from the same folders


def read(name, root, **settings):
    return load(DataConfig(name=name, root=str(root), **settings))


def refusal(name, root, **settings):
    with pytest.raises(RtkError) as error:
        read(name, root, **settings)
    return str(error.value)


def test_every_named_set_has_a_fake():
    assert set(FAKES) | {"cifar10", "cifar100", "voc2012"} == set(CATALOGUE)


@pytest.mark.filterwarnings("ignore:.*grey images")
@pytest.mark.parametrize("inside", ["", "own"], ids=["root", "root-name"])
@pytest.mark.parametrize("name", FAKES)
def test_files_labels_and_parts_belong_together(fakes, tmp_path, name, inside):
    root = tmp_path / name if inside else tmp_path
    expected = fakes[name](root)
    data = read(name, tmp_path, image_size=8 if name in IN_FILES else None)
    assert data.classes == expected["classes"]
    assert (len(data.train), len(data.test)) == (expected["train"], expected["test"])
    assert data.metric == CATALOGUE[name].metric
    assert data.val is None
    for part, split in data.splits().items():
        if name in GREY:
            first = torch.tensor([10 + 20 * i for i in range(10)])
            assert torch.equal(split.images[:, 2, 0, 0].long(), first[split.labels])
            continue
        assert torch.equal(classes_of(split.images), split.labels)
        if name not in MIXED:
            with_val = {"train", "val"} if name in ("dtd", "flowers") else {"train"}
            assert parts_of(split.images) == (with_val if part == "train" else {"test"})
    if name in IN_FILES:
        assert data.train.images.shape[2:] == (8, 8)
        assert data.augment == (CATALOGUE[name].augment or "crop")


@pytest.mark.parametrize("name", IN_FILES)
def test_large_images_stay_in_their_files(fakes, tmp_path, name):
    expected = fakes[name](tmp_path)
    data = read(name, tmp_path, image_size=224, workers=0)
    assert isinstance(data.train, FileSplit) and isinstance(data.test, FileSplit)
    assert data.image_size == 224
    assert data.train.shorter == 256
    assert data.augment == ("shift" if name == "gtsrb" else "resized_crop")
    assert len(data.test) == expected["test"]
    assert classes_of(data.test.sample(1)).tolist() == data.test.labels[:1].tolist()


def test_default_sizes(fakes, tmp_path):
    fakes["pets"](tmp_path)
    fakes["gtsrb"](tmp_path)
    assert read("pets", tmp_path).train.size == (224, 224)
    assert read("gtsrb", tmp_path).train.size == (32, 32)
    assert not read("gtsrb", tmp_path).train.streamed


def test_storage_decides(fakes, tmp_path):
    fakes["pets"](tmp_path)
    assert read("pets", tmp_path, image_size=16, storage="stream").train.streamed
    held = read("pets", tmp_path, image_size=96, storage="memory")
    streamed = read("pets", tmp_path, image_size=96)
    assert not held.train.streamed
    assert torch.equal(held.test.images, streamed.test.images)


def test_class_subset_of_streamed_files(fakes, tmp_path):
    fakes["food"](tmp_path)
    data = read("food[1]", tmp_path)
    assert data.classes == ("waffles",)
    assert isinstance(data.train, FileSplit) and len(data.train) == 2
    assert classes_of(data.train.images).tolist() == [1, 1]
    assert data.train.labels.tolist() == [0, 0]


@pytest.mark.parametrize("name", GREY)
def test_grey_sets_are_repeated_and_said_once(fakes, tmp_path, name):
    fakes[name](tmp_path)
    with pytest.warns(UserWarning, match=f"{name}: grey images are repeated to 3 ch") as caught:
        data = read(name, tmp_path)
    assert len(caught) == 1
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])


def test_grey_files_are_said_once(fakes, tmp_path):
    fakes["pets"](tmp_path)
    for file in (tmp_path / "oxford-iiit-pet" / "images").iterdir():
        Image.open(file).convert("L").save(file)
    with pytest.warns(UserWarning, match="pets: grey images") as caught:
        read("pets", tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("name", [n for n in FAKES if n != "birdsnap"])
def test_missing_sets_say_where_they_looked_and_how_to_get_them(tmp_path, name):
    message = refusal(name, tmp_path)
    entry = CATALOGUE[name]
    assert f"{name} is not there; tried {tmp_path / entry.folder} and" in message
    assert str(tmp_path / name / entry.folder) in message
    assert "--data.root or RTK_DATA" in message
    assert ("By hand: " if entry.by_hand else f"`rtk data get {name}` or --download") in message
    assert list(tmp_path.iterdir()) == []  # torchvision makes folders for the Caltechs


def test_caltech_is_drawn_alike_everywhere(fakes, tmp_path):
    fakes["caltech101"](tmp_path / "a")
    fakes["caltech101"](tmp_path / "b")
    splits = []
    for place in ("a", "b"):
        data = read("caltech101", tmp_path / place)
        names = [[f[-24:] for f in split.files] for split in (data.train, data.test)]
        assert not set(names[0]) & set(names[1])
        assert torch.bincount(data.train.labels).tolist() == [30, 30]
        splits.append(names)
    assert splits[0] == splits[1]
    # Pinned: whatever is published on this split must be found again.
    tested = [name.split("/")[-1] for name in splits[0][1][:2]]
    assert tested == ["image_0007.jpg", "image_0011.jpg"]


def test_caltech_with_too_few_images(fakes, tmp_path):
    fakes["caltech101"](tmp_path)
    for i in range(10):
        folder = tmp_path / "caltech101" / "101_ObjectCategories" / "airplanes"
        (folder / f"image_{i + 1:04}.jpg").unlink()
    message = refusal("caltech101", tmp_path)
    assert "class 'airplanes'" in message and "has 23 images, of which 30 train" in message


def test_sun397_without_its_partition_draws_one_and_says_so(tmp_path):
    sun397(tmp_path, partition=False, each=60)
    with pytest.warns(UserWarning, match="not of the published partition"):
        data = read("sun397", tmp_path)
    assert torch.bincount(data.train.labels).tolist() == [50, 50]
    assert torch.bincount(data.test.labels).tolist() == [50, 50]
    assert not set(data.train.files) & set(data.test.files)


def test_sun397_partition_beside_the_images(tmp_path):
    sun397(tmp_path)
    (tmp_path / "Partitions").mkdir()
    for name in ("Training_01.txt", "Testing_01.txt"):
        (tmp_path / "SUN397" / name).rename(tmp_path / "Partitions" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read("sun397", tmp_path).train) == 4


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", "variants.txt"),
        ("food", "food-101/meta/test.json", "test.json"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "annotations"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat", "Dataset not found"),
        ("sun397", "SUN397/ClassName.txt", "ClassName.txt"),
        ("flowers", "flowers-102/setid.mat", "Dataset not found or corrupted"),
        ("stl10", "stl10_binary/test_y.bin", "Dataset not found or corrupted"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", "Dataset not found"),
    ],
)
def test_incomplete_sets_say_what_is_expected(fakes, tmp_path, name, gone, words):
    fakes[name](tmp_path)
    (tmp_path / gone).unlink()
    message = refusal(name, tmp_path)
    assert "incomplete, damaged or of another layout" in message and words in message
    assert str(tmp_path / CATALOGUE[name].folder) in message
    if CATALOGUE[name].layout:
        assert f"expected {CATALOGUE[name].layout}" in message


def test_half_of_a_set_is_missing_not_broken(fakes, tmp_path):
    fakes["svhn"](tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    assert "svhn is not there" in refusal("svhn", tmp_path)
    fakes["imagenet"](tmp_path)
    (tmp_path / "imagenet" / "val").rename(tmp_path / "imagenet" / "validation")
    message = refusal("imagenet", tmp_path)
    assert "(with imagenet/val beside it)" in message and "image-net.org" in message


def test_imagenets_flat_validation_folder_is_explained(fakes, tmp_path):
    fakes["imagenet"](tmp_path)
    val = tmp_path / "imagenet" / "val"
    for name in ("n01", "n02"):
        for file in (val / name).iterdir():
            file.rename(val / f"{name}{file.name}")
        (val / name).rmdir()
    assert f"{val} holds no class folder; expected {val}/<class>/<image>" in refusal(
        "imagenet", tmp_path
    )


def test_a_class_without_images_is_named(fakes, tmp_path):
    fakes["imagenet"](tmp_path)
    for file in (tmp_path / "imagenet" / "train" / "n02").iterdir():
        file.unlink()
    assert "imagenet/train/n02 holds no image" in refusal("imagenet", tmp_path)
    fakes["cars"](tmp_path)
    from scipy.io import savemat

    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Tesla"], dtype=object)
    savemat(tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": names})
    assert "cars: class 2, 'Tesla', has no training image" in refusal("cars", tmp_path)


@pytest.mark.parametrize("part", ["val", "test"])
def test_lists_with_other_classes(fakes, tmp_path, part):
    fakes["dtd"](tmp_path)
    write(tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt", f"woven/woven_{part}.jpg")
    message = refusal("dtd", tmp_path)
    assert "do not have the same classes (banded is not in all of them)" in message


def test_a_missing_image_is_named_when_it_is_needed(fakes, tmp_path):
    fakes["food"](tmp_path)
    gone = tmp_path / "food-101" / "images" / "waffles" / "train1.jpg"
    gone.unlink()
    assert f"{gone} cannot be decoded" in refusal("food", tmp_path, image_size=8)
    with pytest.warns(UserWarning, match=r"food: 1 of 8 images cannot be decoded .*train1\.jpg"):
        data = read("food", tmp_path, image_size=8, skip_bad=True)
    assert data.train.labels.tolist() == [0, 0, 1]
    assert torch.equal(classes_of(data.train.images), data.train.labels)


def test_skip_bad_leaves_no_class_empty(fakes, tmp_path):
    fakes["food"](tmp_path)
    for i in range(2):
        (tmp_path / "food-101" / "images" / "waffles" / f"train{i}.jpg").write_bytes(b"\0")
    with pytest.warns(UserWarning, match="2 of 8"):
        assert "class 1, 'waffles', has no training image" in refusal(
            "food", tmp_path, skip_bad=True
        )


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise(kind):
    name = f"{kind}-noise"
    data, again = (load(DataConfig(name=name, image_size=6)) for _ in range(2))
    assert data.test.images.shape == (2000, 3, 6, 6)
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.images, data.train.images)
    values = data.test.images.double() / 255
    mean, std = values.mean(), values.std()
    assert abs(mean - 0.5) < 0.005
    # Clipping at two deviations takes 4 % off a Gaussian's.
    assert abs(std - (0.2397 if kind == "gaussian" else (1 / 12) ** 0.5)) < 0.003
    assert load(DataConfig(name=name)).train.size == (32, 32)


def test_cifar_lies_where_torchvision_puts_it():
    from torchvision import datasets

    for name, reader in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        assert CATALOGUE[name].folder == reader.base_folder


def test_the_catalogue_is_registered_but_for_segmentation():
    for name, entry in CATALOGUE.items():
        assert (name in DATA_SETS.names()) == (not entry.segmentation)
