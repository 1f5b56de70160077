"""Supermask: a network with frozen weights, seen through the top-k masks of learned scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rtk.config import SCOPES, check_sparsity
from rtk.draw.granularity import dense_layers, expand_groups, group_scores, group_sizes
from rtk.draw.omp import groups_kept
from rtk.draw.score_init import initial_scores
from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity
from rtk.ops import FoldLayer, FoldPlan, TopkPlan
from rtk.ops._layout import memory_format
from rtk.ops.prepare_weight import apply_mask
from rtk.ticket import Ticket


class Supermask(nn.Module):
    """Runs `model` with `weight * mask` in place of the weights of its prunable convolutions.

    The model itself stays what it is, its weights bit for bit; its parameters no longer require
    grad, but for those of the head. What a forward pass reads are `masked`, leaves that hold
    weight * mask in the precision of the pass and are written anew by each forward. Their gradient
    is the dense gradient of the masked weight, so neither a pass nor its backward knows of masks.

    Its state_dict is the model's, with a bool `LAYER.mask` beside each weight: what a network
    under a ticket has.

    Args:
        model: the pretrained network, with plain convolutions.
        sparsity: fraction of each layer ("layer"), or of all ("global"), that is pruned, in [0, 1).
        granularity: element, row, kernel, channel or a block.
        scope: layer or global.
        include_first: prune the first convolution too.
        scores: "weight_rank" or "kaiming" (`initial_scores`), or the scores themselves by layer.
        seed: of the starts that are drawn.
        dtype: of a training pass (autocast's); None is the weights' own.

    Attributes:
        layers: layer name -> convolution.
        scores: layer name -> scores, floating, in the shape of `group_scores`; `select` reads them.
        masked: list of leaves, in the order of the layers.
        weights: list of the frozen weights, (K, C, R, S) each.
        kind: the granularity.

    Raises:
        RtkError: for settings out of range, N:M, a masked model, or weights that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        granularity: str = "element",
        scope: str = "layer",
        include_first: bool = False,
        scores: str | Mapping[str, Tensor] = "weight_rank",
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = Granularity.parse(granularity)
        if self.kind.n_of_m:
            raise RtkError(
                f"lmp: {self.kind.name} has no scores to learn yet; take element, row, kernel, "
                "channel or a block, or draw it by omp"
            )
        self.sparsity = check_sparsity(sparsity, self.kind.name)
        check_choice("scope", scope, SCOPES)
        self.scope, self.include_first = scope, include_first
        self.model = model
        self.layers = dense_layers(model, include_first, "lmp")
        self.weights = [layer.weight for layer in self.layers.values()]
        self._fold: FoldPlan | None = None
        self.masked = self._leaves(dtype)
        self.scores = self._start(scores, seed)
        in_order = [_in_memory_order(each) for each in self.scores.values()]
        self._plan = TopkPlan(in_order, self._kept())
        self._groups = [
            _as_before(mask, score)
            for mask, score in zip(self._plan.masks, self.scores.values(), strict=True)
        ]
        self._masks = [
            torch.empty_like(weight, dtype=torch.bool) if self.kind.tile else groups
            for weight, groups in zip(self.weights, self._groups, strict=True)
        ]
        if self._in_one_launch(dtype):
            self._fold_into_leaves()
        model.requires_grad_(False)
        for parameter in head_parameters(model):
            parameter.requires_grad_(True)
        self.select()

    def select(self) -> None:
        """Make the masks anew from the scores, in place: exactly k groups are kept."""
        self._plan()
        if self.kind.tile:
            for mask, groups, weight in zip(self._masks, self._groups, self.weights, strict=True):
                mask.copy_(expand_groups(groups, weight, self.kind.name))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask that broadcasts to the weight, as `select` left it."""
        return dict(zip(self.layers, self._masks, strict=True))

    def ticket(self, meta: Mapping[str, Any] | None = None) -> Ticket:
        """Return the masks as a ticket, on the CPU."""
        spec = getattr(self.model, "spec", None)
        return Ticket(
            {name: mask.cpu().contiguous().clone() for name, mask in self.masks.items()},
            {name: tuple(layer.weight.shape) for name, layer in self.layers.items()},
            {
                "scheme": "lmp",
                "sparsity": self.sparsity,
                "granularity": self.kind.name,
                "scope": self.scope,
                "include_first": self.include_first,
                "model": None if spec is None else spec.to_dict(),
                **(meta or {}),
            },
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self._written() if self._served(x) else self._exact()
        names = (f"{name}.weight" for name in self.layers)
        named = dict(zip(names, weights, strict=True))
        return functional_call(self.model, named, (x,))

    @property
    def spec(self) -> Any:
        """The model's own, for checkpoints."""
        return self.model.spec

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = self.model.state_dict(*args, **kwargs)
        return {**state, **{f"{name}.mask": mask for name, mask in self.masks.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` gave: weights and masks. Scores are the optimiser's to load."""
        state = dict(state_dict)
        for name, mask in self.masks.items():
            mask.copy_(state.pop(f"{name}.mask"))
        return self.model.load_state_dict(state, *args, **kwargs)

    @torch.no_grad()
    def _written(self) -> Sequence[Tensor]:
        """Write the leaves: one launch for all of them, under bf16 on a GPU."""
        if self._fold is not None:
            self._fold()
        else:
            for leaf, weight, mask in zip(self.masked, self.weights, self._masks, strict=True):
                leaf.copy_(apply_mask(weight, mask))
        return self.masked

    def _exact(self) -> list[Tensor]:
        pairs = zip(self.weights, self._masks, strict=True)
        return [apply_mask(weight, mask) for weight, mask in pairs]

    def _served(self, x: Tensor) -> bool:
        """Whether a pass has the precision of the leaves; in another one nothing is learned."""
        device, precision = x.device.type, self.masked[0].dtype
        return precision == self.weights[0].dtype or (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == precision
        )

    def _in_one_launch(self, dtype: torch.dtype | None) -> bool:
        return dtype == torch.bfloat16 and all(
            weight.is_cuda and weight.dtype == torch.float32 and weight.numel()
            for weight in self.weights
        )

    def _leaves(self, dtype: torch.dtype | None) -> list[nn.Parameter]:
        format = torch.channels_last if self._in_one_launch(dtype) else torch.preserve_format
        return [
            nn.Parameter(torch.empty_like(weight, dtype=dtype, memory_format=format))
            for weight in self.weights
        ]

    def _fold_into_leaves(self) -> None:
        pairs = zip(self.weights, self._masks, strict=True)
        self._fold = FoldPlan([FoldLayer(weight.detach(), mask) for weight, mask in pairs])
        for leaf, folded in zip(self.masked, self._fold.folded, strict=True):
            leaf.data = folded.weight

    def _start(self, start: str | Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the first scores, each laid out as its leaf, whose gradient it meets."""
        if isinstance(start, str):
            first = initial_scores(self.weights, self.kind.name, self.scope, start, seed)
        else:
            first = [
                _given(start, name, group_scores(weight, self.kind.name))
                for name, weight in zip(self.layers, self.weights, strict=True)
            ]
        scores = {}
        for name, leaf, values in zip(self.layers, self.masked, first, strict=True):
            like = leaf.detach() if values.shape == leaf.shape else values
            scores[name] = torch.empty_like(like, dtype=values.dtype).copy_(values)
        return scores

    def _kept(self) -> int | list[int]:
        """Return how many groups stay, as `groups_kept` counts them at the start.

        One always does: a layer without weights would never learn.
        """
        scores = list(self.scores.values())
        sizes = [group_sizes(weight, self.kind.name) for weight in self.weights]
        if self.scope == "global":
            return max(1, groups_kept(scores, sizes, self.sparsity))
        return [
            max(1, groups_kept([each], [size], self.sparsity))
            for each, size in zip(scores, sizes, strict=True)
        ]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the head: the module `model.head_name`, or the last nn.Linear."""
    name = getattr(model, "head_name", None)
    if name:
        return list(model.get_submodule(name).parameters())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return list(linear[-1].parameters()) if linear else []


def _given(scores: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in scores or scores[name].shape != like.shape:
        got = tuple(scores[name].shape) if name in scores else "none"
        raise RtkError(f"lmp: the scores of {name!r} must be {tuple(like.shape)}, got {got}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return scores[name].detach().to(like.device, dtype)


def _in_memory_order(scores: Tensor) -> Tensor:
    """Return a contiguous view: what the selection reads without a copy.

    Equal scores are then told apart by their place in memory, which in channels_last is that of
    (K, R, S, C).
    """
    if memory_format(scores) == torch.channels_last:
        return scores.permute(0, 2, 3, 1)
    return scores


def _as_before(mask: Tensor, scores: Tensor) -> Tensor:
    """Undo `_in_memory_order` for what was made of its view."""
    return mask.permute(0, 3, 1, 2) if memory_format(scores) == torch.channels_last else mask
