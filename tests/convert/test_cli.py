from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.models.checkpoints.golden import folder
from tests.vectors import GOLDEN
from tinyllava_fast.convert.cli import main
from tinyllava_fast.convert.convert import export_model, import_checkpoint, merge_adapter
from tinyllava_fast.convert.formats._base import FORMATS
from tinyllava_fast.data.pictures import REFERENCE, PictureReading
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.checkpoints._base import Sources

NAME = "llava15-tinyllama-clip"
CLIP = str(GOLDEN / "components" / "tiny-clip")


def test_import_then_export(tmp_path: Path) -> None:
    ours, llava = str(tmp_path / "ours"), str(tmp_path / "llava")
    assert main(["import", str(folder(NAME)), ours, "--vision", CLIP, "--dtype", "bfloat16"]) == 0
    lmm = io.load_model(ours)[0]
    assert (lmm.dtype, lmm.config.template, lmm.config.image_mode) == (torch.bfloat16, "llama", "pad")
    assert main(["export", ours, llava, "--format", "llava", "--dtype", "float32"]) == 0
    assert io.load_model(llava)[0].dtype == torch.float32
    names = ["--llm-name", "a/b", "--vision-name", "c/d"]
    assert main(["export", llava, str(tmp_path / "factory"), "--format", "factory", *names]) == 0
    assert io.load_model(tmp_path / "factory")[0].config.origin["llm"] == "a/b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{model}", "{model}"], "exists; choose another folder"),
        (["import", "{none}", "{new}"], "not a model folder: it does not exist"),
        (["import", "{model}", "{new}", "--vision", CLIP, "--template", "lama"], "unknown chat template 'lama'"),
        (["import", "{model}", "{new}", "--vision", CLIP, "--template", "phi"], "choose the template whose end token"),
        (["import", "{model}", "{new}", "--vision", "{none}"], "is neither a folder"),
        (["export", "{model}", "{new}", "--format", "coreml"], "unknown export format 'coreml'"),
    ],
)
def test_mistakes_exit_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"model": str(folder(NAME)), "none": str(tmp_path / "none"), "new": str(tmp_path / "new")}
    assert main([a.format(**places) if "{" in a else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"orientation": "stored", "background": "drop"}, ""),
        ({"orientation": "upright", "background": "drop"}, "it sees turned pictures as they are stored"),
        ({"orientation": "stored", "background": "white"}, "it sees transparent ones without their transparency"),
        (
            {"orientation": "upright", "background": "white"},
            "for which llava has no place: there, and when it is imported again, it sees turned pictures as they are "
            "stored and transparent ones without their transparency",
        ),
    ],
)
def test_pictures_that_an_export_sees_otherwise_are_said(
    reading: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, llava = tmp_path / "ours", tmp_path / "llava"
    assert main(["import", str(folder(NAME)), str(ours), "--vision", CLIP]) == 0
    assert io.load_model(ours)[0].config.reading == REFERENCE
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "reading": reading}))
    assert io.load_model(ours)[0].config.reading == PictureReading(**reading)
    capsys.readouterr()
    assert main(["export", str(ours), str(llava), "--format", "llava"]) == 0
    error = capsys.readouterr().err
    assert said in error and ("has no place" in error) == bool(said)
    assert io.load_model(llava)[0].config.reading == REFERENCE


def test_our_own_folder_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(folder(NAME)), str(tmp_path / "a"), "--vision", CLIP]) == 0
    assert main(["import", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "is a model folder of this toolkit already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")


def test_every_format_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    known = ["adapter", "factory", "gguf", "hub", "llava", "mlx", "onnx", "openvino"]
    assert FORMATS.names() == known and all(name in text for name in known)


def test_what_an_export_has_no_use_for(tmp_path: Path) -> None:
    ours = import_checkpoint(folder(NAME), tmp_path / "ours", sources=Sources(vision=CLIP))
    with pytest.raises(UserError, match=r"--llm-name: llava states no hub ids; leave it out, or give --format factory"):
        export_model(ours, tmp_path / "a", "llava", names={"llm": "x"})
    with pytest.raises(UserError, match=r"--vision x: .*ours is a model folder of this toolkit and has that part"):
        export_model(ours, tmp_path / "a", "llava", sources=Sources(vision="x"))
    (ours / "adapter").mkdir()
    with pytest.raises(UserError, match=r"it has no config.json; the folder around it is one: .*ours$"):
        merge_adapter(ours / "adapter", tmp_path / "a")
    with pytest.raises(UserError, match=r"cannot write the folder: .*name another folder"):
        export_model(ours, ours / "config.json" / "x", "llava")
    with pytest.raises(UserError, match="too long"):
        export_model(ours, tmp_path / ("x" * 300), "llava")
    assert not (tmp_path / "a").exists()
