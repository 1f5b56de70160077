"""Inception v3 up to its last pooling, with weights from a file: the features of FID.

Two files are known. That of pytorch-fid holds the network of the FID paper (Heusel et al. 2017,
arXiv 1706.08500), ported from TensorFlow; torchvision's holds other weights. Distances of one are
not on the scale of the other's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

from rtk.errors import RtkError

PYTORCH_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SIZE = 299  # of the images that the network sees, in pixels


class _PooledAsInTensorFlow:
    """Pools the last branch of torchvision's block without counting the padding in the mean."""

    branch_pool: nn.Module

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)  # type: ignore[misc]
        return [*others, self.branch_pool(self._pool(x))]


class _InceptionA(_PooledAsInTensorFlow, inception.InceptionA):
    pass


class _InceptionC(_PooledAsInTensorFlow, inception.InceptionC):
    pass


class _InceptionE(_PooledAsInTensorFlow, inception.InceptionE):
    pass


class _LastInceptionE(_InceptionE):
    def _pool(self, x: Tensor) -> Tensor:
        """Take the maximum: a slip of the original network, which every FID since has kept."""
        return F.max_pool2d(x, 3, stride=1, padding=1)


def _pytorch_fid(aux_logits: bool) -> inception.Inception3:
    blocks = [
        inception.BasicConv2d,
        _InceptionA,
        inception.InceptionB,
        _InceptionC,
        inception.InceptionD,
        _InceptionE,
        inception.InceptionAux,
    ]
    network = inception.Inception3(1008, aux_logits, False, blocks, init_weights=False)
    network.Mixed_7c = _LastInceptionE(2048)
    return network


def _torchvision(aux_logits: bool) -> inception.Inception3:
    return inception.Inception3(1000, aux_logits, False, init_weights=False)


_OF_CLASSES = {1008: ("pytorch-fid", _pytorch_fid), 1000: ("torchvision", _torchvision)}


class Inception(nn.Module):
    """Images, (N, 3, H, W) float in [0, 1], to pool3 features, (N, 2048); in eval mode.

    Args:
        path: of pytorch-fid's weights or those of torchvision's inception_v3, a state dict as
            torch.save writes it. It is opened with weights_only=True: code in it does not run.

    Attributes:
        kind: "pytorch-fid" or "torchvision", whose weights they are.
        sha256: of the file.

    Raises:
        RtkError: where the file cannot be read, holds more than tensors, or the weights of another
            network.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        state = _read(Path(path))
        head = state.get("fc.weight")
        classes = len(head) if isinstance(head, Tensor) and head.dim() else 0
        if classes not in _OF_CLASSES:
            raise _another(path, "its fc.weight has not 1008 (pytorch-fid) or 1000 rows")
        self.kind, build = _OF_CLASSES[classes]
        network = build(any(name.startswith("AuxLogits.") for name in state))
        try:
            # Not strict: files from before PyTorch 0.4.1 have no num_batches_tracked.
            missing, extra = network.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise _another(path, str(error).split("\n\t")[1]) from error
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or extra:
            names = (("missing", missing), ("unexpected", extra))
            raise _another(path, "; ".join(f"{what}: {', '.join(n)}" for what, n in names if n))
        network.fc = nn.Identity()  # type: ignore[assignment]
        self.network = network
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Resize to 299 pixels as pytorch-fid does, without antialiasing, and return features."""
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return self.network(2 * x - 1)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RtkError(
            f"Inception weights {path} cannot be read ({error.strerror}); download {PYTORCH_FID}"
        ) from error
    except Exception as error:  # whatever a damaged file, or a pickle of other things, makes it say
        reason = str(error).strip().split("\n")[0]
        raise RtkError(
            f"Inception weights {path} are damaged, or a pickle of more than tensors, which could "
            f"run code and is not opened ({reason}); download {PYTORCH_FID}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise _another(path, "it is not a state dict")
    return state


def _another(path: str | Path, reason: str) -> RtkError:
    if len(reason) > 200:
        reason = f"{reason[:200]}..."
    return RtkError(
        f"{path} does not hold the weights of Inception v3 ({reason}); give pytorch-fid's file "
        f"({PYTORCH_FID}) or that of torchvision's inception_v3"
    )
