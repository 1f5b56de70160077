"""The road on a GPU, as `device auto` takes it there: bf16 autocast, channels_last."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtk import draw, evaluate, pretrain, transfer
from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.runs import read_json
from rtk.train import Checkpoint

PGD = AttackConfig(name="pgd", eps=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_road_runs_on_a_gpu(tmp_path: Path, norm: str) -> None:
    folders = {name: str(tmp_path / name) for name in ("pretrain", "draw", "transfer", "evaluate")}
    train = TrainConfig(epochs=6, batch_size=64, lr=0.05, schedule="cosine", warmup_epochs=1)
    pretrain.run(
        PretrainConfig(
            out=folders["pretrain"],
            device="cuda",
            data=DataConfig("digits[0-4]"),
            model=ModelConfig(width=0.25),
            train=train,
            attack=AttackConfig(name="pgd", norm=norm, eps=0.1 if norm == "linf" else 0.5),
        )
    )
    draw.run(
        DrawConfig(out=folders["draw"], device="cuda", checkpoint=folders["pretrain"], sparsity=0.8)
    )
    transfer.run(
        TransferConfig(
            out=folders["transfer"],
            device="cuda",
            checkpoint=folders["pretrain"],
            ticket=folders["draw"],
            data=DataConfig("digits[5-9]"),
            train=train,
        )
    )
    path = evaluate.run(
        EvaluateConfig(
            out=folders["evaluate"], device="cuda", checkpoint=folders["transfer"], attack=PGD
        )
    )
    result = read_json(path)
    assert result["top1"] > 0.6  # chance is 0.2
    assert result["pgd_top1"] < result["top1"]
    state = Checkpoint.load(folders["transfer"]).section("model")
    masks = {n.removesuffix(".mask"): m for n, m in state.items() if n.endswith(".mask")}
    assert masks and all(not state[f"{n}.weight"][~m].any() for n, m in masks.items())
