"""Top-1 and mean per-class accuracy, on images as they are or under an attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtk import distributed
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

    Processes that work together (`rtk.distributed`) take turns at whole batches and add up what
    they count, which is what one process counts, to the last image: for an attack that has
    `draw_seed`, those of the others' batches are drawn too.

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
    rank, ranks = distributed.rank(), distributed.world_size()
    rights: list[Tensor] = [torch.zeros(0, dtype=torch.bool, device=batches.device)]
    labels: list[Tensor] = [torch.zeros(0, dtype=torch.int64, device=batches.device)]
    try:
        for turn, (x, y) in enumerate(batches.epoch(0, min(rank, len(batches)), ranks)):
            if attack is not None:
                _skip_seeds(attack, rank if turn == 0 else ranks - 1)
                x = attack(model, x, y)
            with torch.no_grad():
                logits = accepting(model, x)(x)
            if turn == 0:
                check_labels(y, logits)
            rights.append(logits.argmax(1) == y)
            labels.append(y)
    finally:
        for module in training:
            module.training = True
    right, label = torch.cat(rights).double(), torch.cat(labels)
    classes = int(batches.labels.max()) + 1
    per_class = torch.zeros(2, classes, dtype=torch.float64, device=label.device)
    both = torch.stack([right, torch.ones_like(right)])
    hits, counts = distributed.summed(per_class.index_add(1, label, both))
    occurring = counts > 0
    return Accuracy(
        (hits.sum() / counts.sum()).item(),
        (hits[occurring] / counts[occurring]).mean().item(),
        int(counts.sum()),
    )


def _skip_seeds(attack: GraphedAttack, count: int) -> None:
    """Draw the seeds of `count` batches that other processes attack."""
    for _ in range(count):
        attack.draw_seed()
