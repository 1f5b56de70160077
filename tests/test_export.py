"""rtk export: what it writes runs without rtk and answers as the network does."""

import io
import json
import sys
from contextlib import chdir

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from rtk import draw, export
from rtk.cli import main
from rtk.config import DrawConfig
from rtk.errors import RtkError
from rtk.models import MODELS, Classifier, ModelSpec, create
from rtk.nn import BatchNormAct2d, MaskedConv2d, MaxPool2d
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint, save_checkpoint

FINISHED = {"progress": {"finished": True}}
SIZE = 32  # pixels


class Tiny(Classifier):
    """Traced in a fraction of a ResNet's time; it has what is rtk's own in one."""

    def __init__(self, spec):
        super().__init__(spec)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), BatchNormAct2d(8)  # nothing of 2 pixels
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), BatchNormAct2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1), BatchNormAct2d(8)
        self.fc = nn.Linear(8, spec.num_classes)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(self.normalise(x)), relu=True))
        y = self.conv3(self.bn2(self.conv2(x), relu=True))
        return self.fc(self.bn3(y, x, relu=True).mean((2, 3)))


def save_network(path, arch="tiny", stem="3x3", width=1.0, meta=FINISHED):
    model = create(ModelSpec(arch, stem, width, 5, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    save_checkpoint(path, model, None, meta)


@pytest.fixture(scope="module")
def site(tmp_path_factory, one_cpu_thread):
    site = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch, one_cpu_thread(), chdir(site):
        patch.setitem(MODELS._entries, "tiny", Tiny)
        torch.manual_seed(0)
        save_network("net/checkpoint.safetensors")
        save_network("wide/checkpoint.safetensors", width=2.0)
        save_network("resnet/checkpoint.safetensors", "resnet18", "7x7", 0.0625)
        save_network("shuffle/checkpoint.safetensors", "shufflenet_v2_x0_5", "own", 1.0)
        config = {"config": {"data": {"image_size": 16}}}
        save_network("small/checkpoint.safetensors", meta={**FINISHED, **config})
        save_network("stopped.safetensors", meta={"progress": {"finished": False, "epoch": 3}})
        for net, ticket in (("net", "ticket"), ("wide", "ticket-wide"), ("shuffle", "ticket-s")):
            draw.run(
                DrawConfig(
                    out=ticket, checkpoint=net, granularity="channel", sparsity=0.5, device="cpu"
                )
            )
        masked = Checkpoint.load("net").build_model()
        Ticket.load(f"ticket/{TICKET}").apply(masked)
        save_checkpoint("masked.safetensors", masked, None, FINISHED)
        yield site


@pytest.fixture(autouse=True)
def _inside(site, monkeypatch):
    monkeypatch.chdir(site)


@pytest.fixture
def pixels():
    return torch.rand(4, 3, SIZE, SIZE)


def answer(pixels, net="net", ticket="ticket"):
    model = Checkpoint.load(net).build_model()
    if ticket:
        Ticket.load(f"{ticket}/{TICKET}").apply(model)
        assert any(isinstance(module, MaskedConv2d) for module in model.modules())
    with torch.no_grad():
        return model.eval()(pixels)


def run_pt2(path, pixels):
    program = torch.export.load(path)
    for node in program.graph.nodes:
        assert "rtk" not in str(node.target)
    return program.module()(pixels)


def run_onnx(path, pixels):
    onnx.checker.check_model(onnx.load(path))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])


RUNNERS = {"torch_export": run_pt2, "onnx": run_onnx}


@pytest.mark.parametrize("format", RUNNERS)
def test_it_runs_without_rtk_on_any_batch(format, pixels):
    path = f"net.{format}"
    done = export.export("net", path, format=format, ticket="ticket")
    assert done.difference <= 1e-4 * done.largest and done.image_size == SIZE
    for n in (1, 4):
        actual = RUNNERS[format](path, pixels[:n])
        torch.testing.assert_close(actual, answer(pixels[:n]), atol=1e-5, rtol=0)
    assert not torch.allclose(answer(pixels), answer(pixels, ticket=None), atol=1e-3)


def test_compact_is_smaller_and_answers_the_same(pixels):
    export.export("net", "whole.pt2", ticket="ticket")
    export.export("net", "compact.pt2", ticket="ticket", compact=True)
    torch.testing.assert_close(run_pt2("compact.pt2", pixels), answer(pixels), atol=1e-5, rtol=0)
    sizes = [
        sum(tensor.numel() for tensor in torch.export.load(path).state_dict.values())
        for path in ("compact.pt2", "whole.pt2")
    ]
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("format", RUNNERS)
def test_where_it_comes_from_is_in_the_file(format):
    export.export("net", "told", format=format, ticket="ticket", image_size=8)
    if format == "onnx":
        told = {p.key: p.value for p in onnx.load("told").metadata_props}["rtk"]
    else:
        extra = {"rtk.json": ""}
        with open("told", "rb") as file:
            torch.export.load(io.BytesIO(file.read()), extra_files=extra)
        told = extra["rtk.json"]
    told = json.loads(told)
    assert told["checkpoint_sha256"] == Checkpoint.load("net").sha256
    assert told["ticket_sha256"] == Ticket.load(f"ticket/{TICKET}").meta["sha256"]
    assert told["image_size"] == 8 and told["model"]["arch"] == "tiny"


def test_a_state_dict_loads_into_the_plain_network(pixels):
    export.export(
        "shuffle", "s.safetensors", format="state_dict", ticket="ticket-s", image_size=SIZE
    )
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()
    network.load_state_dict(load_file("s.safetensors"))
    with safe_open("s.safetensors", "pt") as file:
        model = json.loads(file.metadata()["rtk"])["model"]
    mean, std = (torch.tensor(model[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        actual = network((pixels - mean) / std)
    assert torch.equal(actual, answer(pixels, "shuffle", "ticket-s"))
    masks = Ticket.load(f"ticket-s/{TICKET}").masks
    assert not any(network.get_submodule(n).weight[~m.flatten()].any() for n, m in masks.items())


def test_a_network_that_is_masked_already(pixels):
    export.export("masked.safetensors", "masked.pt2")
    torch.testing.assert_close(run_pt2("masked.pt2", pixels), answer(pixels), atol=1e-5, rtol=0)


def test_a_resnet(pixels):
    export.export("resnet", "resnet.pt2", image_size=SIZE)
    expected = answer(pixels, "resnet", ticket=None)
    torch.testing.assert_close(run_pt2("resnet.pt2", pixels), expected, atol=1e-5, rtol=0)


def test_the_size_of_training_is_the_default():
    assert export.export("small", "small.pt2").image_size == 16
    assert export.export("shuffle", "s.safetensors", format="state_dict").image_size == 224


def test_outputs_that_differ_are_not_written(monkeypatch, tmp_path):
    path = tmp_path / "wrong.pt2"
    writer = export.FORMATS.get("torch_export")
    for wrong in (lambda y: y + 0.01, lambda y: y * float("nan"), lambda y: y[:, :1]):

        def writes(model, images, told, wrong=wrong):
            data, network = writer(model, images, told)
            return data, lambda x: wrong(network(x))

        monkeypatch.setitem(export.FORMATS._entries, "torch_export", writes)
        with pytest.raises(RtkError, match="outputs of the torch_export file differ by"):
            export.export("net", path)
        assert not path.exists()
    monkeypatch.setitem(
        export.FORMATS._entries,
        "torch_export",
        lambda *of: (b"0", lambda x: writer(*of)[1](x) + 0.01),
    )
    assert export.export("net", path, tolerance=1.0).difference == pytest.approx(0.01, rel=1e-3)


def test_onnx_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RtkError, match=r"needs onnxruntime, .* pip install 'rtk\[onnx\]'"):
        export.export("net", "n.onnx", format="onnx")


BAD = {
    "format": ("net --format onx", "unknown export format 'onx'"),
    "compact": ("net --format state_dict --compact", "leave compact out"),
    "size": ("net --image_size 0", "image_size: expected at least 1 pixel, got 0"),
    "missing": ("net --ticket nowhere", "ticket nowhere cannot be read"),
    "tolerance": ("net --tolerance -1", "tolerance: expected a share >= 0, got -1.0"),
    "ticket": ("net --ticket ticket-wide", "the ticket is for width 2.0, the model has width 1.0"),
    "checkpoint": ("nowhere", "checkpoint nowhere cannot be read"),
    "stopped": ("stopped.safetensors", "stopped at epoch 3"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad, capsys, tmp_path):
    options, words = BAD[bad]
    assert main(["export", *options.split(), "--out", f"{tmp_path}/out.pt2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.pt2").exists()


def test_the_command(capsys):
    words = "export net --ticket ticket --format state_dict --out c.safetensors --image_size 8"
    assert main(words.split()) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("c.safetensors: images (N, 3, 8, 8) in [0, 1]; outputs differ by at most")


def test_images_that_the_network_cannot_take():
    with pytest.raises(RtkError, match="the network takes no images of 2 pixels"):
        export.export("net", "a.pt2", image_size=2)
