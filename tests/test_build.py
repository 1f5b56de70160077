"""The compiled module by itself: torch-free, self-describing, the same on every instruction set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pybind11
import pytest

from rtk import _C

ROOT = Path(__file__).parent.parent

# Loads the module from its file: `import rtk` would bring torch in.
LOAD = f"""
import hashlib, importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
"""

# One digest per op, over odd sizes, ties, NaN, infinities and both zeros.
DIGESTS = """
rng = np.random.default_rng(0)
digests = {}
def note(name, array):
    digests[name] = hashlib.sha256(array.tobytes()).hexdigest()

n, c, h, w = 3, 3, 37, 41
chw = c * h * w
x, x_adv = rng.random((2, n, chw), dtype=np.float32)
grad = rng.standard_normal((n, chw), dtype=np.float32)
for l2 in (False, True):
    if not l2:
        grad[0, :4] = np.nan, np.inf, -np.inf, -0.0
    else:
        grad[~np.isfinite(grad)] = 0
    out = np.empty_like(x)
    _C.pgd_step_cpu(x_adv.ctypes.data, _C.f32, grad.ctypes.data, _C.f32, x.ctypes.data, _C.f32,
                    out.ctypes.data, n, chw, 0.1, 0.03, l2, 0.0, 1.0, 3)
    note(f"pgd_step l2={l2}", out)
    strides = (chw, h * w, w, 1)
    _C.pgd_init_cpu(x.ctypes.data, _C.f32, out.ctypes.data, _C.f32, n, c, h, w, strides, strides,
                    0.5, l2, 0.0, 1.0, 2**63 + 5, 3)
    note(f"pgd_init l2={l2}", out)

scores = rng.standard_normal(300_001).astype(np.float32).round(1)
scores[:7] = np.nan, np.inf, -np.inf, 0.0, -0.0, np.nan, 1e-42
for k in (1, 1234, 150_000, 299_999):
    mask = np.empty(scores.size, np.uint8)
    _C.topk_mask_cpu([scores.ctypes.data], [scores.size], [mask.ctypes.data], _C.f32, k, 3)
    assert mask.sum() == k
    note(f"topk_mask {k}", mask)

weight = rng.standard_normal((33, 17, 3, 3), dtype=np.float32)
keep = rng.random((33, 17, 3, 1)) < 0.5
half = np.empty((33, 3, 3, 17), np.float16)
_C.prepare_weight_cpu(weight.ctypes.data, _C.f32, (153, 9, 3, 1), keep.ctypes.data, _C.b1,
                      (51, 3, 1, 0), half.ctypes.data, _C.f16, (153, 1, 51, 17), (33, 17, 3, 3), 3)
np.testing.assert_array_equal(half, (weight * keep).astype(np.float16).transpose(0, 2, 3, 1))
note("prepare_weight", half)
print(json.dumps([_C.cpu_isa(), digests]))
"""


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD + code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def test_imports_without_torch() -> None:
    done = run("print([name for name in sys.modules if name.split('.')[0] in ('torch', 'rtk')])")
    assert done.stdout.strip() == "[]", done.stderr


def test_says_how_it_was_built() -> None:
    info = _C.build_info
    assert set(info) == {"compiler", "flags", "build_type", "cuda", "isas"}
    assert info["compiler"]
    assert "-ffp-contract=off" in info["flags"]
    assert "fast-math" not in info["flags"]
    assert info["isas"][0] == "default"
    assert _C.cpu_isa() in info["isas"]


def test_cuda_is_built_or_says_why_not() -> None:
    built = _C.cuda_status == "built"
    assert _C.cuda_status
    assert bool(_C.cuda_architectures) == built
    assert bool(_C.build_info["cuda"]) == built
    assert hasattr(_C, "prepare_weight_cuda") == built


def test_stub_lists_what_the_module_has() -> None:
    stub: dict[str, object] = {}
    exec(compile((ROOT / "rtk" / "_C.pyi").read_text(), "_C.pyi", "exec"), stub)
    functions = {name for name, value in stub.items() if callable(value) and name[0].islower()}
    has = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")}
    assert has | {"prepare_weight_cuda"} == functions


def test_instruction_sets_agree_to_the_bit() -> None:
    digests = {}
    for isa in _C.build_info["isas"]:
        done = run(DIGESTS, RTK_CPU_ISA=isa)
        if "this machine and build have" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        used, digests[isa] = json.loads(done.stdout)
        assert used == isa
    for isa, found in digests.items():
        assert found == digests["default"], isa


def test_unknown_instruction_set_is_refused() -> None:
    done = run("_C.cpu_isa()", RTK_CPU_ISA="sse9")
    assert "RTK_CPU_ISA=sse9: this machine and build have default" in done.stderr


def test_dtypes_without_an_implementation_raise() -> None:
    with pytest.raises(ValueError, match="pgd_step x_adv: no implementation for dtype code"):
        _C.pgd_step_cpu(0, _C.u8, 0, _C.f32, 0, _C.f32, 0, 1, 1, 0.1, 0.1, False, 0.0, 1.0, 1)


def test_topk_refuses_an_impossible_k() -> None:
    with pytest.raises(ValueError, match=r"topk_mask: k must be in \[0, 0\], got 1"):
        _C.topk_mask_cpu([], [], [], _C.f32, 1, 1)


def test_every_package_is_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("rtk/**/__init__.py")
    }
    assert folders | {"rtk.kernels"} == set(setuptools["packages"])


def test_kernels_has_one_name() -> None:
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "import it as `rtk.kernels`" in done.stderr


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake or ninja"
)
def test_a_build_without_cuda_keeps_its_reason(tmp_path: Path) -> None:
    reason = 'no nvcc in "quotes"; (and) a \\ backslash'
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-G", "Ninja"]
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "RTK_CUDA_STATUS": reason,
    }
    command = configure + [f"-D{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "build_config.h").read_text()
    assert reason in config
    assert '#define RTK_CUDA_VERSION ""' in config
    assert '#define RTK_CUDA_ARCHITECTURES ""' in config
