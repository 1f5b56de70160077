"""LMP: learnable mask pruning. Weights stay as they are; scores learn which of them to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtk import artifact, distributed
from rtk.config import TrainConfig, lmp_train
from rtk.cuda_graph import GraphChoice
from rtk.draw.score_sgd import ScoreSGD
from rtk.draw.supermask import Supermask
from rtk.draw.training import working_folder
from rtk.errors import RtkError
from rtk.models import Classifier
from rtk.ticket import Ticket
from rtk.train import make_step, resolve_arithmetic, train
from rtk.train.loop import BatchSource

SCORES = "scores.safetensors"  # its name in the folder of the run


def make_lmp_step(
    model: nn.Module,
    *,
    sparsity: float,
    granularity: str = "element",
    scope: str = "layer",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    amp: torch.dtype | None = torch.bfloat16,
    graph: GraphChoice = "auto",
    include_first: bool = False,
    score_init: str | Mapping[str, Tensor] = "weight_rank",
    seed: int = 0,
) -> LmpStep:
    """Return `step(x, y) -> loss`, which does one step of learnable mask pruning on a batch.

    A step is a forward pass through weight * mask, a backward pass, SGD with momentum on the scores
    by straight-through estimation (`rtk.ops.score_step`) and on the head, and new masks: the
    groups with the largest scores. On a GPU it becomes one CUDA graph after three eager steps, as
    with `rtk.train.make_step`. The model's weights do not change by a bit, and its parameters other
    than the head's no longer require grad. Batch norm in train mode keeps its running statistics.

    Args:
        model: the pretrained network, with plain convolutions and a head for the task (the module
            that `model.head_name` names, or its last nn.Linear, which is trained). It takes images
            in [0, 1] and returns logits; each module stays in the mode it is in.
        sparsity: fraction that is pruned, in [0, 1); by element exactly round(sparsity * n)
            weights. Under one ranking of groups of several sizes, the number of groups is that of
            the start.
        granularity: what has one score: element, row, kernel, channel or a block (block-64).
        scope: "layer", each layer at this sparsity, or "global", one ranking over all layers.
        lr, momentum, weight_decay: of SGD; the rate of the next steps is
            `step.optimizer.param_groups[i]["lr"]`.
        amp: autocast dtype, or None for fp32.
        graph: "auto" captures on a GPU and warns once where that is impossible; True raises an
            RtkError there; False never captures.
        include_first: prune the first convolution too.
        score_init: "weight_rank" or "kaiming" (`rtk.draw.score_init`), or scores by layer.
        seed: of the scores' start.

    Returns:
        A function of x, (N, C, H, W) in [0, 1], and y, (N,) int64, that returns the batch's loss
        before the step: a detached scalar, without synchronising. See `LmpStep` for the rest.

    Raises:
        RtkError: for settings out of range, N:M, a model that is masked or has nothing to prune,
            and as `rtk.train.make_step` does.
    """
    supermask = Supermask(
        model,
        sparsity=sparsity,
        granularity=granularity,
        scope=scope,
        include_first=include_first,
        scores=score_init,
        seed=seed,
        dtype=amp,
    )
    optimizer = ScoreSGD(supermask, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return LmpStep(supermask, optimizer, amp, graph)


class LmpStep:
    """One step of learnable mask pruning; made by `make_lmp_step`.

    Attributes:
        network: the model seen through its masks; takes images, returns logits.
        optimizer: over scores and head; its state_dict holds the scores.
    """

    def __init__(
        self,
        network: Supermask,
        optimizer: ScoreSGD,
        amp: torch.dtype | None,
        graph: GraphChoice,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self._step = make_step(network, optimizer, amp=amp, graph=graph)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Do one step; see `make_lmp_step`."""
        return self._step(x, y)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Layer name -> scores, floating, one a group; every step changes them in place."""
        return self.network.scores

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask that broadcasts to the weight; changed in place, as scores."""
        return self.network.masks

    @property
    def captured(self) -> bool:
        """Whether there is a CUDA graph by now."""
        return self._step.captured

    @property
    def nonfinite(self) -> Tensor:
        """How many steps had a loss that was NaN or infinite: 0-dim int64, on the device."""
        return self._step.nonfinite

    def ticket(self) -> Ticket:
        """Return the masks as they are now as a ticket; `ticket.apply(model)` prunes by them."""
        return self.network.ticket()


def lmp(
    model: Classifier,
    batches: BatchSource,
    sparsity: float,
    granularity: str = "element",
    scope: str = "layer",
    *,
    config: TrainConfig | None = None,
    score_init: str | Mapping[str, Tensor] = "weight_rank",
    include_first: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    meta: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = True,
    save_scores: bool = False,
) -> Ticket:
    """Draw a ticket by learning its mask on a task's images (equation 2 of arXiv 2304.11834).

    The steps are those of `make_lmp_step`, in the one training loop: with its schedule, its log and
    its checkpoints. Afterwards the model has a trained head and new batch norm statistics, and its
    weights are bit for bit what they were; `ticket.apply(model)` gives the network that was
    learned. The folder's finished checkpoint is that network too.

    Args:
        model: of `rtk.models`, pretrained, with a head for the task, on its device.
        batches: the task's training images, e.g. `rtk.data.Batches`.
        sparsity: fraction that is pruned, from the first step on, in [0, 1).
        granularity: element, row, kernel, channel or a block.
        scope: layer or global.
        config: epochs, optimiser, schedule and arithmetic; by default 150 epochs of SGD, lr 0.1
            divided by 10 at 50 and 100, weight decay 5e-4.
        score_init: weight_rank or kaiming, or scores by layer.
        include_first: prune the first convolution too.
        seed: of the scores' start.
        folder: gets checkpoint.safetensors and metrics.jsonl, from which a stopped run goes on bit
            for bit (on a CPU); None keeps nothing.
        meta: goes into the checkpoint's metadata.
        evaluate: called with the masked network every `eval_every` epochs and after the last.
        resume: go on from the folder's checkpoint, if there is one; else start over.
        save_scores: leave the scores beside the checkpoint, in scores.safetensors.

    Raises:
        RtkError: for bad settings or model, save_scores without a folder or for a run that finished
            without it, or a loss that becomes NaN.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    config = lmp_train() if config is None else config
    if not hasattr(model, "spec"):
        raise RtkError(
            "lmp: the model has no spec, which its checkpoints need; take a network of rtk.models, "
            "or write your own loop around rtk.draw.make_lmp_step"
        )
    if save_scores and folder is None:
        raise RtkError("lmp: save_scores needs a folder to write them to")
    channels_last, amp = resolve_arithmetic(config, next(model.parameters()).device)
    if channels_last:  # first: scores lie in memory as the weights do
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = Supermask(
        model,
        sparsity=sparsity,
        granularity=granularity,
        scope=scope,
        include_first=include_first,
        scores=score_init,
        seed=seed,
        dtype=amp,
    )
    optimizer = ScoreSGD(
        network,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    record = {**(meta or {})}
    record["lineage"] = {**record.get("lineage", {}), **lineage(network.ticket())}

    def look(trained: nn.Module) -> dict[str, float]:
        # What the last checkpoint says of itself is known when the last step is done.
        record["lineage"].update(lineage(network.ticket()))
        if save_scores and distributed.is_main():
            write_scores(Path(str(folder)) / SCORES, network)
        return evaluate(trained) if evaluate is not None else {}

    with working_folder(folder) as path:
        train(
            network,
            batches,
            config,
            folder=path,
            meta=record,
            evaluate=look,
            resume=resume,
            label="draw lmp",
            optimizer=optimizer,
        )
        if save_scores and not (path / SCORES).exists():
            raise RtkError(
                f"the run in {path} finished without keeping its scores; "
                "learn them anew with --no_resume"
            )
    return network.ticket()


def lineage(ticket: Ticket) -> dict[str, Any]:
    """Return the columns of a report that say how a ticket was drawn."""
    return {
        "scheme": "lmp",
        "granularity": ticket.granularity,
        "sparsity": ticket.meta["sparsity"],
        "actual_sparsity": ticket.sparsity,
    }


def write_scores(path: Path, network: Supermask) -> None:
    """Write the scores atomically as safetensors, one tensor a layer."""
    meta = {"granularity": network.kind.name, "layers": list(network.layers)}
    artifact.save(path, "scores", dict(network.scores), meta)
