"""What a fused program is made from: a network's layers, and in which order they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from rtk.nn._fused.layers import Layer

Scale = Tensor | float | tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """A convolution with batch norm, [residual] and [ReLU].

    Attributes:
        out: the number of its value, and of its layer.
        source: the value that is convolved.
        residual: the value that is added, or None.
        relu: whether a ReLU follows; without, the value is read once, as a residual.
    """

    out: int
    source: int
    residual: int | None
    relu: bool


@dataclass
class Structure:
    """A network as a program. Value 0 is the stem's; a step's value comes after all it reads.

    Attributes:
        layers: layer v makes value v; layer 0 is the stem's.
        mean, std: of the normalisation; None where there is none.
        pool: whether the stem ends with a max-pool.
        steps: in an order in which they can run.
        last: the value that the tail reads.
        tail: from that value to the logits; shares the model's modules.
    """

    layers: list[Layer] = field(default_factory=list)
    mean: Scale | None = None
    std: Scale | None = None
    pool: bool = False
    steps: list[Step] = field(default_factory=list)
    last: int = 0
    tail: nn.Module = field(default_factory=nn.Identity)

    def consumers(self) -> list[int]:
        """Return how often each value is read."""
        count = [0] * len(self.layers)
        for step in self.steps:
            count[step.source] += 1
            if step.residual is not None:
                count[step.residual] += 1
        count[self.last] += 1
        return count
