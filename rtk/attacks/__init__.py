"""Attacks: callables `attack(model, x, y) -> x_adv`, by name for the stages.

An attack may have a method `after_epoch(model, x, y)`: the training loop calls it once an epoch,
with the epoch's last batch (see `Fast`). docs/attacks.md tells what each is for.
"""

from rtk.attacks.apgd import APGD
from rtk.attacks.checks import check_labels
from rtk.attacks.external import AutoAttack, Foolbox
from rtk.attacks.fast import Fast
from rtk.attacks.fgsm import FGSM
from rtk.attacks.free import Free
from rtk.attacks.graphed import GraphedAttack
from rtk.attacks.named import Attack, attacks, create, takes_only
from rtk.attacks.pgd import PGD
from rtk.attacks.smoothing import Smoothing
from rtk.attacks.square import Square

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Fast",
    "Foolbox",
    "Free",
    "GraphedAttack",
    "Smoothing",
    "Square",
    "attacks",
    "check_labels",
    "create",
    "takes_only",
]
