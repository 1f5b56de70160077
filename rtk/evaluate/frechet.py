"""Fréchet distance between two sets of images: how far a target lies from the source.

Each set is summed up by mean m and covariance C of its features, and the distance is that of two
Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson & Landau 1982). With pool3 features
of Inception v3 it is the FID (Heusel et al. 2017, arXiv 1706.08500).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from rtk import artifact, data
from rtk.config import DataConfig
from rtk.errors import RtkError
from rtk.evaluate.inception import Inception
from rtk.train import Checkpoint


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A set of feature vectors, summed up.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, over N - 1.
        images: N, how many vectors there were.
        meta: where they come from: what JSON can hold.
    """

    mean: Tensor
    covariance: Tensor
    images: int
    meta: dict[str, Any] = field(default_factory=dict)


class Moments:
    """Mean and covariance of features that come in batches, in float64 on their device.

    Batches are merged about their own means (Chan, Golub & LeVeque 1983), so a mean far from zero
    costs no digits.

    Args:
        name: of what features are of, for messages.
    """

    def __init__(self, name: str = "features") -> None:
        self.name = name
        self.images = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add a batch of features, (B, D) floating, B >= 1."""
        x = features.double()
        mean = x.mean(0)
        x = x - mean
        scatter = x.T @ x
        before, self.images = self.images, self.images + len(x)
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter = mean, scatter
            return
        shift = mean - self._mean
        weight = before * len(x) / self.images
        self._scatter += scatter + weight * torch.outer(shift, shift)
        self._mean = self._mean + shift * (len(x) / self.images)

    def gaussian(self, **meta: Any) -> Gaussian:
        """Return what was added, on its device.

        Raises:
            RtkError: for less than two vectors, or one that is not finite.
        """
        if self._mean is None or self._scatter is None or self.images < 2:
            raise RtkError(f"{self.name}: a covariance needs at least 2 images, got {self.images}")
        if not (self._mean.isfinite().all() and self._scatter.isfinite().all()):
            raise RtkError(
                f"{self.name}: features are not finite; look at how their network was trained"
            )
        return Gaussian(self._mean, self._scatter / (self.images - 1), self.images, meta)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians, which is what FID reports; >= 0.

    tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of A^T C2 A, where C1 = A A^T: that
    matrix is symmetric, so covariances may be singular and no root is complex.

    Args:
        one: statistics of one set.
        other: of the other, on the same device and with as many features; the order does not
            matter.

    Raises:
        RtkError: where the numbers of features differ.
    """
    if one.mean.shape != other.mean.shape:
        raise RtkError(
            f"Fréchet distance: one set has {len(one.mean)} features and the other "
            f"{len(other.mean)}; take both from one network"
        )
    values, vectors = torch.linalg.eigh(one.covariance)
    factor = vectors * values.clamp_min(0).sqrt()
    product = factor.T @ other.covariance @ factor
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    apart = (one.mean - other.mean).square().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return max(0.0, (apart + traces - 2 * cross).item())  # equal sets round to either side of 0


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network whose features distances are measured in.

    Args:
        network: (N, 3, H, W) float images in [0, 1] to (N, D) features, in eval mode.
        kind: "pytorch-fid" or "torchvision" (Inception v3 with their weights), or "own". Distances
            of different kinds, and of two networks of the kind "own", are not comparable.
        label: what it is, in words.
        sha256: of its weights.
        image_size: pixels that images are resized to before; None leaves them as they are.
    """

    network: nn.Module
    kind: str
    label: str
    sha256: str
    image_size: int | None = None

    @classmethod
    def inception(cls, path: str | Path) -> Extractor:
        """Return Inception's pool3 features, 2048; see `Inception` for the file and the errors."""
        network = Inception(path)
        label = f"Inception v3, pool3, with {network.kind}'s weights"
        return cls(network, network.kind, label, network.sha256)

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> Extractor:
        """Return the pooled features of a network of rtk's, at the size it was trained on.

        Args:
            path: a run's folder or its checkpoint.safetensors.

        Raises:
            RtkError: where there is no checkpoint, or its run was stopped.
        """
        checkpoint = Checkpoint.load(path).require_finished()
        trained = checkpoint.meta.get("config") or {}
        size = trained.get("data", {}).get("image_size")
        label = f"pooled features of {path} ({checkpoint.spec.arch})"
        return cls(_Pooled(checkpoint.build_model()), "own", label, checkpoint.sha256, size)


class _Pooled(nn.Module):
    """A classifier up to its head, in eval mode."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def statistics_of(
    config: DataConfig,
    extractor: Extractor,
    folder: str | Path,
    *,
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    resume: bool = True,
) -> Gaussian:
    """Return the features of a set, summed up; from `folder` where they were computed before.

    The file is named by a hash of the set's name, root and size, of the choice of images, and of
    the network. A set whose files changed under the same name is not noticed.

    Args:
        config: the set; `image_size` None leaves images as the set has them.
        extractor: the network; it is moved to `device`.
        folder: where the statistics are kept.
        images: how many of the training images are taken, chosen by `seed`, or all where there are
            fewer; None takes the images of all splits.
        seed: of the choice, which depends on nothing else.
        batch_size: images at a time.
        device: where features are computed.
        resume: take statistics that are there; else compute them anew.

    Returns:
        On `device`; `meta` says which images and features they are.

    Raises:
        RtkError: for an unknown or missing set, an image that cannot be read, or less than two.
    """
    identity = {
        "data": config.name,
        "root": str(data.data_root(config)),
        "image_size": config.image_size,
        "storage": config.storage,
        "skip_bad": config.skip_bad,
        "chosen": None if images is None else {"images": images, "seed": seed},
        "features_sha256": extractor.sha256,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", config.name).strip("-.")[:40]
    path = Path(folder) / f"statistics-{slug}-{key}.safetensors"
    if resume and path.exists():
        tensors, meta, _ = artifact.load(path, "statistics")
        found = Gaussian(tensors["mean"], tensors["covariance"], meta["images"], meta)
    else:
        found = _measured(config, extractor, images, seed, batch_size, device, identity)
        tensors = {"mean": found.mean, "covariance": found.covariance}
        artifact.save(path, "statistics", tensors, {**found.meta, "images": found.images})
    if found.images <= len(found.mean):
        warnings.warn(
            f"{config.name}: {found.images} images for {len(found.mean)} feature dimensions: the "
            "covariance is singular and the distance comes out too large; compare it only with "
            "distances from as many images",
            stacklevel=2,
        )
    return Gaussian(found.mean.to(device), found.covariance.to(device), found.images, found.meta)


def _measured(
    config: DataConfig,
    extractor: Extractor,
    images: int | None,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    identity: dict[str, Any],
) -> Gaussian:
    splits, available = _images(config, images, seed)
    network = extractor.network.to(device)
    moments = Moments(config.name)
    hidden = not sys.stderr.isatty()
    for split in splits:
        batches = data.Batches(split, batch_size, device=device)
        steps = tqdm(batches.epoch(0), config.name, total=len(batches), leave=False, disable=hidden)
        with torch.no_grad():
            for x, _ in steps:
                moments.update(network(x))
    size = list(splits[0].size)
    meta = {**identity, "available": available, "features": extractor.label, "size": size}
    return moments.gaussian(**meta)


def _images(config: DataConfig, count: int | None, seed: int) -> tuple[list[data.Split], int]:
    """Return the images to look at, and how many there were to choose from."""
    dataset = data.load(config)
    if count is None:
        splits = [*dataset.splits().values()]
        return splits, sum(map(len, splits))
    train = dataset.train
    if count >= len(train):
        return [train], len(train)
    order = torch.randperm(len(train), generator=Generator().manual_seed(seed))
    return [train.select(order[:count].sort().values)], len(train)
