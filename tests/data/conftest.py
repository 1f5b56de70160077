"""Tiny trees in the layouts that the named sets have on disk.

Every image is of one colour: red and blue tell its class, green its part, so that a test sees
whether files, labels and parts still belong together (`classes_of`, `parts_of`).
"""

import json
import os

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

GREEN = {"train": 40, "val": 100, "test": 180}


def colour(label, part):
    return 10 + 20 * (label % 12), GREEN[part], 10 + 20 * (label // 12)


def classes_of(images):
    """Return the class that each image's colour tells, (N,) int64; JPEG changes it a little."""
    colours = images.double().mean((2, 3))
    steps = ((colours - 10) / 20).round()
    assert (colours - 10 - 20 * steps)[:, [0, 2]].abs().max() < 5
    return (steps[:, 0] + 12 * steps[:, 2]).long()


def parts_of(images):
    """Return the set of the parts that the colours tell."""
    greens = images[:, 1].double().mean((1, 2)).tolist()
    return {min(GREEN, key=lambda part: abs(GREEN[part] - green)) for green in greens}


def paint(path, label, part, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else None
    Image.new("RGB", size, colour(label, part)).save(path, kind)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "F/A-18 Hornet"]
    write(data / "variants.txt", *names)
    for part, listed, first in (("train", "trainval", 10), ("test", "test", 50)):
        lines = []
        for i in range(4):
            paint(data / "images" / f"00{first + i}.jpg", i % 2, part)
            lines.append(f"00{first + i} {names[i % 2]}")
        write(data / f"images_variant_{listed}.txt", *lines)
    return {"train": 4, "test": 4, "classes": tuple(names)}


def tree(root, train="train", test="test", suffix=".jpg"):
    for place, part in ((train, "train"), (test, "test")):
        for label, name in enumerate(("n01", "n02")):
            for i in range(2):
                paint(root / place / name / f"{i}{suffix}", label, part)
    return {"train": 4, "test": 4, "classes": ("n01", "n02")}


def birdsnap(root):
    return tree(root / "birdsnap")


def imagenet(root):
    return tree(root / "imagenet", test="val", suffix=".JPEG")


def caltech101(root):
    place = root / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(("accordion", "airplanes")):
        for i in range(32 + label):
            paint(place / name / f"image_{i + 1:04}.jpg", label, "train")
    paint(place / "BACKGROUND_Google" / "image_0001.jpg", 3, "train")
    write(place / "accordion" / "Thumbs.db", "no image")
    return {"train": 60, "test": 5, "classes": ("accordion", "airplanes")}


def caltech256(root):
    place = root / "caltech256" / "256_ObjectCategories"
    for label, name in enumerate(("001.ak47", "257.clutter")):
        for i in range(61 + label):
            paint(place / name / f"{label}_{i + 1:04}.jpg", label, "train")
    write(place / "001.ak47" / "RENAME2", "no image")
    return {"train": 120, "test": 3, "classes": ("001.ak47", "257.clutter")}


def cars(root):
    base = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for part, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = np.zeros(3, dtype=[("fname", object), ("class", object)])
        for i in range(3):
            paint(base / f"cars_{part}" / f"{i:05}.jpg", i % 2, part)
            rows[i] = (f"{i:05}.jpg", i % 2 + 1)
        savemat(base / file, {"annotations": rows})
    return {"train": 3, "test": 3, "classes": tuple(names)}


def dtd(root):
    base = root / "dtd" / "dtd"
    for part in ("train", "val", "test"):
        lines = []
        for label, name in enumerate(("banded", "woven")):
            paint(base / "images" / name / f"{name}_{part}.jpg", label, part)
            lines.append(f"{name}/{name}_{part}.jpg")
        write(base / "labels" / f"{part}1.txt", *lines)
        write(base / "labels" / f"{part}2.txt", *lines[:1])  # another partition
    return {"train": 4, "test": 2, "classes": ("banded", "woven")}


def flowers(root):
    base = root / "flowers-102"
    labels = np.arange(306) % 102 + 1
    ids = np.arange(1, 307).reshape(3, 102)
    kinds = {"trnid": "train", "valid": "val", "tstid": "test"}
    for i, (number, label) in enumerate(zip(ids.flat, labels, strict=True)):
        part = list(kinds.values())[i // 102]
        paint(base / "jpg" / f"image_{number:05}.jpg", int(label) - 1, part)
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", dict(zip(kinds, ids, strict=True)))
    return {"train": 204, "test": 102, "classes": tuple(datasets.Flowers102.classes)}


def food(root):
    base = root / "food-101"
    for part in ("train", "test"):
        listed = {}
        for label, name in enumerate(("apple_pie", "waffles")):
            listed[name] = [f"{name}/{part}{i}" for i in range(2)]
            for file in listed[name]:
                paint(base / "images" / f"{file}.jpg", label, part)
        write(base / "meta" / f"{part}.json", json.dumps(listed))
    return {"train": 4, "test": 4, "classes": ("apple_pie", "waffles")}


def pets(root):
    base = root / "oxford-iiit-pet"
    for part, listed in (("train", "trainval"), ("test", "test")):
        lines = []
        for label, name in enumerate(("Abyssinian", "american_bulldog")):
            number = 1 if part == "train" else 2
            paint(base / "images" / f"{name}_{number}.jpg", label, part)
            lines.append(f"{name}_{number} {label + 1} {label + 1} 1")
        write(base / "annotations" / f"{listed}.txt", *lines)
    return {"train": 2, "test": 2, "classes": ("Abyssinian", "American Bulldog")}


def sun397(root, partition=True, each=2):
    base = root / "SUN397"
    names = ("/a/abbey", "/a/apartment_building/outdoor")
    write(base / "ClassName.txt", *names)
    for part, listed in (("train", "Training_01"), ("test", "Testing_01")):
        lines = []
        for label, name in enumerate(names):
            for i in range(each):
                paint(base / name[1:] / f"sun_{part}{i}.jpg", label, part)
                lines.append(f"{name}/sun_{part}{i}.jpg")
        if partition:
            write(base / f"{listed}.txt", *lines)
    classes = ("a/abbey", "a/apartment_building/outdoor")
    return {"train": 2 * each, "test": 2 * each, "classes": classes}


def gtsrb(root):
    base = root / "gtsrb"
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(2):
        for i in range(2):
            paint(base / "GTSRB" / "Training" / f"{label:05}" / f"0000{i}.ppm", label, "train")
        paint(base / "GTSRB" / "Final_Test" / "Images" / f"{label:05}.ppm", label, "test")
        rows.append(f"{label:05}.ppm;12;9;1;1;9;9;{label}")
    write(base / "GT-final_test.csv", *rows)
    return {"train": 4, "test": 2, "classes": ("0", "1")}


def _pixels(count, part, side):
    colours = np.array([colour(i % 10, part) for i in range(count)], np.uint8)
    return np.broadcast_to(colours[:, :, None, None], (count, 3, side, side))


def svhn(root):
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 20), ("test", 10)):
        labels = np.array([[i % 10 or 10] for i in range(count)])  # 10 is the digit 0
        images = _pixels(count, part, 32).transpose(2, 3, 1, 0)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": labels})
    return {"train": 20, "test": 10, "classes": tuple("0123456789")}


def stl10(root):
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    for part, count in (("train", 20), ("test", 10)):
        _pixels(count, part, 96).transpose(0, 1, 3, 2).tofile(base / f"{part}_X.bin")
        (np.arange(count) % 10 + 1).astype(np.uint8).tofile(base / f"{part}_y.bin")
    (base / "unlabeled_X.bin").touch()
    write(base / "class_names.txt", *names)
    return {"train": 20, "test": 10, "classes": tuple(names)}


def _idx(root, classes):
    root.mkdir(parents=True, exist_ok=True)
    for part, stem, count in (("train", "train", 20), ("test", "t10k", 10)):
        images = _pixels(count, part, 28)[:, 0]
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (root / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], ">i4").tobytes() + labels
        )
    return {"train": 20, "test": 10, "classes": classes}


def mnist(root):
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return _idx(root / "MNIST" / "raw", tuple(f"{i} - {digit}" for i, digit in enumerate(digits)))


def fashion_mnist(root):
    return _idx(root / "FashionMNIST" / "raw", tuple(datasets.FashionMNIST.classes))


FAKES = {
    maker.__name__.replace("_", "-"): maker
    for maker in (
        aircraft,
        birdsnap,
        caltech101,
        caltech256,
        cars,
        dtd,
        flowers,
        food,
        pets,
        sun397,
        imagenet,
        svhn,
        mnist,
        fashion_mnist,
        gtsrb,
        stl10,
    )
}


@pytest.fixture
def fakes(monkeypatch):
    """Name of a set -> a function that builds a tiny one below a root and says what it holds.

    Checksums cannot hold for them: there, a file is whole if it is there.
    """

    def there(path, md5=None):
        return os.path.isfile(path)

    for module in ("flowers102", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", there)
    return FAKES
