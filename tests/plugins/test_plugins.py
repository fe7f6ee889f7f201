"""A package outside this repository adds a method, an encoder, a preset and a loss; a broken one is one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastssl import plugins
from fastssl.errors import ConfigError
from fastssl.methods import METHODS, Method, MethodConfig, register_method
from fastssl.models.encoders import ENCODERS, build_encoder
from fastssl.registration import Registry

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(__file__).parent / "example_plugin"
BROKEN = """
from dataclasses import dataclass
from typing import ClassVar

from nnclr_example import NNCLR, NNCLRConfig
from fastssl.methods import register_method

@dataclass(frozen=True, kw_only=True)
class BrokenConfig(NNCLRConfig):
    name: ClassVar[str] = "broken-example"

@register_method
class Broken(NNCLR):
    Config = BrokenConfig

    def forward(self, batch):
        output = super().forward(batch)
        self.queue.enqueue(output.updates[1], None, 0)
        return output
"""

BROKEN_LOSS = """
from nnclr_example import decoupled_info_nce, decoupled_info_nce_definition
from fastssl_kernels import register_loss

def broken(query, key, queue, **options):
    return decoupled_info_nce(query, key.detach() + (query - query.detach()), queue, **options)

register_loss("broken-loss", broken, decoupled_info_nce_definition)
"""


def installed(folder: Path, distribution: str, **entries: str) -> Path:
    """`folder` as a place on sys.path with a distribution that has these entry points."""
    metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines]))
    return folder


@pytest.fixture
def example(tmp_path: Path) -> list[Path]:
    """What an installation of the example adds to sys.path."""
    return [EXAMPLE, installed(tmp_path / "site", "fastssl-nnclr-example", example="nnclr_example")]


def run(path: list[Path], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with these folders on its path."""
    before = os.environ.get("PYTHONPATH")
    folders = [*map(str, path), *([before] if before else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def fastssl(path: list[Path], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(path, "-m", "fastssl", *arguments)


def contract(path: list[Path], names: str) -> subprocess.CompletedProcess[str]:
    """The contract tests of the methods and losses that `names` selects."""
    tests = "tests/fastssl/test_methods.py", "tests/kernels/test_parity.py"
    return run(path, "-m", "pytest", "-q", "-n", "0", *tests, "-k", names)


@pytest.mark.slow
def test_methods_presets_and_options_of_a_plugin_are_listed(example: list[Path]) -> None:
    methods, presets = fastssl(example, "methods"), fastssl(example, "presets")
    assert "nnclr-example" in methods.stdout
    assert "arXiv 2104.14548" in methods.stdout
    assert "nnclr-example, 2 epochs" in presets.stdout
    shown = fastssl(example, "pretrain", "nnclr-example", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--method.queue-size" in shown.stdout
    for absent in ("--method.momentum", "--method.shuffle", "--method.shard-queue", "--method.head"):
        assert absent not in shown.stdout
    misspelled = fastssl(example, "pretrain", "nnclr-exampel")
    assert misspelled.returncode == 2
    assert "did you mean 'nnclr-example'?" in misspelled.stderr


@pytest.mark.slow
def test_a_plugin_trains_and_resumes_and_needs_to_be_installed_for_that(example: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--run.dir", folder, "--train.device", "cpu", "--train.checkpoint-every", "2", "--train.steps", "4"]
    trained = fastssl(example, "pretrain", "nnclr-example", *options)
    assert trained.returncode == 0, trained.stderr
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"]["name"], config["model"]["encoder"]) == ("nnclr-example", "tiny-cnn")
    checkpoints = sorted(folder.rglob("*.pt"))
    assert checkpoints
    resumed = fastssl(example, "resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    without = fastssl([], "resume", folder)
    assert without.returncode == 2
    assert len(without.stderr.splitlines()) == 1
    assert "unknown method 'nnclr-example'" in without.stderr
    assert "if a plug-in defines it, install that plug-in" in without.stderr


@pytest.mark.slow
def test_a_loss_of_a_plugin_is_verified_like_ours(example: list[Path]) -> None:
    verified = fastssl(example, "verify", "decoupled-example", "--device", "cpu", "--dtype", "float32")
    assert verified.returncode == 0, verified.stdout
    assert re.search(r"decoupled-example +float32 +blockwise .*pass", verified.stdout)
    assert "all 1 passed" in verified.stdout


@pytest.mark.slow
def test_the_contract_tests_accept_a_plugin_without_a_transcription(example: list[Path]) -> None:
    tested = contract(example, "nnclr-example or decoupled-example")
    assert tested.returncode == 0, tested.stdout
    assert re.fullmatch(r"[3-9]\d passed, \d+ skipped, \d+ deselected in .*", tested.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_contract_tests_refuse_a_side_effect_and_a_wrong_gradient(example: list[Path], tmp_path: Path) -> None:
    site = installed(tmp_path / "other", "broken", method="broken_example", loss="broken_loss")
    (site / "broken_example.py").write_text(BROKEN)
    (site / "broken_loss.py").write_text(BROKEN_LOSS)
    tested = contract([*example, site], "(broken-example and forward) or (broken-loss and float64)")
    assert tested.returncode == 1, tested.stdout
    assert "test_forward_changes_no_state_except_that_of_batch_norm[broken-example]" in tested.stdout
    assert "test_every_loss_in_float64[broken-loss" in tested.stdout


def sentence(monkeypatch: pytest.MonkeyPatch, *sites: Path) -> str:
    """What `load` raises for the plug-ins in these folders."""
    for site in sites:
        monkeypatch.syspath_prepend(site)
    with pytest.raises(ConfigError) as error:
        plugins.load.__wrapped__()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_of_fastssl", "ModuleNotFoundError: No module named"),
        ("raise RuntimeError('first\\nsecond')", "(RuntimeError: first)"),
        ("raise SystemExit", "(SystemExit: no message)"),
        ("def", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_sentence(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed(tmp_path, "a-package", mine="fails_at_import")
    (site / "fails_at_import.py").write_text(code)
    text = sentence(monkeypatch, site)
    assert "plug-in 'mine' (fails_at_import) of a-package cannot be imported" in text
    assert reason in text


def test_two_plugins_of_one_name_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [installed(tmp_path / name, name, same="json") for name in ("one", "two")]
    text = sentence(monkeypatch, *sites)
    assert "plug-in 'same' was found in " in text
    assert {"one", "two"} <= set(text.replace(";", " ").split())


def test_a_method_with_the_name_of_another_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = installed(tmp_path, "a-package", mine="another_moco")
    code = "from fastssl.methods import METHODS, register_method\n"
    (site / "another_moco.py").write_text(f"{code}class MoCo(METHODS['mocov2']): pass\nregister_method(MoCo)\n")
    text = sentence(monkeypatch, site)
    assert "plug-in 'mine' of a-package cannot be registered: method 'mocov2' was given by another_moco" in text
    assert "fastssl.methods.moco already registers that name" in text
    assert METHODS["mocov2"].__module__ == "fastssl.methods.moco"


def test_a_method_without_a_name_or_paper_is_one_sentence() -> None:
    class Nameless(Method):
        Config = MethodConfig

    with pytest.raises(ConfigError, match=r"Nameless was given without a text as Config\.name; add it"):
        register_method(Nameless)


def test_an_encoder_is_built_from_its_keywords_and_must_have_a_feature_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    def registered(make: Callable[..., Any]) -> None:
        monkeypatch.setitem(ENCODERS, "mine", make)

    made = SimpleNamespace(feature_dim=3)
    registered(lambda **given: SimpleNamespace(**vars(made), given=given))
    given = build_encoder("mine", width=2.0, stem="small", norm_layer=torch.nn.BatchNorm1d).given
    assert given == {"width": 2.0, "stem": "small", "norm_layer": torch.nn.BatchNorm1d}
    registered(lambda **_: SimpleNamespace())
    with pytest.raises(ConfigError, match="encoder 'mine' was given, which has no feature_dim"):
        build_encoder("mine")


def test_a_definition_that_runs_again_replaces_itself() -> None:
    registry: Registry[int] = Registry("thing")

    def define() -> None:
        """The definition."""

    registry.register("name", 1, define)
    registry.register("name", 2, define)
    assert registry.find("name") == 2
    with pytest.raises(ConfigError, match=r"unknown thing 'nam': known are name; did you mean 'name'\?; if a plug-in"):
        registry.find("nam")
