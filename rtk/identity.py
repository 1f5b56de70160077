"""What a run is: its configuration as a file, the hash of it, and the folder that it claims."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rtk import distributed
from rtk.config import SegmentConfig, StageConfig
from rtk.errors import RtkError, did_you_mean
from rtk.runs import atomic_write, lock_folder

# Settings that say where or how a run is executed, not what it computes: not part of its identity.
_NOT_IDENTITY = {"out", "device", "threads", "resume", "checkpoint_seconds", "graph"}
_NOT_IDENTITY |= {"workers", "download", "trust"}
_NOT_IDENTITY |= {"preset"}  # a name for values, and these are
# Settings younger than some runs: at these values they leave a run what it was without them.
_LATER = {"storage": "auto", "skip_bad": False, "ood": []}
_LATER |= dict.fromkeys(("task", "rounds", "rate"))
_LATER["segment"] = dataclasses.asdict(SegmentConfig())

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain dicts, lists and scalars, as YAML and JSON hold them.

    `resume` is left out: it is of one call, and `--config config.yaml` must not start a run over.
    """
    values = dataclasses.asdict(config)
    values.pop("resume", None)
    return json.loads(json.dumps(values))  # tuples become lists, as they come back from a file


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """Build a `cls` from the dicts that `to_dict` gives; unknown keys raise an RtkError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    depending = cls.defaults_for(values) if issubclass(cls, StageConfig) else {}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise RtkError(f"{cls.__name__} has no setting {name!r}{did_you_mean(name, fields)}")
        default = fields[name].default_factory
        if default is not dataclasses.MISSING:
            if not isinstance(value, dict):
                raise RtkError(f"{name}: expected settings by name, got {value!r}")
            stages_own = depending.get(name) or default()
            value = from_dict(type(stages_own), {**to_dict(stages_own), **value})
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def from_preset(cls: type[C], preset: str, **settings: Any) -> C:
    """Build a stage's configuration after a preset, e.g. `from_preset(TransferConfig, "paper")`.

    Args:
        cls: PretrainConfig, DrawConfig or TransferConfig.
        preset: its name; `rtk.config.PRESETS` has all.
        settings: what is to be otherwise, by name; a section as a dict changes these values of it,
            as an object it is taken whole (where `data` leaves size or augmentation open, they are
            the preset's): `data=DataConfig("cifar10"), train={"lr": 0.01}`.

    Raises:
        RtkError: for an unknown preset, one that has no numbers for this, or a bad setting.
    """
    plain = {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in settings.items()}
    return from_dict(cls, {"preset": preset, **plain})


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: _identity(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NOT_IDENTITY and not (name in _LATER and value == _LATER[name])
    }
    # Of a draw the attack is younger: without one it is what it was when there was none.
    attack = kept.get("attack")
    if "scheme" in kept and isinstance(attack, dict) and attack.get("name") == "none":
        del kept["attack"]
    return kept


def config_hash(config: Any) -> str:
    """Return 12 hexadecimal digits of the SHA-256 over what a run, or a section, computes.

    Where it runs (out, device, resume, checkpoint interval) does not count.
    """
    text = json.dumps([type(config).__name__, _identity(to_dict(config))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _read_config(config: StageConfig, path: Path) -> dict[str, Any]:
    """Return the settings in the config.yaml of a folder that `config` asks for."""
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RtkError(
            f"cannot read {path} ({reason}); choose another --out or remove the folder"
        ) from error
    stage = text.removeprefix("# ").split(",")[0] if text.startswith("# ") else None
    if stage not in (None, type(config).__name__):
        raise RtkError(
            f"{path.parent} holds a run of another stage ({stage}, this is a "
            f"{type(config).__name__}); choose another --out or remove the folder"
        )
    return values if isinstance(values, dict) else {}


def claim_folder(config: StageConfig) -> Path:
    """Make `config.out` this run's folder: write config.yaml, or check the one that is there.

    Without `resume` the folder is taken over: the stage makes everything anew. Raises RtkError
    where it holds a run with other settings, naming them, or another process works in it. Of
    processes that work together the main one claims it.
    """
    return distributed.from_main(_claim, config)


def _claim(config: StageConfig) -> Path:
    folder = Path(config.out)
    lock_folder(folder)
    path = folder / "config.yaml"
    if path.exists() and config.resume:
        theirs = _flatten(_identity(_read_config(config, path)))
        ours = _flatten(_identity(to_dict(config)))
        changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if changed:
            shown = ", ".join(
                f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
                for name in changed[:4]
            )
            raise RtkError(
                f"{folder} holds a run with other settings ({shown}); "
                "choose another --out or remove the folder"
            )
    else:
        header = f"# {type(config).__name__}, hash {config_hash(config)}\n"
        atomic_write(path, header + yaml.safe_dump(to_dict(config), sort_keys=False))
    return folder
