"""Builds rtk/_C out of csrc with CMake and Ninja; it needs a C++ compiler, not torch, not CUDA.

RTK_CUDA=0                 leave the CUDA kernels out
RTK_REQUIRE_CUDA=1         a missing or failing CUDA build is an error, not a CPU-only package
RTK_CUDA_ARCHITECTURES     e.g. "80;90a" (CMake's syntax) in place of the visible GPUs' own
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Code for the H100 and H200, and PTX of plain 90 for what is newer: PTX of 90a runs nowhere else.
DEFAULT_ARCHITECTURES = "90a-real;90-virtual"


def find_tool(name: str) -> str | None:
    """`name` on PATH, or beside this Python: a virtual environment need not be activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def find_nvcc() -> str | None:
    """CUDACXX, then the toolkits of CUDA_HOME and CUDA_PATH, then PATH, then the usual place."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def cuda_architectures() -> str:
    """The visible GPUs' architectures in CMake's syntax, from 9.0 on with their `a` features."""
    if named := os.environ.get("RTK_CUDA_ARCHITECTURES"):
        return named.replace(",", ";")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return DEFAULT_ARCHITECTURES
    found = sorted({(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)\s*$", answer, re.M)})
    real = [f"{major}{minor}{'a' if major >= 9 else ''}-real" for major, minor in found]
    return ";".join(real) or DEFAULT_ARCHITECTURES


def first_error(log: str) -> str:
    """What the compiler says in `log`, else CMake, in one line of at most 400 characters."""
    found = re.search(r"^.*(\bfatal\b|\berror\s*:)", log, re.M) or re.search("CMake Error", log)
    return " ".join(log[found.start() if found else 0 :].split())[:400]


class CMakeBuild(build_ext):
    """Builds with CUDA where that works, else without, and leaves the reason in _C.cuda_status."""

    def build_extension(self, ext: Extension) -> None:
        compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            sys.exit(f"rtk: no C++ compiler ({', '.join(compilers)}): install one, or set CXX")
        wanted = os.environ.get("RTK_CUDA", "1") != "0"
        missing = self.build_with_cuda(ext) if wanted else "left out by RTK_CUDA=0"
        if missing is None:
            return
        if os.environ.get("RTK_REQUIRE_CUDA", "0") == "1":
            sys.exit(f"rtk: RTK_REQUIRE_CUDA=1, but the CUDA kernels are not built: {missing}")
        if wanted:
            retry = "put nvcc on PATH or set CUDA_HOME, then RTK_REQUIRE_CUDA=1 pip install -v -e ."
            message = f"rtk is built WITHOUT its CUDA kernels: {missing}\nTo retry: {retry}"
            print(f"\n{'=' * 80}\n{message}\n{'=' * 80}\n", file=sys.stderr, flush=True)
        if error := self.cmake(ext, f"-DRTK_CUDA_STATUS={missing}"):
            sys.exit(f"rtk: the C++ build failed: {error}")

    def build_with_cuda(self, ext: Extension) -> str | None:
        """Builds with CUDA and returns None, or why there is none."""
        nvcc = find_nvcc()
        if nvcc is None:
            return "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        options = {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": cuda_architectures()}
        error = self.cmake(ext, "-DRTK_CUDA=ON", *(f"-D{k}={v}" for k, v in options.items()))
        return error and f"{' for '.join(options.values())} failed: {error}"

    def cmake(self, ext: Extension, *options: str) -> str | None:
        """Configures and builds in a folder of its own; returns what the first error says, or None.

        The folder is always fresh: CMake's cache would remember the cmake and ninja of pip's
        isolated environment, which is gone by the next build.
        """
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None or ninja is None:
            sys.exit("rtk: cmake or ninja is missing: pip install cmake ninja pybind11")
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "RTK_OUTPUT": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
        }
        with tempfile.TemporaryDirectory(prefix="rtk-build-") as folder:
            configure = [cmake, "-S", ROOT.resolve() / "csrc", "-B", folder, "-G", "Ninja"]
            configure += [f"-D{name}={value}" for name, value in settings.items()] + list(options)
            for command in (configure, [cmake, "--build", folder]):
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                print(done.stdout, file=sys.stderr, flush=True)
                if done.returncode:
                    return first_error(done.stdout)
        return None


sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
setup(ext_modules=[Extension("rtk._C", sorted(sources))], cmdclass={"build_ext": CMakeBuild})
