"""Out of distribution: how well a network's confidence tells its own test images from others.

The score of an image is its maximum softmax probability, and the measure is the area under the ROC
curve: the chance that an image of the test set gets a higher score than one of another set, ties
counted half (Hendrycks & Gimpel 2017, arXiv 1610.02136).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtk.attacks.gradient import frozen_view
from rtk.attacks.precision import accepting
from rtk.data import Batches
from rtk.errors import RtkError


def confidences(model: nn.Module, batches: Batches) -> Tensor:
    """Return the maximum softmax probability of each image, (N,) float64 on the CPU, in [0, 1].

    The softmax is in float64: in fp32 every margin beyond 17 is the same 1, and its images tie.

    Args:
        model: takes images in [0, 1] and returns logits; used in eval mode and left as it was.
        batches: the images; one pass, in order.

    Raises:
        RtkError: where a logit is not finite.
    """
    scores: list[Tensor] = []
    with torch.no_grad(), frozen_view(model, "eval"):
        for x, _ in batches.epoch(0):
            scores.append(accepting(model, x)(x).double().softmax(1).amax(1))
    found = torch.cat(scores).cpu()
    if not found.isfinite().all():
        raise RtkError(
            f"the network gives logits that are not finite on {int((~found.isfinite()).sum())} of "
            f"{len(found)} images, so they have no confidence; look at how it was trained"
        )
    return found


def roc_auc(inside: Tensor, outside: Tensor) -> float:
    """Return the area under the ROC curve of scores that should be higher `inside`.

    Args:
        inside: (N,) scores of the test images, N >= 1.
        outside: (M,) scores of the other set's images, M >= 1.

    Returns:
        P(inside > outside) + P(inside = outside) / 2: 1 where every score inside is higher, 0.5
        where the scores tell nothing.
    """
    from sklearn.metrics import roc_auc_score  # costs about a second

    belongs = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(belongs.numpy(), torch.cat([inside, outside]).cpu().numpy()))
