import pytest

from rtk.report import Study, print_table, read_results
from rtk.report.table import build_table

DENSE = {"scheme": "dense", "granularity": None, "sparsity": 0.0}
ROBUST = {"pretrain": "pgd-linf-0.1", "robust": True}

TABLE = """\
target digits[5-9], transfer finetune

                          top-1 %                              PGD top-1 %
ticket       sparsity  n  natural    pgd-linf-0.1  difference  natural    pgd-linf-0.1  difference
dense             0 %  2  96.0 ±1.4  97.5 ±0.7     +1.5 ±1.5   20.0 ±0.0  50.0 ±0.0     +30.0 ±0.0
omp element      80 %  2  91.0 ±1.4  94.0 ±1.4     +3.0 ±0.0   10.0 ±0.0  45.0 ±7.1     +35.0 ±5.0

n: number of seeds.
±: sample standard deviation over the seeds.
difference: minus natural, in points, paired by seed; its ±: standard error over the pairs.
PGD: pgd-linf-0.0314, 20 steps.
"""

ONE_SEED = """\
target digits[5-9], transfer finetune

                          top-1 %
ticket       sparsity  n  natural  pgd-linf-0.1  difference
omp element      80 %  1  90.0     89.0          -1.0

n: number of seeds.
difference: minus natural, in points, paired by seed.
One seed: no spread can be given.
"""


def test_text_exactly(study_folder):
    assert print_table(study_folder) == TABLE


def test_one_seed_has_no_spread(write, tmp_path):
    write("n", pgd_top1=None, attack=None)
    write("r", pgd_top1=None, attack=None, top1=0.89, **ROBUST)
    assert print_table(tmp_path) == ONE_SEED


def test_a_difference_that_rounds_to_zero_has_no_sign(write, tmp_path):
    write("n", top1=0.9002)
    write("r", top1=0.9, **ROBUST)
    table = build_table(Study(read_results(tmp_path)))
    assert [cell.number for cell in table.blocks[0].rows[0].cells[:3]] == ["90.0", "90.0", "0.0"]


def test_unequal_seeds_are_shown_and_pairs_are_common_seeds(write, tmp_path):
    for seed, top1 in enumerate([0.5, 0.6, 0.9]):
        write(f"n{seed}", seed=seed, top1=top1)
    for seed, top1 in enumerate([0.6, 0.8]):
        write(f"r{seed}", seed=seed, top1=top1, **ROBUST)
    row = build_table(Study(read_results(tmp_path))).blocks[0].rows[0]
    assert row.seeds == "3/2"
    # pairs +10 and +20: mean 15, std 7.07, error 5
    assert (row.cells[2].number, row.cells[2].spread) == ("+15.0", "5.0")
    assert "as natural/pgd-linf-0.1 where they differ" in print_table(tmp_path)


def test_pretraining_seeds_are_pairs_too(write, tmp_path):
    for seed in range(2):
        write(f"n{seed}", pretrain_seed=seed, top1=0.5 + 0.1 * seed)
        write(f"r{seed}", pretrain_seed=seed, top1=0.6 + 0.1 * seed, **ROBUST)
    row = build_table(Study(read_results(tmp_path))).blocks[0].rows[0]
    assert (row.seeds, row.cells[2].number, row.cells[2].spread) == ("2", "+10.0", "0.0")


@pytest.mark.parametrize(("name", "other"), [("arch", "resnet50"), ("source", "cifar10")])
def test_what_must_not_be_averaged_is_kept_apart(write, tmp_path, name, other):
    write("a", top1=0.5)
    write("b", top1=0.7, **{name: other})
    table = build_table(Study(read_results(tmp_path)))
    assert sorted(block.rows[0].cells[0].number for block in table.blocks) == ["50.0", "70.0"]
    assert any(f"{name} {other}" in block.title for block in table.blocks)


def test_other_test_images_are_another_task(write, tmp_path):
    write("a", evaluated_on="digits[5-9]", top1=0.5)
    write("b", evaluated_on="shifted", top1=0.7)
    table = build_table(Study(read_results(tmp_path)))
    assert [(block.title, block.rows[0].cells[0].number) for block in table.blocks] == [
        ("target digits[5-9], transfer finetune", "50.0"),
        ("target digits[5-9] tested on shifted, transfer finetune", "70.0"),
    ]


def test_wide_tables_are_split_and_fit(write, tmp_path):
    long = "gaussian-smoothing-with-a-long-name-0.25"
    for seed in range(2):
        write(f"n{seed}", seed=seed)
        for name in ("pgd-l2-0.5", "pgd-l2-1", "pgd-l2-3", long):
            write(f"{name}{seed}", seed=seed, pretrain=name, robust=True, top1=0.5 + seed / 10)
    text = print_table(tmp_path)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("difference  ") + text.count("difference\n") == 8
    assert f"variant 2: {long}." in text
    assert text.count("omp element      80 %  2") > 2


def test_without_a_natural_model_there_is_no_difference(write, tmp_path):
    write("r", **ROBUST)
    text = print_table(tmp_path)
    assert "difference" not in text
    assert "90.0" in text


def test_untransferred_and_dense_models_are_rows(write, tmp_path):
    write("p", target="digits[0-4]", transfer=None, **DENSE)
    write("d", **DENSE)
    table = build_table(Study(read_results(tmp_path)))
    assert [block.title for block in table.blocks] == [
        "target digits[0-4], the pretrained model itself",
        "target digits[5-9], transfer finetune",
    ]
    assert table.blocks[1].rows[0].ticket == "dense"
