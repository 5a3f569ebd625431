"""A component is one new file: a registry finds it, and so do the help text, the error texts and the tests' tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    "models.connectors": """
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.connectors.resampler import ResamplerConnector

@CONNECTORS.register("fresh_connector")
class FreshConnector(ResamplerConnector):
    name = "fresh_connector"
""",
    "models.vision": """
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.models.vision.clip import CLIPTower

@VISION.register("fresh_tower")
class FreshTower(CLIPTower):
    name = "fresh_tower"
""",
    "models.llm": """
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS

@LLMS.register("fresh_family")
class FreshFamily(AutoLLM):
    name = "fresh_family"
    model_types = ("olmo2",)
    template = "fresh_template"
""",
    "data.templates": """
from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("fresh_template")(Template(eos="</s>"))
""",
    "data.formats": """
from tinyllava_fast.data.formats._base import RECORD_FORMATS, RecordFormat, Row

class FreshFormat(RecordFormat):
    def matches(self, head):
        return head.start.startswith(b"fresh:")

    def rows(self, path, base, opened):
        for line, text in enumerate(path.read_text().splitlines()[1:], 1):
            yield Row({"question": text, "answer": "yes"}, line, refer=str)

RECORD_FORMATS.register("fresh_format")(FreshFormat())
""",
    "recipes": """
from tinyllava_fast.recipes.base import RECIPES, Recipe

@RECIPES.register("fresh_recipe")
class FreshRecipe(Recipe):
    def apply(self, lmm, recipe, *, seed):
        lmm.requires_grad_(True)
""",
    "train.optimizers": """
from tinyllava_fast.train.optimizers.adamw import AdamW
from tinyllava_fast.train.optimizers.base import OPTIMIZERS

@OPTIMIZERS.register("fresh_optimizer")
class FreshOptimizer(AdamW):
    pass
""",
    "train.loggers": """
from tinyllava_fast.train.loggers.base import LOGGERS
from tinyllava_fast.train.loggers.tensorboard import TensorBoard

@LOGGERS.register("fresh_logger")
class FreshLogger(TensorBoard):
    pass
""",
    "eval.benchmarks": """
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.pope import POPE

@BENCHMARKS.register("fresh_benchmark")
class FreshBenchmark(POPE):
    pass
""",
}
LOOK = """
import importlib, sys
from pathlib import Path
from types import SimpleNamespace

for folder in list(Path(sys.argv[1]).iterdir()):
    importlib.import_module(f"tinyllava_fast.{folder.name}").__path__.append(str(folder))

from tests.models.llm.families import CONFIGS
from tests.models.test_matrix import TRIPLES
from tests.models.test_parts import CONNECTOR_OPTIONS, TOWERS
from tests.models.vision.families import FAMILIES, random_tower
from tinyllava_fast.config.load import describe
from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.models.checkpoints._parts import fitting_template
from tinyllava_fast.train.cli import _registered

text = " ".join(describe(names=_registered()).split())
for name in ("connector", "tower", "family", "template", "recipe", "optimizer", "logger", "benchmark"):
    assert f" fresh_{name}" in text, f"tlf-train --help lacks fresh_{name}"
try:
    BENCHMARKS.get("fresh_benchmarks")
except UserError as error:
    assert "did you mean 'fresh_benchmark'" in str(error), error
assert CONFIGS["fresh_family"]["hidden_size"] == TOWERS["fresh_tower"]["config"]["hidden_size"] == 32
assert CONNECTOR_OPTIONS["fresh_connector"]["num_queries"] == 3
assert FAMILIES["fresh_tower"].prefix == 1 and random_tower("fresh_tower").hidden_size == 24
assert {"fresh_family", "fresh_tower", "fresh_connector"} <= {name for triple in TRIPLES for name in triple}
records = Path(sys.argv[1], "records")
records.write_text("fresh:\\nis it new ?")
assert [record.turns for record in read_records(records)] == [(("is it new ?", "yes"),)]
tokenizer = SimpleNamespace(eos_token="</s>")
assert fitting_template(tokenizer, "olmo2") == "fresh_template" and fitting_template(tokenizer, "llama") == "llama"
"""


def test_one_new_file_is_found_everywhere(tmp_path: Path) -> None:
    for package, text in FILES.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "fresh.py").write_text(text)
    done = subprocess.run([sys.executable, "-c", LOOK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
