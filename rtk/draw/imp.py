"""IMP: iterative magnitude pruning. Train, prune a part of the rest, rewind, and so on."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtk import distributed
from rtk.config import TASKS, TrainConfig, check_rounds, imp_train, round_sparsity
from rtk.draw.granularity import dense_layers
from rtk.draw.omp import omp, settings_of
from rtk.draw.training import working_folder
from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity
from rtk.identity import config_hash
from rtk.models import Classifier
from rtk.runs import remove_half_written
from rtk.ticket import TICKET, Ticket
from rtk.train import CHECKPOINT, train
from rtk.train.loop import BatchSource

_SHORT = {"upstream": "us", "downstream": "ds"}
ROUNDS = "rounds"  # in the run's folder: 01, 02, ... with a ticket and a log each

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def imp(
    model: Classifier,
    batches: BatchSource,
    sparsity: float | None = None,
    granularity: str = "element",
    scope: str = "global",
    *,
    rounds: int | None = None,
    rate: float = 0.2,
    task: str = "downstream",
    attack: Attack | None = None,
    config: TrainConfig | None = None,
    include_first: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    meta: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    on_round: Callable[[Ticket], object] | None = None,
    resume: bool = True,
) -> Ticket:
    """Draw a ticket by iterative magnitude pruning, with rewinding (IMP, and A-IMP).

    Each round trains the network under the masks so far, prunes `rate` of what remains by the mean
    |weight| of its groups, as `omp` does, and goes back to the full pretrained state: weights,
    batch norm and head (Chen et al. 2021). Rounds that train on adversarial examples are A-IMP
    (equation 1 of arXiv 2304.11834). After round r by element exactly round((1 - (1 - rate) ** r)
    n) weights are pruned, by group as few groups as reach that. What is pruned stays pruned.

    The model is not changed: `ticket.apply(model)` gives the rewound network.

    Args:
        model: of `rtk.models`, pretrained, with a head for the task, on its device.
        batches: the task's training images, e.g. `rtk.data.Batches`.
        sparsity: fraction that the last round leaves pruned, in (0, 1); takes as many rounds as
            reach it.
        granularity: element, row, kernel, channel or a block.
        scope: "global", one ranking over all layers, or "layer", the same sparsity in each.
        rounds: how many; without a sparsity. With neither, 19.
        rate: fraction of what remains that a round prunes, in (0, 1).
        task: "downstream", or "upstream", which prunes before any training: its first round is
            omp, and r rounds train r - 1 times.
        attack: what each batch is made adversarial by; None trains on the images as they are.
        config: epochs, optimiser, schedule and arithmetic of a round; by default
            `rtk.config.imp_train(task)`.
        include_first: prune the first convolution too.
        seed: of what a training draws at random, e.g. the attack's start; the order of the images
            is the batches' own. torch's generators are left as they were.
        folder: gets the tickets, rounds/01/ticket.safetensors and so on, with each round's
            metrics.jsonl. A stopped run goes on there, inside a round too, bit for bit (on a CPU).
            A round's checkpoint goes when its ticket is written. None keeps nothing.
        meta: goes into the metadata of every ticket; its `lineage` is added to.
        evaluate: called with a round's network every `eval_every` epochs and after the last; its
            numbers go into the log.
        on_round: called with the ticket of every round, in order, also of those found in `folder`.
        resume: go on from what is in the folder, if it was made with these settings (images, attack
            and pretrained weights are not looked at: say in `meta` what they are); else start over,
            and remove its rounds.

    Returns:
        The last round's ticket.

    Raises:
        RtkError: for bad settings, N:M, a model that is masked, not finite or without a spec,
            rounds that leave nothing, a damaged ticket in the folder, or a loss that becomes NaN.
        Interrupted: on SIGINT or SIGTERM in a training, after a checkpoint.
    """
    sparsity, rounds = check_rounds(sparsity, rounds, rate)
    check_choice("task", task, TASKS)
    config = imp_train(task) if config is None else config
    check_drawable(model, sparsity, granularity, scope, include_first)
    run = _Imp(
        model=model,
        scheme="imp" if attack is None else "a-imp",
        granularity=Granularity.parse(granularity).name,
        scope=scope,
        include_first=include_first,
        task=task,
        rate=rate,
        rounds=rounds,
        seed=seed,
        meta={"config_hash": config_hash(config), **(meta or {})},
        loop={"batches": batches, "config": config, "attack": attack, "evaluate": evaluate},
    )
    ticket: Ticket | None = None
    with working_folder(folder) as path:
        if not resume:
            distributed.from_main(_remove, path / ROUNDS)
        for number in range(1, rounds + 1):
            target = sparsity if number == rounds else round_sparsity(number, rate)
            ticket = run.round(number, target, ticket, path / ROUNDS / f"{number:02d}")
            if on_round is not None:
                on_round(ticket)
    assert ticket is not None
    return ticket


def check_drawable(
    model: nn.Module, sparsity: float, granularity: str, scope: str, include_first: bool
) -> None:
    """Raise an RtkError if `model` cannot be pruned round by round to this sparsity."""
    kind = Granularity.parse(granularity)
    if kind.n_of_m:
        raise RtkError(
            f"imp: {kind.name} is one sparsity and has no rounds; take element, row, kernel, "
            "channel or a block, or draw it by omp"
        )
    if not hasattr(model, "spec"):
        raise RtkError(
            "imp: the model has no spec, which its checkpoints need; take a network of rtk.models, "
            "or write your own loop around rtk.draw.omp(model, ..., within=ticket)"
        )
    dense_layers(model, include_first, "imp")
    ticket = omp(model, sparsity, granularity, scope, include_first)
    if not any(mask.any() for mask in ticket.masks.values()):
        raise RtkError(
            f"imp: a sparsity of {sparsity:g} by {kind.name} leaves none of the model's groups; "
            "ask for less, or for fewer rounds"
        )


@dataclass(frozen=True)
class _Imp:
    """What all rounds have in common; see `imp` for the settings."""

    model: Classifier
    scheme: str
    granularity: str
    scope: str
    include_first: bool
    task: str
    rate: float
    rounds: int
    seed: int
    meta: Mapping[str, Any]
    loop: Mapping[str, Any]  # arguments of `train`

    def prune(self, network: nn.Module, sparsity: float, within: Ticket | None = None) -> Ticket:
        return omp(
            network, sparsity, self.granularity, self.scope, self.include_first, within=within
        )

    def round(self, number: int, sparsity: float, before: Ticket | None, folder: Path) -> Ticket:
        """Return the ticket of a round: the one in its folder, or a new one, written there."""
        record = self._record(number, sparsity, before)
        path = folder / TICKET
        if not distributed.from_main(_is_there, path, record):
            network: nn.Module = self.model
            if self.task == "downstream" or number > 1:
                network = self._trained(number, before, folder)
            if distributed.is_main():
                ticket = self.prune(network, sparsity, before)
                lineage = {**self.meta.get("lineage", {}), **_lineage(ticket, record)}
                dataclasses.replace(ticket, meta={**record, "lineage": lineage}).save(path)
            del network
            if next(self.model.parameters()).is_cuda:
                gc.collect()  # a captured step holds its memory until the cycles in it are found
        distributed.barrier()  # all processes read the one ticket
        # Once there is a ticket nothing needs the network that it was drawn from.
        if distributed.is_main():
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return Ticket.load(path)

    def _trained(self, number: int, ticket: Ticket | None, folder: Path) -> nn.Module:
        """Return a trained copy of the pretrained network; to drop it is to rewind."""
        network = copy.deepcopy(self.model)
        if ticket is not None:
            ticket.apply(network)
        device = next(network.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(self.seed, number))
            return train(
                network,
                **self.loop,
                folder=folder,
                meta={"stage": "draw", **self.meta, "ticket_sha256": _sha256(ticket)},
                label=f"draw {self.scheme} round {number}/{self.rounds}",
            )

    def _record(self, number: int, sparsity: float, before: Ticket | None) -> dict[str, Any]:
        network = settings_of(
            self.model, sparsity, self.granularity, self.scope, self.include_first
        )
        return {
            "scheme": self.scheme,
            **network,
            "task": self.task,
            "rate": self.rate,
            "seed": self.seed,
            "round": number,
            "previous_sha256": _sha256(before),
            **self.meta,
        }


def _seed(seed: int, number: int) -> int:
    """Return the seed of a round, hashed so that neighbouring seeds and rounds share no stream."""
    digest = hashlib.sha256(f"imp/{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _sha256(ticket: Ticket | None) -> str | None:
    return None if ticket is None else ticket.meta["sha256"]


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _is_there(path: Path, record: Mapping[str, Any]) -> bool:
    """Say whether the ticket at `path` was drawn alike, out of the same one before it.

    Makes its folder ready to be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_half_written(path.parent)
    if not path.exists():
        return False
    theirs = Ticket.load(path).meta
    # Where and how the run was executed does not count: what does is in the configuration's hash.
    ours = {name: value for name, value in record.items() if name not in ("config", "lineage")}
    return all(theirs.get(name) == value for name, value in json.loads(json.dumps(ours)).items())


def _lineage(ticket: Ticket, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a report that say how a ticket was drawn.

    There upstream and downstream are two schemes, as in the paper: lines of their own.
    """
    return {
        "scheme": f"{record['scheme']}-{_SHORT[record['task']]}",
        "granularity": record["granularity"],
        "sparsity": record["sparsity"],
        "actual_sparsity": ticket.sparsity,
        "draw_task": record["task"],
        "draw_round": record["round"],
    }
