"""What bench_lmp_step.py compares: steps that learn a mask, and dense training beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtk
from rtk.draw import prunable_layers

Step = Callable[[Tensor, Tensor], Tensor]
SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}


def _amp(model: nn.Module) -> torch.dtype | None:
    return torch.bfloat16 if next(model.parameters()).is_cuda else None


def lmp_step(model: nn.Module, sparsity: float) -> Step:
    return rtk.draw.make_lmp_step(model, sparsity=sparsity, amp=_amp(model), **SGD)


def dense(model: nn.Module, graph: Any) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=_amp(model) is not None)
    return rtk.train.make_step(model, optimizer, amp=_amp(model), graph=graph)


class GetSubnet(torch.autograd.Function):
    """As hidden-networks has it: sort, mark, and let the gradient through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int) -> Tensor:
        out = scores.clone()
        _, order = scores.flatten().sort()
        pruned = scores.numel() - kept
        flat = out.flatten()
        flat[order[:pruned]] = 0
        flat[order[pruned:]] = 1
        return flat.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SubnetConv(nn.Conv2d):
    """hidden-networks' convolution, around a pretrained one."""

    def __init__(self, conv: nn.Conv2d, sparsity: float) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=False,
            device="meta",
        )
        self.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
        scores = torch.empty(conv.weight.shape, device=conv.weight.device)
        self.scores = nn.Parameter(nn.init.kaiming_uniform_(scores, a=5**0.5))
        self.kept = scores.numel() - round(sparsity * scores.numel())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * GetSubnet.apply(self.scores, self.kept)
        return F.conv2d(x, weight, None, self.stride, self.padding)


def hidden_networks(model: nn.Module, sparsity: float) -> Step:
    """The step of its users, and what costs them nothing: bf16, channels_last, fused SGD."""
    for name, conv in prunable_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SubnetConv(conv, sparsity))
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, SubnetConv):
            module.scores.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    amp = _amp(model)
    optimizer = torch.optim.SGD(trained, **SGD, fused=amp is not None)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


PEERS: dict[str, Callable[[nn.Module, float], Step]] = {
    "rtk": lmp_step,
    "dense-graphed": lambda model, _: dense(model, "auto"),
    "dense-eager": lambda model, _: dense(model, False),
    "hidden-networks": hidden_networks,
}
