"""Imports point one way, and `import rtk` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rtk

ROOT = Path(rtk.__file__).parent

# The road, top to bottom. A file may import its own part and those below it. The leaves may be
# imported by all and import only leaves (rtk.identity reads rtk.config and rtk.runs).
LEAVES = {
    "_version",
    "errors",
    "registry",
    "runs",
    "granularity",
    "config",
    "identity",
    "artifact",
    "cuda_graph",
    "distributed",
}
STAGES = {"pretrain", "draw", "transfer", "evaluate", "report", "convert"}
ALLOWED = {
    "__main__": {"cli"},
    "cli": {"recipes", "report", "doctor", "layers_report", "advise", "data", "export"},
    "advise": {"evaluate", "train"},
    "doctor": {"ops"},
    "export": {"train", "models", "nn", "ticket", "ops"},
    "convert": {"train", "models", "nn", "ticket", "ops"},
    "layers_report": {"train", "models", "nn", "ticket", "ops"},
    "recipes": STAGES | {"advise", "data", "ops"},
    "pretrain": {"train", "data", "models", "attacks", "nn", "ticket", "ops"},
    "draw": {"train", "data", "models", "attacks", "nn", "ticket", "ops"},
    "transfer": {"train", "data", "models", "attacks", "nn", "ticket", "ops"},
    "evaluate": {"train", "data", "models", "attacks", "nn", "ticket", "ops"},
    "report": set(),
    "train": {"data", "models", "attacks", "nn", "ticket", "ops"},
    "attacks": {"models", "nn", "ops"},
    "data": set(),
    "models": {"nn", "ops"},
    "ticket": {"nn", "ops"},
    "nn": {"ops"},
    "ops": {"kernels", "_C"},
    **{leaf: set() for leaf in LEAVES},
}


def files():
    """Return all files but rtk/__init__.py, the facade over everything."""
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules_imported(node, package):
    """Yield the dotted names that an import statement may stand for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        yield base
        if base == "rtk":
            yield from (f"rtk.{alias.name}" for alias in node.names)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(tree):
    """Walk all that runs; what stands under `if TYPE_CHECKING:` does not."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if is_type_checking(node):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imported_parts(path):
    """Return the parts of rtk that a file imports, at its top or inside a function."""
    package = ("rtk", *path.relative_to(ROOT).parent.parts)
    names = set()
    for node in walk(ast.parse(path.read_text())):
        for name in modules_imported(node, package):
            if name.startswith("rtk."):
                names.add(name.split(".")[1])
        if (  # importlib.import_module("rtk._C")
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            names |= {node.args[0].value.split(".")[1]}
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_the_road(path):
    part = part_of(path)
    assert part in ALLOWED, f"where does rtk.{part} stand on the road? add it here"
    upward = imported_parts(path) - ALLOWED[part] - LEAVES - {part}
    assert not upward, f"{path} imports {sorted(upward)}; rtk.{part} is below or beside that"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import rtk.train.loop", {"train"}),
        ("from rtk import draw, ops", {"draw", "ops"}),
        ("from rtk.transfer.linear import x", {"transfer"}),
        ("from ..models import x", {"models"}),
        ("from . import x", {"data"}),
        ("def f():\n    from rtk import cli", {"cli"}),
        ("if TYPE_CHECKING:\n    from rtk import cli", set()),
        ("importlib.import_module('rtk._C')", {"_C"}),
        ("import torch", set()),
    ],
)
def test_the_reader_of_imports_finds_them(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "data" / "file.py"
    path.parent.mkdir()
    path.write_text(text)
    assert imported_parts(path) == expected


LIGHT = """
import sys
import torch, yaml, safetensors.torch
before = set(sys.modules)

class NoCompiledModule:
    def find_spec(self, name, path=None, target=None):
        if name == "rtk._C":
            raise ImportError("hidden")

sys.meta_path.insert(0, NoCompiledModule())
import rtk
print(*sorted(set(sys.modules) - before))
print(rtk.ops._compiled._C is None, torch.cuda.is_initialized(), dir(rtk) == sorted(rtk.__all__))
print(*sorted(name for name in sys.modules if name.startswith("rtk.")), end=" ")
"""


def test_import_rtk_is_light_and_needs_no_compiled_module():
    """Counted in modules, not in seconds: what torch itself does not bring."""
    output = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    new = output[0].split()
    assert output[1] == "True False True"
    roots = {name.split(".")[0] for name in new}
    heavy = {
        "torchvision",
        "sklearn",
        "matplotlib",
        "jsonargparse",
        "scipy",
        "tqdm",
        "jinja2",
        "PIL",
    }
    assert not roots & heavy
    foreign = [name for name in new if name.split(".")[0] not in ("rtk", "torch")]
    assert len(foreign) < 20, foreign
    parts = {name.split(".")[1] for name in output[2].split()}
    assert parts <= LEAVES | {"ops", "nn", "ticket", "kernels"}


ALONE = """
import importlib, os, sys
import torch, torchvision  # what costs time and is not ours
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
print("done")
"""


def test_every_part_imports_alone():
    """Each in its own process, so that no other part has resolved a cycle for it.

    A file inside a part needs no look of its own: its part is imported before it.
    """
    names = ["rtk", *sorted({f"rtk.{part_of(path)}" for path in files()} - {"rtk.__main__"})]
    output = subprocess.run([sys.executable, "-c", ALONE, *names], capture_output=True, text=True)
    assert output.stdout == "done\n", output.stdout + output.stderr


def test_public_names_are_there():
    for name in set(rtk.__all__) - {"kernels"}:  # kernels/ is mapped in when rtk is installed
        assert getattr(rtk, name) is not None
    with pytest.raises(AttributeError, match="module 'rtk' has no attribute 'drwa'"):
        rtk.drwa  # noqa: B018
