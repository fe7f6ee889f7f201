"""`python -m bench gpu`: what runs, for how long, what is kept, and how results compare with the targets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.gpu import part_runner, proof, verdicts
from bench.gpu.part_context import Failed, PartContext, Skipped
from bench.gpu.parts import PARTS, Part, left_to_do, seconds_for
from bench.gpu.small_images import compared
from bench.gpu.speed import ratios
from bench.gpu.targets import SMALL, TARGETS

ROOT = Path(__file__).parents[2]
FAKES = """
import json, os, subprocess, sys, time
from pathlib import Path

kind, folder = sys.argv[1], Path(sys.argv[2])
numbers = folder / "numbers.json"
found = json.loads(numbers.read_text())["numbers"] if numbers.exists() else {}
found["tries"] = found.get("tries", 0) + 1
numbers.write_text(json.dumps({"numbers": found, "errors": {}}))
print("this is", kind)
if kind == "slow" and found["tries"] < 3:
    print("sleeper", subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
if kind == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if kind == "bad":
    raise ValueError("no such thing")
if kind == "absent":
    numbers.write_text(json.dumps({"numbers": found, "errors": {}, "skipped": "not on this machine"}))
    sys.exit(77)
"""


def part(name: str, share: float = 1.0) -> Part:
    return Part(name, f"the {name} one", "no.function", share)


def fake_command(given: Part, folder: Path, device: str, data: Path | None) -> list[str]:
    return [sys.executable, "-S", "-c", FAKES, given.name, str(folder)]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the real parts by ones that take no time."""
    parts = tuple(part(name) for name in ("good", "bad", "absent", "slow", "good2"))
    for module in ("parts", "proof", "verdicts"):
        monkeypatch.setattr(f"bench.gpu.{module}.PARTS", parts)
    run = part_runner.run_part
    monkeypatch.setattr(part_runner, "run_part", lambda *given, **options: run(*given, **options, command=fake_command))
    monkeypatch.setattr(proof, "AROUND_S", 0.0)
    monkeypatch.setattr(proof, "LEAST_S", 0.5)
    monkeypatch.setattr(part_runner, "GRACE_S", 0.2)


def call(out: Path, *more: str, minutes: float = 0.1) -> int:
    return main(["gpu", "--device", "cpu", "--out", str(out), "--budget-minutes", str(minutes), *more])


def statuses(out: Path) -> dict[str, str]:
    records = json.loads((out / "results.json").read_text())["parts"]
    return {record["part"]: record["status"] for record in records}


@pytest.mark.slow
def test_parts_run_in_order_and_each_leaves_its_record(fakes: None, tmp_path: Path) -> None:
    started = time.monotonic()
    assert call(tmp_path) == 1  # One fails
    assert time.monotonic() - started < 9
    expected = {"good": "passed", "bad": "failed", "absent": "skipped", "slow": "timeout", "good2": "passed"}
    assert list(statuses(tmp_path).items()) == list(expected.items())
    for name, status in expected.items():
        record = json.loads((tmp_path / "parts" / f"{name}.json").read_text())
        assert (record["status"], record["device"], record["numbers"]) == (status, "cpu", {"tries": 1})
        assert {"seconds", "command", "tail", "allowed_s"} <= set(record)
    bad = json.loads((tmp_path / "parts" / "bad.json").read_text())
    assert "this is bad" in bad["tail"]
    assert "ValueError: no such thing" in bad["tail"]
    text = (tmp_path / "summary.md").read_text()
    for shown in ("| the absent one | skipped |", "not on this machine", "ValueError: no such thing"):
        assert shown in text


@pytest.mark.slow
def test_a_second_call_tries_again_what_did_not_pass(fakes: None, tmp_path: Path) -> None:
    for tries in (1, 2, 3):
        call(tmp_path)
        records = {name: json.loads((tmp_path / "parts" / f"{name}.json").read_text()) for name in statuses(tmp_path)}
        assert records["slow"]["numbers"] == {"tries": tries}  # It gets its earlier results back
        assert records["bad"]["numbers"] == {"tries": tries}
        assert records["good"]["numbers"] == records["absent"]["numbers"] == {"tries": 1}
    assert statuses(tmp_path)["slow"] == "passed"


def test_the_next_call_runs_what_had_no_time(
    fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LEAST_S", 100.0)
    call(tmp_path)
    assert statuses(tmp_path) == {}
    assert "call again to continue with good" in capsys.readouterr().out
    assert "| the good one | not run |" in (tmp_path / "summary.md").read_text()
    monkeypatch.setattr(proof, "LEAST_S", 0.0)
    call(tmp_path, "--only", "good", "absent")
    assert statuses(tmp_path) == {"good": "passed", "absent": "skipped"}


def test_new_parts_come_before_those_that_failed() -> None:
    parts = [part(name) for name in ("a", "b", "c", "d", "e")]
    records = {
        name: {"status": status, "device": device}
        for name, status, device in [
            ("a", "failed", "cuda"),
            ("b", "passed", "cuda"),
            ("c", "timeout", "cuda"),
            ("e", "passed", "cpu"),
        ]
    }
    assert [p.name for p in left_to_do(parts, records, "cuda")] == ["d", "e", "a", "c"]


def test_shares_of_the_time() -> None:
    first, second, third = part("a", 1), part("b", 2), part("c", 1)
    assert seconds_for(first, [second, third], 100) == 25
    assert seconds_for(second, [third], 90) == 60  # The first left 15 unused
    assert seconds_for(third, [], 30) == 30


def is_gone(process: int) -> bool:
    """Whether a process ends within two seconds; a zombie counts as ended."""
    status = Path(f"/proc/{process}/stat")
    deadline = time.monotonic() + 2
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow", "stubborn"])
def test_no_process_outlives_its_part(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_runner, "GRACE_S", 0.3)
    started = time.monotonic()
    record = part_runner.run_part(part(kind), "cpu", None, seconds=2.0, command=fake_command)
    assert (record["status"], record["exit_code"], record["numbers"]) == ("timeout", None, {"tries": 1})
    assert time.monotonic() - started < 4
    for sleeper in re.findall(r"sleeper (\d+)", record["tail"]):
        assert is_gone(int(sleeper))
    assert kind == "stubborn" or "sleeper" in record["tail"]


@pytest.mark.slow
def test_sigterm_ends_the_part_and_keeps_what_there_is(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.bench import test_gpu_proof as t\n"
        "from bench.gpu import part_runner, parts, proof, verdicts\n"
        "replaced = (t.part('good'), t.part('slow', 100.0))\n"
        "parts.PARTS = proof.PARTS = verdicts.PARTS = replaced\n"
        "run = part_runner.run_part\n"
        "part_runner.run_part = lambda *given, **options: run(*given, **options, command=t.fake_command)\n"
        f"sys.exit(proof.main(['--device', 'cpu', '--out', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("slow"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert statuses(tmp_path) == {"good": "passed"}
    assert not any(Path(os.environ.get("TMPDIR", "/tmp")).glob("bench-gpu-slow-*/numbers.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "lossses"], "did you mean 'losses'?"),
        (["--budget-minutes", "0"], "--budget-minutes 0.0 was given; it must be above 0"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert call(tmp_path / "file" / "out") == 2
    assert "--out" in capsys.readouterr().err


def row(shape: str, column: str, **values: Any) -> dict[str, Any]:
    mode = {"launch": "graph", "cache": "warm", "loss": "info_nce", "memory_bytes": None, "ratio_to_ours": None}
    return {"shape": shape, "column": column, "median_ms": 1.0, **mode, **values}


LOSSES: dict[str, Any] = {
    SMALL: {
        "matmul_tflops": 800.0,
        "rows": [
            row(SMALL, "fastssl", launch="plain", median_ms=0.5),
            row(SMALL, "fastssl", median_ms=0.0198, memory_bytes=12e6),
        ],
    },
    # 4 * 1024 * 65536 * 128 operations: 34.36 GFLOP, at 800 TFLOP/s 42.95 us
    "1024x65536x128": {
        "matmul_tflops": 800.0,
        "rows": [
            row("1024x65536x128", "fastssl", median_ms=0.04295 / 0.75, memory_bytes=25e6),
            row("1024x65536x128", "eager-autocast", ratio_to_ours=18.0),
            row("1024x65536x128", "compile-autocast", ratio_to_ours=2.4),
            row("1024x65536x128", "sdpa-flash", ratio_to_ours=1.15),
            row("1024x65536x128", "sdpa-cudnn", median_ms=None),
        ],
    },
}
STEP = {"resnet50": {"of supervised": 0.70, "beside": 3.3}}


def words_by_target(**numbers: Any) -> dict[str, str]:
    records = {name: {"status": "passed", "device": "cuda", "numbers": given} for name, given in numbers.items()}
    return {found["target"]: found["verdict"] for found in verdicts.verdicts(records, "cuda")}


def test_targets_are_met_or_missed_by_how_much() -> None:
    small = {"end to end": {"times faster": 8.0}}
    assert list(words_by_target(losses=LOSSES, step=STEP, small=small).values()) == [
        "met, 10% better",  # 19.8 of 22 us
        "met, 25% better",  # 75 of 60 %
        "met, 20% better",  # 18 of 15
        "missed by 20%",  # 2.4 of 3
        "met, 0% better",
        "missed by 25%",  # 25 of 20 MB
        "missed by 10%",  # 3.3 of 3 %
        "met, 4% better",  # 0.70 of 0.675
        "missed by 20%",  # 8 of 10
    ]


def test_the_worst_of_the_large_shapes_counts() -> None:
    shape = "4096x65536x128"
    slower = [
        row(shape, "fastssl", median_ms=4 * 0.04295 / 0.5, memory_bytes=10e6),
        row(shape, "eager-autocast", ratio_to_ours=10.5),
    ]
    found = words_by_target(losses={**LOSSES, shape: {"matmul_tflops": 800.0, "rows": slower}})
    assert found["share of the measured matmul rate, N >= 1024"] == "missed by 17%"
    assert found["faster than eager autocast, N >= 1024"] == "missed by 30%"
    assert found["faster than torch.compile, N >= 1024"] == "missed by 20%"


def test_a_missing_measurement_says_why() -> None:
    found = words_by_target(losses={SMALL: LOSSES[SMALL]})
    assert found["share of the measured matmul rate, N >= 1024"] == "not measured: part losses passed"
    assert found["images/s of the supervised ResNet-50 step"] == "not measured: part step has not run"
    on_cpu = verdicts.verdicts({"losses": {"status": "passed", "device": "cpu", "numbers": LOSSES}}, "cpu")
    assert {target["verdict"] for target in on_cpu} == {"needs a GPU"}
    assert len(on_cpu) == len(TARGETS)


def test_the_step_is_compared_with_the_fastest_supervised_one() -> None:
    eager = {"images/s": 50.0, "step ms": 20.0, "loss ms": 0.4, "optimizer ms": 0.4}
    found: dict[str, Any] = {"eager": eager}
    assert ratios(found) == {}
    found["eager, supervised"] = {"images/s": 100.0, "step ms": 10.0}
    assert ratios(found) == {
        "fastest": "eager",
        "of supervised": 0.5,
        "beside": pytest.approx(4.0),
        "beside, measured in": "eager",
    }
    found["graph"] = {"images/s": 100.0, "step ms": 10.0, "graph ms": 9.9}
    found["compiled, supervised"] = {"images/s": 125.0, "step ms": 8.0}
    assert ratios(found) == {
        "fastest": "graph",
        "of supervised": 0.8,
        "beside": pytest.approx(8.0),  # Of the new step, if it takes as long as before
        "beside, measured in": "eager",
    }


def test_ours_at_its_best_is_compared_with_the_other_loop() -> None:
    found: dict[str, Any] = {"fastssl": {"images/s": 800.0}}
    assert compared(found) == {}
    found["lightly's loop"] = {"images/s": 100.0}
    assert compared(found) == {"times faster": 8.0}
    found["fastssl with a CUDA graph"] = {"images/s": 1200.0}
    assert compared(found) == {"times faster": 12.0}


def test_a_measurement_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    import torch

    context = PartContext(torch.device("cpu"), tmp_path, None, numbers={"done": 3})

    def bad() -> None:
        raise Failed("it must be 4")

    def broken() -> None:
        raise ValueError("line\nmore")

    def absent() -> None:
        raise Skipped("not here")

    context.once("done", bad)
    context.once("bad", bad)
    context.once("broken", broken)
    context.once("good", lambda: 5)
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["numbers"] == {"done": 3, "good": 5}
    assert written["errors"] == {"bad": "it must be 4", "broken": "ValueError: line"}
    with pytest.raises(Skipped):
        context.once("absent", absent)


def test_the_exit_code_of_a_part_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import correctness, part_process

    def part_with(outcome: Exception | None) -> Any:
        def run(context: PartContext) -> None:
            if isinstance(outcome, Skipped):
                raise outcome
            if outcome:
                context.errors["it"] = str(outcome)

        return run

    failed, skipped = part_process.EXIT_FAILED, part_process.EXIT_SKIPPED
    for outcome, code in [(None, 0), (Failed("no"), failed), (Skipped("why"), skipped)]:
        monkeypatch.setattr(correctness, "fp16", part_with(outcome))
        assert part_process.main(["correctness.fp16", "--folder", str(tmp_path), "--device", "cpu"]) == code
    assert json.loads((tmp_path / "numbers.json").read_text())["skipped"] == "why"


def test_every_part_has_a_function() -> None:
    import importlib

    for each in PARTS:
        module, _, function = each.function.partition(".")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))


def test_unwritten_momentum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.gpu import correctness
    from fastssl.train import optim

    assert correctness._overflow(torch.device("cpu"), "sgd")["after"] == 32768
    monkeypatch.setattr(optim, "_with_fixed_state", lambda optimizer: optimizer)
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, 3e11, **options))
    with pytest.raises(Failed, match="momentum"):
        correctness._overflow(torch.device("cpu"), "sgd")


@pytest.mark.slow
def test_a_rehearsal_of_some_parts(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--budget-minutes", "4"]
    run = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", *arguments, "--only", "environment", "fp16", "losses", "collectives"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr + run.stdout
    assert statuses(tmp_path) == dict.fromkeys(("environment", "fp16", "losses", "collectives"), "passed")
    results = json.loads((tmp_path / "results.json").read_text())
    numbers = {record["part"]: record["numbers"] for record in results["parts"]}
    assert numbers["fp16"]["sgd"]["scale before"] == 2 * numbers["fp16"]["sgd"]["after"]
    assert {found["column"] for found in numbers["losses"]["64x1024x64"]["rows"]} >= {"fastssl", "sdpa-flash"}
    assert numbers["collectives"]["all_gather torch.bool"] == "equal"
    assert all(target["verdict"] == "needs a GPU" for target in results["targets"])
    assert "Rehearsal on a CPU" in (tmp_path / "summary.md").read_text()
