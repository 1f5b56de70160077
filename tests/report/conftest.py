"""Run folders that were never run: result.json files with chosen numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BASE = {
    "pretrain": "natural",
    "robust": False,
    "source": "digits[0-4]",
    "pretrain_seed": 0,
    "arch": "resnet18",
    "scheme": "omp",
    "granularity": "element",
    "sparsity": 0.8,
    "actual_sparsity": 0.80001,
    "target": "digits[5-9]",
    "transfer": "finetune",
    "seed": 0,
    "attack": "pgd-linf-0.0314, 20 steps",
    "top1": 0.9,
    "mean_per_class": 0.89,
    "pgd_top1": 0.1,
    "images": 200,
    "config_hash": "0123456789ab",
    "rtk": "0.1.0",
    "checkpoint_sha256": "ab" * 32,
}
DENSE: dict[str, Any] = {"scheme": "dense", "granularity": None, "sparsity": 0.0}
ROBUST: dict[str, Any] = {"pretrain": "pgd-linf-0.1", "robust": True}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one result into a folder under tmp_path: BASE with some values changed."""

    def write_result(run: str, **changes: Any) -> Path:
        path = tmp_path / run / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(BASE | changes))
        return path

    return write_result


@pytest.fixture
def study_folder(write: Write, tmp_path: Path) -> Path:
    """Two seeds, natural and robust, dense and 80 %; differences +1.5 +-1.5, +3 +-0 points."""
    for seed, (dense, sparse) in enumerate([(0.95, 0.90), (0.97, 0.92)]):
        write(f"n{seed}-dense", seed=seed, top1=dense, pgd_top1=0.2, **DENSE)
        write(f"n{seed}-omp", seed=seed, top1=sparse, pgd_top1=0.1)
    for seed, (dense, sparse) in enumerate([(0.98, 0.93), (0.97, 0.95)]):
        write(f"r{seed}-dense", seed=seed, top1=dense, pgd_top1=0.5, **DENSE, **ROBUST)
        write(f"r{seed}-omp", seed=seed, top1=sparse, pgd_top1=0.4 + 0.1 * seed, **ROBUST)
    return tmp_path
