"""One report says all that training would refuse in a set, and nothing of what it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.records import read_records
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.prepare.check import SHOWN, Report, check, kind_of
from tinyllava_fast.prepare.cli import main
from tinyllava_fast.prepare.sources import looked_at


def talk(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(said)], **more}


def ask(image: object, **more: Any) -> dict[str, Any]:
    return talk("<image>\nWhich colour?", "Red.", image=image, **more)


PLANTED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "missing": (ask("none.png"), "none.png does not exist"),
    "url": (ask("https://example.org/a.png"), "pictures are not downloaded"),
    "folder": (ask("folder.png"), "it is a folder"),
    "empty file": (ask("empty.png"), "the file is empty"),
    "zeros": (ask("zeros.png"), "are zeros"),
    "web page": (ask("page.png"), "it is a web page (HTML)"),
    "lfs": (ask("pointer.png"), "a pointer of git LFS"),
    "svg": (ask("drawing.png"), "an SVG drawing"),
    "float": (ask("float.tiff"), "floating-point numbers"),
    "video": (talk("q", "a", video="a.mp4"), "videos cannot be read"),
    "misspelt image": (talk("q", "a", img="0.png"), "did you mean 'image'"),
    "marker without image": (talk("<image>\nq", "a"), "names no image"),
    "image of no text": (ask(7), "image: expected"),
    "null image in list": (ask([None]), "image[0]: expected"),
    "too few markers": (ask(["0.png", "1.png"]), "lists 2 images"),
    "unknown role": ({"conversations": [{"from": "cat", "value": "q"}]}, "expected 'human' or 'gpt'"),
    "null answer": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]}, "value"),
    "two in a row": ({"conversations": [{"from": "human", "value": "q"}] * 2}, "in a row"),
    "no answer": (talk("q", "a", "r"), "every question needs one answer"),
    "no conversations": ({"id": "x"}, "conversations: missing"),
    "image in answer": (talk("q", "see <image>"), "contains the template's own '<image>'"),
    "end token": (talk("q", "a</s>b"), "contains the template's own '</s>'"),
    "surrogate": (talk("q", "a\ud800"), "half of a surrogate pair"),
    "no object": ("[1, 2]", "expected an object"),
    "malformed": ('{"id": }', "malformed JSON"),
    "field twice": ('{"id": 1, "id": 2, "conversations": []}', "malformed JSON"),
}


@pytest.fixture
def pictures(own: Path) -> Path:
    """The folder of images, with files that are no pictures beside the good ones."""
    folder = own / "images"
    (folder / "folder.png").mkdir()
    for name, content in {
        "empty": b"",
        "zeros": bytes(500),
        "page": b"<!doctype html><html><body>403</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        "cut": (folder / "0.png").read_bytes()[:-30],
    }.items():
        (folder / f"{name}.png").write_bytes(content)
    Image.new("F", (3, 3)).save(folder / "float.tiff")
    return folder


def write(folder: Path, rows: list[dict[str, Any] | str]) -> str:
    path = folder / "set.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def report(records: str, images: Path, **more: Any) -> Report:
    [source] = looked_at(records, str(images))
    return check(source, **more)


def faults(found: Report) -> list[str]:
    return [fault.reason for group in found.groups.values() for fault in group.first]


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_found_alone(name: str, own: Path, pictures: Path) -> None:
    row, said = PLANTED[name]
    found = report(write(own, [ask("0.png"), row, ask("1.png")]), pictures)
    assert (found.records, found.bad) == (3, 1)
    [group] = found.groups.values()
    assert group.count == 1 and said in group.first[0].reason
    assert "line 2" in group.first[0].where and "record 1" in group.first[0].where


def test_all_faults_of_a_set_are_in_one_report(own: Path, pictures: Path) -> None:
    rows = [row for row, _ in PLANTED.values()]
    found = report(write(own, [ask("0.png"), *rows, *([ask("none.png")] * 30)]), pictures)
    assert found.bad == len(rows) + 30 and found.records == found.bad + 1
    for _, said in PLANTED.values():
        assert any(said in reason for reason in faults(found)), said
    missing = next(group for kind, group in found.groups.items() if "does not exist" in kind)
    assert missing.count == 31 and len(missing.first) == SHOWN
    assert "and 21 more" in found.text()


def test_pixels_are_decoded_only_if_asked(own: Path, pictures: Path) -> None:
    path = write(own, [ask("cut.png"), ask("0.png")])
    assert not report(path, pictures).groups
    assert "truncated" in faults(report(path, pictures, deep=True))[0]


def test_both_faults_of_a_record_are_named(own: Path, pictures: Path) -> None:
    found = report(write(own, [ask(["none.png", "empty.png", "0.png"])]), pictures)
    assert found.bad == 1 and len(faults(found)) == 3


def test_a_list_that_is_cut_off_is_reported_with_what_was_read(own: Path, pictures: Path) -> None:
    path = own / "cut.json"
    path.write_text(json.dumps([ask("0.png"), ask("none.png")])[:-1] + ", {")
    found = report(str(path), pictures)
    assert found.records == 2 and len(found.groups) == 2
    assert any("malformed JSON" in reason for reason in faults(found))
    found = report(str(path), pictures, fix=own / "out" / "mended.jsonl")
    assert found.bad > found.mended  # so that the set does not pass for mended
    assert "malformed JSON" in (own / "out" / "mended.left-out.jsonl").read_text()


@pytest.mark.parametrize("count", [100, 10_000])
def test_nothing_is_said_of_good_records(count: int, own: Path) -> None:
    rows: list[dict[str, Any] | str] = [ask(f"{n % 8}.png") if n % 3 else talk(f"{n}?", f"{n}.") for n in range(count)]
    found = report(write(own, rows), own / "images")
    assert (found.records, found.bad, dict(found.groups)) == (count, 0, {})


def test_the_mended_set_is_clean_and_what_is_left_out_is_listed(own: Path, pictures: Path) -> None:
    shutil.copy(pictures / "0.png", pictures / "Cat.PNG")
    (pictures / "sub").mkdir()
    shutil.copy(pictures / "0.png", pictures / "sub" / "dog.png")
    rows: list[dict[str, Any] | str] = [
        ask("0.png", id="good", system="Be brief."),
        ask("cat.png", id="case"),
        ask("sub\\dog.png", id="slash"),
        talk("Which colour?", "Red.", image="1.png", id="marker"),
        talk("Hello?", "Hi.", id="text"),
        ask("none.png", id="gone"),
        '{"id": }',
    ]
    out = own / "new" / "mended.jsonl"
    found = report(write(own, rows), pictures, fix=out)
    assert (found.bad, found.mended) == (5, 3)
    assert not report(str(out), pictures).groups
    records = {record.id: record for record in read_records(out)}
    assert list(records) == ["good", "case", "slash", "marker", "text"]
    assert records["case"].images == ("Cat.PNG",) and records["slash"].images == ("sub/dog.png",)
    assert records["marker"].turns == (("<image>\nWhich colour?", "Red."),)
    assert records["good"].system == "Be brief."
    left = [json.loads(line) for line in (own / "new" / "mended.left-out.jsonl").read_text().splitlines()]
    assert ["gone" in left[0]["record"], "malformed" in left[1]["reason"]] == [True, True] and len(left) == 2


def test_images_inside_a_source_stay_inside(own: Path, pictures: Path) -> None:
    import base64

    uri = "data:image/png;base64," + base64.b64encode((pictures / "0.png").read_bytes()).decode()
    bad = "data:image/png;base64,AAAA"
    out = own / "mended.jsonl"
    found = report(write(own, [ask(uri), ask(bad)]), pictures, fix=out)
    assert found.bad == 1 and "0.png" not in out.read_text()
    assert not report(str(out), pictures, deep=True).groups


def test_processes_find_what_one_finds(own: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyllava_fast.prepare import check as module

    path = write(own, [row for row, _ in PLANTED.values()] * 8)
    alone = report(path, pictures)
    monkeypatch.setattr(module, "_MANY", 16)
    monkeypatch.setattr(module, "_PART", 16)
    monkeypatch.setattr(module, "cores", lambda: 2)
    both = report(path, pictures)
    assert both.groups == alone.groups and (both.bad, both.images) == (alone.bad, alone.images)


def test_kinds_leave_out_what_is_of_one_record() -> None:
    assert kind_of("id: 'a' and 7") == kind_of('id: "b\\"" and 1,234') == "id: ... and N"


def test_the_command_exits_with_1_if_something_is_wrong(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["check", str(own / "records.json"), "--image-folder", str(own / "images")]
    assert main(good) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["check", write(own, [ask("none.png")]), "--image-folder", str(own / "images"), "--json"]) == 1
    [said] = json.loads(capsys.readouterr().out)
    assert said["bad"] == said["records"] == 1 and said["faults"][0]["first"][0]["record"].startswith("record 0")
    assert main(["check", str(own / "nothing.json")]) == 2
    assert "cannot read the records" in capsys.readouterr().err
    assert main([*good, "--fix", str(own / "records.json")]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_configuration_is_checked_with_its_tokenizer(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = own / "my.yaml"
    assert main(["init", str(own / "records.json"), str(own / "images"), str(out), "--vocab", "300"]) == 0
    assert main(["check", str(out)]) == 0
    run = yaml.safe_load(out.read_text())
    run["stages"][0]["data"]["records"] = write(own, [talk("q", "a", id="x"), ask("0.png"), talk("q", "</s>")])
    out.write_text(yaml.safe_dump(run))
    assert main(["check", str(out), "--fix", str(own / "fixed")]) == 1
    assert "record 2" in capsys.readouterr().out
    assert len(list(read_records(next((own / "fixed").glob("*set.jsonl"))))) == 2
    assert main(["check", str(out), "--template", "phi"]) == 2


@pytest.mark.parametrize(
    "data", [{}, {"turns": "independent", "turns_per_sample": 2}, {"image_mode": "anyres"}], ids=str
)
def test_samples_that_no_pack_holds_are_those_that_training_leaves_out(own: Path, data: dict[str, Any]) -> None:
    out = own / "my.yaml"
    assert main(["init", str(own / "records.json"), str(own / "images"), str(out), "--vocab", "300"]) == 0
    rows: list[dict[str, Any] | str] = [talk("q", "long " * n, id=f"t{n}") for n in (1, 10, 40, 80)]
    rows += [ask(["0.png"] * n, id=f"i{n}") | talk("<image>" * n + "q", "a") for n in (1, 2, 9)]
    rows += [talk(*["<image>\nq", "a", *["more?", "yes. " * 8] * n], image="0.png", id=f"m{n}") for n in (1, 5, 12)]
    run = yaml.safe_load(out.read_text())
    stage = run["stages"][0]
    stage["data"] |= {"records": write(own, rows), "on_error": "skip", **data}
    stage["batch"] = {"tokens": 256, "max_images": 6, "max_segments": 6}
    out.write_text(yaml.safe_dump(run))
    [source] = looked_at(str(out))
    found = check(source)
    assert source.fit is not None and source.tokenizer is not None
    dataset = PackedDataset(
        source.data,
        source.fit.batch,
        tokenizer=source.tokenizer,
        processor=build_image_processor(load_run(str(out)).model),
        tokens_per_image=source.fit.tokens_per_image,
        seed=0,
    )
    theirs = {fault.where for fault in dataset.sources[0].faults}
    ours = {fault.where for group in found.groups.values() for fault in group.first}
    assert ours == theirs and len(ours) < len(rows)
    wanted = {"t80", "i9"} | ({"m12"} if "turns" not in data else set())
    assert wanted <= {where.split("'")[1] for where in ours}


def test_the_records_of_the_validation_are_checked(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = own / "my.yaml"
    assert main(["init", str(own / "records.json"), str(own / "images"), str(out), "--vocab", "300"]) == 0
    run = yaml.safe_load(out.read_text())
    run["stages"][0]["validation"] = {"records": write(own, [ask("none.png")])}
    out.write_text(yaml.safe_dump(run))
    assert main(["check", str(out)]) == 1
    assert "train.validation: 1 records" in capsys.readouterr().out
    run["model"]["llm"]["config"]["vocab_size"] = 30
    out.write_text(yaml.safe_dump(run))
    assert main(["check", str(out)]) == 2
    assert "has only 30 embeddings" in capsys.readouterr().err
