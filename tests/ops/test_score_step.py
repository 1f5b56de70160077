import pytest
import torch
import torch.nn.functional as F

import rtk
from rtk.errors import RtkError
from rtk.ops import score_step
from rtk.ops.score_step import tile_sums

SHAPES = [(8, 4, 3, 3), (6, 5, 1, 1), (64, 32, 3, 3), (1, 1, 1, 1), (130, 70, 1, 1)]


def layers(score_shape=lambda shape: shape, device="cpu", channels_last=False):
    """Return scores, buffers, weights, gradients."""
    format = torch.channels_last if channels_last else torch.contiguous_format

    def random(shape):
        return torch.randn(shape, device=device).to(memory_format=format)

    scores = [random(score_shape(shape)) for shape in SHAPES]
    return (
        scores,
        [torch.zeros_like(each) for each in scores],
        [random(shape) for shape in SHAPES],
        [random(shape) for shape in SHAPES],
    )


def sgd(scores, weights, gradients, reduce, **options):
    parameters = [torch.nn.Parameter(each.clone()) for each in scores]
    optimizer = torch.optim.SGD(parameters, **options)
    for gradient in gradients:
        for parameter, weight, each in zip(parameters, weights, gradient, strict=True):
            parameter.grad = reduce(weight * each)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


GROUPS = {
    "element": lambda shape: shape,
    "row": lambda shape: (*shape[:3], 1),
    "kernel": lambda shape: (*shape[:2], 1, 1),
    "channel": lambda shape: (shape[0], 1, 1, 1),
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_it_is_sgd_on_weight_times_gradient(group, nesterov):
    scores, buffers, weights, gradients = layers(GROUPS[group])
    later = [torch.randn_like(each) for each in gradients]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov}
    expected = [
        sgd([s], [w], [[g], [h]], lambda p, s=s: p.sum_to_size(s.shape), **options)[0]
        for s, w, g, h in zip(scores, weights, gradients, later, strict=True)
    ]
    for each in (gradients, later):
        score_step(scores, buffers, weights, each, **options)
    for one, other in zip(scores, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        if group == "element":
            assert torch.equal(one, other)


def test_tiles():
    scores, buffers, weights, gradients = layers(
        lambda shape: (-(-shape[0] // 4), -(-shape[1] // 3), *shape[2:])
    )
    start = [each.clone() for each in scores]
    score_step(scores, buffers, weights, gradients, lr=0.5, tile=(4, 3))
    for score, first, weight, gradient in zip(scores, start, weights, gradients, strict=True):
        product = (weight * gradient).double()
        for k, c in [(0, 0), (score.shape[0] - 1, score.shape[1] - 1)]:
            tile = product[4 * k : 4 * k + 4, 3 * c : 3 * c + 3].sum((0, 1))
            expected = first[k, c].double() - 0.5 * tile
            torch.testing.assert_close(score[k, c].double(), expected, rtol=1e-5, atol=1e-5)
    padded = F.pad(weights[0], (0, 0, 0, 0, 0, 2))
    expected = padded.unflatten(1, (2, 3)).sum(2).unflatten(0, (2, 4)).sum(1)
    torch.testing.assert_close(tile_sums(weights[0], 4, 3), expected)


def test_a_rate_may_be_a_tensor_and_bf16_gradients_are_taken():
    one, two = layers(), None
    two = [[each.clone() for each in part] for part in one]
    for part in (one, two):
        part[3][:] = [each.bfloat16() for each in part[3]]
    score_step(*one, lr=torch.tensor(0.25), momentum=0.9)
    score_step(*two, lr=0.25, momentum=0.9)
    for a, b in zip(one[0], two[0], strict=True):
        torch.testing.assert_close(a, b)
        assert a.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    scores, buffers, weights, gradients = layers()
    with pytest.raises(RtkError, match="lists of one length"):
        score_step(scores[1:], buffers, weights, gradients, lr=0.1)
    with pytest.raises(RtkError, match="a gradient must be dense"):
        score_step(scores, buffers, weights, gradients[::-1], lr=0.1)
    with pytest.raises(RtkError, match="momentum buffer must be"):
        score_step(scores, [b.double() for b in buffers], weights, gradients, lr=0.1)
    with pytest.raises(RtkError, match="one a tile of 2 x 2"):
        score_step(scores, buffers, weights, gradients, lr=0.1, tile=(2, 2))
    with rtk.ops.backend("cuda"), pytest.raises(RtkError, match="forced backend 'cuda' cannot"):
        score_step(scores, buffers, weights, gradients, lr=0.1)
    score_step([], [], [], [], lr=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("many", [1, 30])
def test_the_kernel_is_the_reference(dtype, channels_last, nesterov, many):
    one = [part * many for part in layers(device="cuda", channels_last=channels_last)]
    one = [[each.clone() for each in part] for part in one]
    one[3] = [each.to(dtype) for each in one[3]]
    two = [[each.clone() for each in part] for part in one]
    options = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov}
    rate = torch.tensor(0.1, device="cuda")
    with rtk.ops.backend("cuda"):
        for lr in (0.1, rate):
            score_step(*one, lr=lr, **options)
    with rtk.ops.backend("reference"):
        for lr in (0.1, rate):
            score_step(*two, lr=lr, **options)
    for mine, theirs in zip(one, two, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_the_kernel_takes_odd_addresses_and_leaves_neighbours_alone():
    memory = torch.full((4, 5003), 7.0, device="cuda")
    parts = [row[1:5002].view(1, 5001, 1, 1) for row in memory]
    parts[2].normal_(), parts[3].normal_()
    expected = [part.cpu().clone() for part in parts]
    with rtk.ops.backend("cuda"):
        score_step(*[[part] for part in parts], lr=0.1, momentum=0.5)
    score_step(*[[part] for part in expected], lr=0.1, momentum=0.5)
    for part, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.cpu(), wanted, rtol=1e-5, atol=1e-5)
    assert (memory[:, [0, -1]] == 7).all()


@pytest.mark.gpu
def test_mixed_layouts_fall_back():
    parts = layers(device="cuda")
    parts[2][:] = [w.to(memory_format=torch.channels_last) for w in parts[2]]
    score_step(*parts, lr=0.1)
    with rtk.ops.backend("cuda"), pytest.raises(RtkError, match="several memory orders"):
        score_step(*parts, lr=0.1)
