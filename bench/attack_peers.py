"""Adversarial training steps to compare with: what people use, and the best written by hand.

Each maker takes (model, optimizer, attack) and returns step(x, y) -> loss. All climb the same PGD:
Linf, random start; batch norm is in eval while attacking, but where a maker says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import rtk

Step = Callable[[Tensor, Tensor], Tensor]


def network(arch: str, stem: str, classes: int, *, ours: bool) -> nn.Module:
    """Return a ResNet that normalises inside: rtk's, or for the peers torchvision's plain one."""
    mean, std = (0.5,) * 3, (0.25,) * 3
    if ours:
        return rtk.models.create(rtk.models.ModelSpec(arch, stem, 1.0, classes, mean, std))
    plain = getattr(torchvision.models, arch)(num_classes=classes)
    if stem == "3x3":
        plain.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        plain.maxpool = nn.Identity()
    return nn.Sequential(_Normalise(mean, std), plain)


class _Normalise(nn.Module):
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, attack: rtk.attacks.PGD) -> Step:
    """rtk's step as users call it."""
    return rtk.train.make_step(model, optimizer, attack)


def ours_natural(model: nn.Module, optimizer: torch.optim.Optimizer, _: rtk.attacks.PGD) -> Step:
    """rtk's natural step."""
    return rtk.train.make_step(model, optimizer)


def natural(model: nn.Module, optimizer: torch.optim.Optimizer, _: rtk.attacks.PGD) -> Step:
    """Natural training, compiled, in one CUDA graph, bf16."""
    compiled = torch.compile(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(compiled(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return _graphed(step)


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    attack: rtk.attacks.PGD,
    *,
    compiled: bool = True,
    graphed: bool = True,
    frozen: bool = True,
) -> Step:
    """The expert's best: compiled, bf16, one graph, attacking a view without weight gradients.

    Batch norm is in eval while attacking. Each of the three can be left out, to see what it gives:
    without the view the model itself is attacked, in train mode, as loops from a tutorial do.
    """
    view = _frozen_view(model) if frozen else model
    if compiled:
        model, view = torch.compile(model), torch.compile(view)

    def move(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        delta = (x_adv + attack.step_size * grad.sign() - x).clamp(-attack.eps, attack.eps)
        return (x + delta).clamp(0, 1)

    update = torch.compile(move) if compiled else move

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            x_adv = (x + torch.empty_like(x).uniform_(-attack.eps, attack.eps)).clamp(0, 1)
            for _ in range(attack.steps):
                x_adv = x_adv.detach().requires_grad_()
                loss = F.cross_entropy(view(x_adv).float(), y)
                (grad,) = torch.autograd.grad(loss, x_adv)
                x_adv = update(x_adv.detach(), grad, x)
            loss = F.cross_entropy(model(x_adv).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return _graphed(step) if graphed else step


def _frozen_view(model: nn.Module) -> nn.Module:
    """The same weights and buffers, without gradients and with batch norm in eval."""
    view = copy.deepcopy(model).eval().requires_grad_(False)
    for mine, theirs in zip(view.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data  # a view: no copy of the weights
    for module, original in zip(view.modules(), model.modules(), strict=True):
        module._buffers = original._buffers
    return view


def torchattacks(
    model: nn.Module, optimizer: torch.optim.Optimizer, attack: rtk.attacks.PGD
) -> Step:
    """torchattacks' PGD in a plain loop, fp32 with TF32, as its users run it."""
    package = pytest.importorskip("torchattacks")
    pgd = package.PGD(model, eps=attack.eps, alpha=attack.step_size, steps=attack.steps)

    def logits(x: Tensor, y: Tensor) -> Tensor:
        model.eval()
        x_adv = pgd(x, y)
        model.train()
        return model(x_adv)

    return _eager_tf32(optimizer, logits)


def robustness(model: nn.Module, optimizer: torch.optim.Optimizer, attack: rtk.attacks.PGD) -> Step:
    """robustness' model in its loop, fp32 with TF32; it normalises a second time, by nothing."""
    attacker = pytest.importorskip("robustness.attacker")
    dataset = SimpleNamespace(mean=torch.zeros(3), std=torch.ones(3))
    wrapped = attacker.AttackerModel(_Plain(model), dataset).to(next(model.parameters()).device)
    options = {
        "constraint": "inf",
        "eps": attack.eps,
        "step_size": attack.step_size,
        "iterations": attack.steps,
        "random_start": True,
        "use_best": False,  # faster, and what the others do
    }

    def logits(x: Tensor, y: Tensor) -> Tensor:
        output, _ = wrapped(x, y, make_adv=True, **options)
        return output

    return _eager_tf32(optimizer, logits)


class _Plain(nn.Module):
    """A model that takes what robustness asks of its own ones, and ignores it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **_: bool) -> Tensor:
        return self.model(x)


def _eager_tf32(
    optimizer: torch.optim.Optimizer, adversarial_logits: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(adversarial_logits(x, y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _graphed(step: Step) -> Step:
    """One CUDA graph over the whole step, with static inputs."""
    held: dict[str, Tensor] = {}
    graph = torch.cuda.CUDAGraph()

    def run(x: Tensor, y: Tensor) -> Tensor:
        if not held:
            held.update(x=torch.empty_like(x), y=torch.empty_like(y))
            held["x"].copy_(x), held["y"].copy_(y)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(held["x"], held["y"])
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                held["loss"] = step(held["x"], held["y"])
        held["x"].copy_(x), held["y"].copy_(y)
        graph.replay()
        return held["loss"]

    return run


PEERS: dict[str, Callable[..., Step]] = {
    "robustness": robustness,
    "torchattacks": torchattacks,
    "bf16": partial(by_hand, compiled=False, graphed=False, frozen=False),
    "bf16-compiled": partial(by_hand, graphed=False, frozen=False),
    "bf16-compiled-graphed": partial(by_hand, frozen=False),
    "by-hand": by_hand,
    "rtk": ours,
    "natural-by-hand": natural,
    "natural-rtk": ours_natural,
}
OURS = ("rtk", "natural-rtk")
