"""Every command, option and path that the documentation shows is real.

Commands of fastssl run, shrunk; those that would take minutes, GPUs or a download only have to parse.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import fastssl_kernels
from bench import __main__ as bench
from fastssl import cli
from fastssl.commands.bench import TASKS
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.presets import load

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastssl", "kernels", "pipelines", "bench")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS))
QUEUE = ["--model.width", "0.0625", "--model.splits", "2", "--method.queue-size", "64"]
STEPS = ["--train.batch-size", "16", "--train.steps", "4", "--train.checkpoint-every", "2"]
PICTURES = ["--data.pictures", "240"]
# Commands that a test does not run, and why; `check` has what is checked instead
NOT_RUN = {
    ("pip", "install"): "downloads",
    ("python3", "-m", "venv"): "the tests have an environment",
    (".", ".venv/bin/activate"): "the tests have an environment",
    ("pre-commit", "install"): "changes the hooks of the repository",
    ("git", "switch"): "names a branch of the reader's",
    ("sbatch",): "needs SLURM",
    ("torchrun",): "needs several GPUs",
    ("pytest",): "would run the tests inside a test",
    ("pytest-benchmark",): "needs two saved runs",
    (".ci/run",): "runs all tests",
    (".ci/tools",): "compiles every kernel",
    ("python", "-m", "bench"): "takes minutes",
    ("python", "-m", "fastssl_kernels.aot"): "takes minutes",
    ("fastssl", "bench"): "takes minutes",
    ("fastssl", "pretrain", "--data.download"): "downloads",
}


class Parsed(BaseException):
    """Stops a command after its options have been read; not an Exception, so that no command catches it."""


def code_blocks(document: str, language: str) -> list[str]:
    """The contents of the blocks in this language, "" for those without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), flags=re.M | re.S)
    return [text for name, text in blocks if name == language]


def inline_code(document: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def shown_commands() -> list[tuple[str, str]]:
    """Document and command of each line of the shell blocks, every command once."""
    commands: dict[str, str] = {}
    for document in DOCUMENTS:
        for block in [*code_blocks(document, ""), *code_blocks(document, "bash")]:
            for line in block.splitlines():
                for words in split(line):
                    commands.setdefault(shlex.join(words), document)
    return [(document, command) for command, document in commands.items()]


def split(line: str) -> list[list[str]]:
    """The words of the commands of a line, without comments, variables in front and redirections."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            commands.append([])
        elif commands[-1] or not re.match(r"[A-Z_]+=", word):
            commands[-1].append(word)
    return [words[: words.index(">")] if ">" in words else words for words in commands if words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    assert cli.main(["pretrain", *QUEUE, *STEPS, *PICTURES, "--run.dir", str(folder)]) == 0
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the placeholders of the documentation stand for."""
    shutil.copytree(finished, tmp_path / "RUN")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "DIR" / name).mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "DIR" / name / f"{name}{index}.png")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as documented but small, or check what can be checked of one that is not run."""
    words = ["quickstart" if word == "PRESET" else word for word in shlex.split(command)]
    if words[0] == "fastssl":
        check_fastssl(words[1:], monkeypatch)
    elif words[0] == "torchrun":
        check_torchrun(words[1:], monkeypatch)
    elif words[:3] == ["python", "-m", "bench"]:
        check_bench(words[3:], monkeypatch)
    elif words[0] in ("pytest", "pytest-benchmark") or words[:3] == ["python", "-m", "fastssl_kernels.aot"]:
        check_options(words)
    elif words[:2] == ["pip", "install"]:
        check_extras(words[2:])
    elif words[0].startswith(".ci/"):
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} cannot be executed"
    else:
        assert any(tuple(words[: len(start)]) == start for start in NOT_RUN), f"no test knows the command {command!r}"


def check_fastssl(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "bench" or "--data.download" in words:
        check_parses(words, monkeypatch)
        return
    if "--data.quarantine" in words:
        Path("LIST").write_text("cat0.png\n")
    code = exit_code(cli.main, small(words))
    assert code == 0, f"fastssl {shlex.join(words)} ended with {code}"


def small(words: list[str]) -> list[str]:
    """The command with options that let it end in a second."""
    images = [] if "--data.root" in words else PICTURES
    if words[0] == "pretrain" and not {"--config", "--help"} & set(words):
        return [*words, *QUEUE, *STEPS, *images]
    if words[0] == "preview":
        return [*words, *images, "--train.batch-size", "16"]
    return [*words, "--epochs", "1"] if words[:2] == ["eval", "linear"] else words


def exit_code(main: Callable[[list[str]], object], words: list[str]) -> object:
    """What a command returned; 0 if it was stopped after parsing, or after --help."""
    try:
        return main(words)
    except Parsed:
        return 0
    except SystemExit as stop:
        return stop.code or 0


def check_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command of fastssl read its options, and stop it then; one that has none runs."""
    name = cli.COMMANDS.get(words[0], "")
    name = TASKS.get(words[1], "") if name == "bench" else name
    if name:
        stop_after_parsing(importlib.import_module(f"fastssl.commands.{name}"), monkeypatch)
    code = exit_code(cli.main, words)
    assert code == 0, f"fastssl {shlex.join(words)} ended with {code}"


def check_bench(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a benchmark read its options, and stop it then."""
    if words and words[0] in bench.COMMANDS:
        stop_after_parsing(sys.modules[bench.COMMANDS[words[0]].__module__], monkeypatch)
    code = exit_code(bench.main, words)
    assert code == 0 or not words, f"python -m bench {shlex.join(words)} ended with {code}"


def stop_after_parsing(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(module, "parse", None)

    def stop(*arguments, **options):
        found = real(*arguments, **options)
        if preset := getattr(found, "preset", ""):
            load(preset)
        raise Parsed

    if real:
        monkeypatch.setattr(module, "parse", stop)


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = get_args_parser().parse_args(words)
    assert (given.module, given.training_script) == (True, "fastssl")
    check_parses(given.training_script_args, monkeypatch)


def check_options(words: list[str]) -> None:
    """The options occur in the program's help and the paths exist."""
    start, words = (words[:3], words[3:]) if words[0] == "python" else (words[:1], words[1:])
    unknown = {word.split("=")[0] for word in words if word.startswith("-")} - options_of(tuple(start))
    assert not unknown, f"{' '.join(start)} has no {unknown}"
    for path in (word for word in words if "/" in word or word == "bench"):
        assert (ROOT / path).exists(), f"there is no {path}"


@functools.cache
def options_of(start: tuple[str, ...]) -> set[str]:
    programs = {"pytest": ["-m", "pytest"], "pytest-benchmark": ["-m", "pytest_benchmark", "compare"]}
    command = [sys.executable, *(programs.get(start[0]) or start[1:]), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", shown))


def check_extras(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(names.split(",")) <= extras.keys(), f"{names} has an extra that pyproject.toml does not define"


@pytest.mark.parametrize(("document", "command"), shown_commands(), ids=lambda value: value)
def test_a_shown_command_works(document: str, command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fastssl pretrian", "did you mean 'pretrain'?"),
        ("fastssl pretrain mocov2-cifar11", "did you mean 'mocov2-cifar10'?"),
        ("fastssl pretrain --train.stepps 3", "--train.stepps"),
        ("fastssl pretrain mocov2-cifar10 --data.rooot DIR", "--data.rooot"),
        ("fastssl resume RUNN", "RUNN"),
        ("fastssl eval lin RUN", "'lin'"),
        ("fastssl eval linear RUN --protocol all", "--protocol"),
        ("fastssl bench stepp", "did you mean 'step'?"),
        ("fastssl bench step mocov2-cifar11", "did you mean 'mocov2-cifar10'?"),
        ("fastssl bench e2e mocov2-cifar10 --data.rot DIR", "--data.rot"),
        ("torchrun --procs 8 -m fastssl pretrain", "--procs"),
        ("torchrun --nproc-per-node 8 -m fastssl pretrain --train.stepps 3", "--train.stepps"),
        ("python -m bench losess", "did you mean 'losses'?"),
        ("python -m bench losses --shape 8x64x16", "--shape"),
        ("python -m bench load --json no/such/folder.json", "no/such/folder.json"),
        ("python -m fastssl_kernels.aot --kernels", "fastssl_kernels.aot has no {'--kernels'}"),
        ("pytest --benchmark-onyl", "pytest has no {'--benchmark-onyl'}"),
        ("pytest tests/pipelines/test_pixel.py", "there is no tests/pipelines/test_pixel.py"),
        ("pytest-benchmark compare --group=fullname", "pytest-benchmark has no {'--group'}"),
        ("pip install -e '.[tests]'", "tests has an extra"),
        (".ci/tool", ".ci/tool cannot be executed"),
        ("fastsl pretrain", "no test knows the command 'fastsl pretrain'"),
    ],
)
def test_a_wrong_command_is_found(
    command: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((AssertionError, SystemExit, ConfigError)) as error:
        check(command, monkeypatch)
    assert message in str(error.value) + capsys.readouterr().err


def test_commands_within_the_text_parse(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = {span for document in DOCUMENTS for span in inline_code(document)}
    commands = sorted(span for span in spans if span.startswith(("fastssl ", "pytest ", "python -m ", "pip install ")))
    assert len(commands) > 20
    for command in commands:
        words = shlex.split(command.replace("PRESET", "quickstart").replace("FILE", "RUN/config.json"))
        complete = any(word.startswith("-") or word in ("RUN", "DIR", "quickstart") for word in words[2:])
        with monkeypatch.context() as patch:
            if words[0] == "fastssl" and complete:
                check_parses(words[1:], patch)
            elif words[0] == "fastssl":  # The name of a command, without what it needs
                assert words[1] in cli.COMMANDS or words[1] == "--help", command
            elif words[:3] == ["python", "-m", "bench"] and not complete:
                assert words[3] in bench.COMMANDS, command
            else:
                check(command, patch)


def test_options_within_the_text_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    presets = ("quickstart", "mocov2-cifar10", "smog-cifar10", "unmix-cifar10")
    commands = [["pretrain", preset] for preset in presets]
    commands += [["eval", "knn"], ["eval", "linear"], ["data", "check"], ["preview"], ["bench", "step"]]
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
    for command in bench.COMMANDS:
        with pytest.raises(SystemExit):
            bench.main([command, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out)) | options_of(("pytest",))
    assert len(known) > 100
    spans = {span for document in DOCUMENTS for span in inline_code(document) if span.startswith("--")}
    assert len(spans) > 30
    assert sorted(span for span in spans if re.split(r"[ =]", span)[0] not in known) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#([\w-]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", ((ROOT / document).parent / target).read_text(), flags=re.M)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor
    for span in inline_code(document):
        if re.fullmatch(r"(tests|bench|fastssl|kernels|pipelines|\.ci)/[\w./-]+", span) and "NAME" not in span:
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md"])
def test_python_examples_run(document: str) -> None:
    torch.manual_seed(0)
    query, key, queue = (torch.nn.functional.normalize(torch.randn(rows, 8), dim=1) for rows in (4, 4, 16))
    names = {"query": query, "key": key, "queue": queue, "y": torch.arange(4), "queue_y": torch.arange(16)}
    (example,) = code_blocks(document, "python")
    exec(example, names)
    assert names["loss"].isfinite()


def test_the_first_page_is_short_and_has_the_two_blocks() -> None:
    """The first block makes a fresh machine train; `.ci/run` runs the second."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []
    first, second = code_blocks("README.md", "bash")
    assert first.splitlines()[-2:] == ["pip install -e .", "fastssl pretrain"]
    assert second.splitlines() == ['pip install -e ".[test]"', "pytest"]


def test_the_table_of_methods_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \[([\d.]+)\] \|", (ROOT / "README.md").read_text(), flags=re.M)
    own = {name: method for name, method in METHODS.items() if method.__module__.startswith("fastssl.")}
    assert {name: f"arXiv {paper}" for name, paper in rows} == {name: cls.Config.paper for name, cls in own.items()}


def test_the_table_of_losses_names_functions() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*)[:\w -]* \|", (ROOT / "kernels/README.md").read_text(), flags=re.M)
    functions = re.findall(r"\w+", " ".join(rows))
    assert len(functions) >= 12
    assert [name for name in functions if not callable(getattr(fastssl_kernels, name, None))] == []
