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

# What code under the interpreter begins with: FILE's module is `test`.
PREAMBLE = """
import importlib.util, sys
import torch
from triton.runtime import interpreter

patch = interpreter._patch_lang_tensor

def patch_index(tensor, scope):
    # Triton 3.6 calls int() on a loop's bound, an array of one number: numpy 2.4 refuses that.
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

interpreter._patch_lang_tensor = patch_index

spec = importlib.util.spec_from_file_location("interpreted_test", FILE)
test = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)

torch.manual_seed(0)
torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
torch.use_deterministic_algorithms(True)
"""


@pytest.fixture
def interpret() -> Callable[..., str]:
    """interpret(code, file=None): run it with TRITON_INTERPRET set, return what it prints.

    The variable counts only before Triton is imported. With `file`, the test's own, PREAMBLE runs
    first.
    """

    def run(code: str, file: str | None = None) -> str:
        if file is not None:
            code = PREAMBLE.replace("FILE", repr(file)) + code
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

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
