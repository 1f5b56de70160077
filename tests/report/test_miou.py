"""Segmentations have mean IoU in the place of accuracies."""

import csv
import io

import pytest

from rtk.errors import RtkError
from rtk.report import write_report
from rtk.report.results import read_results, to_csv
from rtk.report.study import Study
from rtk.report.summary import findings, warnings
from rtk.report.table import build_table

SEGMENTED = {"target": "voc2012", "transfer": "segment", "attack": None, "top1": None}
SEGMENTED |= {"mean_per_class": None, "pgd_top1": None}
ROBUST = {"pretrain": "pgd-linf-0.1", "robust": True}


@pytest.fixture
def segmented(write, tmp_path):
    for seed, (natural, robust) in enumerate([(0.5, 0.6), (0.52, 0.6)]):
        write(f"n{seed}", seed=seed, miou=natural, **SEGMENTED)
        write(f"r{seed}", seed=seed, miou=robust, **SEGMENTED, **ROBUST)
    return tmp_path


def test_table_and_sentences(segmented):
    study = Study(read_results(segmented))
    assert study.metrics == ["miou"]
    table = build_table(study)
    assert {column.metric for column in table.columns} == {"mean IoU %"}
    (block,) = table.blocks
    assert block.title == "target voc2012, transfer segment"
    (row,) = block.rows
    assert (row.seeds, [cell.number for cell in row.cells]) == ("2", ["51.0", "60.0", "+9.0"])
    first, *_ = findings(study)
    assert first.startswith("Mean IoU: pgd-linf-0.1 is ahead of natural in 1 of 1 setting")
    assert warnings(study) == []


def test_beside_a_classification_each_has_its_own(segmented, write):
    for run, extra in (("c-natural", {}), ("c-robust", ROBUST)):
        write(run, **extra)
    study = Study(read_results(segmented))
    assert study.metrics == ["top1", "pgd_top1", "miou"]
    by_target = {panel.target: study.panel_metrics(panel) for panel in study.panels}
    assert by_target == {"digits[5-9]": ["top1", "pgd_top1"], "voc2012": ["miou"]}
    assert not [text for text in warnings(study) if "lack" in text]  # nothing of either is missing
    page = write_report(segmented).read_text()
    assert "voc2012_segment_element_miou.png" in page
    assert "voc2012_segment_element_top1.png" not in page
    assert "60.00" in page


def test_csv_has_a_column(segmented):
    rows = list(csv.DictReader(io.StringIO(to_csv(read_results(segmented)))))
    assert sorted(row["miou"] for row in rows) == ["0.5", "0.52", "0.6", "0.6"]
    assert {row["top1"] for row in rows} == {""}


def test_a_bad_miou_is_named(write, tmp_path):
    write("bad", **SEGMENTED, miou=51.0)
    with pytest.raises(RtkError, match=r"bad/result\.json: miou: expected a fraction in"):
        read_results(tmp_path)
    write("bad", **SEGMENTED, miou=None)
    with pytest.raises(RtkError, match=r"top1: expected a value"):
        read_results(tmp_path)
