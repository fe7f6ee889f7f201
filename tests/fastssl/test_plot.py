"""`fastssl plot` draws a line per run, in a plot for every logged metric."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.commands.plot import Options, run
from fastssl.errors import ConfigError
from fastssl.observe.history import ACCURACY, KNN, LOSS, PARTS, REST, read_history
from tests.fastssl.written_runs import FINISHED, SHARES, START, evaluation, train, write_run

PICTURES = {"loss.png", "contrast_accuracy.png", "knn.png", "images_per_s.png", "time.png"}


def colors(path: Path) -> set[int]:
    """All colors that cover more than a handful of pixels, as 0xRRGGBB."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    values, counts = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_counts=True)
    return set(values[counts > 50].tolist())


def rgb(color: str) -> int:
    return int(color.removeprefix("#"), 16)


def test_one_run_is_drawn_into_its_own_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run", FINISHED)
    assert run(Options(runs=(folder,))) == 0
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {folder / name}" for name in ("loss.png", "contrast_accuracy.png", "knn.png", "images_per_s.png")
    ] + [f"wrote {folder / 'time.png'}"]
    assert {rgb(part.color) for part in PARTS} <= colors(folder / "time.png")


def test_several_runs_share_the_pictures(tmp_path, monkeypatch):
    runs = tuple(write_run(tmp_path / name, FINISHED[: 4 + i]) for i, name in enumerate(("first", "second")))
    monkeypatch.chdir(tmp_path)
    assert run(Options(runs=runs)) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES
    # matplotlib's first two colors; the legend alone has enough pixels of a hidden line
    assert {rgb("#1f77b4"), rgb("#ff7f0e")} <= colors(tmp_path / "loss.png")


def test_a_metric_that_no_run_has_is_named_and_not_drawn(tmp_path, capsys):
    bare = {"event": "train", "step": 1, "loss": 2.0}
    folder = write_run(tmp_path / "run", [START, bare])
    assert run(Options(runs=(folder,), out=tmp_path / "new" / "out")) == 0
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["loss.png"]
    output = capsys.readouterr().out
    assert all(f"no {name}" in output for name in PICTURES - {"loss.png"})


def test_a_single_log_line_is_enough(tmp_path):
    folder = write_run(tmp_path / "run", [train(20)])
    assert run(Options(runs=(folder,))) == 0
    assert {rgb(part.color) for part in PARTS} <= colors(folder / "time.png")


@pytest.mark.parametrize(
    ("records", "words"),
    [(None, ["no metrics.jsonl", "run folder"]), ([START], ["no logged metrics", "--train.log-every"])],
)
def test_a_folder_without_metrics_is_an_error(tmp_path, records, words):
    folder = tmp_path / "run" if records is None else write_run(tmp_path / "run", records)
    with pytest.raises(ConfigError) as error:
        run(Options(runs=(folder,)))
    assert all(word in str(error.value) for word in [str(folder), *words])


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", FINISHED)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"fastssl-pretrain\[plots\]"):
        run(Options(runs=(folder,)))


def test_history_leaves_out_damaged_and_non_finite_values(tmp_path):
    records = [START, train(1, loss=float("nan")), train(2, loss=5.0), train(3, loss="x"), train(4, loss=True)]
    folder = write_run(tmp_path / "run", [*records, evaluation(4, 50.0), {"event": "eval"}, {"step": 3}], cut='{"eve')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\n\xff\xfe\n[1]\n{"event": "train", "step": -1, "loss": 1.0}\n')
    history = read_history(folder)
    assert history.series(LOSS) == {2: 5.0}
    assert history.series(ACCURACY) == dict.fromkeys((1, 2, 3, 4), 50.0)
    assert history.series(KNN) == {4: 50.0}


def test_shares_add_up_to_one(tmp_path):
    over = {f"share_{name}": 2 * share for name, share in SHARES.items()}
    folder = write_run(tmp_path / "run", [train(1), train(2, share_loss=None), train(3, **over)])
    shares = read_history(folder).shares()
    totals = [sum(series[step] for series in shares.values()) for step in (1, 2, 3)]
    assert totals == pytest.approx([1, 1, 1])
    assert shares[REST] == pytest.approx({1: 0.05, 2: 0.1, 3: 0.0})
