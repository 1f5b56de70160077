import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from rtk import Ticket, models
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


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
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
