"""Every setting of every stage: frozen dataclasses that check themselves, a file a stage.

The command line, the YAML files and the recipes are all made of these. What a value may be is
checked here; whether a *name* is known is checked by the registry that holds the names.
"""

from rtk.config.advise import AdviseConfig
from rtk.config.attack import NORMS, AttackConfig
from rtk.config.checks import check_rounds, check_sparsity, round_sparsity
from rtk.config.convert import ConvertConfig
from rtk.config.data import DataConfig
from rtk.config.draw import (
    ITERATIVE,
    SCOPES,
    SCORE_INITS,
    TASKS,
    DrawConfig,
    imp_attack,
    imp_train,
    lmp_train,
)
from rtk.config.evaluate import CertifyConfig, EvaluateConfig
from rtk.config.model import ModelConfig
from rtk.config.presets import PRESETS, Protocol
from rtk.config.pretrain import PretrainConfig
from rtk.config.segment import SEGMENTATION_NETWORKS, SegmentConfig
from rtk.config.stage import StageConfig
from rtk.config.train import TrainConfig
from rtk.config.transfer import TRANSFER_MODES, TransferConfig, segment_train

__all__ = [
    "ITERATIVE",
    "NORMS",
    "PRESETS",
    "SCOPES",
    "SCORE_INITS",
    "SEGMENTATION_NETWORKS",
    "TASKS",
    "TRANSFER_MODES",
    "AdviseConfig",
    "AttackConfig",
    "CertifyConfig",
    "ConvertConfig",
    "DataConfig",
    "DrawConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PretrainConfig",
    "Protocol",
    "SegmentConfig",
    "StageConfig",
    "TrainConfig",
    "TransferConfig",
    "check_rounds",
    "check_sparsity",
    "imp_attack",
    "imp_train",
    "lmp_train",
    "round_sparsity",
    "segment_train",
]
