"""Attacks by name, out of an AttackConfig."""

import pytest

from rtk import attacks
from rtk.attacks import APGD, FGSM, PGD, Fast, Free, Smoothing, Square
from rtk.config import AttackConfig, PretrainConfig
from rtk.errors import RtkError

MADE = {
    "pgd": (
        AttackConfig("pgd", "l2", 0.4, steps=7, restarts=3, keep_best=True, early_stop=True),
        PGD("l2", 0.4, 0.1, 7, restarts=3, keep_best=True, early_stop=True),
        "pgd-l2-0.4, 7 steps, 3 restarts, best iterate, early stop",
    ),
    "fgsm": (
        AttackConfig("fgsm", "l2", 0.4, bn_mode="train"),
        FGSM("l2", 0.4, "train"),
        "fgsm-l2-0.4",
    ),
    "fast": (AttackConfig("fast", eps=0.4), Fast("linf", 0.4, 0.5), "fast-linf-0.4"),
    "fast_step": (
        AttackConfig("fast", eps=0.4, step_size=0.3),
        Fast("linf", 0.4, 0.3),
        "fast-linf-0.4",
    ),
    "free": (AttackConfig("free", eps=0.4), Free("linf", 0.4, 0.4, 4), "free-linf-0.4"),
    "free_replays": (
        AttackConfig("free", "l2", 0.4, 0.1, replays=8),
        Free("l2", 0.4, 0.1, 8),
        "free-l2-0.4",
    ),
    "apgd": (
        AttackConfig("apgd-ce", eps=0.4, steps=100, restarts=2),
        APGD("linf", 0.4, 100, 2),
        "apgd-ce-linf-0.4, 100 steps, 2 restarts",
    ),
    "square": (
        AttackConfig("square", "l2", 0.4, queries=99),
        Square("l2", 0.4, 99),
        "square-l2-0.4, 99 queries",
    ),
    "smoothing": (AttackConfig("smoothing", sigma=0.5), Smoothing(0.5), "smoothing-0.5"),
}


@pytest.mark.parametrize("name", MADE)
def test_create_makes_what_the_configuration_says(name):
    config, expected, summary = MADE[name]
    assert attacks.create(config) == expected
    assert config.summary == summary


def test_all_names_are_known():
    assert attacks.attacks.names() == [
        "none",
        "pgd",
        "fgsm",
        "fast",
        "free",
        "apgd-ce",
        "square",
        "smoothing",
        "autoattack",
        "foolbox",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttackConfig("fgsm", step_size=0.1), "attack.step_size is no setting of fgsm, got 0.1"),
        (AttackConfig("fast", restarts=2), "restarts is no setting of fast.*it has step_size"),
        (AttackConfig("apgd-ce", step_size=0.1), "step_size is no setting of apgd-ce.* restarts"),
        (AttackConfig("square", keep_best=True), "keep_best is no setting of square"),
        (AttackConfig("pgd", queries=7), "queries is no setting of pgd"),
        (AttackConfig("apgd-ce", bn_mode="train"), "unknown bn_mode for APGD 'train'"),
    ],
    ids=lambda value: value.name if isinstance(value, AttackConfig) else "",
)
def test_settings_of_another_attack_are_refused(config, message):
    with pytest.raises(RtkError, match=message):
        attacks.create(config)


def test_evaluating_counts_bad_gradients_and_refuses_training_schemes():
    for config in (AttackConfig("pgd"), AttackConfig("apgd-ce"), AttackConfig("fgsm")):
        assert attacks.create(config, evaluating=True).count_nonfinite
        assert not attacks.create(config).count_nonfinite
    assert attacks.create(AttackConfig(), evaluating=True) is None
    with pytest.raises(RtkError, match="attack free is a way of training; evaluate with pgd"):
        attacks.create(AttackConfig("free"), evaluating=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restarts": 0}, r"attack\.restarts: expected at least 1 start, got 0"),
        ({"restarts": 2, "random_start": False}, r"attack\.restarts: expected 1 without random"),
        ({"queries": -1}, r"attack\.queries"),
        ({"replays": 0}, r"attack\.replays: expected at least 1"),
        ({"sigma": -0.1}, r"attack\.sigma: expected a deviation >= 0"),
        ({"sigma": float("nan")}, r"attack\.sigma"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(RtkError, match=message):
        AttackConfig("pgd", **changes)


def test_early_stopping_is_not_for_training():
    with pytest.raises(RtkError, match=r"attack\.early_stop: expected false while training"):
        PretrainConfig(attack=AttackConfig("pgd", early_stop=True))


def test_free_is_no_attack():
    with pytest.raises(RtkError, match=r"way of training.*rtk\.train\.make_free_step"):
        Free()(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, "unknown norm"),
        ({"eps": -1.0}, "Free: eps must be >= 0, got -1"),
        ({"step_size": -1.0}, "Free: step_size must be >= 0, got -1"),
        ({"replays": 0}, "Free: replays must be >= 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_of_free_are_refused(arguments, message):
    with pytest.raises(RtkError, match=message):
        Free(**arguments)
