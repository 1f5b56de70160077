"""The tutorial's code runs as it stands, and does what the page says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import rtk

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, one_cpu_thread):
    """Every python block of the page, one after the other, in an empty folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), one_cpu_thread():
        patch.chdir(folder)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    return folder, names


def test_the_ticket_is_the_one_that_was_saved(ran):
    folder, names = ran
    saved = rtk.Ticket.load(folder / "ticket.safetensors")
    assert (saved.granularity, round(saved.sparsity, 3)) == ("kernel", 0.8)
    # The last digit depends on how a machine's CPU rounds in the training before.
    assert str(names["ticket"])[:-3] in PAGE.read_text(), "what the page shows as printed"


def test_training_keeps_the_ticket_and_learns_the_task(ran):
    _, names = ran
    after = rtk.Ticket.from_model(names["model"])
    for layer, mask in names["ticket"].masks.items():
        assert torch.equal(after.masks[layer], mask)
        weight = names["model"].get_submodule(layer).weight
        assert not weight[~mask.expand_as(weight)].any()
    assert names["before"] < 0.5 and names["after"] > 0.85


def test_what_is_taken_elsewhere_is_plain_and_the_same(ran):
    folder, names = ran
    assert not any(type(m).__module__.startswith("rtk") for m in names["plain"].modules())
    images = names["images"]
    with torch.no_grad():
        expected = names["model"](images)
        program = torch.export.load(folder / "plain.pt2").module()
        for count in (len(images), 3):
            for network in (names["plain"], program):
                torch.testing.assert_close(network(images[:count]), expected[:count])
    state = torch.load(folder / "plain.pt", weights_only=True)
    assert {name for name in state if "mask" in name} == set()
    assert sum(isinstance(m, nn.Conv2d) for m in names["plain"].modules()) == 15
