"""Triton kernels without a GPU: under the interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Run Python code with TRITON_INTERPRET set, which counts only before Triton is imported."""

    def run(code: str) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


@dataclass(frozen=True)
class Compiled:
    ptx: str
    resources: dict[str, int]  # REG, STACK, SHARED, LOCAL bytes ...

    def accesses(self) -> list[str]:
        """Return the global loads and stores, sorted, e.g. ["ld.v4.b32", "st.v2.b32"]."""
        found = re.findall(r"(ld|st)\.global((?:\.v\d)?\.b\d+)", self.ptx)
        return sorted("".join(access) for access in found)


@pytest.fixture
def compile_for_hopper(tmp_path: Path) -> Callable[..., Compiled]:
    """compile_for_hopper(kernel, types, constants, **options): what sm_90 would run.

    Pointers, and the arguments that `divisible` names, are taken as multiples of 16.
    """
    triton = pytest.importorskip("triton")

    def compile(
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        divisible: tuple[str, ...] = (),
        **options: Any,
    ) -> Compiled:
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else types[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if n not in constants and (types.get(n, "").startswith("*") or n in divisible)
            },
        )
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        built = triton.compile(source, target=target, options=options)
        path = tmp_path / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        usage = re.findall(r"(\w+):(\d+)", report.stdout + report.stderr)
        return Compiled(built.asm["ptx"], {name: int(value) for name, value in usage})

    return compile
