"""make_lmp_step: against a plain hidden-networks implementation, and what must hold of any mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rtk
from rtk.draw import make_lmp_step, omp
from rtk.draw.granularity import group_scores
from rtk.draw.score_init import initial_scores
from rtk.draw.supermask import Supermask
from rtk.errors import RtkError
from rtk.models import ModelSpec, create
from rtk.nn import mask_model

SPEC = ModelSpec("resnet18", "3x3", 0.125, 5, (0.5,) * 3, (0.25,) * 3)
GRANULARITIES = ["element", "row", "kernel", "channel", "block-8"]
EXACT = {"amp": None, "graph": False}


@pytest.fixture
def model():
    return create(SPEC)


def batches(count, size=8, image=12, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(size, 3, image, image, generator=generator)
        yield x.to(device), torch.randint(5, (size,), generator=generator).to(device)


class GetSubnet(torch.autograd.Function):
    """hidden-networks' own: the top k by a sort, the gradient straight through."""

    @staticmethod
    def forward(ctx, scores, pruned):
        out = scores.clone()
        _, order = scores.flatten().sort()
        flat = out.flatten()
        flat[order[:pruned]] = 0
        flat[order[pruned:]] = 1
        return flat.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class SubnetConv(nn.Conv2d):
    def forward(self, x):
        subnet = GetSubnet.apply(self.scores, round(self.sparsity * self.scores.numel()))
        return F.conv2d(x, self.weight * subnet, None, self.stride, self.padding)


def hidden_network(model, scores, sparsity):
    for name, start in scores.items():
        old = model.get_submodule(name)
        new = SubnetConv(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
        )
        new.weight = nn.Parameter(old.weight.detach().clone(), requires_grad=False)
        new.scores, new.sparsity = nn.Parameter(start.clone()), sparsity
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    trained = {id(p) for p in model.fc.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".scores") or id(parameter) in trained)
    return model


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("granularity", ["element", "kernel"])
def test_the_first_mask_is_that_of_magnitude_pruning(model, granularity, scope):
    step = make_lmp_step(model, sparsity=0.7, granularity=granularity, scope=scope, **EXACT)
    expected = omp(model, 0.7, granularity, scope).masks
    assert step.masks.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name]) for name, mask in step.masks.items())


def test_masks_losses_and_scores_are_those_of_hidden_networks(model):
    other = create(SPEC)
    other.load_state_dict(model.state_dict())
    step = make_lmp_step(model, sparsity=0.6, score_init="kaiming", **EXACT)
    start = {name: scores.clone() for name, scores in step.scores.items()}
    theirs = hidden_network(other, start, 0.6)
    optimizer = torch.optim.SGD(
        [p for p in theirs.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    for x, y in batches(6):
        loss = step(x, y)
        expected = F.cross_entropy(theirs(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
        for name, mask in step.masks.items():
            layer = theirs.get_submodule(name)
            assert torch.equal(step.scores[name], layer.scores)
            pruned = round(0.6 * mask.numel())
            assert torch.equal(mask, GetSubnet.apply(layer.scores, pruned).bool())
    assert any(not torch.equal(step.scores[name], start[name]) for name in start)
    assert torch.equal(model.fc.weight, theirs.fc.weight)
    assert torch.equal(model.bn1.running_mean, theirs.bn1.running_mean)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_the_head_and_statistics_change_and_the_masks_keep_k(model, granularity, scope):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = make_lmp_step(model, sparsity=0.7, granularity=granularity, scope=scope, **EXACT)
    first = {name: mask.clone() for name, mask in step.masks.items()}
    kept = {name: group_mask.sum() for name, group_mask in groups(step).items()}
    for x, y in batches(4):
        step(x, y)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert {"fc.weight", "fc.bias"} <= changed
    assert all(
        name.startswith("fc.") or name.rpartition(".")[2].startswith(("running_", "num_batches"))
        for name in changed
    )
    assert any(not torch.equal(mask, first[name]) for name, mask in step.masks.items())
    now = {name: group_mask.sum() for name, group_mask in groups(step).items()}
    assert sum(now.values()) == sum(kept.values())
    ticket = step.ticket()
    assert ticket.granularity == granularity and ticket.meta["scheme"] == "lmp"
    if scope == "layer":
        assert now == kept
    if granularity == "element":
        total = sum(mask.numel() for mask in step.masks.values())
        if scope == "global":
            assert sum(now.values()) == total - round(0.7 * total)
        else:
            for mask in step.masks.values():
                assert mask.sum() == mask.numel() - round(0.7 * mask.numel())


def groups(step):
    """Return the masks with one value a group."""
    found = {}
    for name, mask in step.masks.items():
        if mask.shape != step.scores[name].shape:  # a block: every tile's first element
            mask = mask[::8, ::8]
        assert mask.shape == step.scores[name].shape
        found[name] = mask
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_score_moves_by_the_sum_of_weight_times_dense_gradient(model, granularity):
    lr, wd = 0.05, 1e-3
    other = create(SPEC)
    other.load_state_dict(model.state_dict())
    step = make_lmp_step(
        model, sparsity=0.5, granularity=granularity, lr=lr, weight_decay=wd, **EXACT
    )
    start = {name: scores.clone() for name, scores in step.scores.items()}
    masked = {}
    for name, mask in step.masks.items():
        layer = other.get_submodule(name)
        masked[name] = (layer.weight.detach().clone(), layer.weight)
        with torch.no_grad():
            layer.weight.mul_(mask)
    x, y = next(batches(1))
    F.cross_entropy(other(x), y).backward()
    step(x, y)
    for name, (weight, used) in masked.items():
        product = weight.double() * used.grad.double()
        scores = start[name].double()
        if granularity.startswith("block"):
            padded = F.pad(product, (0, 0, 0, 0, 0, -weight.shape[1] % 8, 0, -weight.shape[0] % 8))
            summed = padded.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).sum((1, 3))
        else:
            summed = product.sum_to_size(scores.shape)
        expected = scores - lr * (summed + wd * scores)
        torch.testing.assert_close(step.scores[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_ticket_gives_the_network_that_was_learned(model):
    step = make_lmp_step(model, sparsity=0.8, **EXACT)
    for x, y in batches(3):
        step(x, y)
    step.network.eval()
    with torch.no_grad():
        expected = step.network(x)
    step.ticket().apply(model).eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_the_state_dict_goes_on_bit_for_bit(model):
    data = list(batches(6))
    other = create(SPEC)
    other.load_state_dict(model.state_dict())
    step = make_lmp_step(model, sparsity=0.6, **EXACT)
    for x, y in data[:3]:
        step(x, y)
    again = make_lmp_step(other, sparsity=0.6, seed=5, **EXACT)
    again.network.load_state_dict(step.network.state_dict())
    again.optimizer.load_state_dict(step.optimizer.state_dict())
    for x, y in data[3:]:
        assert torch.equal(step(x, y), again(x, y))
    assert all(torch.equal(step.masks[name], again.masks[name]) for name in step.masks)


def test_channels_last_weights_learn_alike(model):
    other = create(SPEC)
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)
    one = make_lmp_step(model, sparsity=0.6, **EXACT)
    two = make_lmp_step(other, sparsity=0.6, **EXACT)
    for name in one.scores:
        assert torch.equal(one.scores[name], two.scores[name])
        assert torch.equal(one.masks[name], two.masks[name])
    for x, y in batches(2):
        torch.testing.assert_close(one(x, y), two(x, y), rtol=1e-4, atol=1e-5)
    agreeing = sum((one.masks[n] == two.masks[n]).sum() for n in one.masks)
    assert agreeing > 0.999 * sum(mask.numel() for mask in one.masks.values())


def test_bf16_on_a_cpu_stays_near_fp32(model):
    other = create(SPEC)
    other.load_state_dict(model.state_dict())
    exact = make_lmp_step(model, sparsity=0.5, **EXACT)
    half = make_lmp_step(other, sparsity=0.5, amp=torch.bfloat16, graph=False)
    assert all(leaf.dtype == torch.bfloat16 for leaf in half.network.masked)
    for x, y in batches(3):
        torch.testing.assert_close(half(x, y), exact(x, y), rtol=0.05, atol=0.05)
    assert all(scores.dtype == torch.float32 for scores in half.scores.values())


@pytest.mark.parametrize("granularity", ["element", "kernel", "block-8"])
def test_the_way_of_a_gpu_is_the_same_network(model, monkeypatch, granularity):
    """All leaves folded at once, in channels_last under bf16; without a GPU by its reference."""
    losses = []
    for folded in (False, True):
        monkeypatch.setattr(Supermask, "_in_one_launch", lambda _, dtype, folded=folded: folded)
        torch.manual_seed(0)
        network = create(SPEC).to(memory_format=torch.channels_last)
        step = make_lmp_step(
            network, sparsity=0.6, granularity=granularity, amp=torch.bfloat16, graph=False
        )
        assert (step.network._fold is not None) == folded
        for leaf, scores in zip(step.network.masked, step.scores.values(), strict=True):
            if leaf.shape == scores.shape:  # what a checkpoint's loading compares
                assert leaf.stride() == scores.stride()
        losses.append([step(x, y) for x, y in batches(3)])
        for leaf, name in zip(step.network.masked, step.masks, strict=True):
            assert leaf.grad.shape == network.get_submodule(name).weight.shape
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("start", ["weight_rank", "kaiming"])
def test_score_starts_depend_on_the_seed_only(start):
    weights = [torch.randn(8, 4, 3, 3), torch.randn(8, 8, 1, 1)]
    one, again, other = (initial_scores(weights, "element", "layer", start, s) for s in (0, 0, 1))
    for weight, a, b, c in zip(weights, one, again, other, strict=True):
        bound = weight[0].numel() ** -0.5
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.abs().max() <= bound and a.min() < 0 < a.max()
        if start == "weight_rank":
            order = group_scores(weight, "element").flatten().argsort()
            assert (a.flatten()[order].diff() >= 0).all()


def test_what_cannot_be_is_refused(model):
    with pytest.raises(RtkError, match="2:4 has no scores"):
        make_lmp_step(model, sparsity=0.5, granularity="2:4")
    with pytest.raises(RtkError, match=r"sparsity: expected .* got 1"):
        make_lmp_step(model, sparsity=1.0)
    with pytest.raises(RtkError, match="unknown scope 'layers'"):
        make_lmp_step(model, sparsity=0.5, scope="layers")
    with pytest.raises(RtkError, match="unknown score_init 'rank'"):
        make_lmp_step(model, sparsity=0.5, score_init="rank")
    with pytest.raises(RtkError, match=r"scores of 'layer1\.0\.conv1' must be .*got none"):
        make_lmp_step(model, sparsity=0.5, score_init={})
    with pytest.raises(RtkError, match=r"graph=True.*has no CUDA graphs"):
        make_lmp_step(model, sparsity=0.5, amp=None, graph=True)
    mask_model(model, omp(model, 0.5))
    with pytest.raises(RtkError, match="is masked already"):
        make_lmp_step(model, sparsity=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_captured_step_is_the_eager_one(monkeypatch, granularity, scope):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    steps = []
    for graph in (True, False):
        torch.manual_seed(0)
        model = create(SPEC).cuda().to(memory_format=torch.channels_last)
        steps.append(
            make_lmp_step(model, sparsity=0.7, granularity=granularity, scope=scope, graph=graph)
        )
    before = [weight.clone() for weight in steps[0].network.weights]
    for i, (x, y) in enumerate(batches(10, device="cuda")):
        for step in steps:
            for group in step.optimizer.param_groups:
                group["lr"] = 0.02 / (1 + i)
        captured, eager = (step(x, y) for step in steps)
        torch.testing.assert_close(captured, eager, rtol=0.05, atol=0.05)
    assert steps[0].captured and not steps[1].captured
    assert all(torch.equal(a, b) for a, b in zip(before, steps[0].network.weights, strict=True))
    kept = [sum(mask.sum() for mask in groups(step).values()) for step in steps]
    assert kept[0] == kept[1]
    same = sum((a == steps[1].masks[n]).sum() for n, a in steps[0].masks.items())
    assert same > 0.97 * sum(mask.numel() for mask in steps[0].masks.values())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_gpu_learns_as_a_cpu_does(amp):
    torch.manual_seed(0)
    on_cpu, on_gpu = create(SPEC), create(SPEC)
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu.cuda().to(memory_format=torch.channels_last)
    exact = make_lmp_step(on_cpu, sparsity=0.6, **EXACT)
    step = make_lmp_step(on_gpu, sparsity=0.6, amp=amp)
    for name, mask in exact.masks.items():
        assert torch.equal(step.masks[name].cpu(), mask)
    tolerance = 5e-3 if amp is None else 0.1
    for x, y in batches(3):
        loss = step(x.cuda(), y.cuda())
        torch.testing.assert_close(loss.cpu(), exact(x, y), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_backends_of_the_update_agree_within_a_step():
    results = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        model = create(SPEC).cuda().to(memory_format=torch.channels_last)
        step = make_lmp_step(model, sparsity=0.7, graph=False)
        x, y = next(batches(1, device="cuda"))
        with rtk.ops.backend(None):
            network, optimizer = step.network, step.optimizer
            with torch.autocast("cuda", torch.bfloat16):
                F.cross_entropy(network(x).float(), y).backward()
        with rtk.ops.backend(backend):
            optimizer.step()
        results.append({name: scores.clone() for name, scores in step.scores.items()})
    for name, scores in results[0].items():
        torch.testing.assert_close(scores, results[1][name], rtol=1e-2, atol=1e-4)
