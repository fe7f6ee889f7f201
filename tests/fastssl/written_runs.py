"""Run folders with made-up records, for the tests of plots and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARES = {"data": 0.1, "forward": 0.2, "loss": 0.05, "backward": 0.45, "optimizer": 0.15}
CONFIG = {"seed": 3, "method": {"name": "unimoco"}, "train": {"batch_size": 64}, "data": {"root": "/data/<b>&co"}}


def train(step: int, **values: Any) -> dict[str, Any]:
    shares = {f"share_{name}": share for name, share in SHARES.items()}
    numbers = {"loss": 8 - step / 100, "lr": 0.1, "contrast_accuracy": 0.5, "images_per_s": 640.0}
    return {"event": "train", "step": step, **numbers, **shares, "memory_gib": 1.5, "unreadable": 0, **values}


def evaluation(step: int, top1: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "knn_top1": top1, "seconds": 2.0}


START = {"event": "start", "step": 0, "total_steps": 40, "images": 640, "labels": 0, "labels_crc32": 1}
END = {"event": "end", "step": 40, "reason": "finished", "knn_top1": 62.5, "raw_pixels_top1": 33.25}
FINISHED = [START, evaluation(0, 12.5), *(train(step) for step in range(10, 50, 10)), evaluation(40, 62.5), END]


def write_run(folder: Path, records: list[dict[str, Any]], *, cut: str = "") -> Path:
    """A run folder with these records and the incomplete last line `cut`, as after a kill."""
    folder.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + cut)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "env.json").write_text(json.dumps({"torch": "2.11.0"}))
    return folder
