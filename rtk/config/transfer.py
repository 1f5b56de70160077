"""Settings of `rtk transfer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rtk.config.checks import require
from rtk.config.data import DataConfig
from rtk.config.presets import Protocol, find
from rtk.config.segment import SegmentConfig
from rtk.config.stage import StageConfig, setting
from rtk.config.train import TrainConfig
from rtk.errors import check_choice

TRANSFER_MODES = ("finetune", "linear_bn_update", "linear_frozen", "segment")


def segment_train() -> TrainConfig:
    """The paper's segmentation, with the rate of Chen et al. 2021 for the head.

    30 epochs of `SegmentConfig.epoch_steps` = 1000 iterations, batch 4, lr / 10 after 18 and 22.
    """
    return replace(find("paper", "transfer segment").train)


# The `train` of a TransferConfig that was given none: the paper's, at one rate for all modes.
_AS_THE_MODE = replace(find("paper", "transfer linear_bn_update").train)


@dataclass(frozen=True)
class TransferConfig(StageConfig):
    """Transfer a ticket to a downstream task.

    Args:
        preset: paper, salman2020, chen2021 or doublewin2022: what it says of train, and of
            data.image_size, data.augment and the nulls of segment, stands where you set nothing
            (null, auto); docs/protocols.md has the values.
        checkpoint: the pretrained network that the ticket was drawn from.
        ticket: the ticket: a run's folder or its ticket.safetensors; null transfers it dense.
        mode: finetune (all weights), linear_bn_update (a new classifier, batch norm in train
            mode), linear_frozen (a new classifier on frozen eval-mode features) or segment (all
            weights and a segmentation head).
        data: the downstream images; of segment: npz:PATH with masks, voc2012 or voc2012+sbd.
        train: the optimisation; by default as the mode's papers do.
        segment: of segment: the network and how it is trained.
    """

    preset: str | None = None
    checkpoint: str = ""
    ticket: str | None = None
    mode: str = "finetune"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=lambda: _AS_THE_MODE)
    segment: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        found = _protocol(self.preset, self.mode)
        if self.mode != "segment":
            require(
                self.segment == SegmentConfig(),
                "segment",
                f"no such settings beside mode {self.mode}; they are of --mode segment",
                self.segment,
            )
        if found is not None and self.train is _AS_THE_MODE:
            self._resolve(train=found.train_on(self.data.name))
        if found is not None and self.preset is not None:
            self._resolve(data=found.fill_data(self.data), segment=found.fill_segment(self.segment))
        require(
            self.mode != "segment" or self.train.lr > 0,
            "train.lr",
            "a rate > 0 of the head, beside segment.backbone_lr",
            self.train.lr,
        )

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        found = _protocol(values.get("preset"), values.get("mode", "finetune"))
        if found is None:
            return {}
        return {"train": found.train_on(setting(values, "data", "name", DataConfig().name))}


def _protocol(preset: str | None, mode: str) -> Protocol | None:
    """Return what a preset says of a mode, without one what the paper says of segmentation."""
    check_choice("transfer mode", mode, TRANSFER_MODES)
    if preset is None:
        return find("paper", "transfer segment") if mode == "segment" else None
    return find(preset, f"transfer {mode}")
