"""MMMU: the official numbers, random draws included."""

from __future__ import annotations

import json
import random

import pytest

from tests.eval import golden, layouts
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.benchmarks.mmmu import DOMAINS, MMMU, SUBJECTS, Options, parse, subject_of
from tinyllava_fast.eval.mmmu_answers import chosen_letter, open_is_right, open_values


def questions_of(responses, truths):
    questions = []
    for row in responses:
        letters = tuple(row.get("all_choices") or ()) if row["question_type"] == "multiple-choice" else ()
        questions.append(
            Question(
                key=row["id"],
                id=row["id"],
                images=(golden.GOLDEN / row["id"],),
                prompt="",
                category=subject_of(row["id"]),
                choices=tuple(row["index2ans"][letter] for letter in letters),
                meta={"letters": letters, "gold": truths[row["id"]]["ground_truth"]},
            )
        )
    return questions


def rounded(score):
    """The tables as main_eval_only.py prints them."""
    rows = {f"Overall-{m.name}": m for m in score.tables["domain"]}
    rows |= {m.name: m for m in score.tables["subject"]} | {"Overall": score["Overall"]}
    return {name: {"num": m.questions, "acc": round(m.value / 100, 3)} for name, m in rows.items()}


@pytest.fixture(scope="module", params=["own", "small_set", "real"])
def answered(request):
    """Questions of our own, and (beside the repository) of MMMU: 58 of them, and all with LLaVA-1.5-13B's replies."""
    real = request.param == "real"
    if request.param == "own":
        where = golden.GOLDEN / "mmmu" / "synthetic"
    else:
        where = golden.shared("real_llava15_13b/mmmu" if real else "mmmu/small_set")
    rows = golden.load(where / ("raw_responses.jsonl" if real else "responses.jsonl"))
    truths = golden.load(where / ("answer_dict_val.json" if real else "answer_dict.json"))
    return where, questions_of(rows, truths), {r["id"]: r["response"] for r in rows}


def test_letters():
    rows = golden.load("mmmu/mc_parse.jsonl")
    questions = []
    for row in rows:
        options = {letter: row["index2ans"][letter] for letter in row["all_choices"]}
        assert chosen_letter(row["response"], options) == row["parsed"], row
        question = questions_of([{**row, "question_type": "multiple-choice"}], {row["id"]: {"ground_truth": "A"}})[0]
        questions.append(question)
        alone, _ = parse([question], {row["id"]: row["response"]}, 42)
        assert alone[row["id"]] == row["parsed_first_draw_seed42"]
    sequence = golden.load("mmmu/mc_parse_sequence_seed42.json")
    parsed, drawn = parse(questions, {r["id"]: r["response"] for r in rows}, 42)
    assert list(parsed.values()) == sequence["parsed"] and len(drawn) == sequence["n_random"]


@pytest.mark.parametrize("options", [2, 3, 4, 5, 6, 7, 9])
def test_draws(options):
    letters = "ABCDEFGHI"[:options]
    row = {"question_type": "multiple-choice", "all_choices": letters, "index2ans": dict.fromkeys(letters, "?")}
    ids = [f"validation_Art_{i}" for i in range(40)]
    questions = questions_of([{**row, "id": i} for i in ids], {id: {"ground_truth": "A"} for id in ids})
    parsed, _ = parse(questions, dict.fromkeys(ids, ""), 42)
    assert "".join(parsed.values()) == golden.load("mmmu/python_random_seed42_draws.json")["draws"][str(options)]


@pytest.mark.parametrize("row", golden.load("mmmu/open_parse.jsonl"), ids=lambda r: repr(r["response"])[:40])
def test_open_values(row):
    expected = {repr(float(p["num"])) if "num" in p else repr(p["str"]) for p in row["parsed"]}
    values = open_values(row["response"])
    assert {repr(v) for v in values} == expected and len(values) == len(expected)


def test_verdicts():
    for row in golden.load("mmmu/open_verdict.jsonl"):
        assert open_is_right(open_values(row["response"]), row["gold"]) == row["correct"], row
    for row in golden.load("mmmu/mc_verdict.jsonl"):
        id = "validation_Art_1"
        response = {"id": id, "question_type": "multiple-choice", "all_choices": "ABCD"}
        response["index2ans"] = dict.fromkeys("ABCD", "?")
        question = questions_of([response], {id: {"ground_truth": row["gold"]}})
        if row["parsed"] in tuple("ABCD"):
            assert MMMU().score(question, {id: row["parsed"]}).credit[id] == row["correct"], row


def test_scores(answered, tmp_path):
    where, questions, answers = answered
    expected = golden.load(where / "expected.json")
    bench = MMMU()
    score = bench.score(questions, answers)
    if len(questions) == 900:
        assert score.counts["random draws"] == 2 and round(score["Overall"].value / 100, 3) == 0.367
        assert rounded(score) == expected["total_val_output_main_eval_only"]
        official = golden.load(where / "total_val_output.json")
        (path,) = bench.outputs(questions, answers, score, {}, tmp_path, "x")
        assert path.name == "x_output.json" and json.loads(path.read_text()).keys() == official.keys()
        again = bench.score(questions, official)  # parsed letters and open replies, as the official tool reads them
        assert rounded(again) == rounded(score) and again.counts["random draws"] == 0
        second = bench.score(questions, golden.load(where / "llava1.5_13b_val.json"))
        assert round(second["Overall"].value / 100, 3) == 0.36
    else:
        assert score.counts["random draws"] == expected["n_random_draws"]
        assert rounded(score) == expected["main_eval_only"]
        assert parse(questions, answers, 42)[0] == golden.load(where / "parsed_output.json")
        assert score.credit == {id: verdict == "Correct" for id, verdict in expected["judge"].items()}


def test_the_order_of_answers_means_nothing_and_the_seed_does(answered):
    _, questions, answers = answered
    bench = MMMU()
    score = bench.score(questions, answers)
    shuffled = dict(random.Random(3).sample(list(answers.items()), len(answers)))
    assert bench.score(questions, shuffled) == score
    seeds = {MMMU(Options(seed=seed)).score(questions, answers)["Overall"].value for seed in range(12)}
    expected = score["Overall with draws at their expected value"].value
    assert len(seeds) > 1 and min(seeds) < expected < max(seeds)
    last = questions[-1].key
    with pytest.raises(DataError, match=rf"mmmu: 1 of .* \(ids '{last}'\)"):
        bench.score(questions, {k: v for k, v in answers.items() if k != last})


def test_layout(tmp_path):
    layouts.mmmu(tmp_path)
    bench = MMMU()
    files = bench.locate(tmp_path)
    questions = bench.questions(files)
    assert [q.category for q in questions] == ["Art_Theory"] * 4 + ["Physics"] * 4
    assert [len(q.images) for q in questions[:4]] == [1, 2, 0, 1] and all(
        p.exists() for q in questions for p in q.images
    )
    assert questions[1].prompt.startswith("Compare <image> with <image>.\n(A) thing a\n")
    assert questions[0].prompt.startswith("<image 1> What is it, 0?") and questions[3].prompt.endswith(
        "single word or phrase."
    )
    assert [q.canned for q in questions[:4]] == [None, None, "", None] and questions[3].choices == ()
    assert questions[3].truth == "24/7 or 3.43"
    answers = {q.key: q.canned if q.canned is not None else "B" if q.choices else "about 3.43" for q in questions}
    score = bench.score(questions, answers)
    assert score.counts == {"random draws": 2, "not asked": 2}
    assert score["Overall with draws at their expected value"].value == pytest.approx(100 * (6 + 1 / 3 + 1 / 4) / 8)
    assert str(bench.counts(files, questions)[2]) == "subjects: 2 found, 30 expected (-28)"


def test_bad_files(tmp_path):
    layouts.mmmu(tmp_path)
    bench, files = MMMU(), MMMU().locate(tmp_path)
    records = json.loads(files["questions"].read_text())
    for change, text in (
        ({"id": "validation_Alchemy_1"}, "no answer to 'validation_Alchemy_1'"),
        ({"index2ans": {"A": "x"}}, "index2ans: no field 'B'; it has 'A'"),
    ):
        files["questions"].write_text(json.dumps([{**records[0], **change}]))
        with pytest.raises(DataError, match=text):
            bench.questions(files)
    files["questions"].write_text(json.dumps([records[0], records[0]]))
    with pytest.raises(DataError, match="stands in line 1 already"):
        bench.questions(files)


def test_subjects():
    assert len(SUBJECTS) == 30 and len(DOMAINS) == 6
    assert subject_of("validation_Diagnostics_and_Laboratory_Medicine_7") in SUBJECTS
