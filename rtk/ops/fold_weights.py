"""fold_weights: masks and batch norms folded into the weights of a whole model, in one launch.

A class and not a `torch.library` operator: the results live in memory that is allocated once and
overwritten by every call, so that a captured CUDA graph goes on reading fresh weights. An operator
would have to return new tensors, or declare lists of optional tensors as mutated.

K C R S weight; K output channels, C input channels, R S filter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import _compiled, _registry
from rtk.ops._registry import require
from rtk.ops.prepare_weight import FLOATS, apply_mask, check_mask

_ALIGNMENT = 256  # bytes: what CUDA gives an allocation, and more than any kernel asks for


@dataclass(frozen=True, eq=False)
class FoldLayer:
    """A convolution without groups, and the batch norm in eval mode that follows it, if any.

    Args:
        weight: (K, C, R, S), floating (fp32 for the CUDA kernel), under any strides.
        mask: bool, broadcasts to the weight; None keeps everything.
        bias: (K,) of the convolution, or None.
        mean, var: (K,), the running statistics of the batch norm; both, or None.
        gamma, beta: (K,), its weight and bias; each may be None (1 and 0).
        eps: of the batch norm, added to var.
    """

    weight: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        weight = self.weight
        require(
            weight.dim() == 4 and min(weight.shape) > 0,
            "fold_weights: weight must be (K, C, R, S), nothing of it 0, got %s",
            tuple(weight.shape),
        )
        require(
            weight.dtype in FLOATS, "fold_weights: weight must be floating, got %s", weight.dtype
        )
        require(
            (self.mean is None) == (self.var is None),
            "fold_weights: mean and var come together; give both or neither",
        )
        require(
            self.mean is not None or (self.gamma is None and self.beta is None),
            "fold_weights: gamma and beta need mean and var; a batch norm without running "
            "statistics cannot be folded",
        )
        require(self.eps >= 0, "fold_weights: eps must be at least 0, got %s", self.eps)
        if self.mask is not None:
            require(
                self.mask.dtype == torch.bool,
                "fold_weights: mask must be bool, got %s; use mask.bool()",
                self.mask.dtype,
            )
            check_mask("fold_weights", "(K, C, R, S)", weight, self.mask)
        for name in ("bias", "mean", "var", "gamma", "beta"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            require(
                tensor.shape == weight.shape[:1],
                "fold_weights: %s must be (K,) = (%s,), got %s",
                name,
                weight.shape[0],
                tuple(tensor.shape),
            )
            require(
                tensor.dtype == weight.dtype and tensor.device == weight.device,
                "fold_weights: %s is %s on %s and the weight %s on %s; move it with .to()",
                name,
                tensor.dtype,
                tensor.device,
                weight.dtype,
                weight.device,
            )

    def tensors(self) -> Iterator[Tensor | None]:
        for field in fields(self):
            if field.name != "eps":
                yield getattr(self, field.name)


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """What a layer became; views into the plan's memory.

    Attributes:
        weight: (K, C, R, S) in the plan's dtype, channels_last: weight * mask * gamma / sqrt(var +
            eps).
        turned: (C, K, R, S), channels_last: `turn_filter(weight)`, for the input gradient.
        bias: (K,), fp32 (fp64 from fp64): beta + (bias - mean) * gamma / sqrt(var + eps).
    """

    weight: Tensor
    turned: Tensor
    bias: Tensor


class FoldPlan:
    """Fold all layers of a model at every call, into the same memory.

    Args:
        layers: at least one, all of one dtype on one device. The plan keeps these tensors; what
            they hold is read anew by every call.
        dtype: of the folded weights; bf16 is what the CUDA kernel writes.

    Raises:
        RtkError: if the layers do not go together.

    On a GPU a call is one launch without synchronisation. Addresses of the tensors are sent there
    by the first call, and again when one changed (`parameter.data = ...`), which cannot be done
    while a CUDA graph is captured: call the plan once before.
    """

    def __init__(self, layers: Sequence[FoldLayer], dtype: torch.dtype = torch.bfloat16) -> None:
        require(len(layers) > 0, "fold_weights: there are no layers")
        require(dtype in FLOATS, "fold_weights: dtype must be floating, got %s", dtype)
        first = layers[0].weight
        for layer in layers:
            require(
                layer.weight.dtype == first.dtype and layer.weight.device == first.device,
                "fold_weights: all layers must be %s on %s, got %s on %s",
                first.dtype,
                first.device,
                layer.weight.dtype,
                layer.weight.device,
            )
        self.layers = list(layers)
        self._tensors = [tensor for layer in layers for tensor in layer.tensors()]
        self.dtype = dtype
        self.device = first.device
        exact = torch.promote_types(first.dtype, torch.float32)
        shapes = [layer.weight.shape for layer in layers]
        self._table = FoldTable(shapes, dtype, exact, first.device)
        self.folded = self._table.folded
        self._addresses: list[int] = []

    def __call__(self) -> list[FoldedLayer]:
        """Fold again; return `folded`, the same tensors every time, in the order of the layers."""
        if self._backend() == "cuda":
            self._run_cuda()
        else:
            for layer, folded in zip(self.layers, self.folded, strict=True):
                fold_reference(layer, folded)
        return self.folded

    @property
    def moved(self) -> bool:
        """Whether the next call has to send addresses, which a capture does not allow."""
        return self._backend() == "cuda" and self._now() != self._addresses

    def _now(self) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in self._tensors]

    def _why_not_cuda(self) -> str | None:
        weight = self.layers[0].weight
        return (
            _compiled.why_not_cuda(weight)
            or _compiled.why_not_dtype(weight, "weight", torch.float32)
            or _compiled.why_not_dtype(self.folded[0].weight, "the result", torch.bfloat16)
        )

    def _backend(self) -> str:
        forced, reason = _registry._forced, self._why_not_cuda()
        if forced is None:
            return "reference" if reason else "cuda"
        if forced not in ("reference", "cuda"):
            raise RtkError(f"fold_weights: there is no backend {forced!r}, only cuda, reference")
        if forced == "cuda" and reason:
            raise RtkError(f"fold_weights: the forced backend 'cuda' cannot: {reason}")
        return forced

    def _run_cuda(self) -> None:
        addresses = self._now()
        if addresses != self._addresses:
            self._table.send(table_row(layer) for layer in self.layers)
            self._addresses = addresses
        self._table.launch()


class FoldTable:
    """What the CUDA kernel reads: where the layers are, and where they go, in one arena.

    Args:
        shapes: (K, C, R, S) of the layers.
        dtype: of the folded weights.
        exact: of the folded biases.
        device: of all.
    """

    def __init__(
        self,
        shapes: Iterable[torch.Size],
        dtype: torch.dtype,
        exact: torch.dtype,
        device: torch.device,
    ) -> None:
        weights, biases = _Arena(dtype, device), _Arena(exact, device)
        shapes = list(shapes)
        for k, c, r, s in shapes:
            weights.reserve(k, r, s, c)
            weights.reserve(c, r, s, k)
            biases.reserve(k)
        of_weights, of_biases = weights.views(), biases.views()
        self.device = device
        self.folded = [
            FoldedLayer(
                next(of_weights).permute(0, 3, 1, 2),
                next(of_weights).permute(0, 3, 1, 2),
                next(of_biases),
            )
            for _ in shapes
        ]
        self._memory: Tensor | None = None
        self._tiles = 0

    def send(self, rows: Iterable[list[int]]) -> None:
        """Tell the GPU where the layers are: a `table_row` each, in the order of the shapes.

        Raises:
            RtkError: while a CUDA graph is being captured.
        """
        require(
            not torch.cuda.is_current_stream_capturing(),
            "fold_weights: a tensor of the model moved (or the plan was never called) and a CUDA "
            "graph is being captured; call the plan once before",
        )
        table, tiles = [], 0
        for row, folded in zip(rows, self.folded, strict=True):
            out = [t.data_ptr() for t in (folded.weight, folded.turned, folded.bias)]
            table.append([*row[:_OUT], *out, *row[_OUT:], tiles])
            tiles += _tiles_of(folded.weight.shape)
        host = torch.tensor(table, dtype=torch.int64).pin_memory()
        if self._memory is None:
            self._memory = torch.empty_like(host, device=self.device)
        # Into the same memory: a graph that was captured before reads the new addresses.
        self._memory.copy_(host, non_blocking=True)
        self._tiles = tiles

    def launch(self) -> None:
        """Fold all layers, on the current stream."""
        assert self._memory is not None, "send comes first"
        stream = torch.cuda.current_stream(self.device).cuda_stream
        _compiled._C.fold_weights_cuda(
            self._memory.data_ptr(), len(self.folded), self._tiles, self.device.index, stream
        )


class _Arena:
    """One allocation for many dense tensors of a dtype, each aligned."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.shapes: list[tuple[int, ...]] = []
        self.offsets: list[int] = []
        self.size = 0

    def reserve(self, *shape: int) -> None:
        step = _ALIGNMENT // self.dtype.itemsize
        self.shapes.append(shape)
        self.offsets.append(self.size)
        self.size += -(-torch.Size(shape).numel() // step) * step

    def views(self) -> Iterator[Tensor]:
        memory = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for shape, offset in zip(self.shapes, self.offsets, strict=True):
            yield memory[offset : offset + torch.Size(shape).numel()].view(shape)


@torch.no_grad()
def fold_reference(layer: FoldLayer, folded: FoldedLayer) -> None:
    """Fold one layer in plain PyTorch: all in the weight's precision, at least fp32."""
    exact = torch.promote_types(layer.weight.dtype, torch.float32)
    weight = layer.weight.to(exact)
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if layer.bias is None else layer.bias.to(exact)
    if layer.mean is not None and layer.var is not None:
        deviation = (layer.var.to(exact) + layer.eps).sqrt()
        gamma = torch.ones_like(bias) if layer.gamma is None else layer.gamma.to(exact)
        scale = gamma / deviation
        weight = weight * scale[:, None, None, None]
        bias = (bias - layer.mean.to(exact)) * scale
        if layer.beta is not None:
            bias = bias + layer.beta.to(exact)
    if layer.mask is not None:
        weight = apply_mask(weight, layer.mask)
    results = folded.weight, folded.turned, folded.bias
    with torch.autograd._unsafe_preserve_version_counter(results):  # as the kernel leaves it
        folded.weight.copy_(weight)
        folded.turned.copy_(weight.flip(2, 3).transpose(0, 1))
        folded.bias.copy_(bias)


# What follows mirrors `Layer` and the tiles of csrc/cuda/fold_weights.cu.
_OUT = 7  # where in a row the results' addresses go


def _tiles_of(shape: torch.Size) -> int:
    """Return how many tiles the kernel cuts a weight into."""
    k, c, r, s = shape
    side = 64 if r * s == 1 else 32
    return -(-k // side) * -(-c // side) * -(-(r * s) // 9)


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides, 0 where they mean nothing, so that equal layouts look equal."""
    return [0 if n == 1 else step for n, step in zip(tensor.shape, tensor.stride(), strict=True)]


def table_row(layer: FoldLayer) -> list[int]:
    """Return how a layer lies in memory; valid as long as its tensors stay where they are."""
    weight, mask = layer.weight, layer.mask
    bits = struct.unpack("<i", struct.pack("<f", layer.eps))[0]
    return [
        *(0 if t is None else t.data_ptr() for t in layer.tensors()),
        *weight.shape,
        *_strides(weight),
        *((0,) * 4 if mask is None else _strides(mask.expand(weight.shape))),
        bits,
    ]
