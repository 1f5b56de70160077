"""mask_model and fold on whole networks, and masked networks under compile and export."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from rtk import Ticket
from rtk.errors import RtkError
from rtk.nn import MaskedConv2d, MaskedLinear, fold, mask_model


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.fixture
def network(resnet) -> nn.Module:
    return copy.deepcopy(resnet)


def draw(model: nn.Module, *names: str) -> Ticket:
    """A random element ticket over the named layers; all convolutions but the first by default."""
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    names = names or tuple(convolutions[1:])
    weights = {name: model.get_submodule(name).weight for name in names}
    return Ticket({name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()})


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, state: dict[str, torch.Tensor], kinds: list[type]) -> None:
    assert [type(module) for module in model.modules()] == kinds
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[key], state[key]) for key in state)


def test_resnet18_is_masked_and_folded(network):
    plain = copy.deepcopy(network)
    ticket = draw(network)
    ticket.masks["fc"] = torch.rand(7, 512) < 0.5
    ticket = Ticket(ticket.masks)
    keys = list(network.state_dict())
    parameters = dict(network.named_parameters())
    assert mask_model(network, ticket) is network
    assert [k for k in network.state_dict() if not k.endswith(".mask")] == keys
    assert dict(network.named_parameters()) == parameters
    assert type(network.conv1) is nn.Conv2d
    assert type(network.layer1[0].conv1) is MaskedConv2d
    assert type(network.fc) is MaskedLinear

    with torch.no_grad():
        for name, mask in ticket.masks.items():
            plain.get_submodule(name).weight.mul_(mask)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
    drawn = Ticket.from_model(network)
    assert drawn.sparsity == ticket.sparsity
    assert all(torch.equal(drawn.masks[name], mask) for name, mask in ticket.masks.items())

    before = network(x)
    assert fold(network) is network
    assert not any(isinstance(m, MaskedConv2d | MaskedLinear) for m in network.modules())
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-6)


def test_masking_again_replaces_the_mask_and_the_optimiser_goes_on(network):
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    first, second = draw(network, "layer1.0.conv1"), draw(network, "layer1.0.conv1")
    layer = mask_model(network, first).layer1[0].conv1
    mask_model(network, second)
    assert network.layer1[0].conv1 is layer
    assert torch.equal(layer.mask, second.masks["layer1.0.conv1"])
    assert layer.mask is not second.masks["layer1.0.conv1"]
    network.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    kept = first.masks["layer1.0.conv1"] & second.masks["layer1.0.conv1"]
    assert torch.equal(layer.weight[~layer.mask], torch.zeros(int((~layer.mask).sum())))
    assert layer.weight[kept].all()


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"layer9.0.conv1": torch.ones(64, 64, 3, 3) > 0}, r"'layer9.0.conv1'.*did you mean"),
        ({"bn1": torch.ones(64) > 0}, r"'bn1', which the model has not as a Conv2d or Linear"),
        ({"layer1.0.conv2": torch.ones(8, 64, 3, 3) > 0}, r"is \(8, 64, 3, 3\), .*or width"),
        ({"layer1.0.conv2": torch.ones(64, 64) > 0}, r"is \(64, 64\), the model's weight"),
    ],
    ids=["name", "kind", "width", "dimensions"],
)
def test_all_or_nothing(masks, words, network):
    state, kinds = state_of(network), [type(module) for module in network.modules()]
    good = draw(network, "layer1.0.conv1").masks
    with pytest.raises(RtkError, match=words):
        mask_model(network, Ticket(good | masks))
    assert_unchanged(network, state, kinds)


@pytest.mark.parametrize("kind", ["prune", "weight_norm"])
def test_a_computed_weight_is_refused_before_anything_changes(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    ticket = draw(model, "0", "1")
    if kind == "prune":
        prune.l1_unstructured(model[1], "weight", 0.5)
    else:
        parametrizations.weight_norm(model[1])
    state, kinds = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(RtkError, match="weight of '1' is computed from others"):
        mask_model(model, ticket)
    assert_unchanged(model, state, kinds)


def test_a_layer_with_two_names_is_swapped_under_both():
    conv = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    mask_model(model, draw(model, "0"))
    assert type(model[0]) is MaskedConv2d
    assert model[2] is model[0]
    fold(model)
    assert type(model[0]) is nn.Conv2d
    assert model[2] is model[0]


def test_fold_of_a_masked_layer_and_of_a_plain_model(network):
    layer = MaskedConv2d(3, 4, 3, mask=torch.rand(4, 1, 1, 1) < 0.5)
    assert type(fold(layer)) is nn.Conv2d
    state, kinds = state_of(network), [type(module) for module in network.modules()]
    assert fold(network) is network
    assert_unchanged(network, state, kinds)


def small() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same")
    )
    return mask_model(model, draw(model, "0", "2"))


def test_a_masked_model_compiles():
    torch._dynamo.reset()
    model, x = small(), torch.rand(2, 3, 8, 8)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), *[p.grad.clone() for p in model.parameters()]])
    torch.testing.assert_close(results[1], results[0])


def test_a_masked_model_exports_with_any_batch_size(tmp_path):
    model = small().eval()
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch},)
    program = torch.export.export(model, (torch.rand(3, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(loaded(x), model(x))
    calls = [n.target for n in program.graph.nodes if "masked_conv2d" in str(n.target)]
    assert calls == [torch.ops.rtk.masked_conv2d.default] * 2


class _Standardised(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


def test_a_layer_with_a_forward_of_its_own_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _Standardised(4, 4, 1))
    ticket = Ticket({n: torch.rand_like(model[int(n)].weight) > 0.5 for n in "01"})
    with pytest.raises(RtkError, match=r"_Standardised.*forward of its own"):
        mask_model(model, ticket)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is _Standardised
