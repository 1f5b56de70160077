"""Settings of `rtk draw`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rtk.config.attack import AttackConfig, check_training_attack
from rtk.config.checks import check_rounds, check_sparsity, require
from rtk.config.data import DataConfig, unnamed
from rtk.config.presets import PRESETS, Protocol, find
from rtk.config.stage import StageConfig, setting
from rtk.config.train import TrainConfig
from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity

SCOPES = ("global", "layer")
SCORE_INITS = ("weight_rank", "kaiming")
ITERATIVE = ("imp", "a-imp")
TASKS = ("upstream", "downstream")


def lmp_train() -> TrainConfig:
    """What learns a mask: 150 epochs, batch 64, lr 0.1 (/ 10 at 50 and 100), wd 5e-4 (RST)."""
    return replace(find("paper", "draw lmp").train)


def imp_train(task: str = "downstream", preset: str = "paper") -> TrainConfig:
    """How a round of IMP trains.

    Upstream 10 epochs at a constant lr of 1e-4 (paper, chen2021) or 30 at 5e-4 (doublewin2022);
    downstream 182 epochs at lr 0.1 (/ 10 at 91 and 136), wd 2e-4. docs/protocols.md has the rest.

    Raises:
        RtkError: for an unknown task or preset.
    """
    return find(preset, f"draw imp {check_choice('task', task, TASKS)}").train


def imp_attack(task: str = "downstream", preset: str = "paper") -> AttackConfig:
    """What a round of A-IMP trains on: Linf 8/255 from a random start (doublewin2022).

    Upstream 3 steps of 2 eps / 3, downstream 10 of eps / 4 = 2/255.

    Raises:
        RtkError: for an unknown task or preset.
    """
    return find(preset, f"draw a-imp {check_choice('task', task, TASKS)}").attack


_AS_THE_SCHEME = lmp_train()  # a DrawConfig that holds this very object was given no `train`


@dataclass(frozen=True)
class DrawConfig(StageConfig):
    """Draw a ticket, a sparse subnetwork, out of a pretrained network.

    Args:
        preset: paper, chen2021 or doublewin2022: what it says of train, attack, rounds, rate and
            include_first, and of data.image_size and data.augment, stands where you set nothing
            (null, auto); docs/protocols.md has the values.
        checkpoint: the pretrained network: a run's folder or its checkpoint.safetensors.
        scheme: omp (one-shot magnitude pruning), lmp (a mask learned on a task's images, under
            frozen weights), imp (rounds of training, pruning and rewinding) or a-imp (imp on
            adversarial examples).
        sparsity: fraction of the prunable weights that become zero, in [0, 1); null is 0.8, or
            what N:M means, or what the rounds of imp leave.
        granularity: element, row, kernel, channel, block-64 (or block-KxC: tiles of output and
            input channels) or 2:4 (or another N:M, of omp only); docs/pruning.md tells them apart.
        scope: global (one ranking over all layers) or layer (the same sparsity in each); null is
            layer for lmp, else global.
        include_first: prune the first convolution too; null is no.
        data: of lmp and imp: the task's images; of imp upstream, no name takes those of the
            pretraining.
        train: of lmp: how scores and head are trained; of imp: how each round trains. By default as
            the scheme's papers do (and imp's task).
        score_init: of lmp: where scores start, weight_rank (random values in the order of the
            weights' magnitudes) or kaiming (random).
        save_scores: of lmp: keep the scores beside the ticket, in scores.safetensors.
        task: of imp: upstream (the network keeps its head, and is pruned before any training) or
            downstream (a new head, trained before it is pruned); null is downstream where data has
            a name.
        rounds: of imp; null is as many as reach the sparsity, or 19.
        rate: of imp: fraction of what remains that a round prunes; null is 0.2.
        attack: of imp: what the rounds train on; with one, imp is a-imp.
    """

    preset: str | None = None
    checkpoint: str = ""
    scheme: str = "omp"
    sparsity: float | None = None
    granularity: str = "element"
    scope: str | None = None
    include_first: bool | None = None
    data: DataConfig = field(default_factory=unnamed)
    train: TrainConfig = field(default_factory=lambda: _AS_THE_SCHEME)
    score_init: str = "weight_rank"
    save_scores: bool = False
    task: str | None = None
    rounds: int | None = None
    rate: float | None = None
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        granularity = Granularity.parse(self.granularity)
        require(
            self.scheme not in ("lmp", *ITERATIVE) or granularity.n_of_m is None,
            "granularity",
            f"element, row, kernel, channel or a block for {self.scheme}",
            granularity.name,
        )
        # Stored as what they stand for: "block" and "block-64" are one run, as null and 0.8 are.
        self._resolve(granularity=granularity.name)
        if self.scheme in ITERATIVE:
            found = self._resolve_rounds()
        else:
            self._refuse_rounds()
            found = _protocol(self.preset, self.scheme)
            asked = self.sparsity
            if asked is None and granularity.sparsity is None:
                asked = 0.8
            self._resolve(sparsity=check_sparsity(asked, granularity.name))
        if self.train is _AS_THE_SCHEME and self.scheme in ("lmp", *ITERATIVE):
            self._resolve(train=found.train)
        if self.preset is not None and self.data.name:
            self._resolve(data=found.fill_data(self.data))
        if self.include_first is None:
            self._resolve(include_first=found.include_first)
        if self.scope is None:
            self._resolve(scope="layer" if self.scheme == "lmp" else "global")
        check_choice("scope", str(self.scope), SCOPES)
        check_choice("score_init", self.score_init, SCORE_INITS)
        require(
            self.scheme != "lmp" or bool(self.data.name),
            "data.name",
            "the images that lmp learns a mask on, e.g. --data.name digits[5-9]",
            self.data.name,
        )

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        preset, scheme = values.get("preset"), values.get("scheme", cls.scheme)
        if scheme not in ITERATIVE:
            return {} if scheme != "lmp" else {"train": _protocol(preset, scheme).train}
        task = values.get("task") or _task_of(setting(values, "data", "name", ""))
        if setting(values, "attack", "name", "none") != "none":
            scheme = "a-imp"
        found = _protocol(preset, scheme, task)
        return {"train": found.train, "attack": found.attack}

    def _resolve_rounds(self) -> Protocol:
        """Make the settings of imp what they stand for; returns what the preset says of it."""
        task = _task_of(self.data.name) if self.task is None else self.task
        check_choice("task", task, TASKS)
        require(
            task == "upstream" or bool(self.data.name),
            "data.name",
            f"the images that {self.scheme} trains on downstream, e.g. --data.name digits[5-9]",
            self.data.name,
        )
        attack = self.attack
        require(
            self.scheme == "imp" or attack.name != "none" or attack == AttackConfig(),
            "attack.name",
            "an attack for a-imp, e.g. pgd",
            attack.name,
        )
        scheme = self.scheme if attack.name == "none" else "a-imp"
        found = _protocol(self.preset, scheme, task)
        if attack.name == "none":
            attack = found.attack
        check_training_attack(attack)
        rate = found.rate if self.rate is None else self.rate
        rounds = found.rounds if self.rounds is None and self.sparsity is None else self.rounds
        sparsity, rounds = check_rounds(self.sparsity, rounds, rate)
        self._resolve(
            scheme=scheme, task=task, rate=rate, sparsity=sparsity, rounds=rounds, attack=attack
        )
        return found

    def _refuse_rounds(self) -> None:
        """Raise an RtkError for a setting of imp in another scheme."""
        given = {name: getattr(self, name) for name in ("task", "rounds", "rate")}
        given["attack.name"] = None if self.attack.name == "none" else self.attack.name
        for name, value in given.items():
            if value is not None:
                raise RtkError(
                    f"{name} is a setting of imp, got {value!r} beside scheme {self.scheme}; "
                    "leave it out, or take --scheme imp"
                )


def _task_of(images: str | None) -> str:
    """Return imp's task where it is not given: the pretraining's, where no images are."""
    return "downstream" if images else "upstream"


def _protocol(preset: str | None, scheme: str, task: str = "") -> Protocol:
    """Return what a preset says of a scheme, and of imp's task; without one the paper's numbers.

    Of schemes that the paper does not know they are nobody's.
    """
    what = f"draw {scheme} {check_choice('task', task, TASKS)}" if task else f"draw {scheme}"
    if preset is None and what not in PRESETS["paper"]:
        return Protocol()
    return find("paper" if preset is None else preset, what)
