"""The house rules of CONTRIBUTING.md as checks: a rule without one is a wish."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tinyllava_fast"
SOURCES = sorted(p for folder in ("tinyllava_fast", "kernels", "bench") for p in (ROOT / folder).rglob("*.py"))
CPP = sorted(p for suffix in ("*.cpp", "*.h") for p in (ROOT / "csrc").rglob(suffix))

# Lower rooms never import upper ones.
FLOOR = {
    "errors": 0, "commands": 0, "fields": 0, "files": 0, "group": 0, "heartbeat": 0, "log": 0, "pace": 0, "registry": 0,
    "hardware": 0, "page": 0, "paths": 0, "plugins": 0, "slurm": 0, "tensors": 0, "variables": 0, "version": 0, "_C": 0,
    "ops": 1, "kernels": 1, "config": 1,
    "data": 2, "client": 3, "models": 3, "recipes": 4, "prepare": 4,
    "infer": 5, "look": 6, "eval": 7, "serve": 7, "train": 8, "convert": 9, "demo": 9, "bench": 9, "doctor": 10,
}  # fmt: skip


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room(path: Path) -> str:
    base = PACKAGE if PACKAGE in path.parents else ROOT
    return path.relative_to(base).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tinyllava_fast" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 30
    assert len(CPP) > 4


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_downward(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the lazy door to the assistant
    here = room(path)
    assert here in FLOOR, f"{path}: a new room; give it a floor in {__file__}"
    upward = {r for r in imported_rooms(parse(path)) if r != here and FLOOR[r] > FLOOR[here]}
    assert not upward, f"{path.relative_to(ROOT)} ({here}) imports upper rooms: {sorted(upward)}"


@pytest.mark.parametrize("path", [*SOURCES, *CPP], ids=lambda p: str(p.relative_to(ROOT)))
def test_file_caps(path: Path) -> None:
    cap = 400 if path.suffix == ".py" else 500
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= cap, f"{path.relative_to(ROOT)}: {lines} lines, the cap is {cap}; split it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_annotated_and_documented(path: Path) -> None:
    lacking = []
    for owner in [parse(path), *(n for n in ast.walk(parse(path)) if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            kernel = any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)  # types come with the launch
            if not kernel and (bare or node.returns is None):
                lacking.append(f"{node.name}: annotate {bare or 'the return'}")
            if ast.get_docstring(node) is None:
                lacking.append(f"{node.name}: no docstring")
    assert not lacking, f"{path.relative_to(ROOT)}: {lacking}"


def test_every_config_field_is_read_somewhere() -> None:
    schemas = [PACKAGE / "config" / "schema.py", PACKAGE / "config" / "validation.py"]
    fields = {
        f"{node.name}.{item.target.id}"
        for schema in schemas
        for node in parse(schema).body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    assert len(fields) > 40
    read = {
        node.attr
        for path in SOURCES
        if path not in schemas
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute)
    }
    texts = {  # getattr(config, "image_mean")
        node.value
        for path in SOURCES
        if path not in schemas
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    unread = sorted(f for f in fields if f.split(".")[1] not in read | texts)
    assert not unread, f"config fields that nothing reads: {unread}"


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import tinyllava_fast; s = time.perf_counter() - t;"
        "heavy = [m for m in ('torch', 'transformers', 'deepspeed', 'triton') if m in sys.modules];"
        "assert not heavy, heavy; assert s < 0.3, s"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_kernels_has_no_init() -> None:
    """A top-level regular package named kernels would shadow Hugging Face's and break transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_leftovers() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX)\b|import \*|except:\s*$")
    texts = [*SOURCES, *CPP, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marker.search(line)
    ]
    assert not found, found


def puts_in_place(call: ast.Call) -> bool:
    """Whether a call renames or syncs a file. Text has two arguments in replace, a dataclass keywords."""
    text = ast.unparse(call.func)
    if text == "os.replace" or (text.endswith(".replace") and len(call.args) == 1 and not call.keywords):
        return True
    return text.endswith((".rename", ".renames", ".renameat2", ".fsync", ".mkstemp"))


def test_files_are_put_in_their_place_by_one_file() -> None:
    """A log that is appended to syncs itself, as does the stream of tensors into a folder that is put there later."""
    own = [PACKAGE / "files.py", PACKAGE / "train" / "metrics.py", PACKAGE / "train" / "tensor_writer.py"]
    calls = [(p, n) for p in SOURCES if p not in own for n in ast.walk(parse(p)) if isinstance(n, ast.Call)]
    found = [f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in calls if puts_in_place(call)]
    assert not found, f"write these through files.py: {found}"


def test_every_test_file_asserts_something() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 15
    empty = [str(p) for p in files if not re.search(r"assert|raises|opcheck|gradcheck|check_", p.read_text())]
    assert not empty, empty


def test_warnings_are_errors_only_where_it_is_asked_for() -> None:
    """The next compiler's new warning must not stop who installs."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    named = [line.strip() for line in text.splitlines() if re.search(r"-Werror\b", line.partition("#")[0])]
    assert named and all("$<BOOL:${TLF_WERROR}>" in line for line in named)
    assert re.search(r"option\(TLF_WERROR .* OFF\)", text)
    assert "-DTLF_WERROR=ON" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-Werror" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CPP, ids=lambda p: p.name)
def test_pragmas_of_one_compiler_are_guarded(path: Path) -> None:
    """clang takes a group of warnings that it does not know for a warning itself, and lacks some of GCC's pragmas."""
    open_conditions: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#if"):
            open_conditions.append(line)
        elif line.startswith(("#else", "#elif")):
            open_conditions[-1] = line
        elif line.startswith("#endif"):
            open_conditions.pop()
        guarded = any("!defined(__clang__)" in condition for condition in open_conditions)
        known = line.startswith("#pragma GCC unroll ")  # clang has it too
        assert guarded or known or not re.match(r"#pragma (GCC|clang)\b", line), f"{path}:{number}: {line}"
