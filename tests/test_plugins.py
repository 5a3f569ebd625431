"""Components from outside the package, as CONTRIBUTING says: one file each, named in a YAML, nothing else changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import prepare
from tinyllava_fast.errors import UserError
from tinyllava_fast.plugins import load_plugins

CONNECTOR = '''
from dataclasses import dataclass
from torch import nn
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("gated")
class GatedConnector(Connector):
    """A linear map with a learnt gate on each of its outputs."""

    name = "gated"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        bias: bool = True

    def __init__(self, vision_size, llm_size, options=None):
        super().__init__(vision_size, llm_size, options)
        self.value = nn.Linear(vision_size, llm_size, bias=self.options.bias)
        self.gate = nn.Linear(vision_size, llm_size)

    def forward(self, features):
        return self.value(features) * self.gate(features).sigmoid()
'''
LLM = '''
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS


@LLMS.register("granny")
class Granny(AutoLLM):
    """A family of its own: OLMo 2, whose answers end as Llama's do."""

    name = "granny"
    model_types = ("olmo2",)
    template = "shout"
'''
TEMPLATE = """
from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("shout")(Template(eos="</s>", system="LOUD"))
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A run that names a connector, a language model and a template which the package does not have."""
    for name, text in (("gated", CONNECTOR), ("granny", LLM), ("shout", TEMPLATE)):
        (tmp_path / f"{name}.py").write_text(text)
    path = prepare(tmp_path)
    run = yaml.safe_load(path.read_text())
    run["plugins"] = ["gated.py", "granny.py", "shout.py"]
    run["model"]["llm"]["type"] = "granny"
    run["model"]["llm"]["config"]["model_type"] = "olmo2"
    run["model"]["connector"] = {"type": "gated", "options": {"bias": False}}
    run["stages"] = [run["stages"][1] | {"max_steps": 4}]
    run["stages"][0]["data"]["template"] = "shout"
    path.write_text(yaml.safe_dump(run))
    return path


USE = """
import sys
from pathlib import Path
from tinyllava_fast.errors import UserError
from tinyllava_fast.plugins import load_plugins
import tinyllava_fast
try:
    tinyllava_fast.load("run/final")
except UserError as error:
    assert "unknown language model 'granny'" in str(error), error
else:
    raise AssertionError("a model folder must not bring its own code")
load_plugins(["gated.py", "granny.py", "shout.py"])
model = tinyllava_fast.load("run/final")
assert model.engine.template.system == "LOUD"
assert type(model.engine.lmm.connector).__name__ == "GatedConnector"
assert isinstance(model.answer(next(Path("images").glob("*.png")), "what colour is it ?", max_new_tokens=2), str)
"""


def test_one_file_each_trains_and_answers(outside: Path) -> None:
    folder = outside.parent
    for arguments in (["-m", "tinyllava_fast.train.cli", outside.name], ["-c", USE]):
        done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "summary.json").is_file()


def test_a_name_without_its_plugin_lists_what_there_is(outside: Path) -> None:
    run = [sys.executable, "-m", "tinyllava_fast.train.cli", outside.name, "plugins=[granny.py, shout.py]"]
    done = subprocess.run(run, cwd=outside.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert "model.connector.type: unknown connector 'gated'; " in done.stderr and "mlp2x_gelu" in done.stderr


def test_plugins_that_fail_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import math\nmath.nothing\n")
    with pytest.raises(UserError, match=r"broken\.py' cannot be imported: AttributeError: .*nothing"):
        load_plugins([str(broken)])
    with pytest.raises(UserError, match=r"absent\.py' cannot be imported: FileNotFoundError: .*does not exist"):
        load_plugins([str(tmp_path / "absent.py")])
    with pytest.raises(UserError, match="no_such_module_at_all"):
        load_plugins(["no_such_module_at_all"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit(0)\n", "called sys.exit while it was imported (exit code 0); guard it with if __name__"),
        ("import sys\n\ndef main():\n    return 0\n\nsys.exit(main())\n", "called sys.exit"),
        ("raise SystemExit\n", "called sys.exit while it was imported (exit code None)"),
        ("quit('bye')\n", "called sys.exit while it was imported (exit code 'bye')"),
        ("class Odd(BaseException): ...\nraise Odd('x')\n", "cannot be imported: Odd: x"),
        ("raise GeneratorExit\n", "cannot be imported: GeneratorExit"),
        ("import nothing_of_that_name\n", "cannot be imported: ModuleNotFoundError"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("x = '\\ud800'.encode()\n", "cannot be imported: UnicodeEncodeError"),
        ("def f(): f()\nf()\n", "cannot be imported: RecursionError"),
    ],
)
def test_plugins_that_end_while_they_are_imported(text: str, said: str, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(text)
    for _ in range(2):  # a failed import is forgotten, not half remembered
        with pytest.raises(UserError) as error:
            load_plugins([str(plugin)])
        assert "mine.py'" in str(error.value) and said in str(error.value)


def test_ctrl_c_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugins([str(tmp_path / "mine.py")])


def test_a_plugin_that_exits_is_no_success(outside: Path) -> None:
    (outside.parent / "exits.py").write_text("import sys\nsys.exit()\n")
    run = [sys.executable, "-m", "tinyllava_fast.train.cli", outside.name, "plugins=[exits.py]"]
    done = subprocess.run(run, cwd=outside.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "plugin 'exits.py' called sys.exit" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the name is empty"),
        (" ", "the name is empty"),
        ("{}", "a folder; name the Python file in it"),
        ("{}/notes.txt", "a file whose name does not end in .py"),
        (
            "{}/absent",
            "neither a Python file (ending in .py, relative to the working directory) nor the name of a module",
        ),
        ("./absent", "neither a Python file"),
        (".relative", "neither a Python file"),
        ("a..b", "neither a Python file"),
        ("no-module", "neither a Python file"),
        ("{}/absent.py", "does not exist"),
        ("{}/folder.py", "does not exist"),
        (".py", "does not exist"),
    ],
)
def test_names_that_are_no_plugins(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError) as error:
        load_plugins([name.format(tmp_path)])
    assert said in str(error.value) and "plugin '" in str(error.value)


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    path = tmp_path / "counting.py"
    path.write_text("import builtins\nbuiltins.tlf_counted = getattr(builtins, 'tlf_counted', 0) + 1\n")
    load_plugins([str(path), str(path)])
    load_plugins([str(path)])
    import builtins

    assert builtins.__dict__.pop("tlf_counted") == 1
