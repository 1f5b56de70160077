"""GraphedAttack: an attack alone in one CUDA graph, for many batches of one shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rtk.cuda_graph import GraphChoice, Graphed, Seed, model_state, plain_settings
from rtk.ops import engine


def capturable(attack: object) -> bool:
    """Return whether an attack may be tried in a CUDA graph: unless it says no by itself."""
    return bool(getattr(attack, "capturable", True))


class GraphedAttack(Graphed):
    """`attack(model, x, y)` by replay: for evaluation, where PGD-20 meets batch after batch.

    The images are those of `attack` itself, for the same state of torch's generator. Weights may
    change in place between calls; see `rtk.cuda_graph.Graphed` for when it runs eagerly. On a CPU
    it is `attack`. An attack that looks at values on every batch says so itself, by an attribute
    `capturable` that is False (PGD with early stopping, APGD with restarts, Square, and those of
    other packages), and stays eager without a word.

    Args:
        attack: of `rtk.attacks`, or any that draws no random numbers on the CPU.
        graph: "auto" warns once where the attack cannot be captured (a model that waits for the
            GPU); True raises an RtkError there, and here for one that is not `capturable`; False
            never captures.
    """

    def __init__(self, attack: Callable[..., Tensor], *, graph: GraphChoice = "auto") -> None:
        why_not = None if capturable(attack) else "it looks at values by design"
        if graph == "auto" and (why_not is not None or not engine.is_on()):
            graph = False
        super().__init__(f"GraphedAttack({attack!r})", graph, why_not)
        self._attack = attack
        self._model: nn.Module | None = None
        self._seed: Seed | None = None

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, seed: int | Tensor | None = None
    ) -> Tensor:
        """Return adversarial images, a new tensor; a call with a seed of its own is eager."""
        if seed is not None:
            return self._attack(model, x, y, seed=seed)
        self._model = model
        if self._seed is None:
            self._seed = Seed(self._attack, x.device)
        return self.run(x, y)

    def draw_seed(self) -> int | None:
        """Draw the seed of one call, as the attack itself would; None where it draws none."""
        draw: Callable[[], int | None] = getattr(self._attack, "draw_seed", lambda: None)
        return draw()

    def eager(self, *inputs: Tensor) -> Tensor:
        return self._attack(self._model, *inputs)

    def rehearse(self, *inputs: Tensor) -> Tensor:
        self.refresh()
        return self.recorded(*inputs)

    def recorded(self, *inputs: Tensor) -> Tensor:
        assert self._seed is not None
        return self._attack(self._model, *inputs, **self._seed.arguments)

    def refresh(self) -> None:
        assert self._seed is not None
        self._seed.refresh()

    def state(self) -> list[object]:
        assert self._model is not None
        return [*model_state(self._model), *plain_settings(self._attack)]
