"""Ticket: what it says of itself, where it comes from, and the round trip through a file."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rtk
from rtk import Ticket, artifact
from rtk.errors import RtkError
from rtk.models import ModelSpec, create
from rtk.nn import MaskedConv2d, MaskedLinear

# No number of elements is a multiple of 8.
GRANULARITIES = {
    "element": {"a": (5, 3, 3, 3), "b": (7, 5, 1, 1)},
    "row": {"a": (5, 3, 3, 1), "b": (7, 5, 1, 1)},
    "kernel": {"a": (5, 3, 1, 1), "b": (7, 5, 1, 1)},
    "channel": {"a": (5, 1, 1, 1), "b": (7, 1, 1, 1)},
}
SHAPES = {"a": (5, 3, 3, 3), "b": (7, 5, 1, 1)}
SPEC = ModelSpec("resnet18", "3x3", 0.125, 5, (0.5,) * 3, (0.25,) * 3)


def draw(granularity: str, **meta) -> Ticket:
    shapes = GRANULARITIES[granularity]
    return Ticket({n: torch.rand(s) < 0.4 for n, s in shapes.items()}, SHAPES, meta)


def assert_same(actual: Ticket, expected: Ticket) -> None:
    assert set(actual.masks) == set(expected.masks)
    assert all(torch.equal(actual.masks[name], mask) for name, mask in expected.masks.items())
    assert actual.shapes == expected.shapes
    assert actual.granularity == expected.granularity
    assert actual.sparsity == expected.sparsity


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_round_trip(granularity, tmp_path):
    meta = {"scheme": "omp", "sparsity": 0.6, "recipe": {"seed": 3, "names": ["é", None]}}
    ticket = draw(granularity, **meta)
    sha256 = ticket.save(tmp_path / "new" / "ticket.safetensors")
    loaded = Ticket.load(tmp_path / "new" / "ticket.safetensors")
    assert_same(loaded, ticket)
    assert {key: loaded.meta[key] for key in meta} == meta
    assert loaded.meta["sha256"] == sha256
    assert loaded.save(tmp_path / "again") == sha256, "the content is the same, so is its hash"
    assert_same(Ticket.load(tmp_path / "again"), ticket)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 64, 65])
def test_every_number_of_bits(size, tmp_path):
    ticket = Ticket({"layer": torch.rand(size, 1) < 0.5, "all": torch.ones(1, size) > 0})
    ticket.save(tmp_path / "ticket")
    assert_same(Ticket.load(tmp_path / "ticket"), ticket)


def test_any_length_of_the_header_loads(tmp_path):
    """Some lengths make the file begin like a pickle or like gzip."""
    for length in range(0, 300, 4):
        ticket = draw("element", note="x" * length)
        ticket.save(tmp_path / "ticket")
        assert Ticket.load(tmp_path / "ticket").meta["note"] == "x" * length


@pytest.mark.parametrize("key", ["kind", "format", "layout", "actual_sparsity"])
def test_meta_may_use_any_name(key, tmp_path):
    draw("row", **{key: "mine"}).save(tmp_path / "ticket")
    assert Ticket.load(tmp_path / "ticket").granularity == "row"


@pytest.mark.parametrize(
    ("masks", "shapes", "granularity"),
    [
        *((shapes, SHAPES, name) for name, shapes in GRANULARITIES.items()),
        ({"a": (5, 3, 1, 1), "b": (7, 5, 3, 3)}, {"a": (5, 3, 3, 3), "b": (7, 5, 3, 3)}, "element"),
        ({"a": (5, 3, 1, 1), "b": (7, 5, 1, 1)}, None, "element"),
        ({"a": (5, 1, 1, 1), "head": (9, 4)}, SHAPES, "channel"),
        ({"head": (9, 4)}, None, "element"),
    ],
    ids=[*GRANULARITIES, "mixed", "1x1-only", "channel-and-head", "head-only"],
)
def test_granularity_is_read_off_the_masks(masks, shapes, granularity):
    ticket = Ticket({n: torch.ones(s) > 0 for n, s in masks.items()}, shapes or {})
    assert ticket.granularity == granularity
    drawn = Ticket(ticket.masks, ticket.shapes, {"granularity": "row"})
    assert drawn.granularity == "row", "what was drawn is known better"


def full(granularity: str) -> Ticket:
    """Draw from a small network at a granularity whose masks have the weights' shape."""
    torch.manual_seed(0)
    return rtk.draw.omp(network(), None if granularity == "2:4" else 0.6, granularity)


def network() -> nn.Sequential:
    torch.manual_seed(4)
    sizes = [(3, 32, 3), (32, 48, 3), (48, 64, 1), (64, 40, (3, 1))]
    return nn.Sequential(*(nn.Conv2d(c, k, size) for c, k, size in sizes))


@pytest.mark.parametrize("granularity", ["block-8", "block-4x16", "block-16", "2:4"])
def test_what_the_shapes_do_not_tell_survives_every_round_trip(granularity, tmp_path):
    ticket = full(granularity)
    assert ticket.granularity == granularity
    ticket.save(tmp_path / "ticket")
    loaded = Ticket.load(tmp_path / "ticket")
    assert_same(loaded, ticket)
    assert loaded.meta["granularity"] == granularity

    model = loaded.apply(network())
    assert_same(Ticket.from_model(model), ticket)

    pruned = network()
    for name, mask in ticket.masks.items():
        prune.custom_from_mask(pruned.get_submodule(name), "weight", mask)
    assert_same(Ticket.from_torch_prune(pruned), ticket)


def test_another_name_of_a_granularity_is_made_the_one(tmp_path):
    ticket = full("block-8")
    named = Ticket(ticket.masks, ticket.shapes, {"granularity": "block-8x8"})
    assert named.granularity == "block-8"
    named.save(tmp_path / "ticket")
    assert Ticket.load(tmp_path / "ticket").meta["granularity"] == "block-8"


@pytest.mark.parametrize("granularity", ["row", "kernel", "channel", "block-64", "block-8", "2:4"])
def test_a_false_claim_of_a_granularity_is_refused(granularity):
    torch.manual_seed(0)
    masks = {"a": torch.ones(24, 16, 3, 3) > 0, "b": torch.rand(24, 16, 3, 3) < 0.7}
    with pytest.raises(RtkError, match=f"says granularity {granularity}, .*mask of 'b' has not"):
        Ticket(masks, meta={"granularity": granularity})


def test_a_false_claim_in_a_file_is_refused(tmp_path, monkeypatch):
    ticket = full("block-8")
    ticket.masks["1"][0, 0, 0, 0] ^= True
    with pytest.raises(RtkError, match="says granularity block-8, which the mask of '1' has not"):
        ticket.save(tmp_path / "ticket")
    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "_check_granularity", lambda self: None)
        ticket.save(tmp_path / "ticket")
    with pytest.raises(RtkError, match="says granularity block-8, which the mask of '1' has not"):
        Ticket.load(tmp_path / "ticket")


def test_an_unknown_granularity_in_meta_is_refused():
    with pytest.raises(RtkError, match=r"unknown granularity 'blok-64'.*did you mean 'block-64'"):
        Ticket({"a": torch.rand(5, 3, 3, 3) < 0.5}, meta={"granularity": "blok-64"})


def test_what_is_read_off_the_masks_is_never_refused_as_a_claim(tmp_path):
    """Filters of several shapes, masks of several."""
    sizes = [(3, 3), (5, 1), (1, 5), (1, 1)]
    for shared in itertools.product(range(4), repeat=len(sizes)):
        masks, shapes = {}, {}
        for i, (size, dims) in enumerate(zip(sizes, shared, strict=True)):
            shape = (6, 4, *size)
            mask = torch.rand(shape[: 4 - dims]) < 0.5
            masks[str(i)] = mask.reshape(*mask.shape, *[1] * dims)
            shapes[str(i)] = shape
        ticket = Ticket(masks, shapes)
        ticket.save(tmp_path / "ticket")
        assert_same(Ticket.load(tmp_path / "ticket"), ticket)


def test_sparsity_counts_weights_and_not_mask_elements():
    masks = {"a": torch.ones(5, 1, 1, 1) > 0, "b": torch.ones(7, 5, 1, 1) > 0}
    masks["a"][0] = masks["b"][0, 0] = False
    ticket = Ticket(masks, SHAPES)
    assert ticket.sparsity == pytest.approx((27 + 1) / (135 + 35), abs=1e-15)
    assert repr(ticket) == "Ticket(2 layers, kernel, sparsity 0.1647)"
    assert Ticket({}).sparsity == 0


@pytest.mark.parametrize(
    ("mask", "shape", "words"),
    [
        (torch.ones(5, 3, 3, 3), None, "mask of 'a' must be bool, got torch.float32"),
        (torch.ones(5, 3) > 0, (5, 3, 3, 3), r"must broadcast to \(5, 3, 3, 3\), got \(5, 3\)"),
        (torch.ones(5, 2, 3, 3) > 0, (5, 3, 3, 3), r"must broadcast to .* got \(5, 2, 3, 3\)"),
    ],
    ids=["dtype", "dimensions", "size"],
)
def test_masks_are_checked(mask, shape, words):
    with pytest.raises(RtkError, match=words):
        Ticket({"a": mask}, {"a": shape} if shape else {})


def test_from_model_and_apply_give_the_model_back():
    def network() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5))

    masked, soft = network(), torch.rand(5, 6) * (torch.rand(5, 6) < 0.5)
    masked[0] = MaskedConv2d.from_conv(masked[0], torch.rand(4, 1, 1, 1) < 0.6)
    masked[1] = MaskedConv2d.from_conv(masked[1], torch.rand(3) < 0.6)
    masked[3] = MaskedLinear.from_linear(masked[3], soft)
    ticket = Ticket.from_model(masked)
    assert ticket.shapes == {"0": (4, 3, 3, 3), "1": (6, 4, 3, 3), "3": (5, 6)}
    assert ticket.masks["1"].shape == (1, 1, 1, 3)
    assert torch.equal(ticket.masks["3"], soft != 0)
    plain = network()
    assert ticket.apply(plain) is plain
    x = torch.rand(2, 3, 5, 5)
    masked[3].set_mask(soft != 0)
    assert torch.equal(plain(x), masked(x))
    ticket.masks["0"].zero_()
    assert plain[0].mask.any(), "the model has copies"


def test_from_torch_prune():
    def network() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 3))

    pruned = network().eval()
    layers = [(pruned[0], "weight"), (pruned[2], "weight")]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)
    ticket = Ticket.from_torch_prune(pruned)
    assert list(ticket.masks) == ["0", "2"]
    kept = sum(int(mask.sum()) for mask in ticket.masks.values())
    assert kept == 450 - round(0.9 * 450)
    assert ticket.sparsity == pytest.approx(0.9)
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(ticket.apply(network().eval())(x), pruned(x))
    for layer, name in layers:
        prune.remove(layer, name)
    with pytest.raises(RtkError, match=r"no weight_mask buffers; prune it with torch.nn.utils"):
        Ticket.from_torch_prune(pruned)


@pytest.mark.parametrize("granularity", ["element", "row", "kernel", "channel", "block-8", "2:4"])
def test_to_torch_prune_and_back(granularity):
    ticket = rtk.draw.omp(network(), None if granularity == "2:4" else 0.6, granularity)
    pruned = network()
    x = torch.rand(2, 3, 9, 9)
    expected = ticket.apply(network())(x)
    assert ticket.to_torch_prune(pruned) is pruned
    assert torch.equal(pruned(x), expected)
    assert all(prune.is_pruned(pruned[int(name)]) for name in ticket.masks)
    assert not prune.is_pruned(pruned[0])
    assert torch.equal(pruned[1].weight_orig, network()[1].weight), "what is pruned is kept beside"
    for source in (pruned, {f"module.{key}": value for key, value in pruned.state_dict().items()}):
        assert_same(Ticket.from_torch_prune(source), ticket)
    for name in ticket.masks:
        prune.remove(pruned[int(name)], "weight")
    assert torch.equal(pruned(x), expected)


def test_what_torch_prunes_by_channel_is_by_channel():
    pruned = network()
    for layer in (pruned[1], pruned[2]):
        prune.ln_structured(layer, "weight", amount=0.25, n=1, dim=0)
    ticket = Ticket.from_torch_prune(pruned)
    assert ticket.granularity == "channel" and ticket.masks["1"].shape == (48, 1, 1, 1)
    assert ticket.shapes["1"] == (48, 32, 3, 3) and ticket.sparsity == 0.25
    prune.ln_structured(pruned[3], "weight", amount=0.25, n=1, dim=1)
    assert Ticket.from_torch_prune(pruned).granularity == "kernel"
    linear = prune.random_unstructured(nn.Linear(6, 4), "weight", 0.5)
    assert list(Ticket.from_torch_prune(linear).masks) == [""], "a layer by itself"


def test_to_torch_prune_changes_nothing_where_it_refuses():
    ticket = full("element")
    with pytest.raises(RtkError, match=r"masked by rtk already; .*rtk\.nn\.fold"):
        ticket.to_torch_prune(ticket.apply(network()))
    pruned = network()
    prune.l1_unstructured(pruned[2], "weight", 0.5)
    with pytest.raises(RtkError, match="weight of '2' is computed from others"):
        ticket.to_torch_prune(pruned)
    assert not prune.is_pruned(pruned[1])
    with pytest.raises(RtkError, match="masks layer '1', which the model has not"):
        ticket.to_torch_prune(nn.Sequential(nn.Conv2d(3, 32, 3)))
    named = Ticket(ticket.masks, meta={"model": SPEC.to_dict()})
    with pytest.raises(RtkError, match="ticket is for arch resnet18"):
        named.to_torch_prune(create(ModelSpec("resnet50", "3x3", 0.125, 5, (0.5,) * 3, (1,) * 3)))


def test_a_model_without_masked_layers():
    with pytest.raises(RtkError, match="no masked layers; apply a ticket"):
        Ticket.from_model(nn.Sequential(nn.Conv2d(3, 5, 3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "resnet50"}, "ticket is for arch resnet50, the model has arch resnet18"),
        ({"stem": "7x7"}, "ticket is for stem 7x7, the model has stem 3x3"),
        ({"width": 0.25}, "ticket is for width 0.25, the model has width 0.125"),
    ],
    ids=["arch", "stem", "width"],
)
def test_apply_refuses_another_network(change, words):
    model = create(SPEC)
    name, weight = "layer1.0.conv1", model.layer1[0].conv1.weight
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool)}
    with pytest.raises(RtkError, match=words):
        Ticket(masks, meta={"model": SPEC.to_dict() | change}).apply(model)
    assert weight.all()
    assert type(model.layer1[0].conv1) is nn.Conv2d
    fits = {"num_classes": 99, "mean": [0.1] * 3}
    Ticket(masks, meta={"model": SPEC.to_dict() | fits}).apply(model)
    assert not weight.any()


def test_a_model_whose_spec_is_not_ours_is_judged_by_its_layers():
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    model.spec = "something else"
    ticket = Ticket({"0": torch.rand(5, 3, 3, 3) < 0.5}, meta={"model": SPEC.to_dict()})
    assert torch.equal(Ticket.from_model(ticket.apply(model)).masks["0"], ticket.masks["0"])


def test_a_checkpoint_is_no_ticket(tmp_path):
    artifact.save(tmp_path / "file", "checkpoint", {"w": torch.ones(3)}, {"layout": {}})
    with pytest.raises(RtkError, match="file is a checkpoint, expected a ticket"):
        Ticket.load(tmp_path / "file")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_ticket(failing, tmp_path, monkeypatch):
    path = tmp_path / "ticket"
    old = draw("element")
    old.save(path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(RtkError, match=r"cannot write .*ticket.*No space left on device"):
        draw("element").save(path)
    monkeypatch.undo()
    assert_same(Ticket.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RtkError, match="cannot write"):
        draw("element").save(tmp_path / "file" / "ticket")


def test_layers_keep_their_order(tmp_path):
    masks = {name: torch.rand(2, 3) > 0.5 for name in ("z", "a", "m")}
    Ticket(masks).save(tmp_path / "t")
    assert list(Ticket.load(tmp_path / "t").masks) == ["z", "a", "m"]
