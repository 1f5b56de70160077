"""Top-1 and mean per-class accuracy, on images as they are or under an attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtk.attacks import Attack, GraphedAttack, check_labels
from rtk.attacks.gradient import local_network
from rtk.attacks.precision import accepting
from rtk.cuda_graph import GraphChoice
from rtk.data import Batches


@dataclass(frozen=True)
class Accuracy:
    """Fractions in [0, 1].

    Args:
        top1: share of the images that are classified right.
        mean_per_class: mean of the classes' own accuracies, over the classes that occur.
        images: how many were looked at.
    """

    top1: float
    mean_per_class: float
    images: int


def accuracy(
    model: nn.Module,
    batches: Batches,
    attack: Attack | None = None,
    *,
    graph: GraphChoice = "auto",
) -> Accuracy:
    """Measure the accuracy of `model` in eval mode; every module's mode is put back afterwards.

    On a GPU the attack is one CUDA graph from the fourth batch on, but for a last, smaller batch;
    it finds the same images. See `rtk.attacks.GraphedAttack` for what stays eager.

    Args:
        model: takes images in [0, 1] and returns logits; in half precision, the images are cast for
            it. Of DistributedDataParallel the network inside, so that one rank may measure alone.
        batches: the images; one pass, in order.
        attack: makes each batch adversarial first; None measures natural accuracy.
        graph: whether the attack is captured: "auto" warns once where it cannot be; True raises an
            RtkError there; False never captures. A `GraphedAttack` decides by itself.

    Raises:
        RtkError: for a label that the model has no class for.
    """
    model = local_network(model)
    if attack is not None and not isinstance(attack, GraphedAttack):
        attack = GraphedAttack(attack, graph=graph)
    training = [module for module in model.modules() if module.training]
    model.eval()
    rights: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for x, y in batches.epoch(0):
            if attack is not None:
                x = attack(model, x, y)
            with torch.no_grad():
                logits = accepting(model, x)(x)
            if not labels:
                check_labels(y, logits)
            rights.append(logits.argmax(1) == y)
            labels.append(y)
    finally:
        for module in training:
            module.training = True
    right, label = torch.cat(rights).double(), torch.cat(labels)
    per_class = torch.zeros(int(label.max()) + 1, dtype=torch.float64, device=label.device)
    hits = per_class.index_add(0, label, right)
    counts = per_class.index_add(0, label, torch.ones_like(right))
    occurring = counts > 0
    return Accuracy(
        right.mean().item(), (hits[occurring] / counts[occurring]).mean().item(), len(label)
    )
