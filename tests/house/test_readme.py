"""Commands and snippets of the README, and of pages that a newcomer follows, are run, so that they can't rot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import tinyllava_fast
from tests.docs import pages
from tests.examples import write_example
from tests.models.checkpoints import golden
from tests.tiny import make_model, make_tokenizer, tiny_config
from tests.train.conftest import prepare
from tinyllava_fast.convert.cli import main as tlf_convert
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CHECKPOINTS, OWN_DATA = (ROOT / "docs" / f"{name}.md" for name in ("checkpoints", "own_data"))


def blocks(language: str, page: Path = README) -> list[str]:
    found = pages.blocks(page, language)
    assert found, f"{page.name} has no {language} block"
    return found


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def commands(program: str, page: Path = README) -> list[list[str]]:
    found = [list(command.words) for command in pages.commands(page) if command.program == program and command.whole]
    assert found, f"{page.name} shows no {program} command"
    return found


PAPER = next(words for words in commands("tlf-train", ROOT / "docs" / "recipes.md") if "paper" in words[0])


@pytest.mark.parametrize("words", [*commands("tlf-train"), PAPER], ids=lambda w: Path(w[0]).stem)
def test_training_commands_parse(words: list[str], tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs" / "mine.yaml", tmp_path / "my.yaml")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run = [sys.executable, "-m", "tinyllava_fast.train.cli", *words, "--print_config"]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    for override in words[1:]:
        assert override.partition("=")[2] in done.stdout


def test_convert_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny checkpoints of the reference, put where docs/checkpoints.md says they are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.folder("tinyllama-clip-mlp2x_gelu-mono"), "checkpoints/old")
    shutil.copytree(golden.folder("phi-siglip-mlp2x_gelu-mono"), "checkpoints/tiny-llava-phi-2-siglip-finetune")
    assert tlf_convert(["import", "checkpoints/old", "runs/my/final"]) == 0
    for kind in ("import", "export"):
        words = next(words for words in commands("tlf-convert", CHECKPOINTS) if words[0] == kind)
        assert tlf_convert(words) == 0, words
    assert (tmp_path / "runs/mine/config.json").is_file() and (tmp_path / "out/config.json").is_file()
    scope: dict[str, object] = {"tinyllava_fast": tinyllava_fast}
    exec(blocks("python", CHECKPOINTS)[0], scope)
    assert isinstance(scope["model"], Assistant)


def test_the_python_snippet_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), tmp_path / "runs/my/final")
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(blocks("python")[0] + blocks("python", OWN_DATA)[0], scope)
    assert isinstance(scope["answer"], str) and isinstance(scope["both"], str)
    assert len(scope["answers"]) == 2 and scope["scores"].options == ("cat", "dog")  # type: ignore[arg-type, attr-defined]


def test_own_data_from_records_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the README on its own record and question; training is cut short."""
    from tinyllava_fast.eval.cli import main as tlf_eval
    from tinyllava_fast.prepare.cli import main as tlf_data
    from tinyllava_fast.train.cli import main as tlf_train

    monkeypatch.chdir(tmp_path)
    record, question = blocks("json")[:2]
    Path("data/images").mkdir(parents=True)
    Path("data/records.json").write_text(record)
    Path("data/questions.jsonl").write_text(question.strip())
    Image.new("RGB", (40, 30), (200, 30, 30)).save("data/images/cat.jpg")
    (init,) = commands("tlf-data")
    assert tlf_data(init) == 0
    for words in commands("tlf-data", OWN_DATA):
        if words[0] in ("check", "preview", "stats", "convert"):  # one record cannot be split, and init ran above
            assert tlf_data(words) == 0, words
    train = next(words for words in commands("tlf-train") if words[0] == "my.yaml")
    assert tlf_train([*train, "stages.train.max_steps=2", "engine.workers=0", "engine.threads=1"]) == 0
    (evaluate,) = commands("tlf-eval")
    assert tlf_eval([*evaluate, "--device", "cpu"]) == 0
    assert "my" in Path("runs/my/eval/report.html").read_text(encoding="utf-8")


def test_the_record_is_valid() -> None:
    (record,) = json.loads(blocks("json")[0])
    assert [m["from"] for m in record["conversations"]] == ["human", "gpt"]


def test_the_worked_plugin_trains_and_answers(tmp_path: Path) -> None:
    """The connector that docs/plugins.md shows, in a run and in Python."""
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    write_example(tmp_path, "mine.py")
    path = prepare(tmp_path)
    run, extra = (yaml.safe_load(t) for t in (path.read_text(encoding="utf-8"), shown))
    run["plugins"], run["model"]["connector"] = extra["plugins"], extra["model"]["connector"]
    run["stages"] = [run["stages"][1] | {"max_steps": 2}]
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    use = (
        "import tinyllava_fast as t\n"
        "try: t.load('run/final')\n"
        "except ValueError as e: assert 'load(..., plugins=[FILE])' in str(e), e\n"
        "model = t.load('run/final', plugins=['mine.py'])\n"
        "assert type(model.engine.lmm.connector).__name__ == 'Gated'\n"
        "assert model.engine.lmm.connector.value.bias is None\n"
    )
    for arguments in (["-m", "tinyllava_fast.train.cli", path.name], ["-c", use]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def test_commands_in_configs_name_files_that_exist() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for name in re.findall(r"configs/\S+\.yaml", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"
