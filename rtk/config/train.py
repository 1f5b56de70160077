"""How a network is trained."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import require
from rtk.errors import check_choice


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained: SGD, its schedule and its arithmetic.

    Args:
        epochs: passes over the training images.
        batch_size: images a step; under torchrun those of all processes together.
        lr: learning rate at the start (after warm-up).
        momentum: of SGD.
        weight_decay: L2 penalty of SGD.
        nesterov: use Nesterov momentum.
        schedule: multistep, cosine or constant.
        milestones: epochs at which multistep multiplies the rate by gamma.
        gamma: factor of multistep.
        warmup_epochs: epochs over which the rate rises linearly from 0.
        label_smoothing: of the cross-entropy.
        amp: auto (bf16 on a GPU), bf16 or none (fp32).
        channels_last: auto (on a GPU), yes or no.
        graph: auto (on a GPU, one CUDA graph a training step where it can be captured) or no.
        eval_every: epochs between two looks at the test images; 0 looks once, at the end.
        checkpoint_seconds: seconds between two checkpoints inside an epoch; at an epoch's end one
            is written if the last one is more than 10 seconds old, and after the last epoch.
    """

    epochs: int = 90
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (30, 60)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: str = "auto"
    channels_last: str = "auto"
    graph: str = "auto"
    eval_every: int = 0
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "train.epochs", "a number of epochs >= 0", self.epochs)
        require(
            self.batch_size > 1,
            "train.batch_size",
            "at least 2 images, which batch norm needs",
            self.batch_size,
        )
        require(self.lr >= 0, "train.lr", "a learning rate >= 0", self.lr)
        require(0 <= self.momentum < 1, "train.momentum", "a value in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "train.weight_decay", "a value >= 0", self.weight_decay)
        require(
            not self.nesterov or self.momentum > 0,
            "train.nesterov",
            "momentum > 0 beside it",
            self.momentum,
        )
        require(
            0 <= self.label_smoothing < 1,
            "train.label_smoothing",
            "a value in [0, 1)",
            self.label_smoothing,
        )
        require(self.warmup_epochs >= 0, "train.warmup_epochs", ">= 0", self.warmup_epochs)
        require(self.eval_every >= 0, "train.eval_every", ">= 0 epochs", self.eval_every)
        check_choice("schedule", self.schedule, ("multistep", "cosine", "constant"))
        check_choice("amp", self.amp, ("auto", "bf16", "none"))
        check_choice("channels_last", self.channels_last, ("auto", "yes", "no"))
        check_choice("graph", self.graph, ("auto", "no"))
