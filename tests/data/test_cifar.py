from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rtk.config import DataConfig
from rtk.data import load
from rtk.errors import RtkError


class FakeCifar:
    """What `load` uses of torchvision's class; the files' checksums are torchvision's business."""

    base_folder = "cifar-10-batches-py"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    roots: tuple[str, ...] = ()

    def __init__(self, root, train, download):
        assert download is False
        FakeCifar.roots += (root,)
        count = 6 if train else 2
        self.data = np.arange(count * 32 * 32 * 3, dtype=np.uint8).reshape(count, 32, 32, 3)
        self.targets = [0, 1, 2, 0, 1, 2][:count]
        self.classes = ["plane", "car", "bird"]


@pytest.fixture
def fake(monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(FakeCifar, "roots", ())


@pytest.mark.parametrize("inside", ["", "cifar10"], ids=["root", "root-cifar10"])
def test_cifar10_is_read_by_torchvision(fake, tmp_path, inside):
    (tmp_path / inside / "cifar-10-batches-py").mkdir(parents=True)
    cifar = load(DataConfig(name="cifar10", root=str(tmp_path)))
    assert FakeCifar.roots == (str(tmp_path / inside),) * 2
    assert cifar.classes == ("plane", "car", "bird")
    assert cifar.augment == "crop"
    assert cifar.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    source = torch.from_numpy(FakeCifar("", False, False).data)
    assert torch.equal(cifar.test.images, source.permute(0, 3, 1, 2))
    assert cifar.test.images.is_contiguous()


@pytest.mark.parametrize(
    ("name", "folder", "archive"),
    [
        ("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python", "cifar-100-python.tar.gz"),
    ],
)
def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path, name, folder, archive):
    with pytest.raises(RtkError) as error:
        load(DataConfig(name=name, root=str(tmp_path)))
    message = str(error.value)
    assert str(tmp_path / folder) in message
    assert str(tmp_path / name / folder) in message
    assert f"https://www.cs.toronto.edu/~kriz/{archive}" in message
    assert f"tar -xz -C {tmp_path}" in message
    assert "RTK_DATA" in message and "--data.root" in message


def test_the_root_is_the_setting_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    def looked_in(root):
        with pytest.raises(RtkError) as error:
            load(DataConfig(name="cifar10", root=root))
        return str(error.value)

    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RTK_DATA", raising=False)
    assert str(home / ".cache/rtk/data/cifar-10-batches-py") in looked_in(None)
    monkeypatch.setenv("RTK_DATA", str(tmp_path / "env"))
    assert str(tmp_path / "env" / "cifar-10-batches-py") in looked_in(None)
    assert str(tmp_path / "set" / "cifar-10-batches-py") in looked_in(str(tmp_path / "set"))


def test_damaged_files_are_refused_by_checksum(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the archive's")
    with pytest.raises(RtkError, match=r"incomplete or corrupted \(checksum\).*unpack"):
        load(DataConfig(name="cifar10", root=str(tmp_path)))


def test_fake_matches_torchvision():
    from torchvision import datasets

    real = SimpleNamespace(**vars(datasets.CIFAR10))
    assert (real.base_folder, real.url) == (FakeCifar.base_folder, FakeCifar.url)
