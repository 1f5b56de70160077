"""ScoreSGD: SGD on the scores of a Supermask, and on its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from rtk.draw.supermask import Supermask, head_parameters
from rtk.ops import score_step


class ScoreSGD(torch.optim.Optimizer):
    """SGD with momentum whose step moves scores and makes the masks anew.

    Its parameters are the leaves `supermask.masked`, which autograd fills with dense gradients. The
    scores behind them are its state, so a checkpoint of the optimiser holds them. The head is a
    second group, of plain SGD. All is done without synchronising, so a CUDA graph can hold it.

    Args:
        supermask: the network.
        lr, momentum, weight_decay, nesterov: as for torch.optim.SGD, for both groups.
    """

    def __init__(
        self,
        supermask: Supermask,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
    ) -> None:
        self._supermask = supermask
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "capturable": True,
        }
        groups = [supermask.masked, head_parameters(supermask.model)]
        super().__init__([{"params": group} for group in groups if group], defaults)
        for leaf, scores in zip(supermask.masked, supermask.scores.values(), strict=True):
            self.state[leaf] = {"scores": scores, "momentum_buffer": torch.zeros_like(scores)}
        for parameter in groups[1]:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter.detach())}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one step; a leaf or parameter without a gradient stays as it is."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
            if trained[0].is_cuda and not isinstance(group["lr"], Tensor):
                # As under a graph: what that launches must have been loaded before it is captured.
                settings["lr"] = torch.full((), group["lr"], device=trained[0].device)
            if "scores" in self.state[trained[0]]:
                self._step_scores(trained, nesterov=group["nesterov"], **settings)
            else:
                self._step_head(trained, nesterov=group["nesterov"], **settings)

    def _step_scores(self, trained: list[Tensor], **settings: Any) -> None:
        weight_of = dict(zip(self._supermask.masked, self._supermask.weights, strict=True))
        score_step(
            [self.state[leaf]["scores"] for leaf in trained],
            [self.state[leaf]["momentum_buffer"] for leaf in trained],
            [weight_of[leaf] for leaf in trained],  # type: ignore[index]
            [_gradient(leaf) for leaf in trained],
            tile=self._supermask.kind.tile,
            **settings,
        )
        self._supermask.select()

    def _step_head(self, trained: list[Tensor], **settings: Any) -> None:
        sgd(
            trained,
            [_gradient(parameter) for parameter in trained],
            [self.state[parameter]["momentum_buffer"] for parameter in trained],
            fused=True if all(p.is_cuda for p in trained) else None,
            foreach=False,
            dampening=0.0,
            maximize=False,
            **settings,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load in place: the scores stay where the masks are made from, and in their own dtype."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            for name, value in values.items():
                self.state[parameters[index]][name].copy_(value)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
