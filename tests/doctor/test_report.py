"""The block for a bug report names no folder, user or host."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from tinyllava_fast.doctor import report
from tinyllava_fast.doctor.cli import main
from tinyllava_fast.doctor.examine import Examined
from tinyllava_fast.doctor.finding import fault, ok


def test_no_private_path_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "erika")
    monkeypatch.setattr(socket, "gethostname", lambda: "geheim7")
    monkeypatch.chdir(tmp_path)
    environment = {"TLF_CACHE": "/data/secret project/cache", "HOME": "/home/erika"}
    text = (
        "cache /data/secret project/cache/x, /home/erika/.cache and /srv/kunde/plan.json: erika on geheim7 "
        f"at {tmp_path}/run; /sys/fs/cgroup stays, erikas too, 1/2 and a/b"
    )
    said = report.without_names(text, environment)
    assert said == (
        "cache $TLF_CACHE/x, ~/.cache and <path>: <user> on <host> at <here>/run; /sys/fs/cgroup stays, erikas too, "
        "1/2 and a/b"
    )


def test_the_block(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "mine"))
    assert main(["--only", "caches", "--report"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("```text\ntinyllava_fast ") and "ok    caches     the cache folder, $TLF_CACHE, can" in text
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text


def test_lines_and_summary() -> None:
    one = Examined("gpu", (ok("fine"), fault("bad", "mend it")), 0.25)
    assert list(report.lines(one)) == ["ok    gpu        fine", "FAULT gpu        bad", " " * 17 + "-> mend it"]
    assert report.summary([one, one]) == "2 faults, 0 notes, 0.5 s"
    assert not report.as_json([one])["healthy"]
