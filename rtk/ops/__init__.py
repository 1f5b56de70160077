"""The operators: `torch.library` ops in the namespace rtk, each with a plain-PyTorch reference."""

from rtk.ops._conv_tiles import tuning
from rtk.ops._registry import BACKENDS, backend
from rtk.ops.batch_norm_act import batch_norm_act
from rtk.ops.block_matmul import block_matmul
from rtk.ops.conv2d_bwd_weight import conv2d_bwd_weight_live
from rtk.ops.fold_weights import FoldedLayer, FoldLayer, FoldPlan
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input, turn_filter
from rtk.ops.gaussian_noise import gaussian_noise
from rtk.ops.live_blocks import live_blocks
from rtk.ops.live_tiles import live_tiles
from rtk.ops.masked_conv2d import masked_conv2d
from rtk.ops.max_pool2d import max_pool2d
from rtk.ops.pgd_init import pgd_init
from rtk.ops.pgd_step import pgd_step
from rtk.ops.positive_bits import pack_positive, unpack_positive
from rtk.ops.prepare_weight import prepare_weight
from rtk.ops.score_step import score_step
from rtk.ops.sparse_columns import sparse_columns
from rtk.ops.sparse_conv2d import sparse_conv2d, sparse_conv2d_bwd_input
from rtk.ops.stem_conv2d import stem_conv2d, stem_conv2d_bwd_input
from rtk.ops.topk_mask import topk_mask, topk_mask_global
from rtk.ops.topk_plan import TopkPlan, pack_mask

__all__ = [
    "BACKENDS",
    "backend",
    "batch_norm_act",
    "block_matmul",
    "conv2d_bwd_weight_live",
    "FoldedLayer",
    "FoldLayer",
    "FoldPlan",
    "fused_conv2d",
    "fused_conv2d_bwd_input",
    "gaussian_noise",
    "live_blocks",
    "live_tiles",
    "masked_conv2d",
    "max_pool2d",
    "pack_mask",
    "pack_positive",
    "pgd_init",
    "pgd_step",
    "prepare_weight",
    "score_step",
    "sparse_columns",
    "sparse_conv2d",
    "sparse_conv2d_bwd_input",
    "stem_conv2d",
    "stem_conv2d_bwd_input",
    "topk_mask",
    "topk_mask_global",
    "TopkPlan",
    "tuning",
    "turn_filter",
    "unpack_positive",
]
