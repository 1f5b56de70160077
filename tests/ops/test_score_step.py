import itertools

import pytest
import torch
import torch.nn.functional as F

import rtk
from rtk.errors import RtkError
from rtk.ops import score_step
from rtk.ops._layout import sum_to
from rtk.ops._score_groups import AXES, groups_of
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
    "input": lambda shape: (1, shape[1], 1, 1),
    "tap": lambda shape: (1, 1, *shape[2:]),
    "column": lambda shape: (1, 1, 1, shape[3]),
    "every other": lambda shape: (shape[0], 1, shape[2], 1),
    "all": lambda shape: (1, 1, 1, 1),
}
TILES = [(4, 3), (64, 64), (32, 16), (1, 8), (7, 1), (1000, 1000)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def tiled(tile):
    return lambda shape: (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), *shape[2:])


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


def walk(groups, values):
    """Sum over each group as the kernel does; return by the place of a score in memory."""
    counts, steps, score_steps = (groups[i : i + AXES] for i in range(0, 3 * AXES, AXES))
    most, sizes, strides, on_axis = (groups[i : i + 2] for i in range(3 * AXES, len(groups), 2))
    sums = {}
    for index in itertools.product(*map(range, counts)):
        at = sum(i * step for i, step in zip(index, steps, strict=True))
        sides = [
            min(most[j], sizes[j] - index[on_axis[j]] * most[j]) if on_axis[j] < AXES else most[j]
            for j in range(2)
        ]
        places = [
            at + i * strides[0] + j * strides[1] for i, j in itertools.product(*map(range, sides))
        ]
        score_at = sum(i * step for i, step in zip(index, score_steps, strict=True))
        assert score_at not in sums
        sums[score_at] = values[places].sum().item()
    return sums


@pytest.mark.parametrize("score_layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (8, 4, 3, 3), (5, 7, 1, 1), (1, 9, 3, 1)], ids=str)
@pytest.mark.parametrize("group", [*GROUPS, (4, 3), (2, 4), (1, 2), (3, 1), (9, 9)], ids=str)
def test_what_the_kernel_walks_are_the_groups(group, shape, layout, score_layout):
    tile = None if isinstance(group, str) else group
    score_shape = (GROUPS[group] if tile is None else tiled(tile))(shape)
    weight = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    wanted = tile_sums(weight, *tile) if tile else sum_to(weight, torch.Size(score_shape))
    wanted = wanted.contiguous(memory_format=score_layout)
    groups = groups_of(shape, weight.stride(), score_shape, wanted.stride(), tile)
    assert groups is not None
    memory = torch.as_strided(weight, (weight.numel(),), (1,))
    in_memory = torch.as_strided(wanted, (wanted.numel(),), (1,)).tolist()
    assert walk(groups, memory) == pytest.approx(dict(enumerate(in_memory)))


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


def in_float64(parts):
    return [[each.double() for each in part] for part in parts]


GROUPED = [(group, None) for group in GROUPS if group != "element"] + [(t, t) for t in TILES]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("group", "tile"), GROUPED, ids=lambda v: str(v))
def test_groups_are_one_launch(group, tile, layout, dtype, monkeypatch):
    from rtk.ops import _compiled

    shape_of = GROUPS[group] if tile is None else tiled(tile)
    sizes = [*SHAPES, (130, 70, 3, 3), (96, 300, 3, 3), (256, 512, 1, 1)]
    parts = [], [], [], []
    for shape in sizes:
        scores = torch.randn(shape_of(shape), device="cuda")
        tensors = [torch.randn(shape, device="cuda").to(memory_format=layout) for _ in range(2)]
        tensors[1] = tensors[1].to(dtype)
        for part, each in zip(parts, (scores, torch.zeros_like(scores), *tensors), strict=True):
            part.append(each)
    exact = in_float64(parts)
    again = [[each.clone() for each in part] for part in parts]
    launches = []
    launch = _compiled._C.score_step_cuda

    class Counted:
        def __getattr__(self, name):
            return getattr(compiled, name)

        def score_step_cuda(self, *args):
            launches.append(len(args[0]))
            launch(*args)

    compiled = _compiled._C
    monkeypatch.setattr(_compiled, "_C", Counted())
    options = {"momentum": 0.9, "weight_decay": 5e-4, "tile": tile}
    rate = torch.tensor(0.1, device="cuda")
    for lr, nesterov in ((0.1, False), (rate, True)):
        for each in (parts, again):
            with rtk.ops.backend("cuda"):
                score_step(*each, lr=lr, nesterov=nesterov, **options)
        with rtk.ops.backend("reference"):
            score_step(*exact, lr=0.1, nesterov=nesterov, **options)
    assert launches == [len(sizes)] * 4
    for mine, other, wanted in zip(parts, again, exact, strict=True):
        for one, two, true in zip(mine, other, wanted, strict=True):
            assert torch.equal(one, two), "sums are reproducible"
            scale = max(1.0, true.abs().max().item())
            torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.gpu
def test_many_layers_in_groups():
    parts = [part * 40 for part in layers(GROUPS["kernel"], "cuda", channels_last=True)]
    parts = [[each.clone() for each in part] for part in parts]
    exact = in_float64(parts)
    with rtk.ops.backend("cuda"):
        score_step(*parts, lr=0.1, momentum=0.5)
    score_step(*exact, lr=0.1, momentum=0.5)
    for one, wanted in zip(parts[0], exact[0], strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_group_of_a_whole_layer_leaves_its_neighbours_alone():
    memory = torch.full((4, 5003), 7.0, device="cuda")
    weight, gradient = (row[1:5002].normal_().view(3, 1667, 1, 1) for row in memory[2:])
    score, buffer = (row[1:2].view(1, 1, 1, 1) for row in memory[:2])
    given = [[t] for t in (score, buffer, weight, gradient)]
    exact = in_float64(given)
    with rtk.ops.backend("cuda"):
        score_step(*given, lr=0.1, momentum=0.5)
    score_step(*exact, lr=0.1, momentum=0.5)
    torch.testing.assert_close(score.double(), exact[0][0], rtol=1e-5, atol=1e-3)
    assert (memory[:2, 0] == 7).all() and (memory[:2, 2:] == 7).all()
    assert (memory[2:, [0, -1]] == 7).all()


@pytest.mark.gpu
def test_five_dimensions_fall_back():
    weight = torch.randn(3, 2, 2, 2, 2, device="cuda")
    score = torch.randn(3, 1, 1, 1, 1, device="cuda")
    given = [[t] for t in (score, torch.zeros_like(score), weight, torch.ones_like(weight))]
    wanted = score - 0.1 * weight.sum((1, 2, 3, 4), keepdim=True)
    score_step(*given, lr=0.1)
    torch.testing.assert_close(score, wanted)
    with rtk.ops.backend("cuda"), pytest.raises(RtkError, match="has 5 dimensions, it takes up to"):
        score_step(*given, lr=0.1)
