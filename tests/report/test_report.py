"""The table of a run, and its page."""

import re
from html.parser import HTMLParser

import pytest

from lightning_ntk.functional import judge
from lightning_ntk.plots import plot_values
from lightning_ntk.report import summarize, write_report

SCALARS = (
    "relative_weight_distance", "displacement", "weight_cosine", "weight_norm_ratio", "taylor_gap", "loss", "linearized_loss",
    "accuracy", "linearized_accuracy", "taylor_accuracy", "kernel_distance", "parameter/0.weight", "parameter/0.bias",
)  # fmt: skip


def history(scalars=SCALARS) -> list[dict[str, float]]:
    return [
        {"step": float(s), **dict.fromkeys(scalars, 0.9 / (1 + s))} for s in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    ]


def test_the_table_fits_a_terminal() -> None:
    text = summarize(history(), judge(history()))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 12
    assert text.splitlines()[-1].split()[0] == "500"


class Tags(HTMLParser):
    """Tags that are open and never closed, and addresses that lead elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings = 0
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.headings += tag == "h2"
        self.addresses += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]

    def handle_startendtag(self, tag, attrs) -> None:
        pass

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path) -> None:
    figure = plot_values([1.0, 2.0], "value")[0]
    options = {"title": "A < B", "notes": ["<dropout>"], "figures": {"More": figure}}
    path = write_report(tmp_path / "new" / "run.html", history(), judge(history()), **options)
    page = path.read_text()
    tags = Tags(page)
    assert (tags.open, tags.addresses) == ([], [])
    assert tags.headings == 5 + 1 + 2  # figures, one more, what is not described, how to cite
    assert "A &lt; B" in page
    assert "<li>&lt;dropout&gt;</li>" in page
    assert len(page) < 500_000
    assert page == write_report(path, history(), judge(history()), **options).read_text()


def test_the_page_of_a_long_run_is_small(tmp_path) -> None:
    scalars = (*SCALARS[:-2], *(f"parameter/{number}.weight" for number in range(40)))
    rows = [{"step": float(step), **dict.fromkeys(scalars, 0.9 / (1 + step))} for step in range(3000)]
    page = write_report(tmp_path / "run.html", rows, judge(rows)).read_text()
    assert len(page) < 500_000
    assert "<td>2999</td>" in page


@pytest.mark.parametrize("scalars", [("relative_weight_distance",), ("loss", "linearized_loss")])
def test_what_was_not_measured_has_no_figure(tmp_path, scalars) -> None:
    page = write_report(tmp_path / "run.html", history(scalars), judge(history(scalars))).read_text()
    assert len(re.findall("<figure", page)) == 1
