"""Run stages in several processes, each as soon as the files that it reads are there.

A stage may be killed at any moment and go on later, so nothing here has to be undone: on Ctrl-C
the workers save and stop, and a worker whose parent is gone ends at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from rtk import data
from rtk.config import StageConfig
from rtk.errors import Interrupted, RtkError
from rtk.runs import unwritable

Runner = Callable[[StageConfig], object]


def run_in_processes(
    stages: Sequence[StageConfig],
    runner: Runner,
    jobs: int,
    *,
    log: Path,
    started: Callable[[StageConfig], None],
) -> None:
    """Run all stages, at most `jobs` at a time.

    Args:
        stages: in an order in which each finds what it reads.
        runner: runs one stage; importable by name, as the workers are fresh processes.
        jobs: number of worker processes; where there are several GPUs, they take one each in turn.
        log: what the workers would print goes to the end of this file.
        started: called here whenever a stage begins.

    Raises:
        RtkError: the first error of a stage; the others are stopped, and have saved, before.
        Interrupted: on Ctrl-C, likewise.
    """
    context = multiprocessing.get_context("spawn")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise unwritable(log, error) from error
    workers: dict[Any, Any] = {}
    parent_lives = []
    for gpu in gpus_for(jobs, stages):
        work, theirs = context.Pipe()
        alive, ours = context.Pipe(duplex=False)
        arguments = (runner, theirs, alive, log, gpu)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        alive.close()
        workers[work] = process
        parent_lives.append(ours)  # its end of file tells the worker that we are gone
    try:
        _schedule(list(stages), workers, started)
    finally:
        for connection in workers:
            connection.close()  # idle workers see the end of their work
        for process in workers.values():
            process.join(timeout=10)
        for connection in parent_lives:
            connection.close()  # whoever is still busy ends now


def gpus_for(jobs: int, stages: Sequence[StageConfig]) -> list[str | None]:
    """Return the GPU of each worker, as CUDA_VISIBLE_DEVICES names it, in turns over all there are.

    None leaves a worker what this process sees: where stages name a device, or there is one GPU.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # asks the driver, and leaves CUDA alone
    if count < 2 or any(stage.device not in ("auto", "cuda") for stage in stages):
        return [None] * jobs
    gpus = [str(i) for i in range(count)] if named is None else named.split(",")[:count]
    return [gpus[job % count].strip() for job in range(jobs)]


def _schedule(
    pending: list[StageConfig], workers: dict[Any, Any], started: Callable[[StageConfig], None]
) -> None:
    unmade = {stage.out for stage in pending}
    busy: dict[Any, StageConfig] = {}
    failure: BaseException | None = None

    def stop(reason: BaseException) -> None:
        nonlocal failure
        failure = failure or reason
        pending.clear()
        for connection in busy:
            workers[connection].terminate()  # SIGTERM: a training run saves first

    while pending or busy:
        try:
            for connection in workers:
                ready = next((s for s in pending if not unmade & set(inputs(s))), None)
                if ready is not None and connection not in busy:
                    pending.remove(ready)
                    started(ready)
                    busy[connection] = ready
                    with contextlib.suppress(OSError):  # a worker that is gone shows below
                        connection.send(ready)
            assert busy or not pending, "the stages wait for each other"
            for connection in wait(list(busy)):
                try:
                    error: Any = connection.recv()  # type: ignore[union-attr, call-arg]
                except (EOFError, OSError):
                    error = RtkError(
                        f"the process that ran {busy[connection].out} was killed (out of memory?); "
                        "the same command goes on"
                    )
                stage = busy.pop(connection)
                if error is None:
                    unmade.discard(stage.out)
                else:
                    stop(error)
        except KeyboardInterrupt:
            stop(Interrupted("stopped; the same command goes on"))
    if failure is not None:
        raise failure


def inputs(stage: StageConfig) -> list[str]:
    """Return what a stage reads, and the folders that lies in: runs/x of runs/x/rounds/05."""
    paths = [getattr(stage, name, None) for name in ("checkpoint", "ticket", "features")]
    return [str(folder) for path in paths if path for folder in (path, *Path(path).parents)]


def _worker(
    runner: Runner, work: Connection, alive: Connection, log: Path, gpu: str | None
) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything here has looked at CUDA
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    with log.open("a", buffering=1) as sys.stderr, data.keep_loaded():
        try:
            while True:
                work.send(_attempt(runner, work.recv()))
        except (EOFError, OSError, KeyboardInterrupt):
            pass  # the parent has no more work, or is stopping


def _end_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(1)


def _attempt(runner: Runner, stage: StageConfig) -> BaseException | None:
    """Run a stage and return what it raised, in a form that goes through a pipe."""
    try:
        runner(stage)
    except (RtkError, Interrupted) as error:
        return error
    except KeyboardInterrupt:
        return Interrupted(f"stopped in {stage.out}; the same command goes on")
    except Exception:
        return RuntimeError(f"in {stage.out}:\n{traceback.format_exc()}")
    return None
