import copy
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from rtk import Ticket, models, ops
from rtk.draw import group_scores, mask_shape, omp, prunable_layers
from rtk.errors import RtkError
from rtk.nn import MaskedConv2d

GRANULARITIES = ("element", "row", "kernel", "channel")


def small(seed=0):
    """A first, a 3x3, a strided 5x1 and a 1x1 convolution, and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 12, 3),
        nn.Conv2d(12, 6, (5, 1), stride=2),
        nn.Conv2d(6, 10, 1),
        nn.Flatten(),
        nn.Linear(10, 4),
    )


def resnet18(width=0.125):
    torch.manual_seed(0)
    return models.create(
        models.ModelSpec("resnet18", "3x3", width, 4, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    )


def weights(model, include_first=False):
    return {n: m.weight.detach() for n, m in prunable_layers(model, include_first).items()}


def pruned_by_torch(model, sparsity):
    """Return the masks of torch's own global magnitude pruning over the same layers."""
    model = copy.deepcopy(model)
    layers = prunable_layers(model)
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], prune.L1Unstructured, amount=sparsity
    )
    return {name: layer.weight_mask.bool() for name, layer in layers.items()}


def pruned_by_hand(model, sparsity, granularity, scope, include_first=False):
    """Walk up each ranking of groups by mean |w|, worst flat index first among equals."""
    layers = weights(model, include_first)
    shared = GRANULARITIES.index(granularity)
    masks = {n: torch.ones(mask_shape(w, granularity), dtype=torch.bool) for n, w in layers.items()}
    rankings = [list(layers)] if scope == "global" else [[name] for name in layers]
    for names in rankings:
        groups = []
        for name in names:
            flat = layers[name].reshape(masks[name].numel(), -1) if shared else None
            means = flat.abs().mean(1) if shared else layers[name].reshape(-1).abs()
            size = layers[name].numel() // masks[name].numel()
            groups += [(mean, name, index, size) for index, mean in enumerate(means.tolist())]
        order = sorted(range(len(groups)), key=lambda i: (groups[i][0], -i))
        target = round(sparsity * sum(layers[name].numel() for name in names))
        done = 0
        for i in order:
            if done >= target:
                break
            _, name, index, size = groups[i]
            masks[name].view(-1)[index] = False
            done += size
    return masks


def zeros(ticket, model):
    """Count the weights that a ticket prunes."""
    return sum(
        int((~ticket.masks[name]).expand(w.shape).sum())
        for name, w in weights(model, include_first=True).items()
        if name in ticket.masks
    )


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[n], others[n]) for n in masks)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.8, 0.9, 0.99, 0.9995])
def test_element_is_torchs_global_magnitude_pruning(sparsity):
    model = resnet18()
    assert same(omp(model, sparsity).masks, pruned_by_torch(model, sparsity))


def test_a_torchvision_resnet_is_pruned():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    ticket = omp(model, 0.9, "kernel")
    assert len(ticket.masks) == 19 and "conv1" not in ticket.masks
    assert "layer2.0.downsample.0" in ticket.masks
    total = sum(w.numel() for w in weights(model).values())
    assert 0 <= zeros(ticket, model) - round(0.9 * total) < 9
    assert ticket.meta["model"] is None
    ticket.apply(model)
    assert Ticket.from_model(model).sparsity == ticket.sparsity


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 1 / 3, 0.5, 0.875, 0.9])
@pytest.mark.parametrize("tied", ["constant", "rounded", "pruned_before"])
def test_counts_are_exact_under_ties(tied, sparsity):
    model = small()
    with torch.no_grad():
        for weight in weights(model).values():
            if tied == "constant":
                weight.fill_(-0.5)
            elif tied == "rounded":
                weight.copy_((weight * 10).round() / 10)
            else:
                weight.mul_(torch.rand_like(weight) > 0.6)
    total = sum(w.numel() for w in weights(model).values())
    ticket = omp(model, sparsity)
    assert zeros(ticket, model) == round(sparsity * total)
    assert ticket.sparsity == pytest.approx(round(sparsity * total) / total, abs=1e-12)


def test_among_equals_the_larger_index_goes_first():
    model = small()
    for weight in weights(model).values():
        weight.fill_(0.5)
    flat = torch.cat([mask.reshape(-1) for mask in omp(model, 0.25).masks.values()])
    kept = len(flat) - round(0.25 * len(flat))
    assert flat[:kept].all() and not flat[kept:].any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_go_in_the_order_of_their_mean_magnitude(granularity, scope, sparsity):
    model = small()
    ticket = omp(model, sparsity, granularity, scope)
    assert same(ticket.masks, pruned_by_hand(model, sparsity, granularity, scope))
    assert ticket.granularity == granularity


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_resnets_pruned_weights_reach_the_number_within_one_group(granularity, sparsity):
    model = resnet18()
    layers = weights(model)
    target = round(sparsity * sum(w.numel() for w in layers.values()))
    largest = max(w.numel() // mask_shape(w, granularity).numel() for w in layers.values())
    pruned = zeros(omp(model, sparsity, granularity), model)
    assert target <= pruned < target + largest
    assert (granularity == "element") == (largest == 1)


def blocks_by_hand(model, sparsity, tile, scope):
    """Prune tiles in ascending order of their mean |w|, the one at the larger index first."""
    layers = weights(model)
    masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in layers.items()}
    for names in [list(layers)] if scope == "global" else [[name] for name in layers]:
        tiles = []
        for name in names:
            k, c, r, s = layers[name].shape
            corners = itertools.product(range(0, k, tile[0]), range(0, c, tile[1]))
            for (i, j), a, b in itertools.product(corners, range(r), range(s)):
                index = (slice(i, i + tile[0]), slice(j, j + tile[1]), a, b)
                tiles.append((layers[name][index].abs().mean().item(), name, index))
        target = round(sparsity * sum(layers[name].numel() for name in names))
        done = 0
        for _, name, index in sorted(tiles, key=lambda tile: tile[0]):
            if done >= target:
                break
            masks[name][index] = False
            done += masks[name][index].numel()
    return masks


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("tile", [(4, 4), (5, 2), (1, 8), (64, 64), (10**12, 3)])
def test_blocks_go_in_the_order_of_their_mean_magnitude(tile, scope, sparsity):
    """Tiles that fit the 8 to 12 channels and tiles that do not, one larger than the layers."""
    model = small()
    name = f"block-{tile[0]}" if tile[0] == tile[1] else f"block-{tile[0]}x{tile[1]}"
    ticket = omp(model, sparsity, name, scope)
    assert same(ticket.masks, blocks_by_hand(model, sparsity, tile, scope))
    assert {n: mask.shape for n, mask in ticket.masks.items()} == {
        n: w.shape for n, w in weights(model).items()
    }
    assert ticket.granularity == ticket.meta["granularity"] == name


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_a_resnets_pruned_blocks_reach_the_number_within_one_block(sparsity, scope):
    model = resnet18(0.6)  # 38 to 307 channels: ragged everywhere
    ticket = omp(model, sparsity, "block-64", scope)
    layers = weights(model)
    if scope == "global":
        target = round(sparsity * sum(w.numel() for w in layers.values()))
        assert target <= zeros(ticket, model) < target + 64 * 64
    else:
        for mask in ticket.masks.values():
            target = round(sparsity * mask.numel())
            assert target <= int((~mask).sum()) < target + 64 * 64


def test_the_kernels_live_tiles_are_the_blocks_that_are_kept():
    model = resnet18(2)
    ticket = omp(model, 0.9, "block")
    assert ticket.granularity == "block-64"
    live = total = 0
    for mask in ticket.masks.values():
        words = ops.live_tiles(mask)
        live += sum((word & (2**64 - 1)).bit_count() for word in words.flatten().tolist())
        total += words.numel() * -(-mask.shape[1] // 64)
    assert live == pytest.approx(0.1 * total, abs=1)


def test_tiles_that_tie_go_from_the_end():
    model = small()
    for weight in weights(model).values():
        weight.fill_(-0.5)
    ticket = omp(model, 0.5, "block-4")
    # One weight a tile, in the order of the tiles.
    flat = torch.cat([m[::4, ::4].reshape(-1) for m in ticket.masks.values()])
    kept = int(flat.sum())
    assert 0 < kept < len(flat)
    assert flat[:kept].all() and not flat[kept:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_tiles_are_means_in_every_dtype(dtype):
    weight = torch.full((100, 70, 1, 2), 60.0, dtype=dtype)  # sums of 4096 exceed fp16
    scores = group_scores(weight, "block-64")
    assert scores.shape == (2, 2, 1, 2)
    assert (scores == 60).all()


def four(weight):
    """Return the weight as (K, R, S, C / 4, 4): groups along the reduction of an implicit GEMM."""
    return weight.permute(0, 2, 3, 1).unflatten(3, (-1, 4))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_2_of_4_keeps_the_two_largest_of_every_four_channels(scope):
    model = resnet18()
    ticket = omp(model, granularity="2:4", scope=scope)
    assert ticket.sparsity == ticket.meta["sparsity"] == 0.5
    assert ticket.granularity == ticket.meta["granularity"] == "2:4"
    for name, weight in weights(model).items():
        magnitude, mask = four(weight.abs()), four(ticket.masks[name])
        assert (mask.sum(-1) == 2).all()
        smallest_kept = magnitude.masked_fill(~mask, torch.inf).amin(-1)
        assert (smallest_kept >= magnitude.masked_fill(mask, 0).amax(-1)).all()
    assert same(ticket.masks, omp(model, 0.5, "2:4").masks)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (1, 2), (3, 8), (2, 3)])
def test_n_of_m_in_general(n, m):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 48, 3), nn.Conv2d(48, 7, 1))
    ticket = omp(model, granularity=f"{n}:{m}")
    for mask in ticket.masks.values():
        assert (mask.unflatten(1, (-1, m)).sum(2) == n).all()
    assert ticket.sparsity == pytest.approx(1 - n / m)


def test_among_equal_channels_the_smaller_index_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight.fill_(0.5)
        model[1].weight[:, 1] = -2.0
    mask = omp(model, granularity="2:4").masks["1"]
    kept = torch.tensor([True, True, False, False, True, True, False, False])
    assert (mask == kept[:, None, None]).all()


def test_n_of_m_leaves_dense_what_does_not_divide():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1),
    ]
    model = nn.Sequential(*layers)
    ticket = omp(model, granularity="2:4", include_first=True)
    pruned = [name for name, mask in ticket.masks.items() if not mask.all()]
    assert pruned == ["0", "4"] and list(ticket.masks) == list("01234")
    total = sum(mask.numel() for mask in ticket.masks.values())
    assert ticket.sparsity == (4 * 6 * 9 + 8 * 8) / 2 / total
    assert Ticket.from_model(ticket.apply(model)).granularity == "2:4"


def test_n_of_m_without_a_layer_that_divides_is_refused():
    with pytest.raises(RtkError, match=r"omp: 2:5 needs .* multiple of 5, .*another granularity"):
        omp(resnet18(), granularity="2:5")


@pytest.mark.parametrize("sparsity", [0.9, 0.0, float("nan")])
def test_n_of_m_at_another_sparsity_is_refused(sparsity):
    with pytest.raises(RtkError, match=r"sparsity: expected 0\.5, which is what 2:4 means"):
        omp(resnet18(), sparsity, "2:4")


def test_layer_scope_prunes_each_layer_alike():
    model = resnet18()
    for name, mask in omp(model, 0.7, scope="layer").masks.items():
        assert int((~mask).sum()) == round(0.7 * mask.numel()), name


def test_rows_and_kernels_of_a_1x1_convolution_are_its_elements():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1))
    element = omp(model, 0.6)
    for granularity in ("row", "kernel"):
        assert same(omp(model, 0.6, granularity).masks, element.masks)


def test_group_scores_are_means_in_the_masks_shape():
    weight = torch.arange(-12.0, 12.0).reshape(2, 2, 2, 3)
    assert torch.equal(group_scores(weight, "element"), weight.abs())
    row = torch.tensor([[[11.0, 8], [5, 2]], [[1, 4], [7, 10]]])
    assert torch.equal(group_scores(weight, "row"), row[..., None])
    assert torch.equal(group_scores(weight, "kernel"), row.mean(-1)[..., None, None])
    channel = row.mean((1, 2))[:, None, None, None]
    assert torch.equal(group_scores(weight, "channel"), channel)


def test_the_first_convolution_is_left_out_unless_asked_for():
    model = resnet18()
    first = omp(model, 0.5, include_first=True)
    assert set(first.masks) - set(omp(model, 0.5).masks) == {"conv1"}
    total = sum(w.numel() for w in weights(model, include_first=True).values())
    assert zeros(first, model) == round(0.5 * total)


def test_a_head_is_never_pruned_even_as_a_convolution():
    model = small()
    model.add_module("fc", nn.Conv2d(10, 4, 1))
    assert "fc" in omp(model, 0.5).masks
    model.head_name = "fc"
    assert set(omp(model, 0.5, include_first=True).masks) == {"0", "1", "2", "3"}


def test_the_model_is_not_changed_and_the_draw_repeats():
    model = resnet18()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = omp(model, 0.8, "kernel"), omp(model, 0.8, "kernel")
    assert same(first.masks, second.masks) and first.meta == second.meta
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_ticket_out_of_a_masked_model_goes_on_from_it():
    model = resnet18()
    plain = omp(model, 0.8)
    half = omp(model, 0.5)
    half.apply(model)
    assert isinstance(model.layer1[0].conv1, MaskedConv2d)
    further = omp(model, 0.8)
    assert same(further.masks, plain.masks)
    assert all(not (further.masks[n] & ~half.masks[n]).any() for n in half.masks)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", [*GRANULARITIES, "block-4x3"])
def test_within_a_ticket_nothing_comes_back(granularity, scope):
    """The weights were drawn anew: other groups are small now, and what is pruned may be large."""
    before = omp(small(0), 0.5, granularity, scope)
    model = small(1)
    with torch.no_grad():
        for weight in weights(model).values():
            weight.mul_(torch.rand(len(weight), 1, 1, 1))  # channels of every layer become small
    anew = omp(model, 0.7, granularity, scope)
    ticket = omp(model, 0.7, granularity, scope, within=before)
    assert any((anew.masks[n] & ~before.masks[n]).any() for n in before.masks)
    assert not any((ticket.masks[n] & ~before.masks[n]).any() for n in before.masks)
    total = sum(w.numel() for w in weights(model).values())
    assert zeros(ticket, model) >= round(0.7 * total) - len(before.masks)
    assert ticket.granularity == granularity
    # What goes beside that are the smallest, so a ranking without the pruned ones finds them too.
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight[~before.masks[name].expand(weight.shape)] = 0
    if not granularity.startswith("block"):  # tiles may hold a pruned weight beside a kept one
        assert same(ticket.masks, omp(model, 0.7, granularity, scope).masks)


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5])
def test_within_a_sparser_ticket_it_stays(granularity, sparsity):
    before = omp(small(0), 0.6, granularity)
    assert same(omp(small(1), sparsity, granularity, within=before).masks, before.masks)


@pytest.mark.parametrize(
    ("granularity", "first", "message"),
    [
        ("row", False, "must mask these layers by element, got one by row; masks of other shapes"),
        ("element", True, "got one by element; masks of other shapes, or of one only: 0"),
        ("2:4", False, "2:4 keeps N of every M and cannot go on from a ticket"),
    ],
)
def test_within_a_ticket_that_does_not_fit(granularity, first, message):
    before = omp(small(), None if granularity == "2:4" else 0.5, granularity, include_first=first)
    with pytest.raises(RtkError, match=message):
        omp(small(), 0.5, "2:4" if granularity == "2:4" else "element", within=before)


def test_within_a_ticket_of_other_tiles():
    before = omp(small(), 0.5, "block-4")
    with pytest.raises(RtkError, match=r"by block-8, got one by block-4$"):
        omp(small(), 0.7, "block-8", within=before)


def test_meta_says_how_it_was_drawn():
    meta = omp(resnet18(0.25), 0.6, "row", "layer", include_first=True).meta
    assert meta == {
        "scheme": "omp",
        "sparsity": 0.6,
        "granularity": "row",
        "scope": "layer",
        "include_first": True,
        "model": {
            "arch": "resnet18",
            "stem": "3x3",
            "width": 0.25,
            "num_classes": 4,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.2, 0.2, 0.2),
        },
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = small()
    weights(model)["2"][1, 2] = value
    with pytest.raises(RtkError, match=r"omp: the weight of '2' holds NaN or infinity.*diverged"):
        omp(model, 0.5)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), None])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(RtkError, match=r"sparsity: expected .* in \[0, 1\)"):
        omp(small(), sparsity)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"granularity": "kernels"}, "unknown granularity 'kernels'.*did you mean 'kernel'"),
        ({"scope": "layers"}, "unknown scope 'layers'.*did you mean 'layer'"),
    ],
    ids=["granularity", "scope"],
)
def test_unknown_names_are_refused(setting, message):
    with pytest.raises(RtkError, match=message):
        omp(small(), 0.5, **setting)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(3, 3))],
    ids=["no_convolution", "only_the_first"],
)
def test_a_model_with_nothing_to_prune_is_refused(model):
    with pytest.raises(RtkError, match="no convolution to prune"):
        omp(model, 0.5)
