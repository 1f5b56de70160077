"""The compiled ops: functions over addresses, dtype codes, sizes and strides in elements.

They check nothing that can be seen in Python (shapes, devices, contiguity): call them through
rtk.ops. Every function runs without the GIL; `threads` is the most threads that a call uses.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

class _BuildInfo(TypedDict):
    compiler: str
    flags: str
    build_type: str
    cuda: str
    isas: list[str]

f32: int
"""Code of torch.float32."""
f64: int
"""Code of torch.float64."""
bf16: int
"""Code of torch.bfloat16."""
f16: int
"""Code of torch.float16."""
u8: int
"""Code of torch.uint8; an image of this type stands for value / 255."""
b1: int
"""Code of torch.bool."""

build_info: _BuildInfo
"""Compiler, flags, build type, CUDA version ("" without) and the instruction sets compiled in."""
cuda_status: str
"""'built', or why the CUDA kernels are missing."""
cuda_architectures: list[str]
"""What was compiled, in CMake's syntax, e.g. ['90a-real', '90-virtual']; empty without CUDA."""

def cpu_isa() -> str:
    """The instruction set in use: 'avx512', 'avx2' or 'default'; RTK_CPU_ISA forces one."""

def pgd_step_cpu(
    x_adv_ptr: int,
    x_adv_dt: int,
    grad_ptr: int,
    grad_dt: int,
    x_ptr: int,
    x_dt: int,
    out_ptr: int,
    n: int,
    chw: int,
    eps: float,
    step_size: float,
    l2: bool,
    clip_min: float,
    clip_max: float,
    threads: int,
    /,
) -> None:
    """One PGD step on n images of chw elements, all buffers dense in one memory order."""

def pgd_step_cuda(
    x_adv_ptr: int,
    x_adv_dt: int,
    grad_ptr: int,
    grad_dt: int,
    x_ptr: int,
    x_dt: int,
    out_ptr: int,
    n: int,
    chw: int,
    eps: float,
    step_size: float,
    l2: bool,
    clip_min: float,
    clip_max: float,
    workspace_ptr: int,
    device: int,
    stream: int,
    /,
) -> None:
    """pgd_step_cpu for L2 on device memory, queued on a raw stream; absent without CUDA.

    workspace: pgd_step_workspace() bytes, of any content.
    """

def pgd_step_workspace(
    x_adv_ptr: int,
    x_adv_dt: int,
    grad_ptr: int,
    grad_dt: int,
    x_ptr: int,
    x_dt: int,
    out_ptr: int,
    n: int,
    chw: int,
    device: int,
    /,
) -> int:
    """Bytes that pgd_step_cuda needs beside its tensors."""

def pgd_init_cpu(
    x_ptr: int,
    x_dt: int,
    out_ptr: int,
    out_dt: int,
    n: int,
    c: int,
    h: int,
    w: int,
    x_strides: Sequence[int],
    out_strides: Sequence[int],
    eps: float,
    l2: bool,
    clip_min: float,
    clip_max: float,
    seed: int,
    threads: int,
    /,
) -> None:
    """A random start in the eps-ball around x; noise depends on seed and NCHW index alone."""

def topk_mask_cpu(
    ptrs: Sequence[int],
    sizes: Sequence[int],
    out_ptrs: Sequence[int],
    dt: int,
    k: int,
    threads: int,
    /,
) -> None:
    """Exactly k ones in the byte masks over all segments together."""

topk_mask_tensors: int
"""The most tensors that one call of topk_mask_cuda takes; absent without CUDA."""

def topk_mask_workspace(sizes: Sequence[int], whole: bool, /) -> int:
    """How many bytes of device memory a call of topk_mask_cuda works in; absent without CUDA."""

score_step_tensors: int
"""The most layers that one call of score_step_cuda takes; absent without CUDA."""

score_groups_tensors: int
"""The most that it takes where weights share scores; absent without CUDA."""

def score_step_cuda(
    scores: Sequence[int],
    buffers: Sequence[int],
    weights: Sequence[int],
    grads: Sequence[int],
    sizes: Sequence[int],
    groups: Sequence[Sequence[int]],
    grad_dtype: int,
    lr: float,
    device_lr: int,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    device: int,
    stream: int,
    /,
) -> None:
    """Step the scores of masks, in place; csrc/rtk.h, `ScoreStep`. device_lr is 0 for none.

    groups is empty where every weight has a score, else 20 numbers a layer: the members of
    `ScoreGroups` one after the other.
    """

def topk_mask_cuda(
    ptrs: Sequence[int],
    sizes: Sequence[int],
    mask_ptrs: Sequence[int],
    bit_ptrs: Sequence[int],
    k: Sequence[int],
    device_k_ptr: int,
    dt: int,
    whole: bool,
    fresh: bool,
    workspace_ptr: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Exactly k ones a tensor, or one k over all, queued on a raw stream; `TopkMasks` of rtk.h."""

def prepare_weight_cpu(
    w_ptr: int,
    w_dt: int,
    w_strides: Sequence[int],
    mask_ptr: int,
    mask_dt: int,
    mask_strides: Sequence[int],
    out_ptr: int,
    out_dt: int,
    out_strides: Sequence[int],
    sizes: Sequence[int],
    threads: int,
    /,
) -> None:
    """out = cast(w * mask) in 4 dimensions; a bool mask selects: pruned weights are exactly +0."""

def prepare_weight_cuda(
    w_ptr: int,
    w_dt: int,
    w_strides: Sequence[int],
    mask_ptr: int,
    mask_dt: int,
    mask_strides: Sequence[int],
    out_ptr: int,
    out_dt: int,
    out_strides: Sequence[int],
    sizes: Sequence[int],
    device: int,
    stream: int,
    /,
) -> None:
    """prepare_weight_cpu on device memory, queued on a raw stream; absent without CUDA."""

def prepare_weights_cuda(layers: Sequence[tuple[Any, ...]], device: int, stream: int, /) -> None:
    """The same for many layers, each its arguments up to `sizes`; one launch if they are alike."""

def fold_weights_cuda(
    table_ptr: int,
    layers: int,
    tiles: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Fold masks and batch norms into all weights of the device table, queued on a raw stream."""

def block_matmul_cpu(
    x_ptr: int,
    w_ptr: int,
    mask_ptr: int,
    out_ptr: int,
    m: int,
    n: int,
    k: int,
    bn: int,
    bk: int,
    threads: int,
    /,
) -> None:
    """out (m, n) = x (m, k) @ (w (n, k) * mask (n / bn, k / bk))^T, all f32 and row-major."""

def block_matmul_bwd_input_cpu(
    grad_ptr: int,
    w_ptr: int,
    mask_ptr: int,
    out_ptr: int,
    m: int,
    n: int,
    k: int,
    bn: int,
    bk: int,
    threads: int,
    /,
) -> None:
    """out (m, k) = grad (m, n) @ (w * mask)."""

def block_matmul_bwd_weight_cpu(
    grad_ptr: int,
    x_ptr: int,
    w_ptr: int,
    mask_ptr: int,
    dw_ptr: int,
    dmask_ptr: int,
    m: int,
    n: int,
    k: int,
    bn: int,
    bk: int,
    threads: int,
    /,
) -> None:
    """dw = mask * (grad^T @ x); dmask per block = sum(w * (grad^T @ x)); a pointer of 0 skips."""

def stem_conv2d_cuda(
    x_ptr: int,
    x_dt: int,
    x_strides: Sequence[int],
    weight_ptr: int,
    bias_ptr: int,
    mean_ptr: int,
    std_ptr: int,
    out_ptr: int,
    index_ptr: int,
    positive_ptr: int,
    nhwk: Sequence[int],
    pool: bool,
    device: int,
    stream: int,
    /,
) -> None:
    """Normalise, 7x7/2 convolution, bias, ReLU, max-pool (pool), or 3x3/1 without; NHWC bf16."""

def stem_conv2d_bwd_input_cuda(
    grad_ptr: int,
    index_ptr: int,
    weight_ptr: int,
    std_ptr: int,
    dx_ptr: int,
    dx_dt: int,
    nhwk: Sequence[int],
    pool: bool,
    channels_last: bool,
    device: int,
    stream: int,
    /,
) -> None:
    """The gradient of stem_conv2d_cuda in x, dense in the asked layout."""

def fused_conv2d_cuda(
    x: int,
    w: int,
    bias: int,
    residual: int,
    gate: int,
    live: int,
    out: int,
    positive: int,
    sizes: Sequence[int],
    stride: int,
    padding: int,
    upsample: int,
    residual_stride: int,
    relu: bool,
    tile: Sequence[int],
    device: int,
    stream: int,
) -> None:
    """Convolve bf16 tensors, N H W C and K R S C in memory; csrc/rtk.h, `FusedConv2d`.

    Addresses are 0 where there is no such tensor. sizes: n, h, w, c, k, r, s, oh, ow; tile:
    `rtk.ops._conv_tiles.Tile.arguments`. Raises ValueError for a tile that does not fit.
    """

def fused_conv2d_fits(
    x: int,
    w: int,
    bias: int,
    residual: int,
    gate: int,
    live: int,
    out: int,
    positive: int,
    sizes: Sequence[int],
    stride: int,
    padding: int,
    upsample: int,
    residual_stride: int,
    relu: bool,
    tile: Sequence[int],
) -> bool:
    """Return whether the tile fits, without touching the GPU."""

def live_tiles_cuda(
    w: int,
    w_dt: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    out: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Write the words of `rtk.ops.live_tiles` for a tensor (k, c, r, s) of any strides."""

def sparse_columns_cuda(
    weights: Sequence[int],
    sizes: Sequence[Sequence[int]],
    out: Sequence[int],
    device: int,
    stream: int,
    /,
) -> None:
    """Write the lists of `rtk.ops.sparse_columns` for bf16 weights, K R S C in memory, dense.

    sizes: k, c, r, s of each.
    """

def sparse_conv2d_cuda(
    x: int,
    columns: int,
    bias: int,
    out: int,
    sizes: Sequence[int],
    stride: int,
    padding: int,
    upsample: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Convolve bf16, N H W C in memory, by the lists of `rtk.ops.sparse_columns`.

    sizes: n, h, w, c, k, r, s, oh, ow; bias is fp32, or 0 where there is none.
    """

def positive_bits_cuda(x: int, bits: int, count: int, device: int, stream: int) -> None:
    """Write the bits of `rtk.ops.pack_positive` for count bf16 values, N H W K."""
