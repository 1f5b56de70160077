"""Whole networks: all convolutions of a ResNet, the ResNet itself, and inference with a ticket."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attack_peers import network
from fused_conv2d_peers import cudnn
from masked_conv2d_layers import (
    LAST,
    Branches,
    PlainMasked,
    Shape,
    amp,
    milliseconds,
    shapes_of,
)
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_batch_norm

import rtk

# arch, stem, image size, batch
TRAINED = {
    "resnet18-32px-128": ("resnet18", "3x3", 32, 128),
    "resnet18-32px-512": ("resnet18", "3x3", 32, 512),
    "resnet50-224px-128": ("resnet50", "7x7", 224, 128),
}
TINY = ("resnet18", "3x3", 8, 2)  # for a CPU
KINDS = ("rtk", "masked", "unmasked")
INFERENCE = ("model", "fused", "compiled", "cudnn")
_SPARSITY = 0.9


def _masked(model: nn.Module, kind: str, masks: dict[str, Tensor]) -> nn.Module:
    """Mask a model by rtk, as people do, or not at all."""
    if kind == "rtk":
        rtk.nn.mask_model(model, rtk.Ticket(masks))
    elif kind == "masked":
        for name, mask in masks.items():
            parent, _, child = name.rpartition(".")
            layer = PlainMasked.of(model.get_submodule(name), mask)
            setattr(model.get_submodule(parent), child, layer)
    return model


def _element_masks(model: nn.Module, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.rand(layer.weight.shape, device=device) > _SPARSITY
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }


def _both_modes(run: Callable[[], object], device: str) -> dict[str, float]:
    graph = milliseconds(run, device)
    eager = milliseconds(run, device, graphed=False)
    return {"graph": round(graph, 4), "eager": round(eager, 4)}


def convolutions(case: tuple[str, str, int, int], kind: str, device: str) -> dict[str, float]:
    """Time forward and backward of all convolutions of a network, element masks, 90 % zeros.

    Each has its own input, as the network has it; all gradients but the images' are computed.
    `kind` is rtk (after `rtk.nn.tune`), masked (`F.conv2d(x, w * m)`) or unmasked.
    """
    arch, _, size, batch = case
    shapes = shapes_of(arch, size, batch)
    model = Branches([shape.layer(device) for shape in shapes]).to(memory_format=LAST)
    model = _masked(model, kind, _element_masks(model, device))
    inputs = [_activation(shape, device) for shape in shapes]
    if kind == "rtk" and device == "cuda":
        rtk.nn.tune(model, *inputs)
    with torch.no_grad(), amp(device):
        grads = [torch.randn_like(out) for out in model(*inputs)]
    leaves = [x for x in inputs if x.requires_grad] + list(model.parameters())

    def step() -> None:
        with amp(device):
            outs = model(*inputs)
        torch.autograd.grad(outs, leaves, grads)

    return _both_modes(step, device)


def _activation(shape: Shape, device: str) -> Tensor:
    return shape.input(device).requires_grad_(shape.c > 3)


def whole(case: tuple[str, str, int, int], kind: str, device: str) -> dict[str, float]:
    """Time forward, loss and backward of rtk's ResNet in train mode, masked as `convolutions`."""
    arch, stem, size, batch = case
    model = network(arch, stem, 1000, ours=True).to(device).to(memory_format=LAST)
    model = _masked(model, kind, _element_masks(model, device))
    x = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=LAST)
    y = torch.randint(1000, (batch,), device=device)
    if kind == "rtk" and device == "cuda":
        rtk.nn.tune(model.eval(), x)
    parameters = list(model.train().parameters())

    def step() -> None:
        with amp(device):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        torch.autograd.grad(loss, parameters)

    return _both_modes(step, device)


def inference(case: tuple[int, int], kind: str, device: str) -> dict[str, float]:
    """Time a ResNet-18 with a ticket of 90 % dead 64-blocks in each layer, or a dense peer.

    All of them read fp32 images, normalise them, and are checked to give the same logits. `kind`:
        model       the masked model after `rtk.nn.tune`, under autocast
        fused       `rtk.nn.fuse` of it: batch norm folded in, dead blocks skipped where it pays
        compiled    torch.compile of the dense network in bf16, batch norm folded in
        cudnn       cuDNN's fused convolutions (bias, skip, ReLU) over the same weights
    """
    batch, size = case
    torch.manual_seed(0)
    dense = network("resnet18", "3x3", 10, ours=True)
    ticket = rtk.draw.omp(dense, _SPARSITY, "block-64", scope="layer")
    masked = ticket.apply(dense).to(device).to(memory_format=LAST).eval()
    x = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=LAST)
    plain = network("resnet18", "3x3", 10, ours=False).to(device).to(memory_format=LAST)
    plain[1].load_state_dict(rtk.nn.fold(copy.deepcopy(masked)).state_dict())
    folded = nn.Sequential(plain[0], fold_batch_norm(plain[1].eval()))
    forward = _forward(kind, masked, folded, x)
    with torch.no_grad():
        wanted = folded(x)
        apart = ((forward().float() - wanted).abs().max() / wanted.abs().max()).item()
        assert apart < 0.05, f"{kind}: its logits are {apart:.2g} of the largest apart"
        return _both_modes(forward, device)


def _forward(
    kind: str, masked: nn.Module, folded: nn.Sequential, x: Tensor
) -> Callable[[], Tensor]:
    device = x.device.type
    if kind == "model":
        if device == "cuda":
            rtk.nn.tune(masked, x)

        def under_autocast() -> Tensor:
            with amp(device):
                return masked(x)

        return under_autocast
    if kind == "fused":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        fused = rtk.nn.fuse(masked, x, dtype=dtype, graph=False)  # captured as the others are
        return lambda: fused(x)
    if kind == "compiled":
        half = _BFloat16(folded)
        compiled = torch.compile(half) if device == "cuda" else half
        return lambda: compiled(x)
    peer = _Cudnn(folded)
    return lambda: peer(x)


class _BFloat16(nn.Module):
    """A copy of a network in bf16, for fp32 images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.bfloat16())


class _Cudnn:
    """A ResNet-18 over folded weights by cuDNN's fused operators, or on a CPU by torch's."""

    def __init__(self, folded: nn.Sequential) -> None:
        self.normalise, network = folded
        self.on_gpu = next(network.parameters()).is_cuda
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.layers = {
            name: (
                conv.weight.detach().to(self.dtype).contiguous(memory_format=LAST),
                conv.bias.detach().to(self.dtype),
                {"stride": conv.stride[0], "padding": conv.padding[0]},
            )
            for name, conv in network.named_modules()
            if isinstance(conv, nn.Conv2d)
        }
        self.head = copy.deepcopy(network.fc).to(self.dtype)

    def conv(self, name: str, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Any:
        weight, bias, options = self.layers[name]
        if self.on_gpu:
            return cudnn(x, weight, bias, residual, relu=relu, **options)
        z = nn.functional.conv2d(x, weight, bias, **options)
        z = z if residual is None else z + residual
        return z.relu() if relu else z

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv("conv1", self.normalise(x).to(self.dtype))
        for name in [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]:
            short = f"{name}.downsample.0"
            identity = self.conv(short, x, relu=False) if short in self.layers else x
            x = self.conv(f"{name}.conv2", self.conv(f"{name}.conv1", x), identity)
        return self.head(x.mean((2, 3)))


def networks_of(device: str) -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """Return names and what measures them, for the table."""
    trained = TRAINED if device == "cuda" else {"tiny": TINY}
    batch, size = (256, 32) if device == "cuda" else (2, 8)
    cases: list[tuple[str, Callable[..., dict[str, float]], Any, tuple[str, ...]]] = [
        (f"{name}/{part}", run, case, KINDS)
        for name, case in trained.items()
        for part, run in (("convolutions", convolutions), ("network", whole))
    ]
    cases.append((f"resnet18-{size}px-{batch}/inference", inference, (batch, size), INFERENCE))
    return [
        (f"{name}/{kind}", partial(run, case, kind, device))
        for name, run, case, kinds in cases
        for kind in kinds
    ]
