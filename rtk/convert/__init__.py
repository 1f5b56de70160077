"""Convert: a published checkpoint into one of rtk's, and the masks in it into a ticket.

A format is one file that registers itself, imported here.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from rtk.config import ConvertConfig
from rtk.convert import hidden_networks, plain, prune, robustness, smoothing  # noqa: F401
from rtk.convert.fit import apply_head_mask, find_arch, fit
from rtk.convert.formats import FORMATS, Foreign, Format, detect, without_wrappers
from rtk.convert.naming import pretrain_label
from rtk.convert.read import read_state
from rtk.errors import RtkError
from rtk.identity import claim_folder, config_hash, to_dict
from rtk.models import Classifier
from rtk.ticket import TICKET, Ticket
from rtk.train import CHECKPOINT, Checkpoint, save_checkpoint, seed_everything


def run(config: ConvertConfig) -> Path:
    """Convert as `config` says and return the path of checkpoint.safetensors.

    The checkpoint holds the network's tensors as they are, its head and its normaliser, and is
    finished: draw, transfer and evaluate take it. Masks in the file become ticket.safetensors
    beside it. What was found and done is printed on stderr and kept in the checkpoint. A folder
    that holds the result of the same file is left as it is.

    Raises:
        RtkError: where the file cannot be read or is damaged; where it is a pickle that may run
            code and `trust` is not set; where it is of an unknown network, or does not fit the
            architecture (every key that is missing, unexpected or of another shape is listed).
    """
    sha256 = _sha256(config.file)
    path = Path(config.out) / CHECKPOINT
    if config.resume and _is_done(path, sha256, config):
        return path
    state, told = read_state(config)
    state = without_wrappers(state)
    name = detect(state, config)
    if config.sparsity is not None and name != "hidden-networks":
        raise RtkError(
            f"sparsity: expected none for {config.file}, a {name} checkpoint without scores, got "
            f"{config.sparsity}; prune what is converted with `rtk draw`"
        )
    foreign = FORMATS.get(name).read(state, config)
    arch = find_arch(foreign.state, told, config)
    seed_everything(config.seed)
    model = fit(foreign, arch, config)
    apply_head_mask(model, foreign)
    claim_folder(config)
    made_of = {
        "stage": "convert",
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "source_sha256": sha256,
    }
    meta = {
        **made_of,
        "progress": {"epoch": 0, "step": 0, "loss_sum": 0.0, "finished": True},
        "converted": {"format": name, "ticket": bool(foreign.masks), "notes": foreign.notes},
        "lineage": _lineage(model, name, config),
    }
    (path.parent / TICKET).unlink(missing_ok=True)  # it would be of another file
    checkpoint_sha256 = save_checkpoint(path, model, None, meta)
    classes = f"{model.spec.num_classes} classes"
    _say(f"{config.file}: {name} checkpoint of {arch}, stem {model.spec.stem}, {classes}")
    for note in foreign.notes:
        _say(note)
    if foreign.masks:
        ticket = _ticket(model, foreign, name, {**made_of, "source_sha256": checkpoint_sha256})
        ticket.save(path.parent / TICKET)
        _say(f"{path.parent / TICKET}: {len(ticket.masks)} layers, {ticket.sparsity:.2%} pruned")
    return path


def _say(text: str) -> None:
    print(f"rtk: {text}", file=sys.stderr)


def _sha256(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RtkError(f"{file} cannot be read ({error.strerror})") from error


def _is_done(path: Path, sha256: str, config: ConvertConfig) -> bool:
    """Whether checkpoint and ticket are there: the ticket is written last."""
    if not path.exists():
        return False
    there = Checkpoint.load(path)
    if (there.meta.get("source_sha256"), there.meta.get("config_hash")) != (
        sha256,
        config_hash(config),
    ):
        return False
    if not there.meta["converted"]["ticket"]:
        return True
    ticket = path.parent / TICKET
    return ticket.exists() and Ticket.load(ticket).meta.get("source_sha256") == there.sha256


def _lineage(model: Classifier, name: str, config: ConvertConfig) -> dict[str, Any]:
    """Return what a report says of the network; its seed is unknown, and 0 stands for it."""
    found = pretrain_label(Path(config.file)) or FORMATS.get(name).pretrain
    pretrain = config.pretrain or found
    return {
        "arch": model.spec.arch,
        "source": config.source or ("imagenet" if model.spec.num_classes == 1000 else "unknown"),
        "pretrain": pretrain,
        "robust": pretrain not in ("natural", "unknown"),
        "pretrain_seed": config.seed,
        "seed": config.seed,
    }


def _ticket(model: Classifier, foreign: Foreign, name: str, made_of: dict[str, Any]) -> Ticket:
    shapes = {n: tuple(model.get_parameter(f"{n}.weight").shape) for n in foreign.masks}
    bare = Ticket(foreign.masks, shapes)
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    drawn = {
        "scheme": name,
        "granularity": bare.granularity,
        "sparsity": round(bare.sparsity, 4),
        "actual_sparsity": bare.sparsity,
    }
    meta = {
        **made_of,
        "scheme": name,
        "include_first": first in foreign.masks,
        "model": model.spec.to_dict(),
        "lineage": drawn,
    }
    return Ticket(foreign.masks, shapes, meta)


__all__ = ["FORMATS", "Foreign", "Format", "run"]
