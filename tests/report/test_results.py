import csv
import io
import json

import pytest

from rtk.errors import RtkError
from rtk.report import write_report
from rtk.report.results import COLUMNS, read_results, to_csv
from rtk.report.study import Study

HEADER = (
    "run,pretrain,robust,pretrain_seed,source,arch,scheme,granularity,sparsity,actual_sparsity,"
    "target,transfer,seed,evaluated_on,attack,top1,mean_per_class,pgd_top1,images,config_hash,rtk,"
    "checkpoint_sha256"
)


def test_csv_holds_every_value_and_the_run(write, tmp_path):
    write("transfer/b", evaluated_on="digits[5-9]")
    write("a", transfer=None, target="digits[0-4]", scheme="dense", granularity=None, sparsity=0.0)
    text = to_csv(read_results(tmp_path))
    sha = "ab" * 32
    assert text == (
        f"{HEADER}\n"
        "a,natural,false,0,digits[0-4],resnet18,dense,,0.0,0.80001,digits[0-4],,0,,"
        f'"pgd-linf-0.0314, 20 steps",0.9,0.89,0.1,200,0123456789ab,0.1.0,{sha}\n'
        "transfer/b,natural,false,0,digits[0-4],resnet18,omp,element,0.8,0.80001,digits[5-9],"
        f'finetune,0,digits[5-9],"pgd-linf-0.0314, 20 steps",0.9,0.89,0.1,200,0123456789ab,0.1.0,'
        f"{sha}\n"
    )


def test_csv_keeps_unknown_columns_behind_the_known(write, tmp_path):
    write("a", roc_auc=0.75, aaa={"b": [1, None]})
    rows = list(csv.DictReader(io.StringIO(to_csv(read_results(tmp_path)))))
    assert [*rows[0]] == [*COLUMNS, "aaa", "roc_auc"]
    assert rows[0]["roc_auc"] == "0.75"
    assert rows[0]["aaa"] == '{"b": [1, null]}'


def test_rows_are_in_order_of_contents(write, tmp_path):
    write("1", sparsity=0.95)
    write("2", sparsity=0.5, pretrain="pgd-linf-0.1", robust=True)
    write("3", sparsity=0.5, seed=10)
    write("4", sparsity=0.5, seed=2)
    write("5", granularity="row", sparsity=0.1)
    write("6", scheme="dense", granularity=None, sparsity=0.0)
    write("7", transfer="linear_bn_update", sparsity=0.1)
    write("8", target="cifar10")
    assert [result.run for result in read_results(tmp_path)] == list("86432157")


def test_granularities_are_in_order_from_fine_to_coarse(write, tmp_path):
    names = ["element", "channel", "block-8", "block-16x32", "block-64", "2:4", "of another tool"]
    for i, name in enumerate(reversed(names)):
        write(str(i), granularity=name)
    results = read_results(tmp_path)
    assert [result.granularity for result in results] == names
    study = Study(results)
    assert study.distinct("granularity") == names
    assert [panel.granularity for panel in study.panels] == names


def test_same_inputs_give_the_same_bytes(study_folder, tmp_path):
    first = write_report(study_folder, tmp_path / "one")
    second = write_report(study_folder, tmp_path / "two")
    for name in ("results.csv", "report.html", "plots/overview.png"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


def test_a_result_with_required_keys_only(tmp_path):
    (tmp_path / "result.json").write_text('{"pretrain": "pgd-l2-1", "target": "t", "top1": 1}')
    (result,) = read_results(tmp_path)
    assert result.run == "."
    assert result.robust
    assert (result.scheme, result.granularity, result.sparsity) == ("dense", None, 0.0)
    assert (result.top1, result.pgd_top1, result.seed) == (1, None, None)
    page = write_report(tmp_path).read_text()
    assert "100.00" in page


def test_no_folder(tmp_path):
    with pytest.raises(RtkError, match="nowhere is no folder"):
        read_results(tmp_path / "nowhere")


def test_no_results_names_the_stage(tmp_path):
    with pytest.raises(RtkError, match="run `rtk evaluate`"):
        read_results(tmp_path)


def test_broken_json_is_named(write, tmp_path):
    write("good")
    write("broken").write_text('{"top1": 0.')
    with pytest.raises(RtkError, match=r"broken/result\.json"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top1", 93.1, "a fraction in"),
        ("top1", None, "a value"),
        ("top1", float("nan"), "a fraction in"),
        ("top1", True, "a fraction in"),
        ("pgd_top1", "0.4", "a fraction in"),
        ("sparsity", 1, "a sparsity below"),
        ("seed", -1, "a whole number"),
        ("seed", 0.5, "a whole number"),
        ("robust", "yes", "true or false"),
        ("target", 7, "a text"),
        ("pretrain", None, "a value"),
    ],
)
def test_a_bad_value_is_named(write, tmp_path, name, value, expected):
    write("bad", **{name: value})
    with pytest.raises(RtkError, match=rf"bad/result\.json: {name}: expected {expected}"):
        read_results(tmp_path)


def test_a_list_is_no_result(write, tmp_path):
    write("list").write_text(json.dumps([1]))
    with pytest.raises(RtkError, match=r"list/result\.json: expected a JSON object, got list"):
        read_results(tmp_path)


def test_unwritable_out(study_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RtkError, match="cannot write"):
        write_report(study_folder, tmp_path / "file")
