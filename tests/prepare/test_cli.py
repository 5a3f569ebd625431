from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.prepare.cli import main


def test_init_says_what_to_do_next(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(own / "my.yaml")
    assert main(["init", str(own / "records.json"), str(own / "images"), out, "--vocab", "300"]) == 0
    assert f"next: tlf-train {out}" in capsys.readouterr().err
    assert len(load_tokenizer(own / "my-tokenizer")) <= 300


def test_tokenizer_of_several_files(own: Path) -> None:
    files = [str(own / "records.json")] * 2
    assert main(["tokenizer", *files, str(own / "tok"), "--vocab", "280"]) == 0
    tokenizer = load_tokenizer(own / "tok")
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert len(tokenizer) == 280
    text = "It is Ünknown 🐱"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "{own}/records.json", "{own}/images"], "exists; choose another folder"),
        (["tokenizer", "{own}/none.json", "{own}/new"], "none.json: cannot"),
        (["tokenizer", "{own}/records.json", "{own}/new", "--vocab", "-1"], "a vocabulary of -1 is too small"),
        (
            ["tokenizer", "{own}/records.json", "{own}/new", "--vocab", "9" * 30],
            "is too large; give 1,048,576 at most",
        ),
        (["init", "{own}/records.json", "{own}", "{own}/new.yaml"], "8 of 8 images are not in"),
        (["init", "{own}/images/0.png", "{own}/images", "{own}/new.yaml"], "not UTF-8 text"),
        (
            ["init", "{own}/records.json", "{own}/images", "{own}/new.yaml", "--llm", "x", "--vocab", "300"],
            "--vocab: a",
        ),
        (["init", "{own}/records.json", "{own}/images", "/proc/nope/new.yaml"], "cannot be written"),
    ],
)
def test_mistakes_exit_with_2(
    arguments: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(own=own) for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(own.glob("new*"))
