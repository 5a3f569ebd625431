"""The questions of an evaluation, checked before a model loads: files, records, images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.benchmarks.base import Benchmark, Count, Files, Question
from tinyllava_fast.eval.files import is_file
from tinyllava_fast.log import log


@dataclass(frozen=True)
class Plan:
    """A benchmark with its files and questions. everything: all of them; questions: those to be asked (--limit)."""

    benchmark: Benchmark
    files: Files
    everything: Sequence[Question]
    limit: int | None
    missing_images: Sequence[Path]

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.benchmark.name

    @property
    def questions(self) -> Sequence[Question]:
        """The questions to be asked, in file order."""
        return self.everything[: self.limit]

    @property
    def counts(self) -> list[Count]:
        """Records of the whole benchmark against the official release."""
        return self.benchmark.counts(self.files, self.everything)

    def report(self) -> str:
        """Return the text of --dry-run: files, counts, the first prompt."""
        lines = [f"{self.benchmark.title} ({self.name})"]
        lines += [f"  {what}: {path}" for what, path in self.files.items()]
        lines += [f"  {count}" for count in self.counts] or [f"  questions: {len(self.everything):,}"]
        pairs = {(q.images, q.prompt) for q in self.questions if q.canned is None}
        lines.append(f"  to be asked: {len(self.questions):,} questions, {len(pairs):,} different")
        first = self.questions[0]
        shown = "\n    ".join(first.prompt.splitlines())
        lines.append(
            f"  first prompt, id {first.id!r}, {', '.join(map(str, first.images)) or 'no image'}:\n    {shown}"
        )
        return "\n".join(lines)


def make_plans(
    benchmarks: Iterable[Benchmark], root: str | Path, *, limit: int | None = None, missing_images: str = "error"
) -> list[Plan]:
    """Locate and read every benchmark. missing_images: "error"; "empty": score them as empty answers, if there
    are others; "ignore": no image is looked at.

    Warns, one line each, of counts that differ from the official release. Raises one UserError that lists all problems.
    """
    plans, problems = [], []
    for benchmark in benchmarks:
        try:
            plans.append(_plan(benchmark, Path(root), limit, missing_images))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return plans


def _plan(benchmark: Benchmark, root: Path, limit: int | None, missing_images: str) -> Plan:
    files = benchmark.locate(root)
    everything = benchmark.questions(files)
    _check_keys(benchmark.name, everything)
    if not everything[:limit]:
        raise UserError(f"{benchmark.name}: {root} has no question to ask; check --limit and the data folder")
    images = dict.fromkeys(image for q in everything[:limit] for image in q.images)
    missing = [image for image in images if not is_file(image)]
    plan = Plan(benchmark, files, everything, limit, missing)
    for count in plan.counts:
        if count.found != count.expected:
            log.warning("%s: %s", benchmark.name, count)
    if missing and missing_images != "ignore" and (missing_images == "error" or len(missing) == len(images)):
        other = f"name another one by --option {benchmark.name}.images=FOLDER, " * hasattr(benchmark.options, "images")
        raise DataError(
            f"{benchmark.name}: {len(missing):,} of {len(images):,} images are missing, the first is {missing[0]}; "
            f"complete the folder, {other}or score their questions as empty answers with --missing-images empty"
        )
    return plan


def _check_keys(name: str, questions: Sequence[Question]) -> None:
    keys: set[str] = set()
    for q in questions:
        if q.key in keys:
            raise DataError(f"{name}: the key {q.key!r} stands for two questions; the file holds one of them twice")
        keys.add(q.key)
