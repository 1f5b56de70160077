"""The operators: `torch.library` ops in the namespace rtk, each with a plain-PyTorch reference."""

from rtk.ops._registry import BACKENDS, backend
from rtk.ops.block_matmul import block_matmul
from rtk.ops.masked_conv2d import masked_conv2d
from rtk.ops.pgd_init import pgd_init
from rtk.ops.pgd_step import pgd_step
from rtk.ops.prepare_weight import prepare_weight
from rtk.ops.topk_mask import topk_mask, topk_mask_global

__all__ = [
    "BACKENDS",
    "backend",
    "block_matmul",
    "masked_conv2d",
    "pgd_init",
    "pgd_step",
    "prepare_weight",
    "topk_mask",
    "topk_mask_global",
]
