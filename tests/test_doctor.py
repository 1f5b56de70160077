import subprocess
import sys

import pytest
import torch

import rtk
from rtk import doctor
from rtk.ops import _compiled
from rtk.ops._registry import ops


@pytest.fixture(scope="module")
def text():
    return doctor.describe()


def test_it_names_the_versions(text):
    first, *lines = text.splitlines()
    assert first.startswith(f"rtk {rtk.__version__}, Python {sys.version.split()[0]}, ")
    assert f"  torch {torch.__version__.split('+')[0]}" in "\n".join(lines)
    for package in ("torchvision", "numpy", "scikit-learn", "safetensors", "jsonargparse"):
        assert any(line.startswith(f"  {package} ") for line in lines)
    assert "is not installed" not in text


def test_it_says_whether_torch_sees_a_gpu(text):
    if torch.cuda.is_available():
        assert f"GPU 0: {torch.cuda.get_device_name(0)}, sm_" in text
    else:
        assert "GPU: none that torch can use" in text


def test_it_tells_of_the_compiled_module(text):
    (line,) = [line for line in text.splitlines() if line.startswith("rtk._C: ")]
    if _compiled._C is None:
        assert "not built, or it does not load" in line and "pip install -e ." in line
    else:
        assert _compiled._C.__file__ in line
        assert "CPU code in use" in text and "CUDA architectures" in text


def test_every_op_has_a_backend(text):
    for name in ops:
        (line,) = [line for line in text.splitlines() if line.split()[:3] == [name, "on", "cpu"]]
        assert line.split()[3] in ("reference", "cpu"), line
    assert len(ops) >= 11


def test_a_package_that_is_missing_is_said_so(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert "  no-such-package is not installed; run: pip install -e ." in doctor.describe()


HIDDEN = """
import sys
sys.modules["rtk._C"] = None
from rtk.cli import main
raise SystemExit(main(["doctor"]))
"""


def test_it_works_without_the_compiled_module():
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "rtk._C: not built, or it does not load" in done.stdout
    assert "run: pip install -e ." in done.stdout
    lines = [line for line in done.stdout.splitlines() if " on cpu " in line]
    assert len(lines) == len(ops)
    assert all(line.split()[3] == "reference" for line in lines)
    masked = next(line for line in lines if line.split()[0] == "masked_conv2d")
    assert "rtk._C is missing; see `rtk doctor`" in masked
