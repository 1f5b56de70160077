import base64
from html.parser import HTMLParser

import pytest

from rtk.report import Study, read_results, write_report
from rtk.report.summary import facts, findings, warnings

DENSE = {"scheme": "dense", "granularity": None, "sparsity": 0.0}
ROBUST = {"pretrain": "pgd-linf-0.1", "robust": True}


class Page(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_needs_nothing_else(study_folder):
    path = write_report(study_folder, note="small, for a first look", title="A title")
    assert path == study_folder / "report.html"
    text = path.read_text()
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert not page.all("script")
    assert not page.all("iframe")
    sources = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert len(sources) == 4
    assert all(source.startswith("data:") for source in sources)
    files = [study_folder / "plots" / "overview.png", *sorted(study_folder.glob("plots/dig*"))]
    embedded = [base64.b64decode(image["src"].split(",")[1]) for image in page.all("img")]
    assert sorted(embedded) == sorted(file.read_bytes() for file in files)
    assert "A title" in page.texts
    assert "small, for a first look" in page.texts


def test_page_is_accessible(study_folder):
    page = Page(write_report(study_folder).read_text())
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert page.all("th")
    assert all("scope" in head for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_page_shows_the_table_and_every_run(study_folder):
    page = Page(write_report(study_folder).read_text())
    text = " ".join(" ".join(page.texts).split())
    assert "+3.0 ± 0.0" in text
    assert all(f"r{seed}-{kind}" in text for seed in range(2) for kind in ("dense", "omp"))
    assert "80.001 %" in text


def test_names_are_escaped(write, tmp_path):
    evil = "<script>alert('x')</script>"
    run = "<img src=x onerror=alert(1)>"
    write(run, target=evil, pretrain='"><b>', source=evil, transfer=evil, rtk=evil)
    text = write_report(tmp_path, note=evil, title=evil).read_text()
    page = Page(text)
    assert not page.all("script")
    assert not page.all("b")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert run in page.texts
    assert "&lt;script&gt;" in text


def test_no_claim_of_smallness_of_its_own(study_folder):
    assert "first look" not in write_report(study_folder).read_text()


def test_findings_by_hand(study_folder):
    # differences +1.5 +- 1.5 (within two errors) and +3 +- 0; +30 +- 0 and +35 +- 5
    top1, pgd, caution = findings(Study(read_results(study_folder)))
    assert top1 == (
        "Top-1: pgd-linf-0.1 is ahead of natural in 2 of 2 settings and behind in 0; the "
        "difference ranges from +1.5 to +3.0 points. It exceeds twice its standard error in 1 of "
        "2 (1 ahead, 0 behind)."
    )
    assert pgd == (
        "PGD top-1: pgd-linf-0.1 is ahead of natural in 2 of 2 settings and behind in 0; the "
        "difference ranges from +30.0 to +35.0 points. It exceeds twice its standard error in 2 "
        "of 2 (2 ahead, 0 behind)."
    )
    assert caution.startswith("With 2 pairs a standard error is itself uncertain")


def test_one_pair_is_called_what_it_is(write, tmp_path):
    write("n", pgd_top1=None)
    write("r", pgd_top1=None, top1=0.95, **ROBUST)
    assert findings(Study(read_results(tmp_path))) == [
        (
            "Top-1: pgd-linf-0.1 is ahead of natural in 1 of 1 setting and behind in 0; the "
            "difference is +5.0 points."
        ),
        "With one pair each there is no spread: a difference may be chance.",
    ]


def test_facts(study_folder):
    assert dict(facts(Study(read_results(study_folder)))) == {
        "Models evaluated": "4 transferred tickets, 4 transferred dense models",
        "Source": "digits[0-4]",
        "Network": "resnet18",
        "Pretraining": "natural, pgd-linf-0.1",
        "Tickets": "omp; granularity element",
        "Sparsity": "0 %, 80 %",
        "Target": "digits[5-9]",
        "Transfer": "finetune",
        "Seeds": "2 transfer seeds (0, 1), 1 pretraining seed (0); the spread does not cover how "
        "pretraining itself varies",
        "Test images": "200 of digits[5-9] (one image is 0.5 points)",
        "Attack": "pgd-linf-0.0314, 20 steps",
    }


def test_a_complete_study_has_no_warning(study_folder):
    assert warnings(Study(read_results(study_folder))) == []


@pytest.mark.parametrize(
    ("run", "changes", "expected"),
    [
        ("more", {"seed": 2}, "1 setting of 2 lack a pretraining"),
        ("again", {"seed": 1}, "1 group of runs agree in setting and seeds"),
        ("fewer", {"seed": 1, "images": 50}, "different numbers of test images: 50, 200"),
    ],
)
def test_warnings(study_folder, write, run, changes, expected):
    write(run, **changes)
    assert any(expected in text for text in warnings(Study(read_results(study_folder))))


def test_nothing_to_compare_is_said(write, tmp_path):
    write("n", **DENSE)
    (text,) = warnings(Study(read_results(tmp_path)))
    assert "no robustly pretrained model" in text
