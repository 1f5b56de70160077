"""Attacks: callables `attack(model, x, y) -> x_adv`, by name for the stages."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rtk.attacks.pgd import PGD, check_labels
from rtk.config import AttackConfig
from rtk.registry import Registry

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

attacks: Registry[Callable[[AttackConfig], Attack | None]] = Registry("attack")


@attacks.register("none")
def _none(config: AttackConfig) -> None:
    return None


@attacks.register("pgd")
def _pgd(config: AttackConfig) -> Attack:
    return PGD(
        norm=config.norm,
        eps=config.eps,
        step_size=config.resolved_step_size,
        steps=config.steps,
        random_start=config.random_start,
        bn_mode=config.bn_mode,
    )


def create(config: AttackConfig) -> Attack | None:
    """Return the attack that `config` names; None for "none"."""
    return attacks.get(config.name)(config)


__all__ = ["PGD", "Attack", "attacks", "check_labels", "create"]
