"""YAML that people bring: keys that stand twice or are no text, aliases, encodings, and what ends in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.yaml_text import parse_yaml
from tinyllava_fast.errors import UserError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1e-3", {"a": "1e-3"}),
        ("a: {b: [1, null, true]}", {"a": {"b": [1, None, True]}}),
        ("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}", {"base": {"x": 1, "y": 2}, "use": {"x": 1, "y": 3}}),
        (
            "c: &c {a: 1}\np: {q: &b {<<: *c, a: 2}}\nuse: {<<: *b, z: 3}",
            {"c": {"a": 1}, "p": {"q": {"a": 2}}, "use": {"a": 2, "z": 3}},
        ),
        ("x: &x {a: 1}\ny: &y {a: 2, b: 3}\nz: {<<: [*x, *y]}\n", None),
        ("'1': x\n'null': y\n\"on\": z", {"1": "x", "null": "y", "on": "z"}),
        ("a: 'b: c'\n# comment\n", {"a": "b: c"}),
    ],
)
def test_what_is_fine_stays_so(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    if "*y]" in text:
        value = {"x": {"a": 1}, "y": {"a": 2, "b": 3}, "z": {"a": 1, "b": 3}}
    assert found == value


def test_places_of_an_alias_are_apart() -> None:
    found = parse_yaml("a: &a {b: [1]}\nc: *a\n", "x")
    found["c"]["b"].append(2)
    assert found == {"a": {"b": [1]}, "c": {"b": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 3\nb: 1\na: 7\n", "x, line 3: the key 'a' stands twice, first in line 1"),
        ("o:\n  lr: 0.003\n  lr: 0.5\n", "x, line 3: the key 'lr' stands twice, first in line 2"),
        ("engine: {d: 1}\nstages: []\nengine: {t: 1}\n", "x, line 3: the key 'engine' stands twice"),
        ("{a: 1, 'a': 2}", "x, line 1: the key 'a' stands twice"),
        ("l: [{n: 1}, {n: 1, n: 2}]", "x, line 1: the key 'n' stands twice"),
        ("a: &a {b: 1, b: 2}\nc: {<<: *a}", "x, line 1: the key 'b' stands twice"),
        ("1: x", "x, line 1: the key 1 is not text to YAML; put it in quotes"),
        ("null: x", "the key null is not text"),
        ("~: x", "the key ~ is not text"),
        ("?\n: x", "the key null is not text"),
        ("true: x", "the key true is not text"),
        ("on: x", "the key on is not text"),
        ("1.5: x", "the key 1.5 is not text"),
        ("2020-01-01: x", "the key 2020-01-01 is not text"),
        ("[a]: x", "the key that is a list or mapping is not text"),
        ("? {a: 1}\n: x", "the key that is a list or mapping is not text"),
        ("a: &a [*a]", "does an alias stand inside what it stands for?"),
        ("a: &a {b: {c: *a}}", "does an alias stand inside what it stands for?"),
        (LAUGHS, "more than 100,000 values"),
        ("[" * 3000, "too many lists and mappings"),
        ("a: *nothing", "line 1: not valid YAML: found undefined alias"),
        ("a: [1", "not valid YAML"),
        ("a:\n\t- 1", "line 2: not valid YAML: while scanning for the next token, found character '\\t'"),
        ("a: b: c", "line 1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n b: 2", "line 2: not valid YAML"),
        ("a: @x", "not valid YAML"),
        ("a: \0", "not valid YAML: unacceptable character #x0000"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: expected a single document in the stream, but found another"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        ("a: !mine x", "could not determine a constructor for the tag"),
        ("a: 2020-13-45", "a value cannot be read (month must be in 1..12); put it in quotes"),
        ("a: !!int x", "a value cannot be read"),
        ("a: !!int ''", "a value cannot be read"),
        ("a: !!float ''", "a value cannot be read"),
        ("a: 010", "line 1: 010 is the number 8 to YAML; write 8, or put it in quotes for a text"),
        ("a: -017", "-017 is the number -15 to YAML"),
        ("a: 1:30", "1:30 is the number 90 to YAML; write 90, or put it in quotes"),
        ("a: [1, 1:30.5]", "1:30.5 is the number 90.5 to YAML"),
        ("a: !!bool maybe", "a value cannot be read"),
        ("a: !!timestamp x", "a value cannot be read"),
        ("a: " + "9" * 5000, "a value cannot be read"),
        ("%YAML 9.9\n---\na: 1", "not valid YAML"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "x")
    assert said in str(error.value) and str(error.value).startswith("x")


RUN = b"stages: [{name: a, data: {records: a.json}}]\n"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + RUN, RUN.replace(b"\n", b"\r\n"), b"---\n" + RUN + b"...\n"])
def test_files_that_are_fine(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert load_run(path).stages[0].name == "a"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "run.yaml: expected a mapping of keys, got nothing: the file is empty"),
        (b"# nothing but a comment\n", "got nothing: the file is empty"),
        (b"- name: a\n", "expected a mapping of keys, got [{'name': 'a'}]"),
        (b"just text\n", "expected a mapping of keys, got 'just text'"),
        (RUN.decode().encode("utf-16"), "run.yaml: not UTF-8 text (it is UTF-16); save it as UTF-8"),
        (RUN.decode().replace("a.json", "ä.json").encode("latin-1"), "run.yaml: not UTF-8 text"),
        (b"seed: 1\nseed: 2\n" + RUN, "run.yaml, line 2: the key 'seed' stands twice"),
        (
            b"stages:\n  - name: a\n    data: {records: r}\n    optim:\n      lr: 1\n      lr: 2\n",
            "run.yaml, line 6: the key",
        ),
        (b"engine:\n" + RUN, "run.yaml: engine: expected a mapping of EngineConfig keys, got null"),
        (b"stages:\n", "run.yaml: stages: expected a list of StageConfig, each behind a dash, got null"),
        (b"stages: [null]\n", "run.yaml: stages[0]: expected a mapping of StageConfig keys, got null"),
        (b"base:\n" + RUN, "run.yaml: base: expected the path of a YAML file, got null"),
        (b"base: ''\n" + RUN, "run.yaml: base: expected the path of a YAML file, got ''"),
        (b'base: "a\\0b"\n' + RUN, "run.yaml: base: expected the path of a YAML file"),
        (b"base: .\n" + RUN, "a folder; name a YAML file in it"),
        (b"model: ''\n" + RUN, "run.yaml: model: a section that is text: expected the path of a YAML file, got ''"),
        (b"base: " + b"x" * 400 + b"\n" + RUN, "no such config file"),
    ],
)
def test_files_that_are_not(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_run(path)
    assert said in str(error.value)


def test_a_section_file_is_read_as_strictly(tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text("threads: 1\nthreads: 2\n")
    path = tmp_path / "run.yaml"
    path.write_text("engine: engine.yaml\n" + RUN.decode())
    with pytest.raises(UserError, match=r"engine\.yaml, line 2: the key 'threads' stands twice"):
        load_run(path)
    path.write_bytes(RUN)
    with pytest.raises(UserError, match=r"override 'engine=\{t: 1, t: 2\}', line 1: the key 't' stands twice"):
        load_run(path, ["engine={t: 1, t: 2}"])


@pytest.mark.parametrize("name", ["", "a\0b.yaml", "x" * 400, "."])
def test_config_paths_that_are_none(name: str) -> None:
    with pytest.raises(UserError):
        load_run(name)
