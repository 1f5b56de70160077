"""Export: a network that runs without rtk, with the same outputs.

What is written is the network as it infers: the ticket folded into plain weights, the
normalisation inside, images (N, 3, H, W) in [0, 1] in, logits out, N any number.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rtk._version import __version__
from rtk.errors import RtkError
from rtk.nn import compact as compacted
from rtk.nn import fold
from rtk.registry import Registry
from rtk.runs import atomic_write, find_artefact
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint

Network = Callable[[Tensor], Tensor]
# (network in eval mode, images, what to keep beside it as JSON) -> (bytes of the file, the network
# that a reader of those bytes gets)
Writer = Callable[[nn.Module, Tensor, str], tuple[bytes, Network]]
FORMATS: Registry[Writer] = Registry("export format")

_CHECKED = (3, 1)  # batch sizes; the first is the one that is traced


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: of the file.
        image_size: height and width of its images, in pixels.
        difference: largest difference between its outputs and the network's, on random images.
        largest: largest absolute output.
    """

    path: Path
    image_size: int
    difference: float
    largest: float

    def __str__(self) -> str:
        size = self.image_size
        return (
            f"{self.path}: images (N, 3, {size}, {size}) in [0, 1]; outputs differ by at most "
            f"{self.difference:.2g} of {self.largest:.4g}"
        )


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str = "torch_export",
    ticket: str | Path | None = None,
    image_size: int | None = None,
    compact: bool = False,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a checkpoint's network for use without rtk, and check its outputs against rtk's.

    Args:
        checkpoint: a run's folder or its checkpoint.safetensors.
        out: file to write, atomically.
        format: "torch_export" (a .pt2 file, `torch.export.load(path).module()`), "onnx", or
            "state_dict": safetensors under the keys of torchvision's or timm's network; mean and
            deviation, which no key holds, are in its metadata under "rtk".
        ticket: a run's folder or its ticket.safetensors, to mask the network by first.
        image_size: height and width of the images in pixels, which the file is for; None is the
            size set in training, else 32 for a 3x3 stem and 224 for others.
        compact: remove pruned channels first (`rtk.nn.compact`); not for "state_dict".
        tolerance: largest difference allowed, as a share of the largest output.

    Raises:
        RtkError: for files that cannot be read or do not fit together, a network that cannot be
            traced, a missing library, or outputs that differ by more; then nothing is written.
    """
    write = FORMATS.get(format)
    if compact and format == "state_dict":
        raise RtkError(
            "export: a compact network has other shapes than any class that would load its "
            "state_dict; take torch_export or onnx, or leave compact out"
        )
    if not tolerance >= 0:
        raise RtkError(f"export: tolerance: expected a share >= 0, got {tolerance!r}")
    found = Checkpoint.load(checkpoint).require_finished()
    size = _size_of(found) if image_size is None else image_size
    if size < 1:
        raise RtkError(f"export: image_size: expected at least 1 pixel, got {image_size!r}")
    model: nn.Module = found.build_model()
    masks = None if ticket is None else Ticket.load(find_artefact(ticket, TICKET))
    if masks is not None:
        masks.apply(model)
    model.eval().requires_grad_(False)
    images = torch.rand(max(_CHECKED), 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = _outputs(model, images, f"images of {size} pixels")
    plain = compacted(model, images) if compact else fold(copy.deepcopy(model))
    told = {
        "rtk": __version__,
        "model": found.spec.to_dict(),
        "checkpoint_sha256": found.sha256,
        "ticket_sha256": None if masks is None else masks.meta["sha256"],
        "image_size": size,
    }
    data, read_back = write(plain, images[: _CHECKED[0]], json.dumps(told))
    largest = expected.abs().max().item()
    difference = max(_difference(read_back, images[:n], expected[:n]) for n in _CHECKED)
    if not difference <= tolerance * largest:
        raise RtkError(
            f"export: the outputs of the {format} file differ by {difference:.3g}, of outputs up "
            f"to {largest:.3g}: more than the tolerance, {tolerance:g} of them; nothing was "
            "written. Try another format, or a larger tolerance where that is good enough"
        )
    atomic_write(out, data)
    return Exported(Path(out), size, difference, largest)


def _size_of(checkpoint: Checkpoint) -> int:
    data = checkpoint.meta.get("config", {}).get("data") or {}
    return data.get("image_size") or (32 if checkpoint.spec.stem == "3x3" else 224)


def _outputs(network: Network, images: Tensor, what: str) -> Tensor:
    try:
        with torch.no_grad():
            return network(images)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RtkError(f"export: the network takes no {what} ({reason})") from error


def _difference(network: Network, images: Tensor, expected: Tensor) -> float:
    actual = _outputs(network, images, f"batch of {len(images)} images any more")
    if actual.shape != expected.shape:
        return float("inf")
    return (actual - expected).abs().max().item()  # NaN where one is, which no tolerance allows


@FORMATS.register("state_dict")
def _state_dict(model: nn.Module, images: Tensor, told: str) -> tuple[bytes, Network]:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    data = save_safetensors(state, metadata={"format": "pt", "rtk": told})
    again = copy.deepcopy(model)
    for tensor in again.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    again.load_state_dict(load_safetensors(data))
    return data, again


def _traced(model: nn.Module, images: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of many kinds: of what the network's own code does
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RtkError(
            f"export: torch.export cannot follow this network ({reason[0]}); format state_dict "
            "needs no tracing"
        ) from error


@FORMATS.register("torch_export")
def _torch_export(model: nn.Module, images: Tensor, told: str) -> tuple[bytes, Network]:
    file = io.BytesIO()
    torch.export.save(_traced(model, images), file, extra_files={"rtk.json": told})
    data = file.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bytes are not writable: nobody writes to them
        return data, torch.export.load(io.BytesIO(data)).module()


@FORMATS.register("onnx")
def _onnx(model: nn.Module, images: Tensor, told: str) -> tuple[bytes, Network]:
    runtime = _imported("onnxruntime")
    for name in ("onnx", "onnxscript"):
        _imported(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            _traced(model, images),
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    proto.metadata_props.add(key="rtk", value=told)
    data = proto.SerializeToString()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RtkError(
            f"export: format onnx needs {name}, which is not installed: pip install 'rtk[onnx]'"
        ) from error
