"""topk_mask on the convolutions of ResNet-18 and ResNet-50, against what users write by hand.

On a GPU scores drift between two calls as they do in training. rtk is the functional op, which
knows nothing of the call before; rtk-plan is a TopkPlan, which remembers its thresholds, and
rtk-plan-bits one that writes bits. `global` keeps one share of ResNet-50's 25.5 M scores together;
torch.topk and torch.sort get them concatenated, without the time for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rtk
from rtk.ops import TopkPlan, pack_mask, topk_mask, topk_mask_global

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = 0.1
PEERS = ["rtk", "torch.topk", "torch.sort"]
if DEVICE == "cuda":
    PEERS = ["rtk-plan", "rtk-plan-bits", *PEERS]
Shape = tuple[int, ...]

RESNET18 = [
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3),
    *[(128, 128, 3, 3)] * 3,
    (256, 128, 3, 3),
    *[(256, 256, 3, 3)] * 3,
    (512, 256, 3, 3),
    *[(512, 512, 3, 3)] * 3,
]


def _resnet50() -> Iterator[Shape]:
    """Its 53 convolutions, 23.45 M weights."""
    yield (64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield (width, channels, 1, 1)
            yield (width, width, 3, 3)
            yield (4 * width, width, 1, 1)
            if block == 0:
                yield (4 * width, channels, 1, 1)
            channels = 4 * width


MODELS: dict[str, list[Shape]] = {"resnet18": RESNET18}
if DEVICE == "cuda":
    MODELS["resnet50"] = list(_resnet50())
    MODELS["global"] = [*_resnet50(), (1000, 2048)]


def _mark(like: Tensor, indices: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    return mask.index_fill_(0, indices, True)


def _torch_topk(tensor: Tensor, k: int) -> Tensor:
    return _mark(tensor, tensor.flatten().topk(k, sorted=False).indices)


def _torch_sort(tensor: Tensor, k: int) -> Tensor:
    """As hidden-networks does."""
    return _mark(tensor, tensor.flatten().sort(descending=True).indices[:k])


def _call(peer: str, scores: list[Tensor], k: list[int], whole: bool) -> Callable[[], list[Tensor]]:
    if peer == "rtk":
        return lambda: topk_mask_global(scores, k[0]) if whole else topk_mask(scores, k)
    if peer.startswith("rtk-plan"):
        return TopkPlan(scores, k[0] if whole else k, packed=peer == "rtk-plan-bits")
    one = {"torch.topk": _torch_topk, "torch.sort": _torch_sort}[peer]
    return lambda: [one(tensor, kept) for tensor, kept in zip(scores, k, strict=True)]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("model", MODELS)
def bench_topk_mask(model, peer, measure, benchmark):
    benchmark.group = f"topk_mask {model} {DEVICE}"
    torch.manual_seed(0)
    whole = model == "global"
    shapes = MODELS[model]
    if whole and not peer.startswith("rtk"):
        shapes = [(sum(math.prod(shape) for shape in shapes),)]
    scores = [torch.randn(shape, device=DEVICE) for shape in shapes]
    sizes = [tensor.numel() for tensor in scores]
    k = [round(KEEP * sum(sizes))] if whole else [round(KEEP * size) for size in sizes]
    steps = [[1e-3 * torch.randn_like(tensor) for tensor in scores] for _ in range(2)]

    def drift() -> None:
        steps.append(steps.pop(0))
        torch._foreach_add_(scores, steps[0])

    packed = peer == "rtk-plan-bits"
    moved = sum(sizes) * 4 + sum(sizes) // (8 if packed else 1)
    masks = measure(
        _call(peer, scores, k, whole),
        setup=drift if DEVICE == "cuda" else None,
        bytes=moved,
        device=DEVICE,
    )
    with rtk.ops.backend("cpu"):
        on_cpu = [tensor.cpu() for tensor in scores]
        wanted = topk_mask_global(on_cpu, k[0]) if whole else topk_mask(on_cpu, k)
    for mask, want in zip(masks, wanted, strict=True):
        if packed:
            assert torch.equal(mask.cpu(), pack_mask(want))
        elif peer.startswith("rtk"):
            assert torch.equal(mask.cpu(), want)
        else:
            assert mask.sum() == want.sum()  # which of equal scores they take is not said
