import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from rtk import __version__, data, evaluate, report
from rtk.attacks import PGD
from rtk.config import AttackConfig, DataConfig, EvaluateConfig
from rtk.errors import RtkError
from rtk.identity import config_hash
from rtk.train import CHECKPOINT, Checkpoint, save_checkpoint, seed_everything

PGD3 = AttackConfig("pgd", eps=0.1, steps=3)


@pytest.fixture
def config(tmp_path, transferred):
    return EvaluateConfig(
        out=str(tmp_path / "run"), seed=5, checkpoint=str(transferred), attack=PGD3, batch_size=32
    )


def run(config):
    return json.loads(evaluate.run(config).read_text())


def rights(checkpoint, name, attack=None, batch_size=32):
    """Return which test images are classified right, and the labels; an attack has seed 5."""
    model = Checkpoint.load(checkpoint).build_model().eval()
    seed_everything(5)
    right, labels = [], []
    for x, y in data.Batches(data.load(DataConfig(name)).test, batch_size).epoch(0):
        x = x if attack is None else attack(model, x, y)
        with torch.no_grad():
            right.append(model(x).argmax(1) == y)
        labels.append(y)
    return torch.cat(right), torch.cat(labels)


def test_the_numbers_are_those_of_a_plain_loop(config, transferred):
    result = run(config)
    right, labels = rights(transferred, "digits[2-3]")
    by_class = [right[labels == label].double().mean().item() for label in (0, 1)]
    assert result["top1"] == right.double().mean().item()
    assert result["mean_per_class"] == pytest.approx(sum(by_class) / 2, abs=1e-12)
    assert result["images"] == len(labels) > 60
    attacked, _ = rights(transferred, "digits[2-3]", PGD("linf", 0.1, 2 * 0.1 / 3, 3))
    assert result["pgd_top1"] == attacked.double().mean().item()
    assert result["pgd_top1"] < result["top1"]


def test_the_result_tells_what_was_measured(config, transferred):
    result = run(config)
    checkpoint = Checkpoint.load(transferred)
    numbers = ("top1", "mean_per_class", "pgd_top1", "images")
    assert {k: v for k, v in result.items() if k not in numbers} == {
        **checkpoint.lineage,
        "evaluated_on": "digits[2-3]",
        "attack": "pgd-linf-0.1, 3 steps",
        "config_hash": config_hash(config),
        "checkpoint_sha256": checkpoint.sha256,
        "rtk": __version__,
    }
    assert result["scheme"] == "omp" and result["granularity"] == "row"
    assert (result["pretrain_seed"], result["seed"]) == (2, 3)


def test_a_pretrained_network_is_measured_on_its_own_task(config, pretrained, tmp_path):
    result = run(dataclasses.replace(config, checkpoint=str(pretrained)))
    assert result["target"] == result["source"] == result["evaluated_on"] == "digits[0-1]"
    assert "transfer" not in result
    (row,) = report.read_results(tmp_path)
    assert row.target == "digits[0-1]" and row.scheme == "dense"


def test_other_images_can_be_named(config, transferred):
    with pytest.warns(UserWarning, match=r"trained on the classes 2, 3; digits\[3,2\] has 3, 2"):
        result = run(dataclasses.replace(config, data=DataConfig("digits[3,2]")))
    assert result["evaluated_on"] == "digits[3,2]" and result["target"] == "digits[2-3]"
    right, _ = rights(transferred, "digits[3,2]")
    assert result["top1"] == right.double().mean().item()
    own, _ = rights(transferred, "digits[2-3]")
    assert result["top1"] == pytest.approx(1 - own.double().mean().item())


def test_without_an_attack_there_is_no_adversarial_accuracy(config):
    result = run(dataclasses.replace(config, attack=AttackConfig("none")))
    assert result["pgd_top1"] is None and result["attack"] is None


def test_the_batch_size_does_not_change_natural_accuracy(config, tmp_path):
    one = run(config)
    config = dataclasses.replace(config, out=str(tmp_path / "other"), batch_size=50)
    assert run(config)["top1"] == one["top1"]


def test_the_random_start_follows_the_seed(config, tmp_path):
    def attacked(out, seed):
        # One step of nothing: the start itself is what is measured.
        attack = AttackConfig("pgd", "linf", 0.5, 0.0, 1)
        return run(dataclasses.replace(config, out=str(tmp_path / out), seed=seed, attack=attack))[
            "pgd_top1"
        ]

    assert attacked("a", 1) == attacked("b", 1)
    assert len({attacked(f"c{seed}", seed) for seed in range(4)}) > 1


def test_the_default_attack_is_pgd_20_of_8_255ths():
    config = EvaluateConfig()
    assert (config.attack.name, config.attack.norm) == ("pgd", "linf")
    assert (config.attack.eps, config.attack.steps) == (8 / 255, 20)
    assert config.attack.resolved_step_size == 2 / 255
    assert config.attack.random_start and config.attack.bn_mode == "eval"


def test_the_default_step_grows_with_the_radius():
    attack = dataclasses.replace(EvaluateConfig().attack, norm="l2", eps=3.0)
    assert attack.resolved_step_size == 0.75


def test_batch_statistics_are_refused():
    """The attack would update the statistics of the very model that is measured."""
    with pytest.raises(RtkError, match=r"attack\.bn_mode: expected eval"):
        EvaluateConfig(attack=AttackConfig("pgd", bn_mode="train"))


def test_a_result_that_is_there_is_left_as_it_is(config):
    path = evaluate.run(config)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert evaluate.run(config) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_no_resume_measures_again_to_the_same_numbers(config):
    path = evaluate.run(config)
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    evaluate.run(dataclasses.replace(config, resume=False))
    assert path.stat().st_mtime_ns > written and path.read_bytes() == before


def test_another_checkpoint_is_measured_again(config, tmp_path, transferred):
    source = tmp_path / "source"
    shutil.copytree(transferred, source)
    config = dataclasses.replace(config, checkpoint=str(source))
    first = run(config)
    checkpoint = Checkpoint.load(source)
    model = checkpoint.build_model()
    with torch.no_grad():
        model.fc.weight.neg_()
        model.fc.bias.neg_()
    meta = {key: checkpoint.meta[key] for key in ("progress", "config", "lineage")}
    sha256 = save_checkpoint(source / CHECKPOINT, model, None, meta)
    second = run(config)
    assert second["checkpoint_sha256"] == sha256
    assert second["top1"] == pytest.approx(1 - first["top1"])


def test_a_result_of_other_settings_is_not_taken_for_ours(config):
    """As after a --no_resume that was killed between config.yaml and the result."""
    path = evaluate.run(config)
    stale = path.read_bytes()
    other = dataclasses.replace(config, attack=AttackConfig("none"))
    evaluate.run(dataclasses.replace(other, resume=False))
    path.write_bytes(stale)
    assert run(other)["pgd_top1"] is None


def test_other_settings_in_the_same_folder_are_refused(config):
    evaluate.run(config)
    with pytest.raises(RtkError, match="seed is 5 there and 6 here"):
        evaluate.run(dataclasses.replace(config, seed=6))


def test_its_own_images_can_be_resized(config, transferred):
    result = run(dataclasses.replace(config, data=DataConfig("", image_size=16)))
    named = DataConfig("digits[2-3]", image_size=16)
    dataset = data.load(named)
    model = Checkpoint.load(transferred).build_model().eval()
    with torch.no_grad():
        right = model(dataset.test.images / 255).argmax(1) == dataset.test.labels
    assert result["top1"] == pytest.approx(right.double().mean().item(), abs=0.02)
    assert result["images"] == len(right)


def test_a_checkpoint_that_does_not_know_its_images_needs_a_name(config, tmp_path, transferred):
    path = tmp_path / "c"
    model = Checkpoint.load(transferred).build_model()
    save_checkpoint(path, model, None, {"progress": {"finished": True}})
    config = dataclasses.replace(config, checkpoint=str(path))
    with pytest.raises(RtkError, match=r"does not say what it was trained on.*--data.name"):
        evaluate.run(config)
    assert run(dataclasses.replace(config, data=DataConfig("digits[2-3]")))["images"] > 60


@pytest.mark.filterwarnings("ignore:the network was trained")
def test_labels_the_model_has_no_class_for_are_refused(config):
    with pytest.raises(RtkError, match=r"labels must be in \[0, 2\)"):
        evaluate.run(dataclasses.replace(config, data=DataConfig("digits")))


def test_an_unfinished_checkpoint_is_refused(config, tmp_path, transferred):
    checkpoint = Checkpoint.load(transferred)
    progress = {"epoch": 1, "step": 3, "loss_sum": 0.0, "finished": False}
    path = tmp_path / "unfinished.safetensors"
    save_checkpoint(path, checkpoint.build_model(), None, {"progress": progress})
    with pytest.raises(RtkError, match="stopped at epoch 1; give the same command again"):
        evaluate.run(dataclasses.replace(config, checkpoint=str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("attack", "summary"),
    [
        (AttackConfig("apgd-ce", eps=0.1, steps=5), "apgd-ce-linf-0.1, 5 steps"),
        (AttackConfig("square", eps=0.1, queries=20), "square-linf-0.1, 20 queries"),
        (
            AttackConfig("pgd", eps=0.1, steps=3, restarts=2, early_stop=True),
            "pgd-linf-0.1, 3 steps, 2 restarts, early stop",
        ),
        (AttackConfig("smoothing", sigma=0.5), "smoothing-0.5"),
    ],
    ids=lambda value: value.name if isinstance(value, AttackConfig) else "",
)
def test_stronger_attacks_by_name(config, attack, summary):
    result = run(dataclasses.replace(config, attack=attack))
    assert result["attack"] == summary
    assert 0 <= result["pgd_top1"] <= result["top1"]


def test_more_restarts_never_look_more_robust(config, tmp_path):
    def attacked(restarts):
        attack = AttackConfig("pgd", eps=0.15, steps=3, restarts=restarts, early_stop=True)
        out = str(tmp_path / str(restarts))
        return run(dataclasses.replace(config, out=out, attack=attack, batch_size=128))["pgd_top1"]

    assert attacked(4) <= attacked(1)


def test_free_is_refused(config):
    with pytest.raises(RtkError, match="attack free is a way of training"):
        evaluate.run(dataclasses.replace(config, attack=AttackConfig("free")))


def test_gradients_that_are_not_finite_are_an_error_and_no_robustness(config, monkeypatch):
    """They break after the first batch, which is looked at by itself."""
    from rtk.attacks import pgd

    calls = []

    @contextlib.contextmanager
    def broken(model, **options):
        def gradient(x, y):
            calls.append(len(x))
            scale = 1.0 if len(calls) <= 3 else torch.nan
            return torch.ones_like(x) * scale, model(x).detach()

        yield gradient

    monkeypatch.setattr(pgd, "input_gradient", broken)
    with pytest.raises(RtkError, match=r"gradients .* not as robust as it looks"):
        run(config)
    assert len(calls) > 3
    assert not (Path(config.out) / "result.json").exists()
