"""result.json: the numbers of an evaluation and the lineage of the network that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtk._version import __version__
from rtk.config import EvaluateConfig
from rtk.identity import config_hash
from rtk.runs import read_json, write_json
from rtk.train import Checkpoint

RESULT = "result.json"


def is_there(path: Path, config: EvaluateConfig, checkpoint: Checkpoint) -> bool:
    """Whether `path` holds the result already, of the same configuration and checkpoint."""
    if not (config.resume and path.exists()):
        return False
    there = read_json(path)
    made_of = (there.get("checkpoint_sha256"), there.get("config_hash"))
    return made_of == (checkpoint.sha256, config_hash(config))


def write_result(
    path: Path,
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    evaluated_on: str,
    numbers: dict[str, Any],
) -> None:
    """Write result.json: `numbers`, what was measured, and where the network comes from."""
    write_json(
        path,
        {
            "target": evaluated_on,  # of a network that was not transferred
            **checkpoint.lineage,
            "evaluated_on": evaluated_on,
            **numbers,
            "config_hash": config_hash(config),
            "checkpoint_sha256": checkpoint.sha256,
            "rtk": __version__,
        },
    )
