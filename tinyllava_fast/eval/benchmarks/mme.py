"""MME: yes/no questions about perception (10 subtasks) and cognition (4), two about each image.

A subtask scores 100 x accuracy + 100 x accuracy+, the share of images with both questions right; perception and
cognition are sums of them. Files and prompt are LLaVA's, the score that of the official eval_tool/calculation.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Count,
    Files,
    Grades,
    Metric,
    Question,
    Score,
    line_key,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, is_file, llava_questions
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import clustered_error, mean, mean_influence, require_answers
from tinyllava_fast.fields import read_text, shown

GROUPS = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
SUBTASKS = tuple(subtask for group in GROUPS.values() for subtask in group)
ASK = "Please answer yes or no."
RELEASE = "MME_Benchmark_release_version"


def parse_yes_no(reply: str) -> str:
    """ "yes", "no" or "other" (which is never right), from the first four characters of the reply."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@BENCHMARKS.register("mme")
class MME(Benchmark):
    """2,374 questions about 1,187 images; the number in papers' tables is Perception, at most 2000."""

    name = "mme"
    title = "MME"
    max_new_tokens = 128
    published = published_rows("Perception", 1510.7, 1531.3, 1466.4, 1284.6, 1153.0)

    def locate(self, root: Path) -> Files:
        """llava_mme.jsonl and the release folder, which some archives nest in one of the same name."""
        find = Finder(self.name, root, ["MME", "mme"], EVAL_ZIP)
        first = SUBTASKS[0]
        places = [f"{RELEASE}/{first}", f"{RELEASE}/{RELEASE}/{first}", first]
        source = "the MME data set (huggingface.co/datasets/darkyarding/MME)"
        return {"questions": find.file("llava_mme.jsonl"), "images": find.folder(*places, source=source).parent}

    def questions(self, files: Files) -> list[Question]:
        """The questions with the truths of the release folder's text files."""
        path, truths, questions = files["questions"], _Truths(files["images"]), []
        for record in llava_questions(path, unique=False):
            id, text = record.fields.path("question_id"), record.text
            subtask = next(iter(PurePosixPath(id).parts), "")
            if subtask not in SUBTASKS:
                raise DataError(
                    f"{record.where}: {shown(id)} does not begin with a subtask; they are {', '.join(SUBTASKS)}"
                )
            file = PurePosixPath(id).name.split(".")[0] + ".txt"
            asked, truth = truths.find(subtask, file, text.replace(SHORT.strip(), "").strip(), record.where)
            questions.append(
                Question(
                    key=line_key(record.line - 1, id),
                    id=id,
                    images=(files["images"] / record.image,),
                    prompt=text,
                    truth=truth,
                    category=subtask,
                    meta={"file": file, "question": asked},
                )
            )
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """2,374 questions about 1,187 images in 14 subtasks."""
        return [
            Count("questions", len(questions), 2374),
            Count("images", len({q.id for q in questions}), 1187),
            Count("subtasks", len({q.category for q in questions}), len(SUBTASKS)),
        ]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """The 14 subtask scores and their sums. Raises DataError if a question has no answer."""
        require_answers(self.name, questions, answers)
        parsed = {q.key: parse_yes_no(_one_line(answers[q.key])) for q in questions}
        credit = {q.key: float(parsed[q.key] == q.truth.lower()) for q in questions}
        members = {s: [q for q in questions if q.category == s] for s in SUBTASKS}
        subtasks = {s: _subtask(s, asked, credit) for s, asked in members.items() if asked}
        metrics, notes = [], []
        for group, names in GROUPS.items():
            parts = [subtasks[s] for s in names if s in subtasks]
            metrics.append(_sum(group, [m for m, _ in parts], {c: i for _, found in parts for c, i in found.items()}))
            if len(parts) < len(names):
                notes.append(f"{group} is the sum of {len(parts)} of {len(names)} subtasks: it is not comparable")
        single = sum(len(pair) == 1 for asked in members.values() for pair in _pairs(asked).values())
        if single:
            notes.append(f"images with one question here instead of two: {single}; accuracy+ counts that one")
        return Score(
            metrics=metrics,
            headline="Perception",
            tables={
                group: [subtasks[s][0] for s in names if s in subtasks]
                for group, names in GROUPS.items()
                if any(s in subtasks for s in names)
            },
            credit=credit,
            counts={"neither yes nor no": sum(p == "other" for p in parsed.values())},
            notes=notes,
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """<experiment>/<subtask>.txt: what eval_tool/calculation.py reads, file, question, truth and answer by tabs."""
        target = folder / experiment
        target.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = {subtask: [] for subtask in SUBTASKS}
        for q in questions:
            answer = _one_line(answers[q.key])
            lines[q.category].append(f"{q.meta['file']}\t{q.meta['question']}\t{q.truth}\t{answer}\n")
        paths = []
        for subtask, rows in lines.items():
            if rows:
                paths.append(target / f"{subtask}.txt")
                paths[-1].write_text("".join(rows), encoding="utf-8")
        return paths


class _Truths:
    """The release folder's text files, read when first asked for: "question<TAB>Yes|No", two lines each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[Path, dict[str, str]] = {}

    def find(self, subtask: str, file: str, question: str, where: str) -> tuple[str, str]:
        """The question as the file writes it, and its truth. Some files have two spaces before the closing request."""
        places = [self.folder / subtask / "questions_answers_YN" / file, self.folder / subtask / file]
        path = next((p for p in places if is_file(p)), None)
        if path is None:
            raise DataError(f"{where}: its truth is missing; looked for {places[0]} and {places[1]}")
        if path not in self.known:
            self.known[path] = self._read(path)
        spellings = [question] if ASK in question else [f"{question} {ASK}", f"{question}  {ASK}"]
        for spelling in spellings:
            if spelling in self.known[path]:
                return spelling, self.known[path][spelling]
        raise DataError(f"{where}: {path} does not ask {shown(spellings[0])}; the two files are of different releases")

    @staticmethod
    def _read(path: Path) -> dict[str, str]:
        truths: dict[str, str] = {}
        for number, line in enumerate(read_text(path).splitlines(), 1):
            question, tab, truth = line.partition("\t")
            if line.strip() and (not tab or truth.strip() not in ("Yes", "No")):
                raise DataError(
                    f"{path}, line {number}: a question, a tab and Yes or No are expected, not {shown(line)}"
                )
            if line.strip() and truths.setdefault(question, truth.strip()) != truth.strip():
                raise DataError(f"{path}, line {number}: {shown(question)} has another answer in an earlier line")
        return truths


def _one_line(answer: str) -> str:
    """Tabs and line ends become spaces: the official format has one answer a line, fields separated by tabs."""
    return re.sub(r"[\t\r\n]", " ", answer)


def _pairs(questions: Sequence[Question]) -> dict[str | int, list[Question]]:
    """Image -> its questions, in file order."""
    pairs: dict[str | int, list[Question]] = {}
    for q in questions:
        pairs.setdefault(q.id, []).append(q)
    return pairs


def _subtask(name: str, questions: Sequence[Question], credit: dict[str, float]) -> tuple[Metric, dict[str, float]]:
    """The subtask's score, and each image's influence on it."""
    pairs = _pairs(questions)
    right = [credit[q.key] for q in questions]
    both = {image: float(all(credit[q.key] for q in asked)) for image, asked in pairs.items()}
    influence = dict.fromkeys(map(str, pairs), 0.0)
    for q, value in zip(questions, mean_influence(right), strict=True):
        influence[str(q.id)] += 100 * value
    for image, value in zip(both, mean_influence(list(both.values())), strict=True):
        influence[str(image)] += 100 * value
    metric = Metric(
        name=name,
        value=mean(right) * 100 + mean(list(both.values())) * 100,
        scale=200.0,
        stderr=clustered_error(influence.values(), influence),
        questions=len(questions),
    )
    return metric, influence


def _sum(name: str, parts: Sequence[Metric], influence: dict[str, float]) -> Metric:
    return Metric(
        name=name,
        value=sum(part.value for part in parts),
        scale=200.0 * len(GROUPS[name]),
        stderr=clustered_error(influence.values(), influence),
        questions=sum(part.questions for part in parts),
    )
