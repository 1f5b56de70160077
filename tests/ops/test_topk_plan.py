"""TopkPlan gives the masks of topk_mask, whatever the scores did since the call before."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from rtk import ops
from rtk.errors import RtkError
from rtk.ops import TopkPlan, pack_mask, topk_mask, topk_mask_global

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [100_000, 1, 40_000, 0, 8_192, 8_193, 33]


def wanted(scores: list[Tensor], k: int | list[int]) -> list[Tensor]:
    """The masks by the C++ code on the CPU, which test_topk_mask.py compares with a sort."""
    on_cpu = [tensor.detach().cpu() for tensor in scores]
    with ops.backend("cpu"):
        if isinstance(k, int):
            return topk_mask_global(on_cpu, k)
        return topk_mask(on_cpu, k)


def assert_marks(plan: TopkPlan, scores: list[Tensor], k: int | list[int]) -> None:
    for i, (mask, want) in enumerate(zip(plan(), wanted(scores, k), strict=True)):
        want = pack_mask(want) if plan.packed else want
        assert mask.shape == want.shape and mask.dtype == want.dtype
        assert torch.equal(mask.cpu(), want), i


def drift(tensor: Tensor) -> None:
    tensor.add_(1e-3 * torch.randn_like(tensor))


def shuffle(tensor: Tensor) -> None:
    flat = tensor.flatten()
    tensor.copy_(flat[torch.randperm(flat.numel(), device=flat.device)].view_as(tensor))


CHANGES = {
    "nothing": lambda t: None,
    "drift": drift,
    "shuffle": shuffle,
    "jump": lambda t: t.add_(100),
    "negate": lambda t: t.neg_(),
    "all-equal": lambda t: t.fill_(1.5),
    "few-distinct": lambda t: t.copy_(torch.randint_like(t, -1, 2)),
    "zeros-of-both-signs": lambda t: t.copy_(torch.where(t > 0, 0.0, -0.0)),
    "infinities": lambda t: t.div_((t.abs() > 0.5).to(t.dtype)),
    "nan": lambda t: t.masked_fill_(t > -1, torch.nan),
    "random": lambda t: t.normal_(),
    "all-nan": lambda t: t.fill_(torch.nan),
    "random-again": lambda t: t.normal_(),
}


@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "bits"])
@pytest.mark.parametrize("whole", [False, True], ids=["each", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_any_change_between_two_calls(dtype, whole, packed, device):
    scores = [torch.randn(size, device=device).to(dtype) for size in SIZES]
    k = sum(SIZES) // 10 if whole else [size // 10 for size in SIZES]
    plan = TopkPlan(scores, k, packed=packed)
    places = [mask.data_ptr() for mask in plan.masks]
    for change in CHANGES.values():
        for tensor in scores:
            change(tensor)
        assert_marks(plan, scores, k)
        drift(scores[0])
        assert_marks(plan, scores, k)
    assert [mask.data_ptr() for mask in plan()] == places


def test_k_changes(device):
    scores = [torch.randn(size, device=device) for size in SIZES]
    plan = TopkPlan(scores, [0] * len(SIZES))
    for share in (0, 0.5, 0.49, 0.01, 1, 0.2):
        k = [round(share * size) for size in SIZES]
        plan.set_k(k)
        assert plan.k == k
        assert_marks(plan, scores, k)
    for kept in (0, 1, 2, sum(SIZES), sum(SIZES) - 1, 12_345):
        plan = TopkPlan(scores, 7)
        plan()
        plan.set_k(kept)
        assert_marks(plan, scores, kept)


def test_scores_under_any_strides_and_at_odd_addresses(device):
    memory = torch.randn(2 * 64 * 9 + 1, device=device)
    scores = [
        memory[1 : 1 + 64 * 9].view(8, 8, 3, 3),
        memory[1 + 64 * 9 :].view(8, 8, 3, 3).transpose(0, 1),
        torch.randn(8, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last),
    ]
    plan = TopkPlan(scores, [100, 200, 300])
    for _ in range(3):
        assert_marks(plan, scores, [100, 200, 300])
        drift(memory)


def test_a_parameter_that_got_new_memory_is_found(device):
    weight = torch.nn.Parameter(torch.randn(1_000, device=device))
    plan = TopkPlan([weight], [100])
    plan()
    weight.data = torch.randn(1_000, device=device)
    assert_marks(plan, [weight], [100])
    assert not plan.masks[0].requires_grad
    weight.data = torch.randn(1_001, device=device)
    with pytest.raises(RtkError, match=r"TopkPlan: the scores had \[1000\].*have \[1001\]"):
        plan()


def test_more_tensors_than_a_launch_takes(device):
    dice = random.Random(0)
    scores = [torch.randn(dice.randint(0, 40), device=device).round() for _ in range(1_700)]
    k = [dice.randint(0, tensor.numel()) for tensor in scores]
    plan = TopkPlan(scores, k)
    for _ in range(2):
        assert_marks(plan, scores, k)
    plan.set_k([0] * len(k))
    assert not any(mask.any() for mask in plan())
    assert_marks(TopkPlan(scores, sum(k)), scores, sum(k))


def test_pack_mask():
    mask = torch.zeros(3, 23, dtype=torch.bool)
    mask.view(-1)[[0, 31, 32, 68]] = True
    assert pack_mask(mask).tolist() == [1 - 2**31, 1, 1 << 4]
    assert pack_mask(mask[:0]).shape == (0,)


X = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TopkPlan([], []), "TopkPlan: the list of scores is empty"),
        (lambda: TopkPlan([X.int()], [1]), "TopkPlan: scores must be floating"),
        (lambda: TopkPlan([X, X.double()], [1, 1]), "TopkPlan: scores must share one dtype"),
        (lambda: TopkPlan([X], [4]), r"TopkPlan: k must be in \[0, 3\].*got 4"),
        (lambda: TopkPlan([X, X], 7), r"TopkPlan: k must be in \[0, 6\].*got 7"),
        (lambda: TopkPlan([X], [1, 1]), "TopkPlan: got 1 tensors and 2 values of k"),
        (lambda: TopkPlan([X], [1]).set_k(1), "k was one number a tensor and must stay so"),
        (lambda: TopkPlan([X], 1).set_k([1]), "k was one number for the list and must stay so"),
        (lambda: TopkPlan([X], [1]).set_k([4]), r"TopkPlan: k must be in \[0, 3\].*got 4"),
    ],
    ids=["empty", "int", "dtypes", "k", "k-global", "lengths", "kind", "kind-global", "set-k"],
)
def test_refused(call, words):
    with pytest.raises(RtkError, match=words):
        call()


def test_a_backend_that_cannot_says_why():
    plan = TopkPlan([X], [1])
    with ops.backend("cuda"), pytest.raises(RtkError, match="topk_mask: the forced backend 'cuda'"):
        plan()


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["captured", "called-before"])
@pytest.mark.parametrize("whole", [False, True], ids=["each", "whole"])
def test_a_captured_graph_follows_scores_and_k(whole, first):
    scores = [torch.randn(size, device="cuda") for size in SIZES]

    def number(share: float) -> int | list[int]:
        return int(share * sum(SIZES)) if whole else [int(share * size) for size in SIZES]

    plan = TopkPlan(scores, number(0.1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    if first == "called-before":
        with torch.cuda.stream(side):
            plan()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    for share in (0.1, 0.1, 0.3):
        k = number(share)
        plan.set_k(k)
        for change in ("drift", "drift", "shuffle", "all-equal", "random"):
            for tensor in scores:
                CHANGES[change](tensor)
            graph.replay()
            for mask, want in zip(plan.masks, wanted(scores, k), strict=True):
                assert torch.equal(mask.cpu(), want)


@pytest.mark.gpu
def test_thirty_million_scores():
    scores = torch.randn(30_000_000, device="cuda")
    for k in (3_000_000, 29_999_999):
        plan = TopkPlan([scores], k)
        for change in ("nothing", "drift", "drift", "few-distinct", "random"):
            CHANGES[change](scores)
            assert_marks(plan, [scores], k)


def random_scores(dice: random.Random) -> Tensor:
    """Return scores on the CPU whose number, dtype and distribution are drawn."""
    size = dice.choice([1, 2, 33, dice.randint(1, 300), dice.randint(1, 3_000)])
    scores = torch.randn(size)
    if dice.random() < 0.6:
        scores = (scores * dice.choice([0.5, 3, 50])).round()
    for poison in (torch.nan, torch.inf, -torch.inf, -0.0):
        if dice.random() < 0.2:
            scores[torch.rand(size) < dice.random()] = poison
    return scores


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d).removeprefix("torch."))
def test_ten_thousand_random_cases(dtype):
    """A case is a tensor and a k: four plans of some ninety tensors, called ten times, a dtype."""
    dice = random.Random(0)
    cases = 0
    for _ in range(4):
        scores = [random_scores(dice).to("cuda", dtype) for _ in range(dice.randint(85, 110))]
        plan = TopkPlan(scores, [0] * len(scores))
        for _ in range(10):
            k = [dice.choice([0, 1, t.numel() - 1, dice.randint(0, t.numel())]) for t in scores]
            plan.set_k(k)
            assert_marks(plan, scores, k)
            for tensor in scores:
                CHANGES[dice.choice(["nothing", "drift", "drift", "shuffle", "random"])](tensor)
            cases += len(scores)
    assert cases > 10_000 / 3
