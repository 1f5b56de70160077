import dataclasses
import shutil

import pytest
import torch

from rtk import Ticket, __version__, draw
from rtk.config import DrawConfig
from rtk.draw import omp
from rtk.errors import RtkError
from rtk.identity import config_hash, to_dict
from rtk.train import Checkpoint, save_checkpoint


@pytest.fixture
def config(tmp_path, pretrained):
    return DrawConfig(
        out=str(tmp_path / "ticket"), checkpoint=str(pretrained), sparsity=0.7, granularity="row"
    )


def test_the_ticket_is_omps_and_tells_where_it_comes_from(config, pretrained):
    path = draw.run(config)
    ticket = Ticket.load(path)
    checkpoint = Checkpoint.load(pretrained)
    expected = omp(checkpoint.build_model(), 0.7, "row")
    assert ticket.masks.keys() == expected.masks.keys()
    assert all(torch.equal(ticket.masks[n], mask) for n, mask in expected.masks.items())
    assert ticket.shapes == expected.shapes
    meta = ticket.meta
    assert meta["scheme"] == "omp" and meta["sparsity"] == 0.7
    assert meta["granularity"] == "row" and meta["scope"] == "global"
    assert meta["include_first"] is False
    assert meta["model"] == checkpoint.spec.to_dict()
    assert meta["source_sha256"] == checkpoint.sha256
    assert meta["config"] == to_dict(config)
    assert meta["config_hash"] == config_hash(config)
    assert meta["rtk"] == __version__
    assert meta["lineage"] == {
        "scheme": "omp",
        "granularity": "row",
        "sparsity": 0.7,
        "actual_sparsity": ticket.sparsity,
    }


@pytest.mark.parametrize(
    ("granularity", "sparsity", "name", "expected"),
    [
        ("block", 0.9, "block-64", 0.9),
        ("block-4x8", 0.6, "block-4x8", 0.6),
        ("2:4", None, "2:4", 0.5),
    ],
)
def test_granularities_that_shapes_do_not_tell(config, granularity, sparsity, name, expected):
    config = dataclasses.replace(config, granularity=granularity, sparsity=sparsity)
    ticket = Ticket.load(draw.run(config))
    assert ticket.granularity == ticket.meta["config"]["granularity"] == name
    assert ticket.meta["sparsity"] == ticket.meta["config"]["sparsity"] == expected
    lineage = ticket.meta["lineage"]
    assert (lineage["granularity"], lineage["sparsity"]) == (name, expected)
    assert lineage["actual_sparsity"] == ticket.sparsity


def test_a_ticket_that_is_there_is_left_as_it_is(config):
    path = draw.run(config)
    before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
    assert draw.run(config) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_the_same_settings_give_the_same_masks_elsewhere(config, tmp_path):
    first = draw.run(config)
    second = draw.run(dataclasses.replace(config, out=str(tmp_path / "again")))
    one, two = Ticket.load(first), Ticket.load(second)
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)


def test_no_resume_draws_anew(config):
    path = draw.run(config)
    written = path.stat().st_mtime_ns
    draw.run(dataclasses.replace(config, resume=False))
    assert path.stat().st_mtime_ns > written


def test_another_source_checkpoint_means_another_ticket(config, tmp_path, pretrained):
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    config = dataclasses.replace(config, checkpoint=str(source))
    path = draw.run(config)
    checkpoint = Checkpoint.load(source)
    model = checkpoint.build_model()
    with torch.no_grad():
        model.layer1[0].conv1.weight.zero_()
    meta = {key: checkpoint.meta[key] for key in ("progress", "config", "lineage")}
    sha256 = save_checkpoint(source / "checkpoint.safetensors", model, None, meta)
    draw.run(config)
    ticket = Ticket.load(path)
    assert ticket.meta["source_sha256"] == sha256
    assert not ticket.masks["layer1.0.conv1"].any()


def test_a_ticket_of_other_settings_is_not_taken_for_ours(config):
    """As after a --no_resume that was killed between config.yaml and the ticket."""
    old = draw.run(config)
    stale = old.read_bytes()
    other = dataclasses.replace(config, sparsity=0.2)
    draw.run(dataclasses.replace(other, resume=False))
    old.write_bytes(stale)
    draw.run(other)
    assert Ticket.load(old).meta["sparsity"] == 0.2


def test_other_settings_in_the_same_folder_are_refused(config):
    draw.run(config)
    with pytest.raises(RtkError, match=r"sparsity is 0\.7 there and 0\.2 here"):
        draw.run(dataclasses.replace(config, sparsity=0.2))


def test_a_damaged_ticket_in_the_folder_is_an_error(config):
    path = draw.run(config)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RtkError, match=r"damaged.*SHA-256"):
        draw.run(config)
    draw.run(dataclasses.replace(config, resume=False))
    assert Ticket.load(path).meta["sparsity"] == 0.7


def test_an_unfinished_checkpoint_is_refused(config, tmp_path, pretrained):
    checkpoint = Checkpoint.load(pretrained)
    progress = {"epoch": 3, "step": 1, "loss_sum": 0.0, "finished": False}
    source = tmp_path / "checkpoint.safetensors"
    save_checkpoint(source, checkpoint.build_model(), None, {"progress": progress})
    config = dataclasses.replace(config, checkpoint=str(source))
    with pytest.raises(RtkError, match="stopped at epoch 3; give the same command again"):
        draw.run(config)
    assert not (tmp_path / "ticket").exists()


def test_an_unknown_scheme_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(RtkError, match=r"unknown scheme 'omb'.*did you mean 'omp'"):
        draw.run(dataclasses.replace(config, scheme="omb"))
    assert not (tmp_path / "ticket").exists()
