"""Ranks of DistributedDataParallel train as one process with the whole batch."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "ddp_rank.py"
ITERATIONS = 3


@pytest.fixture(autouse=True)
def _one_cpu_thread():
    """Take the place of the folder's fixture, which hides the GPU."""


def ranks(folder, backend, count):
    """Return what each of `count` processes found."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(folder), backend, str(rank), str(count)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def assert_as_one_process(found, tolerance):
    script = runpy.run_path(str(SCRIPT))
    for name in ("natural", "pgd"):
        alone = script["run"](name, "cpu", graph=False)
        losses = torch.stack([of_rank[name]["losses"] for of_rank in found]).mean(0)
        torch.testing.assert_close(losses, alone["losses"], rtol=tolerance, atol=tolerance)
        assert alone["losses"][-1] < alone["losses"][0]
        for of_rank in found:
            for key, weight in of_rank[name]["weights"].items():
                wanted = alone["weights"][key]
                torch.testing.assert_close(weight, wanted, rtol=tolerance, atol=tolerance)
            assert of_rank[name]["wrapped"] == script["STEPS"]  # the attack goes past the wrapper
    assert found[0]["alone"] == 6


def test_two_ranks_do_what_one_process_does(tmp_path):
    found = ranks(tmp_path, "gloo", 2)
    assert_as_one_process(found, 1e-6)
    for of_rank in found:
        natural, pgd = of_rank["natural"], of_rank["pgd"]
        assert natural["forwards"] == 7
        assert pgd["forwards"] == 7 * (1 + ITERATIONS) + 1  # one looks at the labels
        assert not natural["warnings"] and not pgd["warnings"]  # there are no graphs to miss


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2])
def test_on_gpus_the_attack_alone_is_captured(tmp_path, count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    found = ranks(tmp_path, "nccl", count)
    assert_as_one_process(found, 1e-4)
    for of_rank in found:
        natural, pgd = of_rank["natural"], of_rank["pgd"]
        assert pgd["captured"]
        (told,) = natural["warnings"]
        assert told.endswith("DistributedDataParallel, whose communication is not captured")
        (told,) = pgd["warnings"]
        assert told.endswith("not captured; only the attack has one")
