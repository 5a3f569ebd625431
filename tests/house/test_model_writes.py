"""Nothing outside models/ assigns to an attribute of an LMM or of its config: the model's own methods do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("tinyllava_fast", "kernels", "bench") for p in (ROOT / folder).rglob("*.py"))
MODELS = ROOT / "tinyllava_fast" / "models"

# An LMM goes by these names, alone or as an attribute: lmm.x, self.model.config.x, engine.lmm.x.
MODEL = re.compile(r"(?:.*\.)?(?:lmm|model)(?:\.config)?")
ALLOWED = {
    ("tinyllava_fast/train/compile.py", "model.forward"),  # put back when the stage ends, as torch.compile has it
    ("bench/infer.py", "sides.engine.model.logits"),  # a stopwatch around the prepared model, removed again
}


def written(tree: ast.AST) -> Iterator[str]:
    """Attributes of a model or its config that the code assigns to, deletes, or sets by name."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "object.__setattr__"):
            if MODEL.fullmatch(owner := ast.unparse(node.args[0])):
                yield f"{owner}.{ast.unparse(node.args[1])}"
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
                    if MODEL.fullmatch(ast.unparse(part.value)):
                        yield ast.unparse(part)


def test_only_models_writes_to_a_model() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in SOURCES
        if MODELS not in path.parents
        for name in written(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    }
    assert not found - ALLOWED, "give LMM a method for it (models/lmm.py)"


def test_writes_are_found() -> None:
    code = """
lmm.z_loss, self.model.config.turns = 0.1, "independent"
engine.lmm.config: object = None
del model.peft_config
setattr(lmm, "project", None)
x = lmm.config
self.model = lmm
model.loss += 1
lmm.llm.lm_head.weight = w
"""
    assert set(written(ast.parse(code))) == {
        "lmm.z_loss",
        "self.model.config.turns",
        "engine.lmm.config",
        "model.peft_config",
        "lmm.'project'",
        "model.loss",
    }
