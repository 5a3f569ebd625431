"""The GPU run: its plan, a runner that no step can stop, what it leaves behind, and steps of it on a CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from tinyllava_fast.bench import bundle, cli, gpu, gpu_page, predict
from tinyllava_fast.bench.case import Work
from tinyllava_fast.bench.gpu_job import AGAIN, STEPS, Job, read_lines, rows_of, rows_path, work_folder
from tinyllava_fast.bench.gpu_settings import PLAN, GpuSettings
from tinyllava_fast.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "machine": """
print("garbage {", flush=True)
out.write('{"row": "first", "ms": 1.5}\\n{"row": "half')
""",
    "kernels": """
begun = {json.loads(line).get("begun") for line in open(path)} if os.path.exists(path) else set()
for name in ("good", "deadly", "better"):
    if name in begun:
        continue
    say(begun=name)
    if name == "deadly":
        os.kill(os.getpid(), 9)
    say(row=name, ok=True)
    say(ended=name)
""",
    "opcheck": 'say(row="before"); subprocess.Popen(["sleep", "300"]); time.sleep(300)',
    "train": 'say(row="wrong", ok=False, error="a|b"); sys.exit(3)',
    "infer": 'say(row="fine", ok=True)',
}
HEAD = """
import json, os, subprocess, sys, time
path = sys.argv[1]
out = open(path, "a", buffering=1)
def say(**line): out.write(json.dumps(line) + "\\n")
"""


class Scripted(gpu.Run):
    """Runs scripts in the place of the steps."""

    def command(self, step: str) -> list[str]:
        return [sys.executable, "-S", "-c", HEAD + SCRIPTS[step], str(rows_path(self.folder, step))]


def test_the_plan_names_every_step() -> None:
    assert set(PLAN) == set(STEPS.names())
    assert [step for step, (_, timed, _) in PLAN.items() if not timed] == ["kernels", "opcheck", "parity"]
    for text in (ROOT / "docs" / "gpu.md").read_text().splitlines():
        if text.startswith("| `"):
            assert text.split("`")[1] in PLAN


def test_no_step_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu, "EVERY_S", 0.1)
    work_folder(tmp_path).mkdir()
    run = Scripted(GpuSettings(steps=tuple(SCRIPTS), dry_run=True), tmp_path)
    next(step for step in run.steps if step.name == "opcheck").limit = 2.0  # imports nothing
    began = time.monotonic()
    run.go()
    assert time.monotonic() - began < 120
    report = json.loads((tmp_path / "gpu.json").read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {
        "machine": "done", "kernels": "done", "opcheck": "timeout", "train": "failed", "infer": "done",
    }  # fmt: skip
    assert steps["machine"]["rows"] == {"first": {"ms": 1.5}} and "garbage" in steps["machine"]["tail"]
    assert list(steps["kernels"]["rows"]) == ["good", "better"] and steps["kernels"]["crashed"] == ["deadly"]
    assert list(steps["opcheck"]["rows"]) == ["before"] and steps["train"]["problems"] == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "A dry run" in page and "a\\|b" in page and "deadly | its process ended" in page
    assert "garbage" in (tmp_path / "log.txt").read_text()


def test_without_time_a_step_is_left_out(tmp_path: Path) -> None:
    work_folder(tmp_path).mkdir()
    run = Scripted(GpuSettings(minutes=0.01, steps=("infer",), dry_run=True), tmp_path)
    run.go()
    assert [step.status for step in run.steps] == ["left out"]
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"][0]["error"] == "no time was left"


@pytest.mark.parametrize("words", [["--step", "kernel"], ["--minutes", "0"], ["--out", "/dev/null/x", "--dry-run"]])
def test_mistakes_exit_with_2(words: list[str]) -> None:
    assert cli.main(["gpu", *words]) == 2


def test_a_folder_with_results_is_kept(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(UserError, match="results of another run"):
        gpu.benchmark(GpuSettings(dry_run=True, out=tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            gpu.benchmark(GpuSettings(out=tmp_path / "new"))


def test_items_go_on_where_a_process_ended(tmp_path: Path) -> None:
    work_folder(tmp_path).mkdir()
    ran: list[str] = []

    def item(name: str) -> None:
        ran.append(name)
        if name == "b":
            raise ValueError("\n  no such thing\nat all")

    Job("ops", tmp_path, tiny=True).each(["a", "b"], 60, item)
    Job("ops", tmp_path, tiny=True).each(["a", "b", "c"], 60, item)
    assert ran == ["a", "b", "c"]
    rows = rows_of(read_lines(rows_path(tmp_path, "ops")))
    assert rows == {"b": {"ok": False, "error": "ValueError: no such thing | at all"}}


def test_a_gpu_that_takes_no_more_work_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_folder(tmp_path).mkdir()
    job = Job("ops", tmp_path, tiny=False)

    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit) as ended:
        job.each(["a"], 60, broken)
    assert ended.value.code == AGAIN
    assert "illegal" in rows_of(read_lines(rows_path(tmp_path, "ops")))["a"]["error"]


def test_two_steps_on_a_cpu(tmp_path: Path) -> None:
    work_folder(tmp_path).mkdir()
    for step in ("machine", "ops"):
        STEPS.get(step)(Job(step, tmp_path, tiny=True))
    machine, ops = (rows_of(read_lines(rows_path(tmp_path, step))) for step in ("machine", "ops"))
    assert machine["roof"]["flops_per_s"] > 0 and machine["extension"]["ok"]
    assert any(
        name.startswith("splice") and row["medians"]["ours"] > 0 for name, row in ops.items() if "medians" in row
    )
    step = gpu.Step("ops", 1.0, True, rows=ops)
    page = gpu_page.page(
        {"seconds": 1.0, "settings": {"minutes": 8, "dry_run": True}, "steps": [vars(step) | {"problems": 0}]}
    )
    assert "forward+backward: ours" in page


@pytest.mark.slow
def test_the_page_is_what_the_command_writes() -> None:
    path = ROOT / "docs" / "gpu.md"
    assert predict.page(predict.benchmark(), path) == path.read_text()


def test_a_kernel_takes_the_longer_of_its_bounds() -> None:
    launch = predict.kernel_seconds(Work(), "h100")
    products, bytes_ = (predict.kernel_seconds(work, "h100") for work in (Work(1e12, 1.0), Work(1.0, 1e9)))
    assert [x["bound"] for x in (launch, products, bytes_)] == ["launch", "operations", "memory"]
    assert products["seconds"] == pytest.approx(launch["seconds"] + 1e12 / (0.5 * 989.4e12))
    assert bytes_["seconds"] == pytest.approx(launch["seconds"] + 1e9 / (0.8 * 3.35e12))
    assert [predict.gpu_named(name) for name in ("NVIDIA H200", "NVIDIA GeForce RTX 4090", "Tesla T4")] == [
        "h200",
        "rtx4090",
        None,
    ]
    assert predict.kernel_seconds(Work(0.0, 1e9), "a100")["seconds"] > bytes_["seconds"]


def test_a_page_needs_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"text {predict.BEGIN}")
    with pytest.raises(UserError, match="lacks the line"):
        predict.page({}, path)
    with pytest.raises(UserError, match="cannot read it"):
        predict.page({}, tmp_path / "none.md")


def test_the_bundle_knows_what_it_lacks() -> None:
    held = [f"{package.replace('-', '_')}-1.0-py3-none-any.whl" for package in bundle.PACKAGES]
    assert bundle.lacking(held) == []
    assert bundle.lacking(held[1:]) == [next(iter(bundle.PACKAGES))]
    assert set(bundle.BUILT) <= set(bundle.PACKAGES)
