"""What every stage has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtk.config.checks import require


@dataclass(frozen=True)
class StageConfig:
    """What every stage has.

    Args:
        out: folder of this run; everything the stage makes lands in it.
        seed: of initialisation, data order, augmentation and random starts.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N; under torchrun auto and cuda are
            one GPU a process.
        threads: of the CPU; 0 leaves it to torch. One is often fastest for tiny networks.
        resume: go on where an earlier, stopped run in the same folder was; else start over.
    """

    out: str = "runs/run"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        require(self.threads >= 0, "threads", "a number of CPU threads >= 0", self.threads)
        require(0 <= self.seed < 2**63, "seed", "a whole number in [0, 2**63)", self.seed)

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sections (`train`, ...) whose defaults depend on other settings.

        Args:
            values: plain settings by name, as a file or the command line has them.
        """
        return {}

    def _resolve(self, **values: Any) -> None:
        """Make settings what they stand for; only while the object is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def setting(values: Mapping[str, Any], section: str, name: str, default: str) -> str:
    """Return a setting inside a section of plain settings, or its default."""
    inside = values.get(section)
    return inside.get(name, default) if isinstance(inside, Mapping) else default
