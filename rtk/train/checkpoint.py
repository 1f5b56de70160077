"""Checkpoints: everything that a training run needs to go on, and that the next stage needs.

One safetensors artefact holds `model.*` (masks included), `optimizer.*`, and `rng.*`; its
metadata holds the model's spec, the progress, the configuration and its hash, and the lineage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtk import artifact, models
from rtk.config import DataConfig
from rtk.errors import RtkError, did_you_mean
from rtk.identity import from_dict
from rtk.models import ModelSpec
from rtk.nn import mask_model
from rtk.runs import find_artefact
from rtk.ticket import Ticket

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    meta: dict[str, Any],
) -> str:
    """Write a checkpoint atomically and return its SHA-256.

    Args:
        path: of the file.
        model: one of rtk's models (it has a `spec`), masked or not.
        optimizer: its state is kept for resuming; None leaves it out.
        meta: progress, configuration, lineage: what JSON can hold.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    tensors["rng.numpy"] = torch.from_numpy(keys.astype(np.int64))
    rng = {"numpy": [name, int(position), int(has_gauss), float(cached)]}
    return artifact.save(
        path, "checkpoint", tensors, {"model": model.spec.to_dict(), "rng": rng, **meta}
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint, given the file or the folder of the run that made it."""
        if not str(path):
            raise RtkError("no checkpoint was given; name one with --checkpoint RUN_OR_FILE")
        file = find_artefact(path, CHECKPOINT)
        return cls(file, *artifact.load(file, "checkpoint"))

    @property
    def spec(self) -> ModelSpec:
        return models.read_spec(self.meta["model"])

    @property
    def lineage(self) -> dict[str, Any]:
        """What this model has been through: columns of a report."""
        return dict(self.meta.get("lineage", {}))

    def images(self, named: DataConfig) -> DataConfig:
        """Return `named`, or where it has no name the images that this network was trained on.

        What `named` sets otherwise, as its root, takes the place of what training was given.

        Raises:
            RtkError: if there is no name and the checkpoint does not tell its images.
        """
        if named.name:
            return named
        values = self.meta.get("config", {}).get("data")
        if values is None:
            raise RtkError(
                f"checkpoint {self.path} does not say what it was trained on; "
                "name the images with --data.name"
            )
        own = from_dict(DataConfig, values)
        given = {f.name: getattr(named, f.name) for f in dataclasses.fields(named)}
        default = DataConfig(name=named.name)
        return dataclasses.replace(
            own, **{name: value for name, value in given.items() if value != getattr(default, name)}
        )

    def section(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {k[len(prefix) :]: t for k, t in self.tensors.items() if k.startswith(prefix)}

    def build_model(self) -> models.Classifier:
        """Return the network with its weights and masks, on the CPU."""
        model = models.create(self.spec)
        state = self.section("model")
        masks = {n.removesuffix(".mask"): m for n, m in state.items() if n.endswith(".mask")}
        if masks:
            mask_model(model, Ticket(masks, {n: tuple(state[f"{n}.weight"].shape) for n in masks}))
        load_state(model, state, str(self.path))
        return model

    def require_finished(self) -> Checkpoint:
        """Raise an RtkError if the run that writes this checkpoint has not come to its end."""
        progress = self.meta.get("progress", {})
        if not progress.get("finished", False):
            raise RtkError(
                f"checkpoint {self.path} is of a run that was stopped at epoch "
                f"{progress.get('epoch')}; give the same command again to finish it"
            )
        return self

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put weights, masks, optimiser and random generators back; return the progress."""
        load_state(model, self.section("model"), str(self.path))
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in self.section("optimizer").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(self.tensors["rng.torch"])
        if "rng.cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["rng.cuda"])
        name, *rest = self.meta["rng"]["numpy"]
        keys = self.tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state((name, keys, *rest))
        return self.meta["progress"]


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state_dict; missing, extra and misshapen keys raise one RtkError that lists them."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if missing or extra or shapes:
        parts = []
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", shapes)):
            if names:
                parts.append(f"{what}: {', '.join(names)}")
        near = did_you_mean(missing[0], extra) if missing and extra else ""
        raise RtkError(f"{source} does not fit the model; {'; '.join(parts)}{near}")
    model.load_state_dict(state)
