"""Sources of pretrained files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.sources import read_tokenizer, resolve


def test_a_gguf_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not gguf")
    with pytest.raises(UserError, match=r"m\.gguf: no tokenizer can be read"):
        read_tokenizer(*resolve(str(tmp_path), None, "model.llm"))
