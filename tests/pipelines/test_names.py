from __future__ import annotations

import json
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastssl_pipelines.names import from_line, printable, to_line

# All names that POSIX allows: bytes except NUL and the slash.
file_names = st.binary(min_size=1, max_size=40).map(lambda raw: os.fsdecode(raw.translate(None, b"\0/") or b"x"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat.jpg", "cat.jpg"),
        ("Käse 猫.jpg", "Käse 猫.jpg"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]0;title\a", r"\x1b]0;title\x07"),
        ("tab\there", r"tab\there"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),
        ("lone\ud800", r"lone\ud800"),
        ("line\u2028end", r"line\u2028end"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("del\x7f", r"del\x7f"),
    ],
)
def test_names_are_shown_without_control_characters(name, shown):
    assert printable(name) == shown


@given(file_names)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_what_is_shown_is_one_line_that_can_be_encoded(name):
    shown = printable(name)
    assert shown.isprintable()
    assert len(shown.encode().splitlines()) <= 1


@given(file_names)
@example(" leading and trailing ")
@example('"quoted".jpg')
@example('"')
@example("line\nbreak\r\u2028")
@example("\ufeffmark")
@example("\x85next")
@settings(max_examples=500, derandomize=True, deadline=None)
def test_a_list_gives_back_every_name(name):
    line = to_line(name)
    assert len(line.splitlines()) == 1
    assert from_line(os.fsdecode(os.fsencode(line))) == name


def test_a_name_that_only_looks_like_json_is_unchanged():
    assert from_line('"half.jpg\n') == '"half.jpg'
    assert from_line('"a".jpg') == '"a".jpg'
    assert from_line(json.dumps("x\ny")) == "x\ny"
