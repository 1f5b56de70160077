"""MaskedConv2d: nn.Conv2d on weight * mask, whatever the options, and the same keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rtk.errors import RtkError
from rtk.nn import MaskedConv2d

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "float64": {"dtype": torch.float64},
}
GRANULARITIES = {
    "element": (6, 4, 3, 3),
    "row": (6, 4, 3, 1),
    "kernel": (6, 4, 1, 1),
    "channel": (6, 1, 1, 1),
}


def random_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape) < 0.5
    mask.view(-1)[0] = False
    mask.view(-1)[-1] = True
    return mask


MASK = random_mask(6, 4, 3, 3)


@pytest.mark.parametrize("kind", ["fresh", "from_conv"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_convolution_with_the_masked_weight(name, kind, device):
    options = OPTIONS[name]
    plain = nn.Conv2d(4, 6, 3, device=device, **options)
    mask = random_mask(*plain.weight.shape).to(device)
    if kind == "fresh":
        masked = MaskedConv2d(4, 6, 3, device=device, mask=mask, **options)
        masked.load_state_dict(plain.state_dict())
    else:
        masked = MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3, device=device, **options), mask)
        masked.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.weight.mul_(mask)
    x = torch.randn(2, 4, 7, 8, device=device, dtype=plain.weight.dtype)
    torch.testing.assert_close(masked(x), plain(x))
    torch.testing.assert_close(masked(x[0]), plain(x[0]))
    masked(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(masked.weight.grad, plain.weight.grad * mask)
    assert repr(masked) == repr(plain).replace("Conv2d", "MaskedConv2d")


def test_state_dict_keys_and_a_plain_state_dict():
    layer = MaskedConv2d(4, 6, 3, mask=MASK)
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    state = nn.Conv2d(4, 6, 3).state_dict()
    keys = list(state)
    result = layer.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state) == keys
    assert torch.equal(layer.mask, MASK)
    assert torch.equal(layer.weight, state["weight"] * MASK)


@pytest.mark.parametrize("theirs", GRANULARITIES)
@pytest.mark.parametrize("ours", [*GRANULARITIES, "expanded", "none"])
def test_a_mask_of_any_granularity_loads(ours, theirs):
    if ours == "expanded":
        mask = random_mask(6, 1, 1, 1).expand(6, 4, 3, 3)
    else:
        mask = random_mask(*GRANULARITIES[ours]) if ours in GRANULARITIES else None
    layer = MaskedConv2d(4, 6, 3, mask=mask)
    other = MaskedConv2d(4, 6, 3, mask=random_mask(*GRANULARITIES[theirs]))
    state = other.state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer.mask, other.mask)
    assert torch.equal(layer.weight, other.weight)
    state["mask"].logical_not_()
    assert not torch.equal(layer.mask, other.mask), "the loaded mask is a copy"


@pytest.mark.parametrize("theirs", ["element", "channel"])
def test_masks_of_other_kinds_load(theirs):
    soft = torch.rand(GRANULARITIES[theirs])
    soft_state = MaskedConv2d(4, 6, 3, mask=soft).state_dict()
    hard = MaskedConv2d(4, 6, 3, mask=MASK)
    hard.load_state_dict(soft_state)
    assert torch.equal(hard.mask, soft)

    learnt = MaskedConv2d(4, 6, 3, mask=nn.Parameter(torch.rand(6, 4, 3, 3)))
    parameter = learnt.mask
    learnt.load_state_dict(MaskedConv2d(4, 6, 3, mask=MASK).state_dict())
    assert learnt.mask is parameter
    assert torch.equal(learnt.mask, MASK.float())
    learnt.load_state_dict(soft_state)
    assert torch.equal(learnt.mask, soft)
    assert "mask" in dict(learnt.named_parameters())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": torch.ones(5, 1, 1, 1) > 0}, RtkError, r"loading mask: mask must broadcast"),
        ({"mask": torch.ones(6, 4, 3, 3).int()}, RtkError, r"loading mask: .*bool or floating"),
        ({"weight": torch.ones(6, 3, 3, 3)}, RuntimeError, "size mismatch for weight"),
        ({"scale": torch.ones(1)}, RuntimeError, r"Unexpected key.*scale"),
        ({"weight": None}, RuntimeError, r"Missing key.*weight"),
    ],
    ids=["mask-shape", "mask-dtype", "weight-shape", "unexpected", "missing"],
)
def test_a_state_dict_that_does_not_fit(change, error, words):
    state = MaskedConv2d(4, 6, 3).state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(error, match=words):
        MaskedConv2d(4, 6, 3, mask=MASK).load_state_dict(state)


def test_from_conv_shares_parameters_and_mode():
    conv = nn.Conv2d(4, 6, 3).eval()
    conv.bias.requires_grad_(False)
    layer = MaskedConv2d.from_conv(conv, MASK)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert (conv.weight[~MASK] == 0).all()
    unmasked = MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3, bias=False))
    assert unmasked.sparsity == 0
    assert unmasked.bias is None


@pytest.mark.parametrize("name", GRANULARITIES)
def test_sparsity_is_exact(name):
    mask = torch.ones(GRANULARITIES[name], dtype=torch.bool)
    mask.view(-1)[:3] = False
    layer = MaskedConv2d(4, 6, 3, mask=mask)
    assert layer.sparsity == pytest.approx(3 / mask.numel(), abs=1e-12)
    assert (layer.weight == 0).float().mean() == pytest.approx(layer.sparsity)


def test_set_mask_changes_kind():
    layer = MaskedConv2d(4, 6, 3)
    layer.set_mask(MASK)
    assert torch.equal(layer.weight == 0, ~MASK)
    soft = nn.Parameter(torch.rand(6, 1, 1, 1))
    kept = layer.weight.clone()
    layer.set_mask(soft)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "mask"]
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    assert torch.equal(layer.weight, kept), "a floating mask leaves the weight alone"
    layer.set_mask(torch.zeros(6, 4, 3, 3, dtype=torch.bool))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.sparsity == 1
    assert not layer.weight.any()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(6, 4) > 0, r"MaskedConv2d: mask must broadcast .*\(6, 4\); use mask\[\.\.\."),
        (torch.ones(6, 4, 3, 3).int(), r"MaskedConv2d: mask must be bool or floating"),
    ],
    ids=["shape", "dtype"],
)
def test_a_mask_that_does_not_fit_changes_nothing(mask, words):
    layer = MaskedConv2d(4, 6, 3, mask=MASK)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RtkError, match=words):
        layer.set_mask(mask)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(RtkError, match=words):
        MaskedConv2d(4, 6, 3, mask=mask)


@pytest.mark.parametrize("mask", [MASK, torch.rand(6, 4, 1, 1)], ids=["bool", "float"])
def test_fold(mask):
    layer = MaskedConv2d(4, 6, 3, mask=mask, padding=1, stride=2).eval()
    folded = layer.fold()
    assert type(folded) is nn.Conv2d
    assert list(folded.state_dict()) == ["weight", "bias"]
    assert not folded.training
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(folded(x), layer(x))
    with torch.no_grad():
        folded.weight.zero_()
    assert layer.weight.any(), "fold holds a copy"
