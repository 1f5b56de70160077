"""Training in several processes: each takes its share of every batch, the gradients are averaged.

The training loop (`rtk.train.train`) does all of this by itself where a stage has joined processes
(`rtk.distributed`). What is the same as in one process, and what is not: docs/distributed.md.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk import distributed
from rtk.data import share_of
from rtk.errors import RtkError

_BatchNorm = nn.modules.batchnorm._BatchNorm

_AGREE_EVERY = 0.2  # seconds between two looks of the processes at whether to save or stop
_MOST_STEPS = 1000  # between two looks
_OF_IMAGES = "free_delta"  # in an optimiser's state: what each process has of its own images


def check_batch_size(batch_size: int) -> None:
    """Raise an RtkError unless each process gets the same number of images, at least 2."""
    ranks = distributed.world_size()
    if ranks > 1 and (batch_size % ranks or batch_size < 2 * ranks):
        near = max(2 * ranks, round(batch_size / ranks) * ranks)
        raise RtkError(
            f"train.batch_size: {batch_size} images are of all {ranks} processes together and do "
            f"not divide among them, at least 2 each; give e.g. {near}"
        )


def wrap(network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Return `network` so that its backward averages gradients over the processes.

    All that `optimizer` trains takes part, also leaves that the network reads but does not own
    (LMP's). Weights, masks and other buffers become those of the main process, once.
    """
    own = {id(parameter) for parameter in network.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    extra = [parameter for parameter in trained if id(parameter) not in own]
    device = trained[0].device
    return nn.parallel.DistributedDataParallel(
        _WithLeaves(network, extra) if extra else network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # they would be sent before a pass, but after the attack
    )


class _WithLeaves(nn.Module):
    def __init__(self, network: nn.Module, leaves: list[nn.Parameter]) -> None:
        super().__init__()
        self.network = network
        self.leaves = nn.ParameterList(leaves)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Share:
    """This process's share of batches: neighbours in the batch, in the order of one process.

    Batches that can make their share alone (`rtk.data.Batches.share`) do; of others the whole is
    made and cut.

    Attributes:
        weight: what the loss of the last batch counts, as a mean over the share: 1, but in a
            smaller last batch that is cut into unequal parts. The mean over the processes of
            weight * loss is the mean over the whole batch.
    """

    def __init__(self, source: Any) -> None:
        self._place = distributed.rank(), distributed.world_size()
        self._cuts = not hasattr(source, "share")
        self._source = source if self._cuts else source.share(*self._place)
        self.weight = 1.0

    def __len__(self) -> int:
        return len(self._source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of each batch from step `start` on."""
        ranks = self._place[1]
        for step, (x, y) in enumerate(self._source.epoch(epoch, start=start), start):
            if self._cuts:
                count, own = len(y), share_of(len(y), *self._place)
                x, y = x[own], y[own]
            else:
                count = self._source.images_in(step)
            self.weight = 1.0 if len(y) == count else len(y) * ranks / count
            yield x, y

    def weighted(
        self, loss: Callable[[Tensor, Tensor], Tensor] | None, label_smoothing: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `loss`, by default the cross-entropy, times `weight`."""
        if loss is None:
            loss = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
        return lambda logits, y: loss(logits, y) * self.weight


class OwnStarts:
    """An attack whose random starts are different ones in each process.

    The processes' generators go on alike, so that a checkpoint holds one state for any number of
    them; each number drawn becomes the seed of this process. In the main one it stays what it is.

    Args:
        attack: has `draw_seed` and takes `seed` (see `rtk.cuda_graph.Seed`).
    """

    def __init__(self, attack: Any) -> None:
        self.attack = attack
        self.capturable = getattr(attack, "capturable", True)
        self._offset = distributed.rank() * 0x9E3779B97F4A7C15

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, seed: int | Tensor | None = None
    ) -> Tensor:
        """Return adversarial images."""
        seed = self.draw_seed() if seed is None else seed
        return self.attack(model, x, y, **({} if seed is None else {"seed": seed}))

    def draw_seed(self) -> int | None:
        """Return the seed of one call, in [0, 2**63), or None where there is nothing random."""
        seed = self.attack.draw_seed()
        return None if seed is None else (seed + self._offset) % 2**63


class Pace:
    """When to save or stop: what all processes decide in the same step.

    They ask each other a few times a second; alone it is what it is told.
    """

    def __init__(self, first: int) -> None:
        self._next = first
        self._before = time.monotonic(), first - 1

    def __call__(self, step: int, due: bool, stop: bool) -> tuple[bool, bool]:
        """Return whether to save and whether to stop, if this process would (`due`, `stop`)."""
        if distributed.world_size() == 1:
            return due, stop
        if step < self._next:
            return False, False
        (then, step_then), now = self._before, time.monotonic()
        steps = int(_AGREE_EVERY * (step - step_then) / max(now - then, 1e-6))
        # When the main process saves all have to; when any is asked to stop all stop.
        mine = (due, min(max(steps, 1), _MOST_STEPS)) if distributed.is_main() else (0, 0)
        found = distributed.largest(*mine, stop)
        self._before, self._next = (now, step), step + int(found[1])
        return bool(found[0]), bool(found[2])


def share_statistics(network: nn.Module) -> None:
    """Give the batch norms that are in train mode the running statistics of the main process.

    After each step and in one piece a dtype, so that attacks, evaluations and checkpoints find the
    same ones everywhere.
    """
    if distributed.world_size() == 1:
        return
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
    statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    for dtype in {tensor.dtype for tensor in statistics}:
        alike = [tensor for tensor in statistics if tensor.dtype == dtype]
        flat = torch.cat(alike)
        distributed.broadcast([flat])
        torch._foreach_copy_(alike, flat.split([len(tensor) for tensor in alike]))


def check_alike(optimizer: torch.optim.Optimizer) -> None:
    """Raise an RtkError if weights, or scores and with them masks, differ between processes."""
    if distributed.world_size() == 1:
        return
    tensors: list[Tensor] = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        # Not in the order of the state: in one that was loaded that is another in each process.
        state = sorted(optimizer.state.get(parameter, {}).items())
        tensors += [parameter.detach()]
        tensors += [t for name, t in state if name != _OF_IMAGES and _counts(t)]
    sums = torch.stack([tensor.double().sum() for tensor in tensors]).tolist()
    highest = distributed.largest(*sums)
    if highest != [-value for value in distributed.largest(*(-value for value in sums))]:
        raise RtkError(
            "the processes no longer have the same weights, so what they train is no longer one "
            "network; give the same command again to go on from the last checkpoint, and report it"
        )


def _counts(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextlib.contextmanager
def whole_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, what each process carries for its own images is there for all of them, in order."""
    own = {}
    if distributed.world_size() > 1:
        for parameter, state in optimizer.state.items():
            if _OF_IMAGES in state:
                own[parameter] = state[_OF_IMAGES]
                state[_OF_IMAGES] = torch.cat(distributed.gathered(state[_OF_IMAGES]))
    try:
        yield
    finally:
        for parameter, tensor in own.items():
            optimizer.state[parameter][_OF_IMAGES] = tensor


def take_share(optimizer: torch.optim.Optimizer) -> None:
    """Of what is carried for each image of a batch, keep what is of this process's images."""
    place = distributed.rank(), distributed.world_size()
    for state in optimizer.state.values():
        if _OF_IMAGES in state:
            state[_OF_IMAGES] = state[_OF_IMAGES][share_of(len(state[_OF_IMAGES]), *place)]
