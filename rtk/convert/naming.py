"""What the names of published files tell about how a network was trained."""

from __future__ import annotations

import re
from pathlib import Path


def pretrain_label(path: Path) -> str | None:
    """Return a label as `AttackConfig.label` gives it, or None where the name does not tell.

    robust-models-transfer: resnet50_l2_eps3.ckpt, and resnet50_linf_eps4.0.ckpt for 4/255 (eps 0 is
    natural). smoothing: noise_0.25/checkpoint.pth.tar.
    """
    trained = re.search(r"_(l2|linf)_eps(\d+(?:\.\d+)?)", path.name)
    if trained:
        norm, eps = trained[1], float(trained[2])
        if eps == 0:
            return "natural"
        return f"pgd-{norm}-{eps / 255 if norm == 'linf' else eps:.4g}"
    noise = re.search(r"noise_(\d+(?:\.\d+)?)", path.as_posix())
    if noise:
        return "natural" if float(noise[1]) == 0 else f"smoothing-{float(noise[1]):.4g}"
    return None
