import dataclasses
import json
import signal

import pytest
import torch

from rtk import data, pretrain
from rtk.config import AttackConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from rtk.errors import Interrupted, RtkError
from rtk.identity import config_hash, to_dict
from rtk.train import CHECKPOINT, Checkpoint, loop

NATURAL = PretrainConfig(
    data=DataConfig("digits[0-1]"),
    model=ModelConfig(width=0.0625),
    train=TrainConfig(epochs=2, batch_size=64, lr=0.05, schedule="cosine"),
)
ROBUST = dataclasses.replace(NATURAL, attack=AttackConfig("pgd", eps=0.1, steps=2))
STEPS = 4  # of 64 images in an epoch


def at(config, folder, **changes):
    return dataclasses.replace(config, out=str(folder), **changes)


def stop_after(monkeypatch, call):
    """Send SIGINT to this process after one of the steps; return the list that counts them."""
    make_step, done = loop.make_step, []

    def make(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def counted(x, y):
            loss = step(x, y)
            done.append(loss)
            if len(done) == call:
                signal.raise_signal(signal.SIGINT)
            return loss

        return counted

    monkeypatch.setattr(loop, "make_step", make)
    return done


def numbers(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def same_run(one, two):
    ours, theirs = Checkpoint.load(one), Checkpoint.load(two)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())
    assert numbers(one) == numbers(two)
    return True


def test_it_learns_and_tells_what_it_did(tmp_path):
    config = at(NATURAL, tmp_path)
    path = pretrain.run(config)
    assert path == tmp_path / CHECKPOINT
    first, last = numbers(tmp_path)
    assert last["loss"] < first["loss"] and last["top1"] > 0.6
    checkpoint = Checkpoint.load(path).require_finished()
    mean, std = data.channel_stats(data.load(config.data).train)
    assert (checkpoint.spec.mean, checkpoint.spec.std) == (mean, std)
    assert (checkpoint.spec.stem, checkpoint.spec.num_classes) == ("3x3", 2)
    assert checkpoint.meta["stage"] == "pretrain"
    assert checkpoint.meta["classes"] == ["0", "1"]
    assert checkpoint.meta["config"] == to_dict(config)
    assert checkpoint.meta["config_hash"] == config_hash(config)
    assert checkpoint.lineage == {
        "arch": "resnet18",
        "source": "digits[0-1]",
        "pretrain": "natural",
        "robust": False,
        "pretrain_seed": 0,
        "seed": 0,
    }


def test_robust_pretraining_is_labelled_and_differs(tmp_path):
    pretrain.run(at(NATURAL, tmp_path / "natural"))
    pretrain.run(at(ROBUST, tmp_path / "robust"))
    lineage = Checkpoint.load(tmp_path / "robust").lineage
    assert lineage["robust"] is True and lineage["pretrain"] == "pgd-linf-0.1"
    natural, robust = numbers(tmp_path / "natural"), numbers(tmp_path / "robust")
    assert all(r["loss"] > n["loss"] for n, r in zip(natural, robust, strict=True))


def test_another_seed_is_another_run(tmp_path):
    for seed in (0, 1):
        pretrain.run(at(NATURAL, tmp_path / str(seed), seed=seed))
    one, two = (Checkpoint.load(tmp_path / str(seed)).tensors for seed in (0, 1))
    assert not torch.equal(one["model.conv1.weight"], two["model.conv1.weight"])


@pytest.mark.parametrize("call", [3, STEPS, STEPS + 2], ids=["mid_epoch", "epoch_end", "epoch_2"])
@pytest.mark.parametrize("config", [NATURAL, ROBUST], ids=["natural", "pgd"])
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, config, call):
    pretrain.run(at(config, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        stop_after(patch, call)
        with pytest.raises(Interrupted, match="the same command goes on"):
            pretrain.run(at(config, tmp_path / "stopped"))
    assert not Checkpoint.load(tmp_path / "stopped").meta["progress"]["finished"]
    torch.manual_seed(77)
    pretrain.run(at(config, tmp_path / "stopped"))
    assert same_run(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    pretrain.run(at(NATURAL, tmp_path))
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert set(before) == {".lock", "config.yaml", "metrics.jsonl", CHECKPOINT}  # no left-overs
    pretrain.run(at(NATURAL, tmp_path, device="cpu"))
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_no_resume_starts_over(tmp_path, monkeypatch):
    pretrain.run(at(NATURAL, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            pretrain.run(at(NATURAL, tmp_path / "again"))
    half_way = Checkpoint.load(tmp_path / "again").meta["progress"]
    assert (half_way["epoch"], half_way["step"]) == (1, 2)
    steps = stop_after(monkeypatch, None)
    pretrain.run(at(NATURAL, tmp_path / "again", resume=False))
    assert len(steps) == 2 * STEPS
    assert same_run(tmp_path / "again", tmp_path / "undisturbed")
    # It is the same run, not one that differs by how it was started.
    assert (
        Checkpoint.load(tmp_path / "again").meta["config_hash"]
        == Checkpoint.load(tmp_path / "undisturbed").meta["config_hash"]
    )


def test_no_resume_takes_a_folder_over(tmp_path):
    pretrain.run(at(NATURAL, tmp_path))
    pretrain.run(at(NATURAL, tmp_path, seed=1, resume=False))
    assert Checkpoint.load(tmp_path).lineage["seed"] == 1
    pretrain.run(at(NATURAL, tmp_path, seed=1))


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    pretrain.run(at(NATURAL, tmp_path))
    train = dataclasses.replace(NATURAL.train, lr=0.1)
    with pytest.raises(RtkError, match=r"train\.lr is 0\.05 there and 0\.1 here.*another --out"):
        pretrain.run(at(NATURAL, tmp_path, train=train))
    assert Checkpoint.load(tmp_path).meta["config"]["train"]["lr"] == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig("digist")}, "unknown data set 'digist'.*did you mean 'digits'"),
        ({"model": ModelConfig(arch="resnet19")}, "unknown model 'resnet19'.*did you mean"),
        ({"attack": AttackConfig("pdg")}, "unknown attack 'pdg'.*did you mean 'pgd'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"model": ModelConfig(width=0.001)}, "width 0.001 is so small"),
    ],
    ids=["data", "model", "attack", "device", "width"],
)
def test_a_mistaken_command_does_not_claim_the_folder(tmp_path, changes, message):
    """Else the corrected command would be refused for having other settings."""
    folder = tmp_path / "run"
    with pytest.raises(RtkError, match=message):
        pretrain.run(at(NATURAL, folder, **changes))
    assert not folder.exists()
