"""The optimiser and its schedule, made from a TrainConfig."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rtk.config import TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.SGD:
    """Return SGD over the parameters that require grad: fused, in one kernel, on a GPU."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True if trained and all(_fusible(p) for p in trained) else None,
    )


def _fusible(parameter: Tensor) -> bool:
    return parameter.is_cuda and parameter.is_floating_point()


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Return the rate at `epoch` (fractional inside an epoch): a pure function, nothing to save.

    Multistep changes at whole epochs, cosine falls to 0 at the last one; a linear warm-up from 0
    scales either.
    """
    rate = config.lr
    if config.schedule == "multistep":
        rate *= config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    elif config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / max(1, config.epochs))))
    if epoch < config.warmup_epochs:
        rate *= epoch / config.warmup_epochs
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, as a number: a captured step reads it before each replay.

    A group with an `lr_factor` gets the rate times that.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Lay the optimiser's state out in memory as its parameters are; values stay as they are.

    A checkpoint gives momentum back contiguous. Beside a channels_last weight that is slower, and
    the fused SGD refuses it.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                laid_out = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state[name] = laid_out.copy_(value)


def why_not_captured(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why a CUDA graph cannot hold a step of `optimizer`, or None where it can."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SGD):
        if any(group["differentiable"] for group in optimizer.param_groups):
            return f"{name} is differentiable"
        if not all(_fusible(p) for group in optimizer.param_groups for p in group["params"]):
            return f"{name} has parameters that are not floating ones on the GPU"
        return None
    if all(group.get("capturable", False) for group in optimizer.param_groups):
        return None
    return f"{name} is not capturable; make it with capturable=True, or use SGD"


class DeviceRates:
    """The learning rates of an optimiser as tensors on the device, for a captured step to read.

    Schedules go on setting `group["lr"]` to numbers, and a state_dict holds numbers. A rate that
    is a tensor on the device already is read as it is.

    Args:
        optimizer: SGD, or one with capturable=True.
        device: where its parameters lie.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._values: list[float | None] = []
        self._tensors: list[Tensor] = []

    def refresh(self) -> None:
        """Copy the rates that have changed to the device, without waiting for it."""
        groups = self._optimizer.param_groups
        while len(self._tensors) < len(groups):
            self._tensors.append(torch.zeros((), device=self._device))
            self._values.append(None)
        for index, group in enumerate(groups):
            rate = group["lr"]
            if isinstance(rate, Tensor) and rate.is_cuda:
                continue
            if float(rate) != self._values[index]:
                self._values[index] = float(rate)
                self._tensors[index].fill_(float(rate))  # a kernel's argument: nothing to wait for

    def load(self) -> None:
        """Run the kernels of `step` on idle weights, so that none is loaded inside a capture."""
        if not isinstance(self._optimizer, torch.optim.SGD):
            return  # a capturable one has been using its own kernels
        for group in self._optimizer.param_groups:
            for dtype in {parameter.dtype for parameter in group["params"]}:
                weight = torch.zeros(1, dtype=dtype, device=self._device)
                weight.grad = torch.zeros_like(weight)
                torch.optim.SGD([weight], lr=0.0, momentum=group["momentum"], fused=True).step()

    def step(self) -> None:
        """Step the optimiser with the rates on the device; `refresh` must have come before.

        SGD takes its fused kernel, the only one of its ways that reads a rate from memory.
        """
        with contextlib.ExitStack() as stack:
            for group, rate in zip(self._optimizer.param_groups, self._tensors, strict=True):
                changes: dict[str, object] = {}
                if not (isinstance(group["lr"], Tensor) and group["lr"].is_cuda):
                    changes["lr"] = rate
                if isinstance(self._optimizer, torch.optim.SGD):
                    changes |= {"fused": True, "foreach": False}
                stack.enter_context(_changed(group, changes))
            self._optimizer.step()


@contextlib.contextmanager
def _changed(group: dict[str, object], changes: dict[str, object]) -> Iterator[None]:
    before = {name: group[name] for name in changes}
    group.update(changes)
    try:
        yield
    finally:
        group.update(before)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[object]:
    """Return what a captured step of `optimizer` depends on: its settings but the rate, its state.

    State counts by where it lies in memory, so loading a state_dict changes this.
    """
    found: list[object] = []
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name == "params":
                found += (id(parameter) for parameter in value)
            elif isinstance(value, Tensor):
                found.append((name, value.data_ptr()))
            elif name != "lr":
                found.append((name, value))
    for state in optimizer.state.values():
        found += (value.data_ptr() for value in state.values() if isinstance(value, Tensor))
    return found
