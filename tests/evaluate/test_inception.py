import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from rtk.errors import RtkError
from rtk.evaluate import Extractor
from rtk.evaluate.inception import Inception


def random_state(classes, aux_logits):
    """A state dict of torchvision's network, in half precision to be quick on the disk."""
    network = torchvision.models.inception_v3(
        weights=None, num_classes=classes, aux_logits=aux_logits, init_weights=False
    )
    return {name: tensor.half() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(1)
    torch.save(random_state(1008, False), folder / "fid.pth")
    torch.save(random_state(1000, True), folder / "torchvision.pth")
    return folder


@pytest.fixture(scope="module")
def fid(folder):
    return Inception(folder / "fid.pth")


def test_torchvisions_features(folder):
    """Its own way, ImageNet's normalisation undone inside, leads to the same features."""
    path = folder / "torchvision.pth"
    peer = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=True)
    peer.load_state_dict(torch.load(path))
    peer.fc = nn.Identity()
    x = torch.rand(2, 3, 32, 40)
    large = F.interpolate(x, (299, 299), mode="bilinear")
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    network = Inception(path)
    with torch.no_grad():
        features = network(x)
        expected = peer.eval()(normalise(large))
    assert network.kind == "torchvision" and features.shape == (2, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert features.std() > 0


@pytest.mark.parametrize(
    ("name", "channels"),
    [("5b", 192), ("5c", 256), ("5d", 288)]
    + [(f"6{letter}", 768) for letter in "bcde"]
    + [("7b", 1280), ("7c", 2048)],
)
def test_pytorch_fids_blocks_pool_as_tensorflow_did(fid, name, channels):
    """Padding does not count in a mean; the very last block takes the maximum."""
    block = fid.network.get_submodule(f"Mixed_{name}")
    x = torch.rand(1, channels, 5, 5)
    pooled = F.avg_pool2d(F.pad(x, [1] * 4), 3, 1) * 9
    pooled = pooled / F.avg_pool2d(F.pad(torch.ones_like(x), [1] * 4), 3, 1) / 9
    if name == "7c":
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    with torch.no_grad():
        out = block(x)
        branch = block.branch_pool(pooled)
    torch.testing.assert_close(out[:, -branch.shape[1] :], branch, rtol=1e-4, atol=1e-5)
    original = next(
        cls for cls in type(block).__mro__ if cls.__module__ == "torchvision.models.inception"
    )
    with torch.no_grad():
        others = torch.cat(original._forward(block, x)[:-1], 1)
    assert torch.equal(out[:, : -branch.shape[1]], others)


def test_pytorch_fids_features(fid, folder):
    x = torch.rand(1, 3, 299, 299)
    with torch.no_grad():
        features = fid(x)
        plain = torchvision.models.inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False
        )
        plain.load_state_dict(torch.load(folder / "fid.pth"))
        plain.fc = nn.Identity()
        other = plain.eval()(2 * x - 1)
    assert fid.kind == "pytorch-fid" and features.shape == (1, 2048)
    assert features.isfinite().all() and not torch.allclose(features, other, rtol=1e-2)
    assert not fid.training and not any(p.requires_grad for p in fid.parameters())


def test_the_extractor_says_whose_weights_they_are(folder):
    extractor = Extractor.inception(folder / "fid.pth")
    assert extractor.kind == "pytorch-fid" and "pytorch-fid" in extractor.label
    assert extractor.image_size is None and len(extractor.sha256) == 64


def test_files_from_before_batches_were_counted(folder, tmp_path):
    state = torch.load(folder / "torchvision.pth")
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert Inception(tmp_path / "old.pth").kind == "torchvision"


class Harmful:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def write_bad(kind, folder, path):
    if kind == "another architecture":
        torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), path)
    elif kind == "no head":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif kind == "a module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    elif kind == "code in a zip":
        torch.save({"fc.weight": Harmful()}, path)
    elif kind == "nested":
        torch.save({"state_dict": {"fc.weight": torch.zeros(1000, 2048)}}, path)
    elif kind == "a list":
        torch.save([torch.zeros(2)], path)
    elif kind == "text":
        path.write_text("not found\n")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes((folder / "fid.pth").read_bytes()[:100_000])
    elif kind == "a folder":
        path.mkdir()
    else:
        state = torch.load(folder / "fid.pth")
        if kind == "a missing key":
            del state["Mixed_7c.branch1x1.conv.weight"]
        else:
            state["Mixed_9z.conv.weight"] = torch.zeros(2)
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another architecture", r"does not hold the weights of Inception v3 \(size mismatch"),
        ("no head", "its fc.weight has not 1008"),
        ("a missing key", r"\(missing: Mixed_7c\.branch1x1\.conv\.weight\)"),
        ("an extra key", r"\(unexpected: Mixed_9z\.conv\.weight\)"),
        ("nested", "it is not a state dict"),
        ("a list", "it is not a state dict"),
        ("a module", "damaged, or a pickle of more than tensors"),
        ("code", "damaged, or a pickle of more than tensors"),
        ("code in a zip", "damaged, or a pickle of more than tensors"),
        ("text", "damaged, or a pickle"),
        ("empty", "damaged, or a pickle"),
        ("truncated", "damaged, or a pickle"),
        ("a folder", "cannot be read .*; download https://github.com/mseitzer/pytorch-fid"),
        ("nothing", "cannot be read .No such file or directory"),
    ],
)
def test_other_files_are_refused_and_no_code_runs(kind, message, folder, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if kind != "nothing":
        write_bad(kind, folder, path)
    capsys.readouterr()
    with pytest.raises(RtkError, match=message) as caught:
        Inception(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "code of the file ran" not in capsys.readouterr().out
