"""The API reference has every public name, and nothing that is not there."""

from __future__ import annotations

import re
from importlib import import_module

import tinyllava_fast
from tests.docs.pages import DOCS, read
from tinyllava_fast import ops

TEXT = read(DOCS / "reference.md")
LISTED = re.findall(r"^::: (\S+)$", TEXT, re.MULTILINE)


def test_every_public_name_is_on_the_page() -> None:
    for name in tinyllava_fast.__all__:
        assert f"tinyllava_fast.{name}" in TEXT, name
    assert {f"tinyllava_fast.ops.{name}" for name in ops.__all__} <= set(LISTED)


def test_every_name_on_the_page_exists_and_is_documented() -> None:
    assert len(LISTED) > 30 and len(LISTED) == len(set(LISTED))
    for name in LISTED:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name
