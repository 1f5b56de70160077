"""Attacks by name: how each is made of an AttackConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from rtk.attacks.apgd import APGD
from rtk.attacks.external import AutoAttack, Foolbox
from rtk.attacks.fast import Fast
from rtk.attacks.fgsm import FGSM
from rtk.attacks.free import Free
from rtk.attacks.pgd import PGD
from rtk.attacks.smoothing import Smoothing
from rtk.attacks.square import Square
from rtk.config import AttackConfig
from rtk.errors import RtkError
from rtk.registry import Registry

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

attacks: Registry[Callable[[AttackConfig], Attack | None]] = Registry("attack")

# Settings that only some attacks have. Norm, eps, steps and the like belong to nearly all, and a
# stage's default may set them for another attack than the one that is named.
_OPTIONS = (
    "step_size",
    "restarts",
    "keep_best",
    "early_stop",
    "queries",
    "replays",
    "sigma",
)


def takes_only(config: AttackConfig, *options: str) -> None:
    """Raise an RtkError if an option that the attack does not have is not at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for option in _OPTIONS:
        value = getattr(config, option)
        if option not in options and value != defaults[option]:
            has = f"of these it has {', '.join(options)}" if options else "it has no such options"
            raise RtkError(f"attack.{option} is no setting of {config.name}, got {value!r}; {has}")


@attacks.register("none")
def _none(config: AttackConfig) -> None:
    return None


@attacks.register("pgd")
def _pgd(config: AttackConfig) -> Attack:
    takes_only(config, "step_size", "restarts", "keep_best", "early_stop")
    return PGD(
        norm=config.norm,
        eps=config.eps,
        step_size=config.resolved_step_size,
        steps=config.steps,
        random_start=config.random_start,
        bn_mode=config.bn_mode,
        restarts=config.restarts,
        keep_best=config.keep_best,
        early_stop=config.early_stop,
    )


@attacks.register("fgsm")
def _fgsm(config: AttackConfig) -> Attack:
    takes_only(config)
    return FGSM(config.norm, config.eps, config.bn_mode)


@attacks.register("fast")
def _fast(config: AttackConfig) -> Attack:
    takes_only(config, "step_size")
    return Fast(config.norm, config.eps, config.resolved_step_size, config.bn_mode)


@attacks.register("free")
def _free(config: AttackConfig) -> Attack:
    takes_only(config, "step_size", "replays")
    return Free(config.norm, config.eps, config.resolved_step_size, config.replays)


@attacks.register("apgd-ce")
def _apgd(config: AttackConfig) -> Attack:
    takes_only(config, "restarts")
    return APGD(
        config.norm,
        config.eps,
        steps=config.steps,
        restarts=config.restarts,
        bn_mode=config.bn_mode,
    )


@attacks.register("square")
def _square(config: AttackConfig) -> Attack:
    takes_only(config, "queries")
    return Square(config.norm, config.eps, config.queries)


@attacks.register("smoothing")
def _smoothing(config: AttackConfig) -> Attack:
    takes_only(config, "sigma")
    return Smoothing(config.sigma)


@attacks.register("autoattack")
def _autoattack(config: AttackConfig) -> Attack:
    takes_only(config)
    return AutoAttack(config.norm, config.eps)


@attacks.register("foolbox")
def _foolbox(config: AttackConfig) -> Attack:
    takes_only(config)
    attack = config.name.partition(":")[2]
    if not attack:
        raise RtkError(
            "attack foolbox: name the class too, e.g. foolbox:LinfDeepFoolAttack; its norm is part "
            "of it"
        )
    return Foolbox(attack, config.eps)


def create(config: AttackConfig, *, evaluating: bool = False) -> Attack | None:
    """Return the attack that `config` names; None for "none".

    Args:
        config: its name may have an argument behind a colon, as in foolbox:LinfDeepFoolAttack.
        evaluating: the attack measures a model: PGD and APGD count gradients that are not finite,
            for `check_finite` after the last batch (see `rtk.attacks.checks`).

    Raises:
        RtkError: for an unknown name, settings that the attack does not have, or evaluating with
            "free".
    """
    attack = attacks.get(config.name.partition(":")[0])(config)
    if evaluating:
        if isinstance(attack, Free):
            raise RtkError("attack free is a way of training; evaluate with pgd or apgd-ce")
        if isinstance(attack, PGD | APGD):
            attack.count_nonfinite = True
    return attack
