"""Several processes that torchrun started on one run: who is who, and how they agree.

A stage joins the processes (`stage`) and lets them go at its end. Outside of that, and without
torchrun, there is one process: `world_size()` is 1, and everything here returns at once.

Gradients are not this file's: they go through DistributedDataParallel (`rtk.train.distributed`).
What is agreed on here are small things, on the CPU: numbers, paths, whether to stop.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rtk.errors import Interrupted, RtkError

if TYPE_CHECKING:
    from torch import Tensor

    from rtk.config import StageConfig

TIMEOUT = timedelta(minutes=10)  # of one exchange: a process that does not come is given up

_POLL = 0.02  # seconds between two looks at whether the main process is done
_FAILED = "failed"
# What torch raises where another process is gone, or did not come in time.
_LOST = re.compile(r"gloo|nccl|socket|process ?group|connection|timed? ?out|broken pipe", re.I)

C = TypeVar("C", bound="StageConfig")
T = TypeVar("T")


@dataclass
class _Group:
    rank: int
    ranks: int
    local_rank: int
    store: Any  # where processes leave each other notes: torchrun's
    control: Any  # a gloo group: what is agreed on must not wait for a GPU
    calls: int = 0


_group: _Group | None = None
_store: Any = None  # there is one for the life of the process
_joined = 0  # how often, so that nothing left by an earlier group is read
_alone = False  # the main process works while the others wait
_speaks: bool | None = None  # after a failure: whether it is this process that tells


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    # Schedulers too set WORLD_SIZE and RANK, of other things.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return by_torchrun and int(os.environ.get("WORLD_SIZE", 1)) > 1


def processes_here() -> int:
    """Return how many processes torchrun started on this machine, which share its CPUs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process, 0 for the only one."""
    return 0 if _group is None else _group.rank


def world_size() -> int:
    """Return how many processes work together on this stage."""
    return 1 if _group is None else _group.ranks


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process is the one to print what was raised, or what it has to say.

    Of a failure that is the process that failed first; before and after a stage the main one.
    """
    if _speaks is not None:
        return _speaks
    return not launched() or int(os.environ["RANK"]) == 0


def stage(run: Callable[[C], Path]) -> Callable[[C], Path]:
    """Let the processes that torchrun started run a stage together.

    Each runs it; `config.device` says whether they meet on GPUs (NCCL, GPU LOCAL_RANK) or on CPUs
    (gloo). Without torchrun the stage is what it was.

    Raises:
        RtkError: where there are not as many GPUs as processes, one GPU is named for all, the
            processes do not find each other, or one of them is lost.
    """

    @functools.wraps(run)
    def together(config: C) -> Path:
        if _group is not None or _alone or not launched():
            return run(config)
        with _processes(config.device):
            return run(config)

    return together


def own_device(name: str) -> str:
    """Return the device of this process: its own GPU where `name` leaves that open."""
    if _group is None or name not in ("auto", "cuda"):
        return name
    return f"cuda:{_group.local_rank}" if _on_gpus(name) else "cpu"


def from_main(function: Callable[..., T], *arguments: Any) -> T:
    """Return, in every process, what `function(*arguments)` returned in the main one.

    Only the main process calls it, and sees itself alone meanwhile; the others wait, however long
    that takes. An RtkError is raised in all of them. The result goes through pickle.
    """
    if _group is None:
        return function(*arguments)
    _group.calls += 1
    key = f"main/{_group.calls}"
    if _group.rank == 0:
        try:
            with _as_only_one():
                outcome: tuple[T | None, RtkError | None] = function(*arguments), None
        except RtkError as error:
            outcome = None, error
        _group.store.set(key, pickle.dumps(outcome))
    else:
        while not _group.store.check([key]):
            if _group.store.check([_FAILED]):
                raise _lost("it failed")
            time.sleep(_POLL)
        outcome = pickle.loads(_group.store.get(key))
    value, raised = outcome
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]  # None is a result too


def largest(*values: float) -> list[float]:
    """Return the largest of each value over all processes."""
    return _reduced(values, "MAX") if _group is not None else list(values)


def total(*values: float) -> list[float]:
    """Return the sum of each value over all processes, in float64."""
    return _reduced(values, "SUM") if _group is not None else list(values)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on its device; waits for the GPU."""
    if _group is None:
        return tensor
    import torch.distributed as dist

    own = tensor.cpu().clone()
    dist.all_reduce(own, group=_group.control)
    return own.to(tensor.device)


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which may differ in size, on the CPU."""
    if _group is None:
        return [tensor.cpu()]
    import torch.distributed as dist

    found: list[Any] = [None] * _group.ranks
    dist.all_gather_object(found, tensor.detach().cpu(), group=_group.control)
    return found


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values of the main process, in place."""
    if _group is None:
        return
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def barrier(timeout: timedelta = TIMEOUT) -> None:
    """Wait until all processes are here.

    Raises:
        RtkError: naming the process that does not come within `timeout`.
    """
    if _group is None:
        return
    import torch.distributed as dist

    try:
        dist.monitored_barrier(_group.control, timeout=timeout)
    except RuntimeError as error:
        raise _lost(_first_line(error)) from error


def leave(code: int) -> int:
    """Return the exit code of a command; after a failure beside others, end the process with it.

    At once, because an orderly end would wait for processes that are gone.
    """
    if _speaks is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def _processes(device: str) -> Iterator[None]:
    global _group, _speaks
    _speaks = None
    stopped: Interrupted | None = None
    try:
        _group = _join(device)
        try:
            yield
        except Interrupted as error:  # all of them stop, in the same step
            stopped = error
        barrier()
    except BaseException as error:
        _speaks = _is_first()
        if isinstance(error, RuntimeError) and _is_of_others(error):
            raise _lost(_first_line(error)) from error
        raise
    else:
        import torch.distributed as dist

        dist.destroy_process_group()
    finally:
        _group = None
    if stopped is not None:
        raise stopped


def _join(device: str) -> _Group:
    global _store, _joined
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise RtkError(
            "this program has a process group already, and a stage makes its own; call the stage "
            "before init_process_group, or after destroy_process_group"
        )
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", own))
    gpus = _on_gpus(device)
    if gpus:
        here = processes_here()
        if torch.cuda.device_count() < here:
            raise RtkError(
                f"torchrun started {here} processes here and torch sees {torch.cuda.device_count()}"
                " GPUs; start one process a GPU (--nproc_per_node), or take --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        if _store is None:
            _store = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))[0]
        _joined += 1
        store = dist.PrefixStore(f"rtk/{_joined}", _store)
        dist.init_process_group(
            "nccl" if gpus else "gloo", store=store, rank=own, world_size=ranks, timeout=TIMEOUT
        )
        control = dist.new_group(backend="gloo", timeout=TIMEOUT) if gpus else dist.group.WORLD
    except (RuntimeError, ValueError) as error:
        raise RtkError(
            f"the {ranks} processes did not find each other ({_first_line(error)}); start them "
            "with torchrun"
        ) from error
    return _Group(own, ranks, local, store, control)


def _on_gpus(device: str) -> bool:
    import torch

    if device.startswith("cuda:"):
        raise RtkError(
            f"device {device!r} is one GPU for all processes; under torchrun give --device cuda, "
            "and each takes its own"
        )
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


@contextlib.contextmanager
def _as_only_one() -> Iterator[None]:
    global _group, _alone
    group, _group, _alone = _group, None, True
    try:
        yield
    finally:
        _group, _alone = group, False


def _is_first() -> bool:
    """Say whether no other process has failed before this one."""
    if _group is None:  # before they met: all of them find the same
        return int(os.environ["RANK"]) == 0
    try:
        return _group.store.add(_FAILED, 1) == 1
    except RuntimeError:  # torchrun is gone too
        return _group.rank == 0


def _is_of_others(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))


def _reduced(values: Iterable[float], how: str) -> list[float]:
    import torch
    import torch.distributed as dist

    assert _group is not None
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=_group.control)
    return tensor.tolist()


def _lost(reason: str) -> RtkError:
    return RtkError(
        f"process {rank()} lost another process of this run ({reason}), which died or no longer "
        "answers; the same command goes on from the last checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return " ".join((str(error).splitlines() or [""])[0].split())[:200]
