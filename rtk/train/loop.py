"""The one training loop: pretraining and every kind of transfer run through it.

Data order, augmentation and the learning rate are functions of (seed, epoch, step), so a
checkpoint needs only weights, optimiser and generators to go on to bit-identical results.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rtk import distributed
from rtk.attacks import Free
from rtk.config import TrainConfig
from rtk.errors import Interrupted, RtkError
from rtk.runs import JsonlLog
from rtk.train.checkpoint import CHECKPOINT, Checkpoint, save_checkpoint
from rtk.train.distributed import (
    OwnStarts,
    Pace,
    Share,
    check_alike,
    check_batch_size,
    share_statistics,
    take_share,
    whole_state,
    wrap,
)
from rtk.train.free import make_free_step
from rtk.train.optim import learning_rate, make_optimizer, match_layouts, set_learning_rate
from rtk.train.step import Loss, Step, make_step

_CHECK_EVERY = 50  # steps between two looks at the loss on a GPU: each look synchronises
# Seconds of work that are not worth a checkpoint at the end of an epoch: writing one takes up to a
# second, which is what an epoch on a small set takes.
_SHORT = 10.0


class BatchSource(Protocol):
    """What the loop needs of batches: `rtk.data.Batches`, or features computed once."""

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels from step `start` on, the same ones at each call."""


def train(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    folder: Path,
    meta: dict[str, Any],
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    network: nn.Module | None = None,
    set_mode: Callable[[nn.Module], object] = nn.Module.train,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = True,
    label: str = "train",
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Train `model` and leave checkpoint.safetensors and metrics.jsonl in `folder`.

    In several processes (see `rtk.distributed`) each takes its share of every batch, gradients are
    averaged, `evaluate` is called in all of them, and the main one writes.

    Args:
        model: on its device; parameters that do not require grad stay as they are.
        batches: the training images.
        config: optimiser, schedule and arithmetic.
        folder: the run's folder, there already.
        meta: goes into the checkpoint's metadata (configuration, hash, lineage, ...).
        attack: for adversarial training; `rtk.attacks.Free` trains by its own step. If it has a
            method `after_epoch(network, x, y)`, that is called after each epoch with the last batch
            (images as they are) and may warn, but must leave the network and torch's generators.
        network: the part of the model that the batches go through; the whole model by default.
        set_mode: puts the modules into the mode they train in, at the start of each epoch.
        evaluate: called every `eval_every` epochs and after the last; its numbers go into the log.
        resume: go on from the folder's checkpoint, if there is one; else start over.
        label: what the progress bar and the lines are called.
        optimizer: of the model as it lies in memory; by default the configuration's SGD over all
            parameters that require grad. The schedule's rate is that of every group, times the
            group's `lr_factor` if it has one.
        loss: `loss(logits, labels) -> scalar` in the place of the cross-entropy; not for `Free`.

    Returns:
        The trained model.

    Raises:
        RtkError: if the loss or a weight becomes NaN or infinite (the last good checkpoint stays).
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    device = next(model.parameters()).device
    channels_last, amp = resolve_arithmetic(config, device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if optimizer is None:
        optimizer = make_optimizer(model.parameters(), config)
    trained = model if network is None else network
    alone = trained
    after_epoch = getattr(attack, "after_epoch", None)
    if distributed.world_size() > 1:
        check_batch_size(config.batch_size)
        batches = Share(batches)
        if not isinstance(attack, Free):
            loss = batches.weighted(loss, config.label_smoothing)
        attack = OwnStarts(attack) if hasattr(attack, "draw_seed") else attack
        trained = wrap(alone, optimizer)
    step_options: dict[str, Any] = {
        "amp": amp,
        "graph": "auto" if config.graph == "auto" else False,
        "label_smoothing": config.label_smoothing,
    }
    step_fn: Step
    if isinstance(attack, Free):
        step_fn = make_free_step(trained, optimizer, attack, **step_options)
    else:
        step_fn = make_step(trained, optimizer, attack, loss=loss, **step_options)
    log = JsonlLog(folder / "metrics.jsonl")
    path = folder / CHECKPOINT
    progress: dict[str, Any] = {"epoch": 0, "step": 0, "loss_sum": 0.0, "finished": False}
    if resume and distributed.from_main(path.exists):
        checkpoint = Checkpoint.load(path)
        for key in ("config_hash", "source_sha256", "ticket_sha256"):
            if checkpoint.meta.get(key) != meta.get(key):
                raise RtkError(
                    f"{path} was made with another configuration, checkpoint or ticket ({key} "
                    "differs); start over with --no_resume or choose another --out"
                )
        progress = checkpoint.restore(model, optimizer)
        match_layouts(optimizer)
        take_share(optimizer)
        if distributed.is_main():
            log.keep(lambda record: record["epoch"] <= progress["epoch"])
    elif distributed.is_main():
        path.unlink(missing_ok=True)  # first, so that no checkpoint is ever without its log
        log.keep(lambda record: False)
    if progress["finished"]:
        return model

    def save(**now: Any) -> None:
        # A finished run has nothing to go on with: half the file, and only weights are read of it.
        state = None if now["finished"] else optimizer
        check_alike(optimizer)
        with whole_state(optimizer):
            if distributed.is_main():
                save_checkpoint(path, model, state, {**meta, "progress": now})

    def mean_sum() -> float:
        return distributed.total(loss_sum.item())[0] / distributed.world_size()

    with _stop_requests() as stop_requested:
        saved = time.monotonic()
        for epoch in range(progress["epoch"], config.epochs):
            started = time.perf_counter()
            set_mode(model)
            first = progress["step"]
            loss_sum = torch.tensor(progress["loss_sum"], dtype=torch.float64, device=device)
            progress = {"step": 0, "loss_sum": 0.0}
            steps = len(batches)
            pace = Pace(first)
            bar = _progress_bar(f"{label} {epoch + 1}/{config.epochs}", first, steps)
            seen = 0
            for step, (x, y) in enumerate(batches.epoch(epoch, start=first), start=first):
                rate = learning_rate(config, epoch + step / steps)
                set_learning_rate(optimizer, rate)
                loss_sum += step_fn(x, y)
                share_statistics(alone)
                seen += len(y)
                bar.update()
                if device.type == "cpu" or step % _CHECK_EVERY == 0:
                    _check_finite(loss_sum, epoch, step, path)
                due = time.monotonic() - saved > config.checkpoint_seconds
                due, stop = pace(step, due, stop_requested())
                if (due or stop) and step + 1 < steps:
                    _check_finite(loss_sum, epoch, step, path, model)
                    save(epoch=epoch, step=step + 1, loss_sum=mean_sum(), finished=False)
                    saved = time.monotonic()
                    if stop:
                        raise Interrupted(_stopped(epoch, step + 1, path))
            bar.close()
            _check_finite(loss_sum, epoch, steps - 1, path, model)
            if after_epoch is not None and distributed.is_main():
                after_epoch(alone, x, y)
            last = epoch + 1 == config.epochs
            seconds = time.perf_counter() - started
            record = {
                "epoch": epoch + 1,
                "loss": mean_sum() / max(1, steps),
                "lr": rate,
                "seconds": round(seconds, 3),
                "images_per_second": round(distributed.total(seen)[0] / seconds, 1),
            }
            if distributed.world_size() > 1:
                record["processes"] = distributed.world_size()
            look = config.eval_every > 0 and (epoch + 1) % config.eval_every == 0
            if evaluate is not None and (last or look):
                record |= evaluate(model)
            # The record first: if the process dies in between, resuming drops it again.
            if distributed.is_main():
                log.append(**record)
            due = time.monotonic() - saved > min(_SHORT, config.checkpoint_seconds)
            due, stop = map(bool, distributed.largest(due, stop_requested()))
            if due or stop or last:
                save(epoch=epoch + 1, step=0, loss_sum=0.0, finished=last)
                saved = time.monotonic()
            _plain_line(label, config.epochs, record)
            if stop:
                raise Interrupted(_stopped(epoch + 1, 0, path))
        if config.epochs == 0:
            save(epoch=0, step=0, loss_sum=0.0, finished=True)
    return model


def resolve_arithmetic(
    config: TrainConfig, device: torch.device
) -> tuple[bool, torch.dtype | None]:
    """Return (channels_last, autocast dtype) for a device: on by default on a GPU only."""
    on_gpu = device.type == "cuda"
    channels_last = on_gpu if config.channels_last == "auto" else config.channels_last == "yes"
    bf16 = on_gpu if config.amp == "auto" else config.amp == "bf16"
    return channels_last, torch.bfloat16 if bf16 else None


def _check_finite(
    loss_sum: Tensor, epoch: int, step: int, path: Path, model: nn.Module | None = None
) -> None:
    # Before saving the model is looked at too: a step's loss does not tell what the step did.
    saved = [] if model is None else model.state_dict().values()
    if not all(tensor.isfinite().all() for tensor in (loss_sum, *saved)):
        kept = f"the last good checkpoint is {path}" if path.exists() else "nothing was saved yet"
        raise RtkError(
            f"the loss or a weight became NaN or infinite in epoch {epoch + 1}, step {step + 1}; "
            f"{kept}; try a smaller --train.lr or --train.amp none, in another --out"
        )


def _stopped(epoch: int, step: int, path: Path) -> str:
    return f"stopped at epoch {epoch}, step {step}; saved {path}; the same command goes on"


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that the loop can finish its step and save."""
    requested: list[int] = []

    def request(number: int, frame: Any) -> None:
        if number in requested:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        requested.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not the main thread: signals go to somebody else
        pass
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_bar(label: str, first: int, steps: int) -> tqdm:
    return tqdm(
        desc=label,
        initial=first,
        total=steps,
        leave=False,
        disable=not (sys.stderr.isatty() and distributed.is_main()),
    )


def _plain_line(label: str, epochs: int, record: dict[str, Any]) -> None:
    """Say how an epoch went where there is no terminal for a bar: at most some ten lines a run."""
    every = max(1, epochs // 10)
    if not distributed.is_main():
        return
    if not sys.stderr.isatty() and (record["epoch"] % every == 0 or record["epoch"] == epochs):
        print(
            f"{label} epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, "
            f"{record['images_per_second']:.0f} images/s",
            file=sys.stderr,
            flush=True,
        )
