"""Attacks of other packages, where they are installed: AutoAttack and Foolbox."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtk.attacks.checks import Guard
from rtk.attacks.gradient import frozen_view
from rtk.attacks.precision import accepting
from rtk.attacks.seeds import draw_seed
from rtk.errors import RtkError, check_choice, did_you_mean


def _import(module: str, pip: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RtkError(
            f"the attack needs the package {module}, which cannot be imported ({error}); "
            f"pip install {pip}"
        ) from error


@contextmanager
def _seeded(x: Tensor, seed: int | None) -> Iterator[int]:
    """Seed torch's generators for a package that draws from them; put them back afterwards."""
    if seed is None:
        seed = draw_seed()
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield seed


@dataclass
class AutoAttack:
    """The ensemble by which robustness is compared (Croce & Hein 2020, arXiv 2003.01690).

    Runs `autoattack.AutoAttack`, of github.com/fra31/auto-attack. It differentiates the model by
    itself, so nothing that rtk does to make attacks fast applies.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        version: "standard", "plus" or "rand" (models that are random).
    """

    norm: str = "linf"
    eps: float = 8 / 255
    version: str = "standard"
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    capturable = False  # what another package does is no CUDA graph's business

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("version of AutoAttack", self.version, ("standard", "plus", "rand"))
        _check_eps("AutoAttack", self.eps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
        """Return adversarial images; those that no attack fooled are the images as they were.

        Raises:
            RtkError: where the package is missing; for images and labels as PGD does.
        """
        package = _import("autoattack", "git+https://github.com/fra31/auto-attack")
        x = x.detach()
        network = accepting(model, x)
        with self._guard.batch(network, x, y):
            if len(x) == 0:
                return x.clone()
            with _seeded(x, seed) as own, frozen_view(network, "eval"):
                attack = package.AutoAttack(
                    network,
                    norm={"linf": "Linf", "l2": "L2"}[self.norm],
                    eps=self.eps,
                    seed=own,
                    version=self.version,
                    device=x.device,
                    verbose=False,
                )
                return attack.run_standard_evaluation(x, y, bs=len(x)).detach()


@dataclass
class Foolbox:
    """Any attack of Foolbox 3 that takes a radius (Rauber et al. 2017, arXiv 1707.04131).

    Args:
        attack: the name of a class in `foolbox.attacks`, e.g. "LinfDeepFoolAttack" (its norm is
            part of it), or an attack object for settings of your own.
        eps: radius in [0, 1] pixel scale, in the attack's norm.
    """

    attack: Any
    eps: float = 8 / 255
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    capturable = False  # what another package does is no CUDA graph's business

    def __post_init__(self) -> None:
        _check_eps("Foolbox", self.eps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
        """Return adversarial images, clipped to the radius.

        Raises:
            RtkError: where the package or the attack is missing; for images and labels as PGD does.
        """
        package = _import("foolbox", "foolbox")
        attack = self.attack
        if isinstance(attack, str):
            if not hasattr(package.attacks, attack):
                near = did_you_mean(attack, dir(package.attacks))
                raise RtkError(f"foolbox.attacks has no {attack!r}{near}")
            attack = getattr(package.attacks, attack)()
        x = x.detach()
        network = accepting(model, x)
        with self._guard.batch(network, x, y):
            if len(x) == 0:
                return x.clone()
            with _seeded(x, seed), frozen_view(network, "eval"):
                target = package.PyTorchModel(network, bounds=(0, 1), device=x.device)
                _, clipped, _ = attack(target, x, y, epsilons=self.eps)
        return clipped.detach()


def _check_eps(name: str, eps: float) -> None:
    if not eps >= 0:
        raise RtkError(f"{name}: eps must be >= 0 in [0, 1] pixel scale, got {eps}")
