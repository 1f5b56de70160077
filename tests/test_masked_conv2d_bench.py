"""What bench/bench_masked_conv2d.py is made of: its shapes, masks and table, and the plot."""

import json

import masked_conv2d_sweep
import plot_masked_conv2d
import pytest
import torch
from masked_conv2d_layers import (
    Shape,
    assert_right,
    compacted,
    groups_kept,
    ours,
    random_mask,
    ready,
    shapes_of,
    times,
)
from masked_conv2d_table import Table

from rtk.granularity import Granularity


def test_every_convolution_of_the_resnets_is_there():
    small, large = shapes_of("resnet18", 32, 512), shapes_of("resnet50", 224, 128)
    assert (len(small), len(large)) == (20, 53)
    assert (len(set(small)), len(set(large))) == (11, 23)
    assert small[0] == Shape(512, 3, 64, 32, 3) and large[0] == Shape(128, 3, 64, 224, 7, 2)
    assert Shape(512, 512, 512, 4, 3) in small and Shape(128, 128, 128, 56, 3, 2) in large
    assert str(large[0]) == "7x7-3to64-224px-stride2"


@pytest.mark.parametrize("granularity", masked_conv2d_sweep.GRANULARITIES)
def test_a_mask_keeps_its_density_in_whole_groups(granularity):
    shape = Shape(1, 128, 192, 4, 3)
    density = 0.5 if granularity == "2:4" else 0.3
    mask = random_mask(shape, granularity, density, "cpu")
    assert mask.dtype == torch.bool
    assert Granularity.parse(granularity).holds(mask, shape.filters)
    kept, groups = groups_kept(shape, granularity, density)
    share = 0.5 if granularity == "2:4" else kept / groups
    assert mask.float().mean().item() == pytest.approx(share)
    assert share == pytest.approx(density, abs=0.02)
    assert random_mask(shape, granularity, 1e-9, "cpu").any()


def test_a_wrong_result_is_noticed():
    shape = Shape(2, 8, 8, 5, 3)
    mask = random_mask(shape, "element", 0.5, "cpu")
    model = ours(shape, mask, "cpu", count=2)
    assert_right(model, shape, mask, "cpu")
    with pytest.raises(AssertionError, match=r"forward: .* apart"):
        assert_right(model, shape, random_mask(shape, "element", 0.1, "cpu"), "cpu")


def test_peers_are_timed_each_way():
    shape = Shape(2, 8, 16, 5, 3)
    assert len(times(ready(shape, "cpu", count=2), shape, "cpu")) == 3
    mask = torch.zeros(16, 1, 1, 1, dtype=torch.bool)
    mask[:3] = True
    assert compacted(shape, mask, "cpu").layers[0].weight.shape == (8, 8, 3, 3)
    wide = Shape(2, 32, 16, 5, 3)
    assert compacted(wide, mask, "cpu").layers[0].weight.shape == (8, 32, 3, 3)
    assert compacted(wide, mask, "cpu", inner=True).layers[0].weight.shape == (8, 8, 3, 3)


def test_the_table_goes_on_and_keeps_failures(tmp_path, capsys):
    path = tmp_path / "table.json"
    first = Table(path, "what it is", "cpu")
    assert first.measure("a", lambda: {"ms": 1}) == {"ms": 1}
    assert first.measure("b", lambda: {"ms": 1 / 0}) is None
    with pytest.raises(AssertionError, match="failed: b"):
        first.assert_whole()
    assert "FAILED b" in capsys.readouterr().out

    def never():
        raise AssertionError("measured again")

    second = Table(path, "what it is", "cpu")
    assert second.measure("a", never) == {"ms": 1} and second.measure("b", never) is None
    assert json.loads(path.read_text())["failures"]["b"].startswith("ZeroDivisionError")
    other = Table(path, "something else", "cpu", seconds=1e-9)
    assert other.measure("a", never) is None and other.left == ["a"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    table = Table(tmp_path_factory.mktemp("sweep") / "table.json", masked_conv2d_sweep.WHAT, "cpu")
    masked_conv2d_sweep.sweep(table, "cpu", "tiny/3x3", (0.1, 0.5, 1.0))
    table.assert_whole()
    return json.loads(table.path.read_text())


def test_the_sweep_has_every_granularity_and_says_what_it_took_over(table):
    rows = [row for row in table["rows"].values() if "granularity" in row]
    assert len(rows) == 3 * 5 + 1
    assert all(len(row[which]) == 3 for row in rows for which in ("rtk", "ready", "masked"))
    of = {(row["granularity"], row["density"]): row["of"] for row in rows}
    assert of["element", 0.1] == of["element", 0.5] == of["element", 1.0] == 0.1
    assert [of["channel", d] for d in (0.1, 0.5, 1.0)] == [0.1, 0.5, 1.0]
    assert of["2:4", 0.5] == 0.5
    for which in ("compact", "inner"):
        assert all((which in row) == (row["granularity"] == "channel") for row in rows)


def test_the_plot_has_the_geometric_mean_of_the_shapes(table):
    def row(shape, density, kept, ready, rtk):
        return {
            "network": "n",
            "shape": shape,
            "granularity": "element",
            "density": density,
            "kept": kept,
            "ready": [ready] * 3,
            "rtk": [rtk] * 3,
        }

    rows = {
        "a": row("3x3-8to8-4px-stride1", 0.5, 0.5, 4.0, 1.0),
        "b": row("3x3-8to8-2px-stride1", 0.5, 0.5, 1.0, 1.0),
        "c": row("3x3-8to8-2px-stride1", 0.1, 0.5, 9.0, 1.0),  # too few groups for 10 %
        "d": row("3x3-3to8-2px-stride1", 0.5, 0.5, 9.0, 1.0),  # a stem
        "e": row("1x1-8to8-2px-stride1", 0.5, 0.5, 9.0, 1.0),
        "peer": {"times": [1.0, 1.0, 1.0]},
    }
    kept = plot_masked_conv2d.rows_of({"rows": rows})
    assert plot_masked_conv2d.classes(kept) == [("n", "3x3"), ("n", "1x1")]
    found = plot_masked_conv2d.speed_ups(kept, ("n", "3x3"), "element", "rtk", "ready", 0)
    assert found == {0.5: pytest.approx(2.0)}
    for way in plot_masked_conv2d.WAYS:
        figure = plot_masked_conv2d.draw(table, way)
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == [title for title, *_ in plot_masked_conv2d.PANELS]
