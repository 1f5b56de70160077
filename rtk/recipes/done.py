"""Says which stages need not run, without loading data or weights: a look at what is there.

Every stage looks for itself too, and more closely; but it reads its data first, which takes longer
than all else where a recipe of a thousand stages is called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtk import artifact
from rtk.config import (
    AdviseConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    StageConfig,
    TransferConfig,
)
from rtk.errors import RtkError
from rtk.evaluate import RESULT
from rtk.identity import config_hash
from rtk.recipes.processes import inputs
from rtk.runs import find_artefact, read_json

# As the stages call them, whose parts (train, ticket) recipes do not import.
CHECKPOINT, TICKET = "checkpoint.safetensors", "ticket.safetensors"


def pending(stages: Sequence[StageConfig]) -> list[StageConfig]:
    """Return the stages that must run: what they make is missing, or was made of something else.

    A stage that reads what a pending one makes is pending too.
    """
    found: list[StageConfig] = []
    made: set[str] = set()
    for stage in stages:
        if made & set(inputs(stage)) or not is_done(stage):
            found.append(stage)
            made.add(stage.out)
    return found


def is_done(stage: StageConfig) -> bool:
    """Whether what `stage` makes is there, with these settings and out of what it would read."""
    if not stage.resume:
        return False
    out, wanted = Path(stage.out), config_hash(stage)
    if isinstance(stage, EvaluateConfig | AdviseConfig):
        advice = isinstance(stage, AdviseConfig)
        there = _json(out / (f"advice-{wanted}.json" if advice else RESULT))
        if isinstance(stage, EvaluateConfig):
            made_of = there.get("checkpoint_sha256") == _sha256(stage.checkpoint, CHECKPOINT)
        else:
            own = stage.features
            made_of = own is None or there.get("features_sha256") == _sha256(own, CHECKPOINT)
        return there.get("config_hash") == wanted and made_of
    if not isinstance(stage, PretrainConfig | DrawConfig | TransferConfig):
        return False
    found = artifact.peek(out / (TICKET if isinstance(stage, DrawConfig) else CHECKPOINT))
    if found is None or found[0].get("config_hash") != wanted:
        return False
    meta = found[0]
    if not isinstance(stage, DrawConfig) and not meta.get("progress", {}).get("finished"):
        return False
    if isinstance(stage, PretrainConfig):
        return True
    ticket = getattr(stage, "ticket", None)
    return meta.get("source_sha256") == _sha256(stage.checkpoint, CHECKPOINT) and (
        ticket is None or meta.get("ticket_sha256") == _sha256(ticket, TICKET)
    )


def _sha256(path: str, name: str) -> str | None:
    found = artifact.peek(find_artefact(path, name))
    return found and found[1]


def _json(path: Path) -> dict[str, object]:
    try:
        there = read_json(path)
    except RtkError:
        return {}
    return there if isinstance(there, dict) else {}
