"""Certified accuracy: the radius in which a network smoothed by noise cannot change its mind.

Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918): the smoothed classifier answers with the
class that the network gives most often to the image plus Gaussian noise. If that class wins a share
p of the draws, no change of the image shorter than sigma Phi^-1(p) in L2 makes another one win.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from rtk import distributed, ops
from rtk.attacks.gradient import frozen_view
from rtk.attacks.seeds import draw_seed
from rtk.config import CertifyConfig
from rtk.data import Split
from rtk.errors import RtkError

ABSTAIN = -1


def lower_bound(hits: int, samples: int, alpha: float) -> float:
    """Return a lower confidence bound of a share (Clopper & Pearson 1934).

    Args:
        hits: how many of `samples` were hits.
        samples: how many were drawn, >= 1.
        alpha: probability that the share is below the bound, in (0, 1).
    """
    from scipy.stats import beta  # with scikit-learn; here, because it takes long to import

    return float(beta.ppf(alpha, hits, samples - hits + 1)) if hits else 0.0


def certified_radius(hits: int, samples: int, sigma: float, alpha: float) -> float:
    """Return the L2 radius in which a class cannot lose that won `hits` of `samples` draws.

    0 where it may not even have the majority. With all of 100000 draws at alpha = 0.001 it is
    3.8115 sigma.
    """
    from scipy.stats import norm

    share = lower_bound(hits, samples, alpha)
    return sigma * float(norm.ppf(share)) if share > 0.5 else 0.0


class Smoothed:
    """A network that answers with the class it gives most often under Gaussian noise.

    Nothing waits for the device but one look at the counts at the end of each call.

    Args:
        model: takes images (it normalises inside) and returns logits of at least two classes; used
            in eval mode and left as it was.
        sigma: standard deviation of the noise in [0, 1] pixel scale, > 0.
        batch_size: noisy copies at a time.
    """

    def __init__(self, model: nn.Module, sigma: float, batch_size: int = 1000) -> None:
        if not sigma > 0 or batch_size < 1:
            raise RtkError(
                f"Smoothed: expected sigma > 0 and a batch of at least 1, got {sigma} and "
                f"{batch_size}"
            )
        self.model = model
        self.sigma = sigma
        self.batch_size = batch_size

    def predict(self, x: Tensor, n: int, alpha: float, *, seed: int | None = None) -> int:
        """Return the class of one image, or -1 where the draws do not tell.

        Args:
            x: (C, H, W) the image, floating, in [0, 1].
            n: number of draws, >= 1.
            alpha: probability of a wrong answer.
            seed: of the noise; drawn from torch's generator where None.
        """
        from scipy.stats import binomtest

        values, classes = self._counts(x, n, self._generator(seed)).topk(2)
        (first, second), winner = values.tolist(), int(classes[0])
        sure = binomtest(first, first + second, p=0.5).pvalue <= alpha
        return winner if sure else ABSTAIN

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, *, seed: int | None = None
    ) -> tuple[int, float]:
        """Return the class of one image and the L2 radius in which it is certain.

        Args:
            x: (C, H, W) the image, floating, in [0, 1].
            n0: draws that guess the class, >= 1.
            n: draws that estimate its share, >= 1.
            alpha: probability that the certificate is wrong.
            seed: of the noise; drawn from torch's generator where None.

        Returns:
            (class, radius), or (-1, 0.0) where the class may not have the majority.
        """
        generator = self._generator(seed)
        guess = self._counts(x, n0, generator).argmax()
        hits = self._counts(x, n, generator)[guess]
        winner, count = torch.stack([guess, hits]).tolist()
        radius = certified_radius(count, n, self.sigma, alpha)
        return (winner, radius) if radius > 0 else (ABSTAIN, 0.0)

    def _generator(self, seed: int | None) -> Generator:
        """Return a CPU generator that gives each batch of noise a seed."""
        return Generator().manual_seed(draw_seed() if seed is None else seed)

    def _counts(self, x: Tensor, n: int, generator: Generator) -> Tensor:
        """Return, (classes,) int64 on the device, how often each class wins in `n` draws."""
        if x.dim() != 3 or not x.is_floating_point():
            raise RtkError(f"Smoothed: expected one floating image (C, H, W), got {x.shape}")
        if n < 1:
            raise RtkError(f"Smoothed: expected at least 1 draw, got {n}")
        copies = x.expand(min(n, self.batch_size), *x.shape).contiguous()
        counts: Tensor | None = None
        with torch.no_grad(), frozen_view(self.model, "eval"):
            for done in range(0, n, self.batch_size):
                seed = int(torch.randint(2**63 - 1, (), generator=generator))
                clean = copies[: n - done]
                logits = self.model(ops.gaussian_noise(clean, sigma=self.sigma, seed=seed))
                winners = logits.argmax(1)
                if counts is None:
                    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=x.device)
                # scatter_add and not bincount, which waits to know the largest class.
                counts.scatter_add_(0, winners, torch.ones_like(winners))
        assert counts is not None
        return counts


def certify_split(
    model: nn.Module, split: Split, config: CertifyConfig, *, seed: int, device: torch.device
) -> dict[str, Any]:
    """Certify evenly spaced images and return what result.json says of them.

    Args:
        model: on `device`.
        split: the test images and their labels.
        config: of the certification; its `sigma` must be given.
        seed: of the noise; an image's noise depends on it and the image's index only.
        device: where to compute.

    Returns:
        The settings; `images`, how many were certified; `abstained`, the share without an answer;
        `accuracy`, the share that is classified right by the smoothed network; `mean_radius`, with
        0 for wrong ones (the average certified radius); `certified_accuracy`, for each of `radii`
        the share that is right with a radius of at least that.
    """
    assert config.sigma is not None
    smoothed = Smoothed(model, config.sigma, config.batch_size)
    total = len(split)
    count = total if config.images is None else min(config.images, total)
    images = split.sample(count)
    # Of each image whether it is right, its radius where it is, whether there was an answer.
    found = torch.zeros(count, 3, dtype=torch.float64)
    own_share = range(distributed.rank(), count, distributed.world_size())
    quiet = not (sys.stderr.isatty() and distributed.is_main())
    for i in tqdm(own_share, desc="certify", leave=False, disable=quiet):
        index = i * total // count  # as `sample` chooses
        x = images[i].to(device).float() / 255
        label = int(split.labels[index])
        own = (seed + index * 0x9E3779B97F4A7C15) % 2**63  # streams of neighbours far apart
        winner, radius = smoothed.certify(x, config.n0, config.n, config.alpha, seed=own)
        right_here = winner == label
        found[i] = torch.tensor([right_here, radius * right_here, winner == ABSTAIN])
    found = distributed.summed(found)
    right = found[found[:, 0] > 0, 1].tolist()
    settings = dataclasses.asdict(config)
    return {
        **{name: settings[name] for name in ("sigma", "n0", "n", "alpha")},
        "images": count,
        "abstained": found[:, 2].sum().item() / count,
        "accuracy": len(right) / count,
        "mean_radius": sum(right) / count,
        "radii": list(config.radii),
        "certified_accuracy": [sum(r >= at for r in right) / count for at in config.radii],
    }
