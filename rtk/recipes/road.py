"""Collects the stages of a figure, so that figures share the runs that are the same.

A run's folder is named by what it is, and by a hash of all its settings and of those of the runs
that it reads: two figures that ask for the same run mean the same folder, and a changed setting
means another one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtk.config import (
    AdviseConfig,
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    TransferConfig,
    round_sparsity,
)
from rtk.identity import config_hash
from rtk.recipes.scale import Scale

_READS = ("checkpoint", "ticket", "features")


class Road:
    """The stages of a figure, in an order in which each finds what it reads.

    Every method adds a stage, unless it is there, and returns its folder, relative to the recipe's.

    Args:
        scale: its settings.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.evaluated: list[str] = []
        self._stages: dict[str, StageConfig] = {}

    def _add(self, kind: str, label: str, stage: StageConfig) -> str:
        out = f"{kind}/{label}-{config_hash(stage)[:6]}"
        if out not in self._stages:
            self._stages[out] = replace(stage, out=out, **self.scale.machine)
        return out

    def pretrain(self, model: ModelConfig, attack: AttackConfig, seed: int) -> str:
        """Pretrain a network on the source."""
        train = {"none": self.scale.natural, "smoothing": self.scale.smoothed}
        return self._add(
            "pretrain",
            f"{slug(model.arch)}-{attack.label}-s{seed}",
            PretrainConfig(
                seed=seed,
                data=self.scale.source,
                model=model,
                train=train.get(attack.name, self.scale.robust),
                attack=attack,
            ),
        )

    def omp(self, network: str, sparsity: float, granularity: str = "element") -> str:
        """Draw a ticket by its weights' magnitudes."""
        shape = "" if granularity == "element" else f"-{granularity}"
        return self._add(
            "draw",
            f"{_label(network)}-omp{shape}-{sparsity:g}",
            DrawConfig(checkpoint=network, sparsity=sparsity, granularity=granularity),
        )

    def lmp(self, network: str, sparsity: float, target: DataConfig, seed: int) -> str:
        """Learn a mask on a target."""
        return self._add(
            "draw",
            f"{_label(network)}-lmp-{sparsity:g}-{slug(target.name)}-s{seed}",
            DrawConfig(
                seed=seed,
                checkpoint=network,
                scheme="lmp",
                sparsity=sparsity,
                data=target,
                train=self.scale.on(self.scale.lmp, target),
            ),
        )

    def imp(
        self, network: str, robust: bool, target: DataConfig | None, seed: int
    ) -> dict[float, str]:
        """Draw by rounds, on adversarial examples where `robust`, upstream without a target.

        Returns sparsity -> ticket of the scale's rounds.
        """
        scale = self.scale
        images = "us" if target is None else f"ds-{slug(target.name)}"
        attack = scale.upstream_attack if target is None else scale.downstream_attack
        settings: dict[str, Any] = {"data": target, "task": "downstream"}
        folder = self._add(
            "draw",
            f"{_label(network)}-{'a-imp' if robust else 'imp'}-{images}-s{seed}",
            DrawConfig(
                seed=seed,
                checkpoint=network,
                scheme="a-imp" if robust else "imp",
                rounds=scale.rounds[-1],
                rate=scale.rate,
                train=scale.upstream if target is None else scale.on(scale.downstream, target),
                attack=attack if robust else AttackConfig(),
                **({"task": "upstream"} if target is None else settings),
            ),
        )
        return {
            round_sparsity(number, scale.rate): f"{folder}/rounds/{number:02d}"
            for number in scale.rounds
        }

    def transfer(
        self, network: str, ticket: str | None, mode: str, target: DataConfig, seed: int
    ) -> str:
        """Transfer a ticket, or the dense network."""
        scale = self.scale
        train = scale.finetune if mode == "finetune" else scale.linear
        settings: dict[str, Any] = {"train": scale.on(train, target)}
        if mode == "segment":
            settings = {"train": scale.segment, "segment": scale.segmentation_settings}
        drawn = _label(network) + "-dense" if ticket is None else _label(ticket)
        return self._add(
            "transfer",
            f"{drawn}-{slug(target.name)}-{mode}-s{seed}",
            TransferConfig(
                seed=seed, checkpoint=network, ticket=ticket, mode=mode, data=target, **settings
            ),
        )

    def evaluate(
        self,
        network: str,
        attack: AttackConfig | None = None,
        ood: tuple[str, ...] = (),
    ) -> str:
        """Measure a network; its result belongs to the figure."""
        more = "-attacked" if attack is not None else ""
        out = self._add(
            "evaluate",
            f"{_label(network)}{more}",
            EvaluateConfig(checkpoint=network, attack=attack or AttackConfig(), ood=ood),
        )
        if out not in self.evaluated:
            self.evaluated.append(out)
        return out

    def distances(self, targets: tuple[DataConfig, ...], network: str | None) -> str:
        """Measure how far targets lie from the source: in a network's features, or Inception's."""
        return self._add(
            "distances",
            "inception" if network is None else "own",
            AdviseConfig(
                data=self.scale.source,
                targets=tuple(target.name for target in targets),
                weights=self.scale.weights,
                features=network,
                source_images=self.scale.source_images,
            ),
        )

    def stages(self, root: Path, data_root: str | None = None) -> tuple[StageConfig, ...]:
        """Return all stages, their folders below `root` and their data below `data_root`."""
        return tuple(below(stage, root, data_root) for stage in self._stages.values())


def below(stage: StageConfig, root: Path, data_root: str | None) -> Any:
    """Return a stage whose folders, relative before, lie below `root`."""
    paths = {name: getattr(stage, name, None) for name in ("out", *_READS)}
    changed: dict[str, Any] = {name: str(root / path) for name, path in paths.items() if path}
    data = getattr(stage, "data", None)
    if data is not None and data_root is not None:
        changed["data"] = replace(data, root=data_root)
    return replace(stage, **changed)


def slug(name: str) -> str:
    """Return a set's or a network's name in characters that any folder may have."""
    name = re.sub(r"^(?:npz|folder):(?:.*/)?", "", name).removesuffix(".npz")
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _label(folder: str) -> str:
    """Return a run's folder without its kind and hash: pretrain/a-123456 is a."""
    _, name, *inside = folder.split("/")
    return "-".join([name[:-7], *(f"r{part}" for part in inside[1:])])
