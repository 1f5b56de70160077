"""What is installed, what was compiled, and which backend each op would take and why."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from rtk import ops as public_ops  # noqa: F401  (declares the ops that are listed)
from rtk._version import __version__
from rtk.ops import _compiled
from rtk.ops._conv_paths import CUDNN, DENSITIES, NO_LISTS
from rtk.ops._registry import ops
from rtk.ops.sparse_columns import lists_shape

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "scikit-learn",
    "safetensors",
    "jsonargparse",
    "matplotlib",
    "jinja2",
)


_BACKENDS_OF = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def describe() -> str:
    """Return the report of `rtk doctor` as text."""
    lines = [f"rtk {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name} {_installed(name)}" for name in _PACKAGES]
    lines += ["", *_gpu(), "", *_compiled_module(), "", *_backends()]
    return "\n".join(lines)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed; run: pip install -e ."


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return [f"GPU: none that torch can use (torch is built with {built})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, "
            f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _compiled_module() -> list[str]:
    module = _compiled._C
    if module is None:
        return [f"rtk._C: {_compiled.missing_reason}"]
    lines = [f"rtk._C: {module.__file__}"]
    lines += [f"  {name}: {value}" for name, value in module.build_info.items()]
    lines.append(f"  CPU code in use: {module.cpu_isa()}")
    architectures = ", ".join(module.cuda_architectures) or f"none ({module.cuda_status})"
    lines.append(f"  CUDA architectures: {architectures}")
    return lines


def _samples(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return arguments that are typical of each op on a device."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.rand(2, 8, 4, 4, device=device, dtype=dtype)
    weight = torch.rand(8, 8, 3, 3, device=device)
    mask = weight > 0.5
    conv = ([1, 1], [1, 1], [1, 1], 1)
    rows, matrix = torch.rand(2, 8, device=device), torch.rand(8, 8, device=device)
    blocks = torch.ones(2, 2, dtype=torch.bool, device=device)
    ball = {"eps": 0.1, "norm": "linf", "clip_min": 0.0, "clip_max": 1.0}
    pixels = torch.rand(2, 3, 4, 4, device=device)
    fused = {"relu": True, "stride": 1, "padding": 1, "upsample": 1, "out_size": None}
    fused |= {"residual_stride": 1, "save_positive": False}
    filter, three, eight = (torch.rand(size, device=device) for size in ((8, 3, 3, 3), 3, 8))
    stem = {"stride": 1, "padding": 1, "pool": False}
    stem_bwd = {**stem, "input_size": pixels.shape, "dtype": pixels.dtype, "channels_last": False}
    upstream = torch.rand(2, 8, 4, 4, device=device, dtype=torch.bfloat16)
    no_index = torch.empty(0, device=device, dtype=torch.uint8)
    images = x.to(memory_format=torch.channels_last)
    words = torch.ones(1, 9, device=device, dtype=torch.int64)
    columns = torch.zeros(lists_shape(weight.shape), device=device, dtype=torch.int32)
    numbers = torch.rand(8, device=device)
    batch_norm = (images, None, numbers, numbers, numbers)
    return {
        "prepare_weight": ((weight, mask, dtype, device == "cuda"), {}),
        "masked_conv2d": ((x, weight, mask, None, *conv), {}),
        "masked_conv2d_prepared": (
            (
                *(x, weight, mask, weight.to(dtype), None, None, *conv),
                *(*CUDNN, *NO_LISTS, [*DENSITIES]),
            ),
            {},
        ),
        "masked_conv2d_bwd_input": (
            (x, weight.to(dtype), None, x.shape, *conv, "cudnn", None, 0.5),
            {},
        ),
        "masked_conv2d_bwd_weight": (
            (x, x, weight, mask, *conv, [True, False], "cudnn", None, 0.5),
            {},
        ),
        "pgd_step": ((pixels, pixels, pixels), {**ball, "step_size": 0.1}),
        "pgd_init": ((pixels,), {**ball, "seed": 0}),
        "fused_conv2d": ((x, weight.to(dtype), None, None, None), fused),
        "gaussian_noise": ((pixels,), {"sigma": 0.25, "dtype": torch.float32, "seed": 0}),
        "batch_norm_stats": ((images, numbers, numbers, None, 0.1), {}),
        "batch_norm_act": ((*batch_norm, numbers, True, 1e-5, True, True), {}),
        "batch_norm_act_bwd": ((images, *batch_norm, True, 1e-5, [True] * 4), {}),
        "stem_conv2d": ((pixels, filter, eight, three, three), {**stem, "save_positive": False}),
        "stem_conv2d_bwd_input": ((upstream, no_index, filter, three), stem_bwd),
        "live_blocks": ((matrix, 4), {}),
        "live_tiles": ((weight.detach(),), {}),
        "sparse_columns": (([weight.detach().bfloat16()],), {}),
        "sparse_conv2d": ((x.bfloat16(), columns, weight.shape, None, 1, 1, 1, None), {}),
        "conv2d_bwd_weight_live": ((x, x, words, weight.shape, *conv[:3], mask, True, 0.5), {}),
        "max_pool2d": ((images,), {}),
        "max_pool2d_bwd": ((images, images.to(torch.uint8), [8, 8]), {}),
        "topk_mask": (([matrix], [3]), {}),
        "topk_mask_global": (([matrix], 3), {}),
        "block_matmul": ((rows, matrix, blocks, [4, 4]), {}),
        "block_matmul_bwd_input": ((rows, matrix, blocks, [4, 4]), {}),
        "block_matmul_bwd_weight": ((rows, rows, matrix, blocks, [4, 4], [True, True]), {}),
    }


def _backends() -> list[str]:
    lines = ["backend that each op takes, and why not another (RTK_BACKEND forces one):"]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        samples = _samples(device)
        for name, op in ops.items():
            args, kwargs = samples[name]
            taken = None
            reasons = []
            for candidate in op.implementations:
                why_not = candidate.serves(*args, **kwargs)
                if why_not is None:
                    taken = candidate.backend
                    break
                if candidate.backend in _BACKENDS_OF[device]:
                    reasons.append(f"{candidate.backend}: {why_not}")
            passed_over = f"  (not {'; '.join(reasons)})" if reasons else ""
            lines.append(f"  {name:26} on {device:5} {taken}{passed_over}")
    return lines
