"""report.html: complete, self-contained, escaped, and written for any records."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.commands.pretrain import parse
from fastssl.commands.report import Options, run
from fastssl.config import to_json
from fastssl.errors import ConfigError
from fastssl.observe import svg as chart
from fastssl.observe.history import History, read_history
from fastssl.observe.html_report import page, write_report
from fastssl.observe.summary import ADVICE, training_s
from tests.fastssl.written_runs import CONFIG, FINISHED, START, evaluation, train, write_run

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Check that tags are closed in order, and collect the text and the attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def report_of(folder) -> Page:
    return Page(write_report(folder).read_text())


def test_a_finished_run_reports_its_results(tmp_path):
    folder = write_run(tmp_path / "run", FINISHED)
    page = report_of(folder)
    for text in (
        "40 of 40 steps (4.0 epochs); finished",
        "7.6",  # Loss
        "62.50 %",
        "12.50 % before training, 33.25 % on raw pixels",
        "640",  # Images/s
        "0:08",  # 40 steps of 64 at 640 images/s, and two evaluations of 2 s
        "backward, 45%",
        "waiting for data, 10%",
        f"fastssl pretrain --config {folder / 'config.json'}",
        "train.batch_size",
        "2.11.0",
    ):
        assert text in page.text, text
    assert "fastssl resume" not in page.text
    assert page.tags.count("svg") == 6  # loss, accuracy, kNN, images/s, learning rate, shares of the time


def test_the_page_is_self_contained(tmp_path):
    page = report_of(write_run(tmp_path / "run", FINISHED))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "url(" not in page.text


def test_external_text_is_escaped(tmp_path):
    evil = "<script>alert('&')</script>"
    records = [*FINISHED, {"event": "note", "step": 40, "text": evil}]
    folder = write_run(tmp_path / "<i>run", records)
    (folder / "console.log").write_text(f"warning: {evil} too\nanother line\n")
    (folder / "env.json").write_text(json.dumps({evil: evil}))
    page = report_of(folder)
    assert not {"script", "i"} & set(page.tags)
    assert page.text.count(evil) == 4
    assert CONFIG["data"]["root"] in page.text
    assert "<i>run" in page.text


def test_a_killed_run_is_reported_up_to_its_last_record(tmp_path):
    folder = write_run(tmp_path / "run", [START, train(10), train(20)], cut='{"event": "train", "step": 30, "los')
    page = report_of(folder)
    assert "20 of 40 steps (2.0 epochs) are logged" in page.text
    assert f"fastssl resume {folder}" in page.text
    assert "Not logged so far: kNN top-1 (%)" in page.text


def test_a_run_before_its_first_record_has_a_report(tmp_path):
    page = report_of(write_run(tmp_path / "run", []))
    assert "0 steps are logged" in page.text
    assert "svg" not in page.tags


def test_a_stopped_run_with_a_skipped_step(tmp_path):
    broken = {"event": "non_finite", "step": 20, "broken_step": 27, "loss": "inf", "action": "skipped"}
    note = {"event": "note", "step": 10, "text": "a.jpg cannot be read"}
    records = [
        START,
        note,
        {**note, "step": 20},
        {"event": "start", "step": 20},
        {**broken, "ids": [5, 8], "names": []},
        {**broken, "broken_step": 29, "ids": list(range(64)), "names": [f"cat/{i}.jpg" for i in range(64)]},
        {"event": "end", "step": 32, "reason": "stopped"},
    ]
    page = report_of(write_run(tmp_path / "run", records))
    assert "32 of 40 steps (3.2 epochs); stopped before the end" in page.text
    assert page.text.count("a.jpg cannot be read") == 1
    assert "step 27 was not finite: loss inf; skipped; its images are 5, 8" in page.text
    assert "cat/0.jpg, cat/1.jpg" in page.text
    assert "cat/8.jpg" not in page.text
    assert page.attributes.count(("class", "alarm")) == 2


def test_time_counts_every_step_once(tmp_path):
    records = [START, evaluation(0, 1.0), train(10, images_per_s=64.0), train(30, images_per_s=128.0)]
    history = read_history(write_run(tmp_path / "run", records))
    assert training_s(history) == pytest.approx(2 + 10 + 10)


numbers = st.sampled_from([0, 1, -1, 10**400, 1e59, -1e59, 1e-300, 0.5, float("nan"), float("inf")]) | st.floats()
words = st.text("a<&\n\x00\ud800", max_size=3)
plain = st.none() | st.booleans() | numbers | words
json_values = plain | st.lists(plain, max_size=3) | st.dictionaries(words, plain, max_size=2)
NAMES = (
    *("loss", "lr", "contrast_accuracy", "gradient_norm", "images_per_s", "share_data", "share_loss", "memory_gib"),
    *("knn_top1", "seconds", "total_steps", "images", "text", "ids", "names", "action", "broken_step"),
)
odd_records = st.fixed_dictionaries(
    {"event": st.sampled_from(["start", "train", "eval", "note", "non_finite", "end"]), "step": st.integers(0, 2**50)},
    optional=dict.fromkeys(NAMES, numbers | json_values),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(odd_records, max_size=8), st.dictionaries(st.sampled_from(["train", "data", "method"]), json_values))
def test_no_record_breaks_the_report(tmp_path_factory, records, config):
    folder = write_run(tmp_path_factory.mktemp("odd") / "run", records)
    (folder / "config.json").write_text(json.dumps({"train": {"batch_size": 1e59}, **config}))
    report_of(folder)


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="run folder"):
        run(Options(run=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_option_in_the_advice_exists():
    config = json.loads(to_json(parse([])))
    named = [option for text in ADVICE.values() for option in re.findall(r"--([a-z]+)\.([a-z-]+)", text)]
    assert len(named) > 5
    for section, name in named:
        assert name.replace("-", "_") in config[section]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.1, 7.9, [3, 4, 5, 6, 7, 8]),
        (-20.0, 1900.0, [-500, 0, 500, 1000, 1500, 2000]),
        (5.0, 5.0, [2, 3, 4, 5, 6, 7, 8]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_axes_have_round_ticks_around_the_values(low, high, ticks):
    first, last, found = chart.nice_axis(low, high)
    assert found == pytest.approx(ticks)
    assert (first, last) == (found[0], found[-1])


def points_of(svg: str, shape: str) -> list[tuple[float, float]]:
    element = ET.fromstring(svg).find(shape)
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def test_a_line_spans_the_plotted_area():
    svg = chart.line_chart({0: 0.0, 50: 1.0, 100: 0.0}, title="t")
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    assert points_of(svg, "polyline") == [
        (left, chart.HEIGHT - chart.BOTTOM),
        ((left + right) / 2, chart.TOP),
        (right, chart.HEIGHT - chart.BOTTOM),
    ]


def test_a_long_line_is_thinned_and_its_peak_is_kept():
    series = dict.fromkeys(range(100_000), 0.0) | {77_777: 1.0}
    svg = chart.line_chart(series, title="t")
    assert len(points_of(svg, "polyline")) <= chart.BUCKETS
    assert min(y for _, y in points_of(svg, "polygon")) == chart.TOP
    assert len(svg) < 20_000


def test_the_parts_of_the_time_fill_the_whole_height(tmp_path):
    shares = read_history(write_run(tmp_path / "run", FINISHED)).shares()
    polygons = ET.fromstring(chart.stacked_chart(shares, title="t")).findall("polygon")
    assert [polygon.get("fill") for polygon in polygons] == [part.color for part in shares]
    heights = [float(y) for polygon in polygons for y in re.findall(r",([\d.]+)", polygon.get("points"))]
    assert (min(heights), max(heights)) == (chart.TOP, chart.HEIGHT - chart.BOTTOM)


def test_a_page_is_made_from_a_history_alone(tmp_path):
    empty = History(tmp_path / "gone", records=[], config={}, environment={}, warnings=[])
    assert "gone" in Page(page(empty)).text
