"""A file below configs/ that is not here is the installed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_fast.config import load


def test_the_packages_own_file_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site" / "tinyllava_fast"
    (installed / "configs").mkdir(parents=True)
    (installed / "configs" / "demo.yaml").write_text("seed: 1")
    monkeypatch.setattr(load, "__file__", str(installed / "config" / "load.py"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = Path("configs/demo.yaml")
    assert load.shipped(name) == installed / name
    assert load.shipped(Path("configs/other.yaml")) == Path("configs/other.yaml")
    assert load.shipped(Path("demo.yaml")) == Path("demo.yaml")
    (tmp_path / "here" / "configs").mkdir()
    name.write_text("seed: 2")
    assert load.shipped(name) == name
