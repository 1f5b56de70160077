import shutil

import numpy as np
import pytest
from PIL import Image

from rtk.cli import main
from rtk.config import DataConfig
from rtk.data import CATALOGUE, DATA_SETS
from rtk.data.check import check, list_sets
from rtk.errors import RtkError


def tree(root, each=3):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for c, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(each + c):
                pixels = rng.integers(0, 256, (10 + i, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


def test_list_names_every_set_once_and_says_what_is_ready(fakes, tmp_path):
    fakes["pets"](tmp_path)
    fakes["food"](tmp_path / "food")
    text = list_sets(DataConfig(root=str(tmp_path)))
    rows = {line.split()[0]: line for line in text.splitlines()[2:-1]}
    assert set(rows) == set(CATALOGUE) | set(DATA_SETS.names()) - {"npz", "folder"}
    assert text.startswith(f"data root: {tmp_path}\n")
    assert "ready" in rows["pets"] and str(tmp_path / "oxford-iiit-pet") in rows["pets"]
    assert str(tmp_path / "food" / "food-101") in rows["food"]
    for word in ("missing", "100", "6,667", "3,333", "mean_per_class", "rtk data get aircraft"):
        assert word in rows["aircraft"]
    assert "by hand" in rows["cars"] and "miou" in rows["voc2012"]
    assert "CC BY-SA 4.0" in rows["pets"] and "774 MiB" in rows["pets"]


def test_a_whole_folder(tmp_path):
    found = check(DataConfig(name=tree(tmp_path)), duplicates=True)
    assert found.problems == ()
    assert found.text.splitlines() == [
        f"folder:{tmp_path}: 2 classes, reported as top1",
        "  train 7 images, 3 (cat) to 4 a class, median 3",
        "        20x10 to 20x13 pixels (width x height), 0 grey",
        "  test  7 images, 3 (cat) to 4 a class, median 3",
        "        20x10 to 20x13 pixels (width x height), 0 grey",
        "  0 test images are also in train",
    ]


def test_every_damaged_image_is_named_whatever_skip_bad_says(tmp_path):
    name = tree(tmp_path)
    bad = [tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "dog" / "1.png"]
    for file in bad:
        file.write_bytes(b"no image")
    for skip_bad in (False, True):
        (problem,) = check(DataConfig(name=name, skip_bad=skip_bad)).problems
        assert problem.startswith("2 of 7 train images cannot be decoded")
        assert all(f"{file} cannot be decoded" in problem for file in bad)


def test_duplicates_and_grey_images_are_counted(tmp_path):
    name = tree(tmp_path)
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "dog" / "9.png")
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "dog" / "8.png")
    Image.new("L", (30, 30)).save(tmp_path / "train" / "cat" / "grey.png")
    text = check(DataConfig(name=name), duplicates=True).text
    assert "2 test images are also in train" in text
    assert str(tmp_path / "test" / "dog" / "9.png") in text
    assert "20x10 to 30x30 pixels (width x height), 1 grey" in text


def test_arrays_are_checked_too(tmp_path):
    images = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
    labels = np.array([0, 1, 1, 1])
    path = tmp_path / "a.npz"
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        test_images=images[2:3],
        test_labels=labels[2:3],
    )
    text = check(DataConfig(name=f"npz:{path}"), duplicates=True).text
    assert "train 4 images, 1 (0) to 3 a class" in text and "6x5 pixels" in text
    assert "1 test images are also in train\n        image 0" in text


def test_counts_are_compared_with_the_catalogue(fakes, tmp_path):
    fakes["pets"](tmp_path)
    found = check(DataConfig(name="pets", root=str(tmp_path)))
    assert found.problems == (
        "train has 2 images where the set has 3,680",
        "test has 2 images where the set has 3,669",
        "2 classes where the set has 37",
    )
    assert "reported as mean_per_class" in found.text
    assert check(DataConfig(name="pets[0]", root=str(tmp_path))).problems == ()


def test_segmentation_sets_have_no_labels_to_check():
    with pytest.raises(RtkError, match="voc2012 has a mask for each image, no label"):
        check(DataConfig(name="voc2012"))


def test_the_command_line(fakes, tmp_path, capsys):
    name = tree(tmp_path / "tree")
    assert main(["data", "check", name, "--duplicates"]) == 0
    assert "7 images" in capsys.readouterr().out
    (tmp_path / "tree" / "test" / "cat" / "0.png").write_bytes(b"")
    assert main(["data", "check", name]) == 2
    captured = capsys.readouterr()
    assert "7 images" in captured.out and "1 of 7 test images cannot be decoded" in captured.err

    fakes["pets"](tmp_path)
    assert main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert str(tmp_path / "oxford-iiit-pet") in capsys.readouterr().out
    assert main(["data", "get", "pets", f"--data.root={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'oxford-iiit-pet'}\n"
    assert main(["data", "get", "cars", "--data-root", str(tmp_path)]) == 2
    assert "cars is not there" in capsys.readouterr().err
    assert main(["data", "check", "birdsnap", "--data-root", str(tmp_path)]) == 2
    assert "sort them into birdsnap/train/<class>/" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "list,get,check" in capsys.readouterr().err


def test_download_is_an_option_of_every_stage(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("rtk.data.resolve.get", lambda name, config: asked.append(name))
    command = ["pretrain", "--data.name", "pets", "--data-root", str(tmp_path), "--download"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert asked == ["pets"] and "pets is not there" in capsys.readouterr().err
