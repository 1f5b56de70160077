"""Settings of `rtk pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rtk.config.attack import AttackConfig, check_training_attack
from rtk.config.checks import require
from rtk.config.data import DataConfig
from rtk.config.model import ModelConfig
from rtk.config.presets import find
from rtk.config.stage import StageConfig, setting
from rtk.config.train import TrainConfig

_AS_USUAL = TrainConfig()  # a PretrainConfig that holds this very object was given no `train`


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a network on a source task, naturally or on adversarial examples.

    Args:
        preset: paper or salman2020: what it says of train and attack, and of data.image_size and
            data.augment, stands where you set nothing (null, auto); docs/protocols.md has the
            values.
        data: the source images.
        model: the network.
        train: the optimisation.
        attack: none for natural pretraining, pgd for robust pretraining; fast and free are cheaper,
            smoothing trains for certificates.
    """

    preset: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=lambda: _AS_USUAL)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_training_attack(self.attack)
        if self.preset is None:
            return
        found = find(self.preset, f"pretrain {self.attack.name}")
        require(
            self.attack.norm != "linf" or self.attack.eps <= 1,
            "attack.eps",
            "a radius of Linf in [0, 1], e.g. 4/255, as the preset's is of L2",
            self.attack.eps,
        )
        train = found.train if self.train is _AS_USUAL else self.train
        self._resolve(train=train, data=found.fill_data(self.data))

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        preset, attack = values.get("preset"), setting(values, "attack", "name", "none")
        if preset is None:
            return {}
        found = find(preset, f"pretrain {attack}")
        return {"train": found.train, "attack": found.attack}
