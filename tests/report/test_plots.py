import io
import math
import sys

import matplotlib.image
import numpy
import pytest
from matplotlib.collections import PolyCollection

from rtk.report import Study, read_results, write_report
from rtk.report.axes import sparsity_position
from rtk.report.plots import (
    Panel,
    accuracy_figure,
    describe,
    file_name,
    overview_figure,
    to_png,
)

DENSE = {"scheme": "dense", "granularity": None, "sparsity": 0.0}
ROBUST = {"pretrain": "pgd-linf-0.1", "robust": True}


def test_a_line_per_variant_through_the_means(study_folder):
    study = Study(read_results(study_folder))
    (panel,) = study.panels
    assert panel == Panel("digits[5-9]", "finetune", "element")
    (axes,) = accuracy_figure(study, panel, "top1").axes
    natural, robust = axes.lines
    numpy.testing.assert_allclose(natural.get_xdata(), [0, -math.log10(0.2)])
    numpy.testing.assert_allclose(natural.get_ydata(), [96, 91])
    numpy.testing.assert_allclose(robust.get_ydata(), [97.5, 94])
    bands = [band for band in axes.collections if isinstance(band, PolyCollection)]
    assert len(bands) == 2
    low, high = bands[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((91 - math.sqrt(2), 96 + math.sqrt(2)))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["80", "0"]
    assert axes.get_ylabel() == "top-1 accuracy (%)"


def test_high_sparsities_are_spread():
    where = [sparsity_position(sparsity) for sparsity in (0, 0.9, 0.99, 0.999)]
    assert where == pytest.approx([0, 1, 2, 3])


def test_schemes_share_the_dense_point(write, tmp_path):
    write("d", top1=0.99, **DENSE)
    write("o", top1=0.9)
    write("i", top1=0.8, scheme="imp")
    study = Study(read_results(tmp_path))
    (axes,) = accuracy_figure(study, study.panels[0], "top1").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[99, 90], [99, 80]]
    assert len({line.get_linestyle() for line in axes.lines}) == 2


def test_overview_has_a_panel_per_metric_and_column(write, tmp_path):
    for transfer in ("finetune", "linear_bn_update"):
        for granularity in ("element", "channel"):
            run = f"{transfer}-{granularity}"
            write(run, transfer=transfer, granularity=granularity)
            write(f"r-{run}", transfer=transfer, granularity=granularity, **ROBUST)
    study = Study(read_results(tmp_path))
    figure = overview_figure(study)
    assert [axes.get_title("left") for axes in figure.axes[:4]] == [
        "finetune, element",
        "finetune, channel",
        "linear_bn_update, element",
        "linear_bn_update, channel",
    ]
    assert len(figure.axes) == 8
    assert all(len(axes.lines) == 2 for axes in figure.axes)


def test_files_are_pngs_of_the_size_meant(study_folder):
    write_report(study_folder)
    names = sorted(path.name for path in (study_folder / "plots").iterdir())
    assert names == [
        "digits-5-9_finetune_element_pgd_top1.png",
        "digits-5-9_finetune_element_top1.png",
        "overview.png",
    ]
    image = matplotlib.image.imread(study_folder / "plots" / names[1])
    assert image.shape[:2] == (600, 900)  # 4 by 6 inches at 150 dpi
    assert image[..., :3].std() > 0.05


def test_no_adversarial_accuracy_no_plot_of_it(write, tmp_path):
    write("a", pgd_top1=None, attack=None)
    write_report(tmp_path)
    assert not list((tmp_path / "plots").glob("*pgd*"))


def test_pretrained_models_are_no_curve(write, tmp_path):
    write("p", transfer=None, target="digits[0-4]", **DENSE)
    write("t")
    assert [panel.target for panel in Study(read_results(tmp_path)).panels] == ["digits[5-9]"]


def test_a_formula_in_a_name_is_a_name(write, tmp_path):
    write("a", target=r"$\frac{_x")
    study = Study(read_results(tmp_path))
    png = to_png(accuracy_figure(study, study.panels[0], "top1"))
    assert matplotlib.image.imread(io.BytesIO(png)).shape[1] == 900


def test_file_names_stay_in_the_folder_and_apart():
    panels = [
        Panel(target, "finetune", None) for target in ("../a", "--/a", "a", "npz:" + 200 * "x")
    ]
    names = [file_name(panel, "top1") for panel in panels]
    assert len(set(names)) == 4
    assert names[2] == "a_finetune_dense_top1.png"
    assert all("/" not in name and not name.startswith(".") and len(name) < 120 for name in names)


def test_alternative_text_has_the_numbers(study_folder):
    study = Study(read_results(study_folder))
    assert describe(study, study.panels[0], "top1") == (
        "top-1 accuracy (%) against sparsity, digits[5-9], finetune, element. "
        "natural (omp): 96.0 % at 0 % sparsity, 91.0 % at 80 % sparsity; "
        "pgd-linf-0.1 (omp): 97.5 % at 0 % sparsity, 94.0 % at 80 % sparsity."
    )


def test_pyplot_is_left_alone(study_folder):
    had_pyplot = "matplotlib.pyplot" in sys.modules
    write_report(study_folder)
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
