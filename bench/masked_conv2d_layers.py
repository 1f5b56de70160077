"""Masked convolutions to measure: the shapes, their masks, rtk and its peers, and the clock.

N C H W input, K output channels, R S filter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import rtk
from rtk.draw.granularity import expand_groups, group_scores, n_of_m_mask
from rtk.granularity import Granularity

WAYS = ("forward", "input", "weight")  # the last two are gradients
LAST = torch.channels_last
_BRANCHES = 6  # layers a replay
_REPLAYS = 5


@dataclass(frozen=True)
class Shape:
    """A convolution of `c` channels of size x size pixels to `k`, on a batch of `n`."""

    n: int
    c: int
    k: int
    size: int
    taps: int
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.taps}x{self.taps}-{self.c}to{self.k}-{self.size}px-stride{self.stride}"

    @property
    def filters(self) -> tuple[int, int, int, int]:
        return self.k, self.c, self.taps, self.taps

    def layer(self, device: str) -> nn.Conv2d:
        options = {"stride": self.stride, "padding": self.taps // 2, "bias": False}
        return nn.Conv2d(self.c, self.k, self.taps, device=device, **options)

    def input(self, device: str) -> Tensor:
        x = torch.randn(self.n, self.c, self.size, self.size, device=device)
        return x.to(_dtype(device)).contiguous(memory_format=LAST)


def shapes_of(arch: str, image_size: int, batch: int) -> list[Shape]:
    """Return every convolution of torchvision's network in the order of its forward.

    Args:
        arch: resnet18 or resnet50.
        image_size: in pixels; up to 64 the stem is 3x3, without max-pool.
        batch: images at a time.
    """
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)().eval()
        if image_size <= 64:
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
        found = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(
                    lambda layer, given: found.append(_shape(layer, given[0], batch))
                )
        network(torch.empty(1, 3, image_size, image_size))
    return found


def _shape(layer: nn.Conv2d, x: Tensor, batch: int) -> Shape:
    sizes = layer.in_channels, layer.out_channels, x.shape[2], layer.kernel_size[0]
    return Shape(batch, *sizes, layer.stride[0])


def groups_kept(shape: Shape, granularity: str, density: float) -> tuple[int, int]:
    """Return how many groups of weights a mask keeps, at least one, and how many there are."""
    kind = Granularity.parse(granularity)
    weight = torch.empty(shape.filters, device="meta")
    groups = weight.numel() // 4 if kind.n_of_m else group_scores(weight, granularity).numel()
    return (groups if kind.n_of_m else max(1, round(density * groups))), groups


def random_mask(shape: Shape, granularity: str, density: float, device: str) -> Tensor:
    """Return a bool mask that keeps `density` of the groups, or of N:M what that means."""
    kind = Granularity.parse(granularity)
    weight = torch.rand(shape.filters, device=device)
    if kind.n_of_m:
        return n_of_m_mask(weight, *kind.n_of_m)
    scores = torch.rand_like(group_scores(weight, granularity))
    kept, _ = groups_kept(shape, granularity, density)
    groups = torch.zeros(scores.numel(), dtype=torch.bool, device=device)
    groups[scores.flatten().argsort()[:kept]] = True
    return expand_groups(groups.view(scores.shape), weight, granularity)


class Branches(nn.Module):
    """Layers beside each other, each with an input of its own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


class PlainMasked(nn.Conv2d):
    """What people write: `F.conv2d(x, weight * mask)`, of an fp32 weight, under autocast."""

    mask: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d, mask: Tensor) -> PlainMasked:
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        layer = cls(*sizes, bias=conv.bias is not None, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        whole = mask.dim() == 4 and mask.shape == conv.weight.shape
        layer.register_buffer("mask", mask.contiguous(memory_format=LAST) if whole else mask)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def branches(shape: Shape, device: str, count: int = _BRANCHES) -> Branches:
    """Return dense fp32 layers of one shape, in channels_last."""
    return Branches([shape.layer(device) for _ in range(count)]).to(memory_format=LAST)


def ours(shape: Shape, mask: Tensor, device: str, count: int = _BRANCHES) -> Branches:
    """Return layers that rtk has masked; `rtk.nn.tune` is still to be called."""
    model = branches(shape, device, count)
    masks = {f"layers.{i}": mask for i in range(len(model.layers))}
    sizes = dict.fromkeys(masks, shape.filters)
    rtk.nn.mask_model(model, rtk.Ticket(masks, sizes))
    return model


def plain_masked(shape: Shape, mask: Tensor, device: str, count: int = _BRANCHES) -> Branches:
    """Return layers that multiply by the mask in every forward."""
    dense = branches(shape, device, count)
    return Branches([PlainMasked.of(layer, mask) for layer in dense.layers])


def ready(
    shape: Shape, device: str, mask: Tensor | None = None, count: int = _BRANCHES
) -> Branches:
    """Return layers with weights in bf16, to which nothing is left to do."""
    model = branches(shape, device, count)
    if mask is not None:
        with torch.no_grad():
            for layer in model.layers:
                layer.weight *= mask
    return model.to(_dtype(device))


def compacted(shape: Shape, mask: Tensor, device: str, inner: bool = False) -> Branches:
    """Return the layers that `rtk.nn.compact` leaves of a channel mask, with ready weights.

    Only their own pruned outputs are gone; with `inner` as many of their inputs are pruned as well,
    as between two layers of a network.
    """
    layer = rtk.nn.MaskedConv2d.from_conv(shape.layer(device), mask)
    before = nn.Conv2d(8, shape.c, 1, bias=False, device=device)
    if inner:
        kept = max(1, round(mask.float().mean().item() * shape.c))
        pruned = torch.arange(shape.c, device=device)[:, None, None, None] < kept
        before = rtk.nn.MaskedConv2d.from_conv(before, pruned)
    whole = nn.Sequential(before, layer, nn.Conv2d(shape.k, 8, 1, device=device)).eval()
    small = rtk.nn.compact(whole, multiple_of=8)[1]
    sizes = small.in_channels, small.out_channels
    return ready(Shape(shape.n, *sizes, shape.size, shape.taps, shape.stride), device)


def times(model: Branches, shape: Shape, device: str) -> list[float]:
    """Return milliseconds a layer of the forward, of the input's and of the weight's gradient.

    A CUDA graph holds `_BRANCHES` layers with weights and inputs of their own, so that little of
    what a layer reads is in the L2 cache, and what the model's forward does for all of them: their
    weights and lists. Graphs of the forward, of forward and input gradient, and of all three are
    replayed `_REPLAYS` times; a gradient is what it adds to the median. So the three make up a
    training step's time.
    """
    inputs = [shape.input(device) for _ in model.layers]
    weights = [layer.weight for layer in model.layers]
    with torch.no_grad(), amp(device):
        grads = [torch.randn_like(out) for out in model(*inputs)]

    def run(leaves: list[Tensor]) -> None:
        with torch.set_grad_enabled(bool(leaves)), amp(device):
            outs = model(*inputs)
        if leaves:
            torch.autograd.grad(outs, leaves, grads)

    sums = [0.0]
    for leaves in ([], inputs, [*inputs, *weights]):
        for tensor in (*inputs, *weights):
            tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
        sums.append(milliseconds(partial(run, leaves), device))
    return [round((after - before) / len(inputs), 5) for before, after in pairwise(sums)]


def assert_right(model: Branches, shape: Shape, mask: Tensor, device: str) -> None:
    """Compare the first layer, value and gradients, with `F.conv2d(x, weight * mask)`."""
    inputs = [shape.input(device).requires_grad_() for _ in model.layers]
    weight = model.layers[0].weight.requires_grad_()
    peer = PlainMasked.of(model.layers[0], mask)
    results = []
    for run in (lambda: model(*inputs)[0], lambda: peer(inputs[0])):
        with amp(device):
            out = run()
        grad = torch.linspace(-1, 1, out.shape[1], device=device, dtype=out.dtype)
        gradients = torch.autograd.grad(
            out, [inputs[0], weight], grad[:, None, None].expand_as(out)
        )
        results.append([out, *gradients])
    for name, mine, theirs in zip(WAYS, *results, strict=True):
        apart = (mine.float() - theirs.float()).abs().max()
        largest = theirs.float().abs().max()
        assert apart <= 0.02 * largest, f"{name}: {apart:.3g} apart, of {largest:.3g}"


def milliseconds(run: Callable[[], object], device: str, *, graphed: bool = True) -> float:
    """Return the median time of a call: of the GPU in a replayed graph or eagerly, or of a CPU."""
    if device == "cpu":
        run()
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    calls, call = 5, run
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        calls, call = 1, graph.replay
    call()
    found = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / calls)
    return statistics.median(found)


@contextmanager
def amp(device: str) -> Iterator[None]:
    """Autocast to bf16 on a GPU; without a cache, which must not outlive a graph's capture."""
    with torch.autocast("cuda", torch.bfloat16, device == "cuda", cache_enabled=False):
        yield


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32
