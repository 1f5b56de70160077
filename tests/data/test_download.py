import hashlib
import io
import zipfile
from urllib.error import URLError

import pytest

from rtk.config import DataConfig
from rtk.data import CATALOGUE, download, load
from rtk.data.download import get
from rtk.errors import RtkError

# Where torchvision's reader of a set takes its download functions from.
MODULES = {
    "aircraft": "fgvc_aircraft",
    "caltech101": "caltech",
    "caltech256": "caltech",
    "dtd": "dtd",
    "flowers": "flowers102",
    "food": "food101",
    "pets": "oxford_iiit_pet",
    "sun397": "sun397",
    "svhn": "svhn",
    "mnist": "mnist",
    "fashion-mnist": "mnist",
    "gtsrb": "gtsrb",
    "stl10": "stl10",
}


def config(name, root, **settings):
    return DataConfig(name=name, root=str(root), **settings)


@pytest.fixture
def network(monkeypatch, fakes, tmp_path):
    """Stand in for torchvision's download functions: what they would unpack is a fake."""

    def serve(name, fail=False):
        part = tmp_path / f".{name}.part"
        urls = []

        def fetch(url, *_, **__):
            urls.append(url)
            if len(urls) > 1:
                return
            fakes[name](part)
            if name == "caltech101":  # archives in an archive
                (part / "caltech101" / "caltech-101").mkdir()
                (part / "caltech101" / "caltech-101.zip").touch()
            if fail:
                raise URLError("unreachable")

        module = f"torchvision.datasets.{MODULES[name]}"
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"{module}.{function}", fetch, raising=False)
        monkeypatch.setattr(download, "_fetch_partition", lambda folder: urls.append(folder))
        return urls

    return serve


@pytest.mark.filterwarnings("ignore:.*grey images")
@pytest.mark.parametrize("name", MODULES)
def test_get_moves_a_complete_download_into_the_root(network, tmp_path, name, capsys):
    urls = network(name)
    entry = CATALOGUE[name]
    assert get(name, config(name, tmp_path)) == tmp_path / entry.folder
    assert urls and all(path.name != f".{name}.part" for path in tmp_path.iterdir())
    assert f"{name}: {entry.download} from {entry.source}" in capsys.readouterr().err
    assert (tmp_path / ".sun397.part" / "SUN397" in urls) == (name == "sun397")
    assert len(load(config(name, tmp_path, image_size=8)).train) > 0
    urls.clear()
    assert get(name, config(name, tmp_path)) == tmp_path / entry.folder
    assert not urls  # it was there


def test_a_broken_download_leaves_nothing_that_looks_like_the_set(network, tmp_path):
    network("food", fail=True)
    with pytest.raises(RtkError) as error:
        get("food", config("food", tmp_path))
    message = str(error.value)
    assert "food could not be downloaded (URLError: <urlopen error unreachable>)" in message
    assert str(tmp_path / "food-101") in message and CATALOGUE["food"].source in message
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_download_left_is_not_taken_for_the_set(network, tmp_path):
    (tmp_path / ".pets.part" / "oxford-iiit-pet" / "images").mkdir(parents=True)
    (tmp_path / ".pets.part" / "oxford-iiit-pet" / "annotations").mkdir()
    with pytest.raises(RtkError, match="pets is not there"):
        load(config("pets", tmp_path))
    assert network("pets") == []
    get("pets", config("pets", tmp_path))
    assert len(load(config("pets", tmp_path, image_size=8)).train) == 2


def test_a_download_joins_a_folder_that_is_there(network, tmp_path):
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    network("mnist")
    get("mnist", config("mnist", tmp_path))
    assert sorted(path.name for path in (tmp_path / "MNIST").iterdir()) == ["processed", "raw"]


def test_what_is_in_the_way_of_a_download_is_named(network, tmp_path):
    (tmp_path / "MNIST").touch()
    network("mnist")
    with pytest.raises(RtkError, match=f"{tmp_path / 'MNIST'} is in the way of the downloaded"):
        get("mnist", config("mnist", tmp_path))


def test_loading_downloads_only_when_asked(network, tmp_path):
    urls = network("pets")
    with pytest.raises(RtkError, match="`rtk data get pets` or --download fetches it"):
        load(config("pets", tmp_path))
    assert not urls
    assert len(load(config("pets[0]", tmp_path, image_size=8, download=True)).train) == 1
    assert urls


@pytest.mark.parametrize("name", ["cars", "birdsnap"])
def test_what_cannot_be_downloaded_says_what_to_do(tmp_path, name):
    with pytest.raises(RtkError) as error:
        get(name, config(name, tmp_path))
    assert f"{name} is not there" in str(error.value)
    assert CATALOGUE[name].by_hand in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_imagenet_is_unpacked_from_its_archives(fakes, tmp_path, monkeypatch):
    with pytest.raises(RtkError, match="By hand: get ILSVRC2012_img_train"):
        get("imagenet", config("imagenet", tmp_path))
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(RtkError, match=r"could not be unpacked .*devkit_t12\.tar\.gz is not pres"):
        get("imagenet", config("imagenet", tmp_path))

    def unpack(root, split):
        if split == "val":
            fakes["imagenet"](tmp_path)

    monkeypatch.setattr("torchvision.datasets.ImageNet", unpack)
    assert get("imagenet", config("imagenet", tmp_path)) == tmp_path / "imagenet" / "train"


def test_unknown_name(tmp_path):
    with pytest.raises(RtkError, match=r"unknown data set to get 'foods'.*did you mean 'food'"):
        get("foods", config("foods", tmp_path))


def test_sun397s_partition_is_taken_out_of_its_archive(tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("Partitions/Training_01.txt", "Testing_01.txt", "Training_02.txt", "../x.txt"):
            file.writestr(name, f"of {name}")
    content = archive.getvalue()

    def fetch(url, folder):
        assert url == download.SUN_PARTITIONS
        (tmp_path / "Partitions.zip").write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    with pytest.raises(RuntimeError, match="checksum"):
        download._fetch_partition(tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(download, "SUN_PARTITIONS_SHA256", digest)
    download._fetch_partition(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Testing_01.txt", "Training_01.txt"]
    assert (tmp_path / "Training_01.txt").read_text() == "of Partitions/Training_01.txt"
