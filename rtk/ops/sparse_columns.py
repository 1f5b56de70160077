"""sparse_columns: the weights of a convolution that are not zero, listed for `sparse_conv2d`.

K output channels, C input channels, R S filter. Made on the device whenever the weights change, of
a size that does not depend on them: there is room for every weight, so a list never overflows, and
a captured graph follows a mask that is updated in place.

Sixteen output channels, a panel, share a list for each chunk of 128 input channels, of the columns
(r, s, c) in which any of them has a weight. csrc/cuda/sparse_conv2d.h describes the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._registry import Op, require

TAPS = 3  # rows and columns of a filter, at most
_PANEL, _CHUNK, _STEP = 16, 128, 32
_HEADER, _STEP_WORDS = 4, _STEP + _STEP * _PANEL // 2
_ROW = 9  # from a place's row of the filter to the next
_BANKS = 8  # in which the kernel's reads meet, see csrc/cuda/sparse_columns.cu


@overload
def sparse_columns(weight: Tensor) -> Tensor: ...
@overload
def sparse_columns(weight: Sequence[Tensor]) -> list[Tensor]: ...
def sparse_columns(weight: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Return the lists by which `sparse_conv2d` multiplies by the weights that are not zero.

    For the input gradient, ask with the turned weight (`turn_filter`).

    Args:
        weight: (K, C, R, S), bf16, the prepared weight (NaN is not 0, -0 is); R and S at most 3.
            Or several of them, on one device: their lists are made by one launch.

    Returns:
        (ceil(K / 16) * ceil(C / 128), words of a list) int32, dense, for each weight; what lies
        beyond a list's last step is undefined. It takes 1.13 times the weight's memory, and it does
        not require grad.

    Raises:
        RtkError: if a shape, dtype or device does not fit.
    """
    if isinstance(weight, Tensor):
        return _op([weight])[0]
    return _op(list(weight)) if weight else []


def lists_shape(size: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the lists of a weight of `size` (K, C, R, S)."""
    k, c, r, s = size
    steps = -(-r * s * min(c, _CHUNK) // _STEP)
    return -(-k // _PANEL) * -(-c // _CHUNK), _HEADER + steps * _STEP_WORDS


def listed_share(columns: Tensor, size: Sequence[int]) -> float:
    """Return what the lists hold, padding included, of the columns of all panels; synchronises."""
    k, c, r, s = size
    return columns[:, 0].sum().item() * _STEP / (-(-k // _PANEL) * c * r * s)


def dense_weight(columns: Tensor, size: Sequence[int]) -> Tensor:
    """Return the weight (K, C, R, S), fp32, that the lists hold: what the reference runs on."""
    k, c, r, s = size
    width = min(c, _CHUNK)
    steps = columns[:, _HEADER:].unflatten(1, (-1, _STEP_WORDS))
    places = steps[..., :_STEP].flatten(1)
    values = _from_fragments(steps[..., _STEP:]).float()
    listed = torch.arange(places.shape[1], device=columns.device) < columns[:, :1] * _STEP
    places = torch.where(listed, places, 0)
    tap = places // _CHUNK
    column = (tap // _ROW * s + tap % _ROW) * width + places % _CHUNK
    weight = values.new_zeros(len(columns), r * s * width, _PANEL)
    weight.scatter_add_(
        1,
        column.long()[..., None].expand(-1, -1, _PANEL),
        values.where(listed[..., None], 0),
    )
    # (panels, chunks, R, S, width, 16) -> (panels, 16, chunks, width, R, S)
    weight = weight.view(-(-k // _PANEL), -1, r, s, width, _PANEL).permute(0, 5, 1, 4, 2, 3)
    return weight.flatten(2, 3).flatten(0, 1)[:k, :c]


def _check(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        require(
            weight.dtype == torch.bfloat16,
            "sparse_columns: weight must be torch.bfloat16, got %s; use prepare_weight",
            weight.dtype,
        )
        require(
            weight.dim() == 4 and min(weight.shape) > 0 and max(weight.shape[2:]) <= TAPS,
            "sparse_columns: weight must be (K, C, R, S), none of them 0, R and S at most 3, got "
            "%s",
            tuple(weight.shape),
        )
        require(
            weight.device == weights[0].device,
            "sparse_columns: weights are on %s and %s; call it once a device",
            weights[0].device,
            weight.device,
        )


def _fake(weights: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.empty(lists_shape(weight.shape), dtype=torch.int32, device=weight.device)
        for weight in weights
    ]


_op = Op("sparse_columns(Tensor[] weights) -> Tensor[]", _check, _fake)
_op.no_gradient()


@_op.implementation("cuda", lambda weights: _compiled.why_not_cuda(*weights))
def _cuda(weights: Sequence[Tensor]) -> list[Tensor]:
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    lists = _fake(weights)
    device = weights[0].device
    _compiled._C.sparse_columns_cuda(
        [weight.data_ptr() for weight in weights],
        [list(weight.shape) for weight in weights],
        [each.data_ptr() for each in lists],
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return lists


@_op.implementation("reference")
def _reference(weights: Sequence[Tensor]) -> list[Tensor]:
    return [_lists_of(weight.detach()) for weight in weights]


def _lists_of(weight: Tensor) -> Tensor:
    k, c, r, s = weight.shape
    width = min(c, _CHUNK)
    padded = F.pad(weight, (0, 0, 0, 0, 0, -c % width, 0, -k % _PANEL))
    pieces = padded.unflatten(1, (-1, width)).unflatten(0, (-1, _PANEL))
    # (panels, 16, chunks, width, R, S) -> (lists, columns in the order r, s, c; 16)
    columns = pieces.permute(0, 2, 4, 5, 3, 1).flatten(2, 4).flatten(0, 1)
    live = (columns != 0).any(-1)

    def count(size: int) -> Tensor:
        return torch.arange(size, device=weight.device)

    tap = (_ROW * count(r)[:, None] + count(s)).flatten()[:, None]
    channel = count(width)
    place = (tap * _CHUNK + channel).flatten()
    group = ((tap + 7 * channel + channel // 8) % _BANKS).flatten()
    in_group = F.one_hot(group, _BANKS)
    counts = (live[..., None] * in_group).sum(1)
    rank = ((live[..., None] * in_group).cumsum(1) * in_group).sum(-1) - 1
    steps = -(-live.sum(1, keepdim=True) // _STEP)
    capacity = -(-live.shape[1] // _STEP) * _STEP
    position = _positions(counts, rank, group, steps * (_STEP // _BANKS), capacity // _BANKS)
    position = torch.where(live, position, capacity)  # beyond the end: not listed

    places = position.new_full((len(live), capacity + 1), -1)
    places = places.scatter(1, position, place.expand_as(position))[:, :-1]
    # Columns of zeros lie where another is read anyway, in the same matrix if it has any.
    for instead in (places[:, ::_BANKS].repeat_interleave(_BANKS, 1), places[:, :1]):
        places = torch.where(places < 0, instead, places)
    places = torch.where(count(capacity) < steps * _STEP, places, 0).int()
    values = columns.new_zeros(len(live), capacity + 1, _PANEL)
    values = values.scatter(1, position[..., None].expand(-1, -1, _PANEL), columns)
    words = _to_fragments(values[:, :-1])
    body = torch.cat([places.unflatten(1, (-1, _STEP)), words], -1).flatten(1)
    return torch.cat([F.pad(steps.int(), (0, _HEADER - 1)), body], 1)


def _positions(counts: Tensor, rank: Tensor, group: Tensor, matrices: Tensor, most: int) -> Tensor:
    """Return where columns go, so that the kernel's reads find different groups of banks.

    The n-th column of a group goes into the n-th matrix, the eight columns that are read together.
    What a group has more than there are matrices fills the holes that others leave, beginning with
    the last matrix, where most are.

    Args:
        counts: (lists, 8), the live columns of each group.
        rank: (lists, columns), which of its group's a live column is.
        group: (columns,).
        matrices: (lists, 1), how many there are; `most` at most.
    """
    groups = torch.arange(_BANKS, device=group.device)
    beyond = counts[:, None] > rank[..., None]
    before = (beyond & (groups < group[:, None])).sum(-1)
    surplus = (counts - matrices).clamp(min=0)[:, None]
    over = surplus.minimum((rank - matrices)[..., None]).sum(-1) + before
    number = torch.arange(most, device=group.device)
    taken = (counts[:, None] > number[:, None]).sum(-1)
    holes = torch.where(number < matrices, _BANKS - taken, 0)
    after = holes.flip(1).cumsum(1).flip(1) - holes  # holes of later matrices
    matrix = (after[:, None] > over[..., None]).sum(-1).clamp(max=most - 1)
    filled = matrix * _BANKS + taken.gather(1, matrix) + over - after.gather(1, matrix)
    return torch.where(rank < matrices, rank * _BANKS + before, filled)


# Of 32 columns, (piece, column // 8, column % 8 // 2, column % 2) by rows (row // 8, row % 8): the
# order in which the lanes of mma.m16n8k16 hold A.
_SPLIT, _IN_LANES, _BACK = (2, 2, 4, 2, 2, 8), (0, 1, 2, 7, 4, 3, 6, 5), (0, 1, 2, 5, 4, 7, 6, 3)


def _to_fragments(values: Tensor) -> Tensor:
    """(lists, columns, 16) bf16 -> (lists, steps, 256) int32."""
    lists = values.shape[0]
    split = values.reshape(lists, -1, *_SPLIT).permute(_IN_LANES).contiguous()
    return split.view(lists, -1, _STEP * _PANEL).view(torch.int32)


def _from_fragments(words: Tensor) -> Tensor:
    """(lists, steps, 256) int32 -> (lists, columns, 16) bf16."""
    lists, steps, _ = words.shape
    laned = words.contiguous().view(torch.bfloat16).view(lists, steps, 2, 8, 4, 2, 2, 2)
    return laned.permute(_BACK).reshape(lists, steps * _STEP, _PANEL)
