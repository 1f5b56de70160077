"""Pretraining with each attack that is for it, by name."""

import dataclasses
import json

import pytest
import torch

from rtk import pretrain
from rtk.attacks import Fast
from rtk.config import AttackConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from rtk.train import Checkpoint

ATTACKS = {
    "fgsm": AttackConfig("fgsm", eps=0.03),
    "fast": AttackConfig("fast", eps=0.03),
    "free": AttackConfig("free", eps=0.03, replays=2),
    "apgd": AttackConfig("apgd-ce", eps=0.03, steps=2),
    "smoothing": AttackConfig("smoothing", sigma=0.1),
    "restarts": AttackConfig("pgd", eps=0.03, steps=1, restarts=2, keep_best=True),
}


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        out=str(tmp_path),
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(width=0.0625),
        train=TrainConfig(epochs=1, batch_size=64, lr=0.05),
    )


@pytest.mark.filterwarnings("ignore:catastrophic overfitting")
@pytest.mark.parametrize("name", ATTACKS)
def test_pretraining_by_name(config, tmp_path, name):
    config = dataclasses.replace(config, attack=ATTACKS[name])
    checkpoint = Checkpoint.load(pretrain.run(config)).require_finished()
    assert checkpoint.lineage["pretrain"] == config.attack.label
    assert checkpoint.lineage["robust"] is True
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < record["loss"] < 2 and record["top1"] > 0.4


def test_the_loop_asks_fast_after_each_epoch(config, monkeypatch):
    sizes = []
    monkeypatch.setattr(Fast, "after_epoch", lambda self, model, x, y: sizes.append(x.shape))
    train = dataclasses.replace(config.train, epochs=2)
    pretrain.run(dataclasses.replace(config, train=train, attack=ATTACKS["fast"]))
    assert sizes == [torch.Size([64, 3, 8, 8])] * 2
