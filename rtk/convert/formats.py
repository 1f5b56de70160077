"""What a format is: how its keys look, and how they become those of a plain network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from rtk.config import ConvertConfig
from rtk.errors import RtkError
from rtk.registry import Registry

State = dict[str, Tensor]
Triple = tuple[float, float, float]

_NORMALISERS = (
    ("normalizer.new_mean", "normalizer.new_std"),  # MadryLab/robustness
    ("normalize.mean", "normalize.std"),  # advertorch, in Double-Win-LTH
    ("normalizer.mean", "normalizer.std"),
    ("0.means", "0.sds"),  # locuslab/smoothing, where they are buffers
    ("0.mean", "0.std"),
)


@dataclass
class Foreign:
    """What was found in a checkpoint.

    Args:
        state: the network's tensors, under torchvision's (or timm's) keys.
        mean, std: of the normaliser in the file; None if there is none.
        masks: layer name -> bool mask that broadcasts to the weight.
        notes: what a user should know of the conversion, a sentence each.
    """

    state: State
    mean: Triple | None = None
    std: Triple | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """A way in which peers write checkpoints.

    Args:
        recognises: whether a file with these keys (wrappers removed) is of the format.
        read: the tensors by key (wrappers removed) and the settings -> what is in them.
        pretrain: how its networks are trained, where the file's name does not tell.
    """

    recognises: Callable[[Collection[str]], bool]
    read: Callable[[State, ConvertConfig], Foreign]
    pretrain: str = "unknown"


FORMATS: Registry[Format] = Registry("checkpoint format")
PLAIN = "torchvision"  # what a file is that no format recognises


def detect(keys: Collection[str], config: ConvertConfig) -> str:
    """Return the format's name: the one asked for, else the first that recognises the keys."""
    if config.format != "auto":
        FORMATS.get(config.format)
        return config.format
    known = (name for name in FORMATS.names() if FORMATS.get(name).recognises(keys))
    return next(known, PLAIN)


def without_wrappers(state: State) -> State:
    """Drop what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put into keys."""
    new = {}
    for key, tensor in state.items():
        parts = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        new[".".join(parts)] = tensor
    if len(new) != len(state):
        raise RtkError(
            "the checkpoint holds keys that differ only in `module.` or `_orig_mod.`: several "
            "networks in one; save the one you mean alone"
        )
    return new


def without_prefix(state: State, prefix: str) -> State:
    """Drop `prefix` from the front of the keys as often as all of them have it."""
    while state and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def take_normaliser(state: State) -> tuple[Triple | None, Triple | None]:
    """Take the normaliser's mean and deviation out of `state`, in place."""
    for mean, std in _NORMALISERS:
        if mean in state and std in state:
            return _triple(mean, state.pop(mean)), _triple(std, state.pop(std))
    return None, None


def _triple(name: str, tensor: Tensor) -> Triple:
    values = tensor.flatten().double().tolist()
    if len(values) != 3:
        raise RtkError(f"{name}: expected 3 values, one a channel, got {tuple(tensor.shape)}")
    # Their buffers are fp32: 7 digits give back what was written in the source.
    r, g, b = (float(f"{value:.7g}") for value in values)
    return r, g, b


def torchvision_names(state: State) -> State:
    """Rename what the CIFAR ResNets of many peers call `shortcut` and `linear`."""
    if "linear.weight" not in state and not any(".shortcut." in key for key in state):
        return state
    new = {}
    for key, tensor in state.items():
        name = key.replace(".shortcut.", ".downsample.")
        new["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = tensor
    return new
