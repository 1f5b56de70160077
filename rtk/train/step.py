"""make_step: one whole training step on a batch, natural or adversarial."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk.attacks import GraphedAttack
from rtk.attacks.gradient import local_network
from rtk.attacks.graphed import capturable
from rtk.cuda_graph import (
    GraphChoice,
    Graphed,
    Seed,
    model_state,
    plain_settings,
    renew_accumulators,
)
from rtk.errors import RtkError
from rtk.ops import engine
from rtk.train.optim import DeviceRates, match_layouts, optimizer_state, why_not_captured

Step = Callable[[Tensor, Tensor], Tensor]
StepAttack = Callable[..., Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    attack: StepAttack | None = None,
    *,
    amp: torch.dtype | None = torch.bfloat16,
    graph: GraphChoice = "auto",
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
) -> TrainStep:
    """Return `step(x, y) -> loss`, which does one optimiser step on a batch.

    On a GPU the whole step (attack with its random start, forward, backward, optimiser) becomes one
    CUDA graph after three eager steps; see `rtk.cuda_graph.Graphed` for when it is replayed. The
    learning rate may change from step to step, `model.train()` and `eval()` may be called in
    between, checkpoints may be saved and loaded. Hooks and other Python code of the model and the
    optimiser run in eager steps only, and a model that looks at tensor values stays eager.

    A DistributedDataParallel model is attacked without its wrapper, on each rank by itself; only
    the outer forward and backward pass communicate. There, and where the optimiser is what cannot
    be captured, the attack becomes a CUDA graph of its own. Each rank's loss is that of its own
    batch. Random starts follow each process's generator: seed the ranks differently.

    Args:
        model: takes images in [0, 1] and returns logits; each module stays in the mode (train or
            eval) that it is in.
        optimizer: over the model's parameters: SGD, or one with capturable=True, to be captured.
        attack: `attack(model, x, y)` makes the images adversarial first, under the same autocast;
            None trains naturally. One that draws its own random numbers on the CPU is captured if
            it has `draw_seed` (see `rtk.cuda_graph.Seed`), as those of `rtk.attacks` do.
        amp: autocast dtype, or None for fp32.
        graph: "auto" captures on a GPU and warns once where that is impossible; True raises an
            RtkError there; False never captures.
        label_smoothing: of the cross-entropy.
        loss: `loss(logits, y) -> scalar` of fp32 logits; None is the batch's mean cross-entropy.

    Returns:
        A function of x, (N, C, H, W) in [0, 1], and y, (N,) int64, that returns the batch's loss
        before the step: a detached scalar, without synchronising. Its `nonfinite` counts the steps
        whose loss was NaN or infinite, and its `captured` says whether there is a graph.

    Raises:
        RtkError: for an amp dtype that is not floating, an unknown `graph`, or graph=True where
            the step cannot be captured: here if that is known (a model on the CPU), else by the
            step that finds out.
    """
    if loss is None:
        loss = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    return TrainStep(model, optimizer, attack, amp, graph, loss)


class TrainStep(Graphed):
    """One training step; made by `make_step`.

    Attributes:
        nonfinite: how many steps had a loss that was NaN or infinite, a 0-dim int64 tensor on the
            model's device; reading its value synchronises.
    """

    nonfinite: Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        attack: StepAttack | None,
        amp: torch.dtype | None,
        graph: GraphChoice,
        loss: Loss,
    ) -> None:
        if amp is not None and not amp.is_floating_point:
            raise RtkError(f"make_step: amp must be a floating dtype or None, got {amp}")
        if graph == "auto" and not engine.is_on():
            graph = False
        device = optimizer.param_groups[0]["params"][0].device
        why_not = _why_not(model, optimizer) if device.type == "cuda" else None
        if graph is True and device.type != "cuda":
            why_not = f"the model is on {device}, which has no CUDA graphs"
        if why_not is not None and graph == "auto" and attack is not None and capturable(attack):
            attack, why_not = GraphedAttack(attack), f"{why_not}; only the attack has one"
        super().__init__("make_step", graph, why_not)
        if device.type != "cuda":
            self._graph = False
        self._model = model
        self._attacked = local_network(model)
        self._optimizer = optimizer
        self._attack = attack
        self._amp = amp
        self._loss = loss
        self._seed = Seed(attack, device)
        self._rates = DeviceRates(optimizer, device)
        self._grads: list[tuple[Tensor, Tensor]] = []  # what a replay writes
        self._grads_shown = False
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Do one step; see `make_step`."""
        return self.run(x, y)

    def eager(self, *inputs: Tensor) -> Tensor:
        return self._step(*inputs, update=self._optimizer.step)

    def rehearse(self, *inputs: Tensor) -> Tensor:
        self._seed.refresh()
        match_layouts(self._optimizer)
        return self._step(*inputs, update=self._optimizer.step, **self._seed.arguments)

    def recorded(self, *inputs: Tensor) -> Tensor:
        return self._step(*inputs, update=self._rates.step, **self._seed.arguments)

    def _step(
        self, x: Tensor, y: Tensor, *, update: Callable[[], object], **seed: Tensor
    ) -> Tensor:
        autocast = (
            contextlib.nullcontext()
            if self._amp is None
            else torch.autocast(x.device.type, dtype=self._amp)
        )
        with autocast:
            if self._attack is not None:
                x = self._attack(self._attacked, x, y, **seed)
            logits = self._model(x)
            loss = self._loss(logits.float(), y)
        self._optimizer.zero_grad(set_to_none=True)
        self._grads_shown = False
        loss.backward()
        update()
        loss = loss.detach()
        if self.nonfinite.device != loss.device:  # the model was moved after make_step
            self.nonfinite = self.nonfinite.to(loss.device)
        self.nonfinite += ~loss.isfinite()
        return loss

    def state(self) -> list[object]:
        return [
            *model_state(self._model),
            *optimizer_state(self._optimizer),
            *plain_settings(self._attack),
        ]

    def refresh(self) -> None:
        self._seed.refresh()
        self._rates.refresh()
        if not self._grads_shown:  # an eager step has put its own in their place
            for parameter, grad in self._grads:
                parameter.grad = grad
            self._grads_shown = True

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        optimizer = self._optimizer
        self._grads.clear()
        optimizer.zero_grad(set_to_none=True)  # those of the capture lie in the graph's own memory
        rated = (p for group in optimizer.param_groups for p in group["params"])
        trained = dict.fromkeys(p for p in (*self._model.parameters(), *rated) if p.requires_grad)
        renew_accumulators(trained)
        self._rates.refresh()
        self._rates.load()
        state = {parameter: dict(values) for parameter, values in optimizer.state.items()}
        try:
            yield
        except BaseException:
            # Nothing has run: what was made holds no values.
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            optimizer.state.update(state)
            raise
        self._grads += (
            (parameter, parameter.grad)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )


def _why_not(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "the model is DistributedDataParallel, whose communication is not captured"
    return why_not_captured(optimizer)
