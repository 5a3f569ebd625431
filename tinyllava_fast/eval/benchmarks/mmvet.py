"""MM-Vet: 218 open questions, graded by a language model.

Files and prompt are LLaVA's, grading and scores those of MM-Vet's mm-vet_evaluator.py. The judge is any endpoint that
speaks OpenAI's chat completions. Without one, the answers and the file for the online evaluator are written, and the
report says that they are not scored.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from tinyllava_fast.config.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Range, Text
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Files,
    Grades,
    Question,
    Score,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, llava_questions
from tinyllava_fast.eval.judge import GradeFile, Judge, JudgeError, grade_all, grade_key
from tinyllava_fast.eval.mmvet_scores import capabilities, integration, metric, rounded, run_totals, score_csv, table
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.eval.prompts import whole_prompt
from tinyllava_fast.fields import Fields, read_json, read_object, read_text, shown
from tinyllava_fast.log import log

OPENAI = "https://api.openai.com/v1"
EVALUATOR = "mm-vet_evaluator.py"
GRADES = "grades.jsonl"

UNOFFICIAL_PROMPT = """You grade the answer that a model gave about an image. Each row of the table below holds a \
question, the reference answer, the model's answer and a mark from 0.0 (entirely wrong) to 1.0 (entirely right) in \
steps of 0.1. Where the reference joins parts by <AND>, full marks need all of them; where it joins them by <OR>, any \
one is enough. Reply with the mark that belongs in the last cell and nothing else.

Question | Reference | Answer | Mark
--- | --- | --- | ---
Which colours has the flag? | red <AND> white | It is red and white. | 1.0
Which colours has the flag? | red <AND> white | It is red. | 0.5
Which colours has the flag? | red <AND> white | It is blue. | 0.0
What is this animal? | donkey <OR> mule | A mule in front of a barn. | 1.0
"""


@dataclass(frozen=True)
class Options:
    """Settings of mmvet: how the answers are graded."""

    judge: Text = "gpt-4-0613"
    """The judging model's name. Scores are comparable for one judge only."""
    base_url: Text = OPENAI
    """Of an endpoint that speaks OpenAI's chat completions, up to /v1."""
    key_env: Text = "OPENAI_API_KEY"
    """Environment variable that holds the key. With neither a key nor a base_url of your own, nothing is graded."""
    runs: PositiveInt = 1
    """Grades of each answer. The MM-Vet paper uses 5, LLaVA's released file 3."""
    prompt_file: str = ""
    """MM-Vet's mm-vet_evaluator.py, whose prompt makes scores comparable. Default: the one beside mm-vet.json, else
    wording of our own, marked unofficial."""
    max_tokens: NonNegativeInt = 3
    """Of a grade; raise it for a judge that thinks first, 0 leaves it to the server."""
    timeout_s: PositiveFloat = 60.0
    """Of one attempt."""
    attempts: PositiveInt = 6
    """Most times that a request is sent to a server that is busy, fails or stalls, at growing intervals."""
    parallel: Annotated[int, Range(least=1, most=1024)] = 4
    """Requests at a time."""


@BENCHMARKS.register("mmvet")
class MMVet(Benchmark):
    """218 questions about 200 images; total is over all, capability scores over the questions that need one."""

    name = "mmvet"
    title = "MM-Vet"
    official = (218, 200)
    Options = Options
    scored_by = ("judge",)
    max_new_tokens = 1024
    published = published_rows("total", 31.1, 36.1, 37.5, 23.2, 19.5)

    def __init__(self, options: object = None) -> None:
        """Raise UserError for a base_url that no HTTP client takes."""
        super().__init__(options)
        if not self.options.base_url.startswith(("http://", "https://")):
            raise UserError("mmvet.base_url: expected an address that begins with http:// or https://")

    def locate(self, root: Path) -> Files:
        """llava-mm-vet.jsonl, mm-vet.json and the images; the evaluator and bard_set.json if they are there."""
        find = Finder(self.name, root, ["mm-vet", "mmvet"], EVAL_ZIP)
        nested = ("", "mm-vet/", "mm-vet/mm-vet/")
        release = "mm-vet.zip of the MM-Vet release v1 (github.com/yuweihao/MM-Vet)"
        files = {
            "questions": find.file("llava-mm-vet.jsonl"),
            "metadata": find.file(*(f"{n}mm-vet.json" for n in nested), source=release),
            "images": find.folder(*(f"{n}images" for n in nested), source=release),
        }
        for name, file in (("evaluator", EVALUATOR), ("bard_set", "bard_set.json")):
            if path := find.optional(*(n + file for n in nested)):
                files[name] = path
        return files

    def questions(self, files: Files) -> list[Question]:
        """The questions with reference answers and capabilities."""
        metadata, questions = read_object(files["metadata"]), []
        subset = set(_names(files["bard_set"])) if "bard_set" in files else set()
        for asked in llava_questions(files["questions"]):
            key = f"v1_{asked.id}"
            if key not in metadata.values:
                raise DataError(f"{files['metadata']}: no entry {shown(key)}, which {asked.where} asks")
            known = metadata.mapping(key)
            capabilities = sorted(set(known.texts("capability")))
            questions.append(
                Question(
                    key=key,
                    id=asked.id,
                    images=(files["images"] / asked.image,),
                    prompt=asked.text,
                    truth=known.word("answer"),
                    category="+".join(capabilities),
                    meta={
                        "capabilities": capabilities,
                        "question": known.text("question", asked.text),
                        "bard_set": key in subset,
                        "evaluator": str(files.get("evaluator", "")),
                    },
                )
            )
        self._prompt(questions)  # a file that holds none is refused before any question is asked
        return questions

    def recorded_prompt(self, question: Question) -> str:
        """The whole prompt, as model_vqa.py writes it."""
        return whole_prompt(question)

    def is_asked_by(self, question: Question, prompt: str) -> bool:
        """Return True if the question is part of the recorded prompt."""
        return question.prompt in prompt

    def grade(self, questions: Sequence[Question], answers: Answers, folder: Path, experiment: str) -> Grades:
        """Grades of the judge, run by run. An endpoint that fails leaves those made so far; the next run goes on."""
        judge = self._judge()
        if judge is None:
            return {}
        messages = self._messages(questions, answers)
        folder.mkdir(parents=True, exist_ok=True)
        file = GradeFile(folder / GRADES)
        runs = self.options.runs
        keys = [grade_key(judge, m, run) for m in messages.values() for run in range(runs)]
        done = sum(key in file.grades for key in keys)
        new = grade_all(judge, messages, runs, file, parallel=self.options.parallel)
        try:
            for _ in progress(new, total=len(keys), done=done, label="grades"):
                pass
        except JudgeError as error:
            log.error("%s: %s. %d of %d grades are in %s; run the same command again to go on", self.name, error,
                      sum(key in file.grades for key in keys), len(keys), file.path)  # fmt: skip
        return {
            id: [file.grades[key].score for run in range(runs) if (key := grade_key(judge, m, run)) in file.grades]
            for id, m in messages.items()
        }

    def _judge(self) -> Judge | None:
        o = self.options
        key = os.environ.get(o.key_env, "")
        if not key and o.base_url == OPENAI:
            return None
        return Judge(o.base_url, o.judge, key, o.timeout_s, o.attempts, max_tokens=o.max_tokens)

    def _messages(self, questions: Sequence[Question], answers: Answers) -> dict[str, str]:
        prompt = self._prompt(questions)[0]
        return {q.key: message(prompt, q, answers[q.key]) for q in questions if q.key in answers}

    def _prompt(self, questions: Sequence[Question]) -> tuple[str, str]:
        """The judge's instructions and what they are called in the report."""
        source = self.options.prompt_file or (str(questions[0].meta["evaluator"]) if questions else "")
        if not source:
            return (
                UNOFFICIAL_PROMPT,
                "UNOFFICIAL wording (no mm-vet_evaluator.py): not comparable with published scores",
            )
        prompt = read_prompt(Path(source))
        return prompt, f"prompt of {Path(source).name}, sha256 {hashlib.sha256(prompt.encode()).hexdigest()[:8]}"

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Mean grade over all questions and per capability, over the runs that are complete; x 100."""
        runs = min((len((grades or {}).get(q.key, ())) for q in questions), default=0)
        if not grades or not runs:
            return Score(notes=[self._not_scored(questions, grades)])
        graded = {q.key: list(grades[q.key][:runs]) for q in questions}
        total = metric("total", questions, graded)
        per_run = run_totals(questions, graded)
        tables = {
            "capability": table(questions, graded, capabilities),
            "integration": table(questions, graded, integration),
            "run": [replace(total, name=f"run {run}", value=v, stderr=None) for run, v in enumerate(per_run)],
        }
        if subset := [q for q in questions if q.meta["bard_set"]]:
            tables["Bard set"] = [metric("total", subset, graded), *table(subset, graded, capabilities)]
        notes = [
            f"judge {self.options.judge}, {self._prompt(questions)[1]}",
            f"runs: {rounded(per_run)}, standard deviation {float(np.round(np.std(per_run), 1))}",
        ]
        if runs < self.options.runs:
            notes.append(f"{runs} of {self.options.runs} runs are complete")
        return Score(
            metrics=[total],
            headline="total",
            tables=tables,
            credit={key: sum(g) / runs for key, g in graded.items()},
            notes=notes,
        )

    def _not_scored(self, questions: Sequence[Question], grades: Grades | None) -> str:
        if grades:
            done = sum(bool(g) for g in grades.values())
            return f"answers written, not scored: the judge graded {done} of {len(questions)}; run again to go on"
        return (
            f"answers written, not scored: no judge. Set {self.options.key_env}, or mmvet.base_url for an endpoint "
            "that needs no key, or upload the results file to huggingface.co/spaces/whyu/MM-Vet_Evaluator"
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """<experiment>.json for the online evaluator, and after grading the official grade file and score tables."""
        texts = {q.key: answers[q.key] for q in questions if q.key in answers}
        paths = [_write_json(folder / f"{experiment}.json", texts, 2)]
        judge = self._judge()
        if judge is None or not score.headline:
            return paths
        grades, runs = GradeFile(folder / GRADES).grades, len(score.tables["run"])
        record: dict[str, dict[str, list[object]]] = {}
        for id, text in self._messages(questions, answers).items():
            made = [grades[grade_key(judge, text, run)] for run in range(runs)]
            record[id] = {name: [getattr(g, name) for g in made] for name in ("model", "content", "score")}
        name = self.options.judge.replace("/", "_")
        paths.append(_write_json(folder / f"{experiment}_{name}-grade-{runs}runs.json", record, 4))
        scores = {id: [float(str(s)) for s in r["score"]] for id, r in record.items()}
        subset = [q for q in questions if q.meta["bard_set"]]
        for mark, members in (("", questions), ("bardset_", subset)):
            for kind, groups in (("cap-score", capabilities), ("cap-int-score", integration)):
                if members:
                    path = folder / f"{experiment}_{mark}{name}-{kind}-{runs}runs.csv"
                    path.write_text(score_csv(experiment, members, scores, groups), encoding="utf-8")
                    paths.append(path)
        return paths


def message(prompt: str, question: Question, answer: str) -> str:
    """Return the message to the judge: its instructions and the row to complete."""
    reference = question.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return prompt + "\n" + " | ".join([question.meta["question"], reference, answer, ""])


def read_prompt(path: Path) -> str:
    """The constant ``prompt`` of MM-Vet's evaluator, which is read and not run. DataError if there is none."""
    text = read_text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as MM-Vet's {EVALUATOR} ({error})") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if any(isinstance(t, ast.Name) and t.id == "prompt" for t in node.targets):
                return node.value.value
    raise DataError(f"{path}: it assigns no text to `prompt`; MM-Vet's {EVALUATOR} is expected")


def _names(path: Path) -> list[str]:
    """A JSON file that holds a list of texts."""
    return Fields({"list": read_json(path)}, str(path)).texts("list", empty=True)


def _write_json(path: Path, content: object, indent: int) -> Path:
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    return path
