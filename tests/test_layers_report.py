"""`rtk doctor --layers`: its table, and what it refuses."""

import pytest
import torch
from torch import nn

import rtk
from rtk import cli, layers_report
from rtk.errors import RtkError
from rtk.models import ModelSpec, create
from rtk.nn import LayerTimes, mask_model

FOUND = [
    LayerTimes(
        "0",
        (4, 64, 8, 8),
        1 / 9,
        {"cudnn": (1.0, 2.0, 3.0), "skip": (0.25, None, 2.5), "sparse": (0.5, 1.5, None)},
    ),
    LayerTimes("1", (4, 64, 8, 8), 1.0, {"cudnn": (0.5, 0.75, 1.0), "skip": (0.6, 0.7405, 1.0)}),
]


@pytest.fixture
def masked():
    options = {"kernel_size": 3, "bias": False}
    layers = [nn.Conv2d(64, 64, padding=p, **options) for p in (1, 1, "same")]
    mask = torch.zeros(64, 64, 3, 3, dtype=torch.bool)
    mask[:, :, 0, 0] = True
    tickets = {"0": mask, "1": torch.ones_like(mask), "2": torch.ones(64, 64, 1, 1).bool()}
    return mask_model(nn.Sequential(*layers), rtk.Ticket(tickets))


def test_the_table_sets_each_path_beside_the_dense_layer(masked):
    header, first, second, third, sums = layers_report.table(masked, FOUND).splitlines()
    ways = ["ms", "dense"]
    assert header.split() == [
        *("layer", "input", "filters", "kept", "blocks"),
        *("forward", *ways, "input", "gradient", *ways, "weight", "gradient", *ways),
    ]
    assert first.split() == [
        *("0", "4x64x8x8", "64x64x3x3", "11.1%", "11%"),
        *("skip", "0.2500", "1.0000", "sparse", "1.5000", "2.0000", "skip", "2.5000", "3.0000"),
    ]
    assert second.split()[3:] == [
        *("100.0%", "100%", "cudnn", "0.5000", "0.5000", "cudnn", "0.7500", "0.7500"),
        *("cudnn", "1.0000", "1.0000"),
    ]
    assert third.split() == ["2", "64x64x3x3", "100.0%", "cudnn", "cudnn", "cudnn"]
    assert sums.split() == ["all", "0.7500", "1.5000", "2.2500", "2.7500", "3.5000", "4.0000"]
    assert third.index("cudnn") == first.index("skip")


def test_a_linear_layer_stands_beside_cublas():
    model = nn.Sequential(nn.Linear(64, 128))
    mask_model(model, rtk.Ticket({"0": torch.eye(128, 64) > 0}))
    times = {"blocks64": (0.25, 0.3, 0.5), "cublas": (0.5, 0.25, 0.5), "blocks32": (None,) * 3}
    found = [LayerTimes("0", (8, 3, 64), 0.5, times)]
    _, row, sums = layers_report.table(model, found).splitlines()
    assert row.split() == [
        *("0", "8x3x64", "128x64", "0.8%", "50%", "blocks64", "0.2500", "0.5000"),
        *("cublas", "0.2500", "0.2500", "cublas", "0.5000", "0.5000"),
    ]
    assert sums.split() == ["all", "0.2500", "0.5000", "0.2500", "0.2500", "0.5000", "0.5000"]


def test_a_ticket_without_convolutions_is_refused():
    model = mask_model(nn.Sequential(nn.Linear(2, 2)), rtk.Ticket({"0": torch.ones(2, 2).bool()}))
    with pytest.raises(RtkError, match="masks no convolution; expected one as `rtk draw` makes it"):
        layers_report.table(model, [])


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--layers", "net", "ticket"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "doctor --layers: expected a GPU to time the layers on" in err
    assert "run it on a machine that has one" in err


def test_the_command_line_hands_everything_on(monkeypatch, capsys):
    asked = []

    def describe(*names, **sizes):
        asked.append((names, sizes))
        return "the table"

    monkeypatch.setattr(layers_report, "describe_layers", describe)
    assert cli.main(["doctor", "--layers", "net", "ticket"]) == 0
    sizes = ["--image_size", "64", "--batch_size", "7"]
    assert cli.main(["doctor", "--layers", "a", "b", *sizes]) == 0
    assert capsys.readouterr().out == "the table\n" * 2
    assert asked == [
        (("net", "ticket"), {"image_size": None, "batch_size": 128}),
        (("a", "b"), {"image_size": 64, "batch_size": 7}),
    ]


@pytest.mark.parametrize("sizes", [{"image_size": 0}, {"batch_size": -1}])
def test_sizes_below_one_are_refused(sizes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    [(name, value)] = sizes.items()
    with pytest.raises(RtkError, match=f"{name}: expected at least 1, got {value}"):
        layers_report.describe_layers("net", "ticket", **sizes)


@pytest.mark.parametrize("model", ["resnet18", "nowhere"])
def test_an_architecture_takes_the_tickets_stem_and_width(model):
    spec = ModelSpec("resnet18", "3x3", 0.125, 3, (0.5,) * 3, (0.25,) * 3)
    ticket = rtk.draw.omp(create(spec), 0.5)
    if model == "nowhere":
        with pytest.raises(RtkError, match="checkpoint nowhere cannot be read"):
            layers_report._network(model, ticket)
    else:
        found = layers_report._network(model, ticket).spec
        assert (found.arch, found.stem, found.width) == ("resnet18", "3x3", 0.125)


@pytest.mark.gpu
def test_a_network_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec("resnet18", "3x3", 1.0, 3, (0.5,) * 3, (0.25,) * 3)
    ticket = rtk.draw.omp(create(spec), 0.9, "block-64", scope="layer")
    ticket.save(tmp_path / "ticket.safetensors")
    text = layers_report.describe_layers("resnet18", str(tmp_path), batch_size=64)
    title, blank, header, *rows, sums = text.splitlines()
    assert title.startswith("resnet18, block-64 ticket, ") and "64 images of 32 x 32 on" in title
    assert blank == "" and header.startswith("layer") and sums.startswith("all")
    assert [row.split()[0] for row in rows] == list(ticket.masks)
    for column, paths in ((5, ("cudnn", "skip", "sparse")), (11, ("cudnn", "skip"))):
        assert all(row.split()[column] in paths for row in rows)
