"""topk_mask and topk_mask_global against a sort in plain Python."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

import rtk
from rtk.errors import RtkError
from rtk.ops import topk_mask, topk_mask_global

OP = "topk_mask"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CUDA_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float64]
INF, NAN = math.inf, math.nan
TRICKY = {
    "all-equal": [1.0] * 9,
    "few-distinct": [2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0],
    "zeros-of-both-signs": [0.0, -0.0, -0.0, 0.0, -1.0, 0.0, -0.0],
    "infinities": [INF, 1.0, -INF, INF, -INF, 0.0, -1.0],
    "nan": [NAN, 1.0, NAN, -INF, 2.0, NAN, INF],
    "nan-of-both-signs": [-NAN, NAN, -INF, -NAN],
    "all-nan": [NAN] * 5,
    "one": [3.0],
    "none": [],
}


def oracle(scores: list[Tensor], k: int) -> list[Tensor]:
    """Sort all scores in Python: NaN last, larger first, then the smaller flat index."""
    flat = [value for tensor in scores for value in tensor.flatten().tolist()]

    def rank(i: int) -> tuple[bool, float, int]:
        return (True, 0.0, i) if math.isnan(flat[i]) else (False, -flat[i], i)

    kept = set(sorted(range(len(flat)), key=rank)[:k])
    indices = itertools.count()
    return [
        torch.tensor([next(indices) in kept for _ in range(t.numel())], dtype=torch.bool).reshape(
            t.shape
        )
        for t in scores
    ]


def assert_kept(masks: list[Tensor], wanted: list[Tensor]) -> None:
    assert [m.shape for m in masks] == [w.shape for w in wanted]
    assert [m.dtype for m in masks] == [torch.bool] * len(masks)
    for mask, want in zip(masks, wanted, strict=True):
        assert torch.equal(mask.cpu(), want), (mask, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", TRICKY)
def test_every_k_of_tricky_scores(name, dtype, backend, device):
    if backend == "cuda" and dtype not in CUDA_DTYPES:
        pytest.skip("the kernel does not take this dtype")
    scores = torch.tensor(TRICKY[name], dtype=dtype, device=device)
    for k in range(scores.numel() + 1):
        mask = topk_mask(scores, k)
        assert mask.sum() == k
        assert_kept([mask], oracle([scores], k))


def random_scores(dice: random.Random) -> Tensor:
    """Return a small tensor of random shape, dtype, number of distinct values, NaN and layout."""
    shape = [dice.randint(0 if dice.random() < 0.1 else 1, 6) for _ in range(dice.randint(0, 4))]
    scores = torch.randn(shape)
    if dice.random() < 0.6:
        scores = (scores * dice.choice([0.5, 1, 3])).round()
    for poison in (NAN, INF, -INF, -0.0):
        if dice.random() < 0.3:
            scores[torch.rand(shape) < dice.random()] = poison
    return scores.transpose(0, -1) if dice.random() < 0.3 and shape else scores


@pytest.mark.parametrize("seed", range(8))
def test_random_lists(seed, backend, device):
    dice = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(40):
        dtype = dice.choice(CUDA_DTYPES if backend == "cuda" else DTYPES)
        scores = [random_scores(dice).to(device, dtype) for _ in range(dice.randint(1, 5))]
        sizes = [tensor.numel() for tensor in scores]
        ks = [dice.choice([0, n, max(0, n - 1), dice.randint(0, n)]) for n in sizes]
        total = dice.choice([0, sum(sizes), dice.randint(0, sum(sizes))])
        wanted = [oracle([t], k)[0] for t, k in zip(scores, ks, strict=True)]
        try:
            assert_kept(topk_mask(scores, ks), wanted)
            assert_kept(topk_mask_global(scores, total), oracle(scores, total))
        except AssertionError as error:
            raise AssertionError(f"case {case}: k {ks}, global {total}, {scores}") from error


@pytest.mark.parametrize("distinct", [None, 7], ids=["distinct", "ties"])
@pytest.mark.parametrize("k", [1, 4_000, 99_999, 300_000, 400_002])
def test_many_scores_in_many_segments(k, distinct, backend, device, two_threads):
    """Large enough for several threads and for radix passes; checked by a stable sort."""
    scores = torch.randn(400_008)
    if distinct:
        scores = (scores * distinct).round()
    sizes = [1, 0, 100_000, 7, 99_990] + [1_000] * 200
    sizes.append(400_008 - sum(sizes))
    masks = topk_mask_global(list(scores.to(device).split(sizes)), k)
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    wanted[scores.argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(torch.cat([m.flatten() for m in masks]).cpu(), wanted)


def test_global_breaks_ties_by_the_place_in_the_list(backend, device):
    scores = [torch.ones(2, 2, device=device), torch.ones(3, device=device)]
    masks = topk_mask_global(scores, 5)
    assert [m.tolist() for m in masks] == [[[True, True], [True, True]], [True, False, False]]


def test_flat_index_follows_the_shape_and_not_the_memory(backend, device):
    scores = torch.zeros(2, 2, 1, 2, device=device).contiguous(memory_format=torch.channels_last)
    assert topk_mask(scores, 3).flatten().tolist() == [True] * 3 + [False] * 5
    assert topk_mask(scores.transpose(0, 3), 3).flatten().tolist() == [True] * 3 + [False] * 5


def test_one_thread_and_two_agree(backend, device):
    scores = (torch.randn(300_000, device=device) * 50).round()
    alone = topk_mask(scores, 123_456)
    torch.set_num_threads(2)
    assert torch.equal(topk_mask(scores, 123_456), alone)


def test_masks_own_their_memory_and_need_no_gradient(backend, device):
    scores = [torch.randn(4, device=device, requires_grad=True) for _ in range(2)]
    masks = topk_mask_global(scores, 3)
    assert masks[0].untyped_storage().data_ptr() != masks[1].untyped_storage().data_ptr()
    assert [m.requires_grad for m in masks] == [False, False]


X = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: topk_mask(X, 4), r"topk_mask: k must be in \[0, 3\].*got 4"),
        (lambda: topk_mask(X, -1), r"topk_mask: k must be in \[0, 3\].*got -1"),
        (lambda: topk_mask([X, X], [1, 4]), r"topk_mask: k must be in \[0, 3\].*got 4"),
        (lambda: topk_mask_global([X, X], 7), r"topk_mask_global: k must be in \[0, 6\].*got 7"),
        (lambda: topk_mask([], []), "topk_mask: the list of scores is empty"),
        (lambda: topk_mask_global([], 0), "topk_mask_global: the list of scores is empty"),
        (lambda: topk_mask([X], [1, 1]), "topk_mask: got 1 tensors and 2 values of k"),
        (lambda: topk_mask([X], 1), "takes a list of k; .* use topk_mask_global"),
        (lambda: topk_mask(X, [1]), "one tensor takes one k, an int, got list"),
        (lambda: topk_mask_global(X, 1), "must be a list of tensors; for one tensor use topk_mask"),
        (lambda: topk_mask(X.int(), 1), "scores must be floating, got torch.int32"),
        (lambda: topk_mask([X, X.double()], [1, 1]), "one dtype and device, got torch.float32 on"),
        (lambda: topk_mask_global([X, X.to("meta")], 1), "one dtype and device.*on meta"),
    ],
    ids=[
        "k-large",
        "k-negative",
        "k-large-in-list",
        "k-large-global",
        "empty",
        "empty-global",
        "lengths",
        "list-with-int",
        "tensor-with-list",
        "global-with-tensor",
        "int-scores",
        "dtypes",
        "devices",
    ],
)
def test_refused(call, words):
    with pytest.raises(RtkError, match=words):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 3_000_000, 29_999_999])
def test_thirty_million_scores_on_a_gpu(k):
    scores = torch.randn(30_000_000, device="cuda")
    for values in (scores, (8 * scores).round()):  # the second time with many ties
        assert torch.equal(topk_mask(values, k).cpu(), topk_mask(values.cpu(), k))


@pytest.mark.gpu
def test_float64_on_a_gpu_takes_the_reference():
    scores = [
        torch.tensor(values, dtype=torch.float64, device="cuda") for values in TRICKY.values()
    ]
    ks = [tensor.numel() // 2 for tensor in scores]
    wanted = [oracle([t], k)[0] for t, k in zip(scores, ks, strict=True)]
    assert_kept(topk_mask(scores, ks), wanted)
    with rtk.ops.backend("cuda"), pytest.raises(RtkError, match=r"scores is torch\.float64"):
        topk_mask(scores, ks)
