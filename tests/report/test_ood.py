"""Areas under ROC curves go the way of accuracies: table, plots, findings, results.csv."""

import csv
import io

import pytest

from rtk.errors import RtkError
from rtk.report import Study, print_table, read_results, write_report
from rtk.report.plots import accuracy_figure, file_name, overview_figure
from rtk.report.results import to_csv
from rtk.report.summary import findings

ROBUST = {"pretrain": "pgd-linf-0.1", "robust": True}
AREA = "ood_auc.digits[0-1]"

TABLE = """\
target digits[5-9], transfer finetune

                          OoD AUC digits[0-1] %                 OoD AUC noise %
ticket       sparsity  n  natural    pgd-linf-0.1  difference   natural  pgd-linf-0.1  difference
omp element      80 %  2  85.0 ±7.1  90.0 ±7.1     +5.0 ±0.0    -        50.0          -

n: number of seeds.
±: sample standard deviation over the seeds.
difference: minus natural, in points, paired by seed; its ±: standard error over the pairs.
PGD: pgd-linf-0.0314, 20 steps.
OoD AUC: ROC-AUC of the confidence, test images against those of that set.
"""


@pytest.fixture
def folder(write, tmp_path):
    for seed, area in enumerate([0.8, 0.9]):
        write(f"n{seed}", seed=seed, ood_auc={"digits[0-1]": area})
        others = {"noise": 0.5} if seed else {}
        write(f"r{seed}", seed=seed, ood_auc={"digits[0-1]": area + 0.05, **others}, **ROBUST)
    return tmp_path


def test_the_table_has_a_column_for_each_set(folder):
    lines = print_table(folder).splitlines()
    panel = next(i for i, line in enumerate(lines) if "OoD" in line)
    found = "\n".join(lines[panel - 1 : panel + 3])
    assert found.split() == "\n".join(TABLE.splitlines()[1:5]).split()
    assert lines[-5:] == TABLE.splitlines()[-5:]


def test_results_without_areas_have_no_such_columns(write, tmp_path):
    write("a")
    assert "OoD" not in print_table(tmp_path)
    assert Study(read_results(tmp_path)).metrics == ["top1", "pgd_top1"]


def test_the_plots_show_it(folder):
    study = Study(read_results(folder))
    assert study.metrics == ["top1", "pgd_top1", AREA, "ood_auc.noise"]
    (panel,) = study.panels
    (axes,) = accuracy_figure(study, panel, AREA).axes
    assert axes.get_ylabel() == "OoD AUC digits[0-1] (%)"
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [pytest.approx(85)],
        [pytest.approx(90)],
    ]
    figure = overview_figure(study)
    assert len(figure.axes) == 4
    assert "PGD: pgd-linf-0.0314" in figure.legends[0].get_title().get_text().replace("\n", " ")


def test_the_page_and_its_files(folder):
    text = write_report(folder).read_text()
    assert "OoD AUC digits[0-1]" in text
    study = Study(read_results(folder))
    name = file_name(study.panels[0], AREA)
    assert name.endswith("_ood_auc.digits-0-1.png") and (folder / "plots" / name).exists()


def test_the_findings_count_it(folder):
    (sentence,) = [s for s in findings(Study(read_results(folder))) if "OoD" in s]
    assert sentence.startswith("OoD AUC digits[0-1]: pgd-linf-0.1 is ahead of natural in 1 of 1")
    assert "the difference is +5.0 points" in sentence


def test_results_csv_has_it_too(folder):
    rows = list(csv.DictReader(io.StringIO(to_csv(read_results(folder)))))
    assert rows[0]["ood_auc"] == '{"digits[0-1]": 0.8}'


@pytest.mark.parametrize(
    ("areas", "message"),
    [
        ({"svhn": 93.0}, r"ood_auc\.svhn: expected a fraction in \[0, 1\], got 93\.0"),
        ({"svhn": float("nan")}, "expected a fraction"),
        ({"svhn": True}, "expected a fraction"),
        ([0.5], "ood_auc: expected areas by set"),
        (None, "ood_auc: expected areas by set"),
    ],
)
def test_a_bad_area_is_named(write, tmp_path, areas, message):
    write("bad", ood_auc=areas)
    with pytest.raises(RtkError, match=rf"bad/result\.json: .*{message}"):
        read_results(tmp_path)
