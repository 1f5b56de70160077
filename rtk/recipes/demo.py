"""The demo: robust against natural tickets on scikit-learn's digits, on two cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.errors import RtkError
from rtk.recipes.recipe import Recipe

SPARSITIES = (0.5, 0.8, 0.95)
# 8x8 digits are coarse: a radius of 8/255 does nothing to them, 0.1 is visible and still readable.
ATTACK = AttackConfig(name="pgd", eps=0.1, steps=3)
# So small a network gains nothing from a GPU or a second thread; and so the numbers are the same
# on every machine.
MACHINE: dict[str, Any] = {"device": "cpu", "threads": 1}
TRAIN = TrainConfig(
    epochs=6, batch_size=64, lr=0.05, schedule="cosine", warmup_epochs=1, weight_decay=5e-4
)


def demo(out: str = "runs/demo", seeds: int = 3) -> Recipe:
    """Return the recipe: pretrain on the digits 0-4, transfer OMP tickets to the digits 5-9.

    Args:
        out: the folder.
        seeds: repetitions, each with its own pretraining, tickets and transfers.

    Raises:
        RtkError: for less than one repetition.
    """
    if seeds < 1:
        raise RtkError(f"demo: expected at least 1 seed, got {seeds}")
    stages: list[StageConfig] = []
    for seed in range(seeds):
        for kind, attack in (("natural", AttackConfig()), ("robust", ATTACK)):
            stages += _road(Path(out), f"{kind}-seed{seed}", seed, attack)
    return Recipe(
        title="rtk demo: tickets from the digits 0-4, transferred to the digits 5-9",
        note=(
            "Small, for a first look: 8x8 images, a narrow ResNet-18, minutes of training. "
            "It shows the road from data to report, not the paper's findings."
        ),
        folder=Path(out),
        stages=tuple(stages),
    )


def _road(out: Path, name: str, seed: int, attack: AttackConfig) -> list[StageConfig]:
    """Return the stages of one pretrained network: dense and sparse, finetuned and linear."""
    pretrained = str(out / "pretrain" / name)
    stages: list[StageConfig] = [
        PretrainConfig(
            out=pretrained,
            seed=seed,
            **MACHINE,
            data=DataConfig("digits[0-4]"),
            model=ModelConfig(width=0.25),
            train=TRAIN,
            attack=attack,
        )
    ]
    tickets: dict[str, str | None] = {"dense": None}
    for sparsity in SPARSITIES:
        ticket = str(out / "draw" / f"{name}-omp-{sparsity:g}")
        tickets[f"omp-{sparsity:g}"] = ticket
        stages.append(
            DrawConfig(out=ticket, seed=seed, **MACHINE, checkpoint=pretrained, sparsity=sparsity)
        )
    for label, drawn in tickets.items():
        for mode in ("finetune", "linear_bn_update"):
            transferred = str(out / "transfer" / f"{name}-{label}-{mode}")
            stages.append(
                TransferConfig(
                    out=transferred,
                    seed=seed,
                    **MACHINE,
                    checkpoint=pretrained,
                    ticket=drawn,
                    mode=mode,
                    data=DataConfig("digits[5-9]"),
                    train=replace(TRAIN, epochs=2),
                )
            )
            stages.append(
                EvaluateConfig(
                    out=str(out / "evaluate" / f"{name}-{label}-{mode}"),
                    seed=seed,
                    **MACHINE,
                    checkpoint=transferred,
                    attack=replace(ATTACK, steps=7, step_size=ATTACK.eps / 4),
                )
            )
    return stages
