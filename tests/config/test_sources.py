from __future__ import annotations

import pytest
import yaml

from tinyllava_fast.config.load import load_run, to_dict
from tinyllava_fast.errors import UserError

TWO = [{"path": "a/vqa.json", "weight": 3}, {"path": "b/digits.parquet", "weight": 1}]


def load(tmp_path, overrides=(), **data):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stages": [{"name": "train", "data": data}]}))
    return load_run(path, overrides).stages[0].data


def test_what_a_source_does_not_say_is_the_stages(tmp_path):
    own = {"path": "c.csv", "name": "own", "image_folder": "i", "template": "phi", "turns": "independent", "weight": 2}
    data = load(tmp_path, sources=[*TWO, {**own, "turns_per_sample": 2}], image_folder="x", template="gemma")
    assert [source.title for source, _ in data.each()] == ["vqa", "digits", "own"]
    first, _, last = (alone for _, alone in data.each())
    assert (first.records, first.image_folder, first.template, first.turns) == (
        "a/vqa.json",
        "x",
        "gemma",
        "conversation",
    )
    assert (last.records, last.image_folder, last.template, last.turns, last.turns_per_sample) == (
        "c.csv",
        "i",
        "phi",
        "independent",
        2,
    )
    assert not first.sources and load(tmp_path, records="a.json").each()[0][1].records == "a.json"


def test_an_override_reaches_a_source_by_name_and_number(tmp_path):
    sources = [{"name": "v", **TWO[0]}, TWO[1]]
    overrides = ["stages.train.data.sources.v.weight=5", "stages.train.data.sources.1.path=c.json"]
    data = load(tmp_path, overrides, sources=sources)
    assert [(s.path, s.weight) for s in data.sources] == [("a/vqa.json", 5.0), ("c.json", 1.0)]


def test_data_root(tmp_path):
    data = load(tmp_path, sources=[*TWO, {"path": "/abs/x.json", "image_folder": "i", "weight": 1}]).under("/root")
    assert [s.path for s in data.sources] == ["/root/a/vqa.json", "/root/b/digits.parquet", "/abs/x.json"]
    assert [alone.image_folder for _, alone in data.each()] == ["/root", "/root", "/root/i"]
    assert to_dict(data)["sources"][0]["name"] is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"records": "a.json", "sources": TWO}, "stages.train.data.sources: given beside 'records'"),
        ({"sources": [{"weight": 1}]}, "stages.train.data.sources[0].path: missing"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "sources[0].wieght: unknown key; did you mean 'weight'?"),
        ({"sources": [{"path": "a", "weight": 0}]}, "sources[0].weight: expected a number above 0"),
        ({"sources": [{"path": "a", "samples": 1.5}]}, "sources[0].samples: expected int"),
        ({"sources": [{"path": "a", "weight": 1, "times": 2}]}, "sources[0].times: given beside 'weight'; keep one of"),
        ({"sources": [{"path": "x/a.json"}, {"path": "y/a.csv"}]}, "data.sources: 2 of them are called 'a'"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data.sources: 'b' has no weight, others have one"),
        ({"sources": [{"path": "a", "name": "n", "turns": "x"}]}, "sources.n.turns: expected"),
        ({"sources": "a.json"}, "stages.train.data.sources: expected a list of SourceConfig"),
    ],
)
def test_errors_name_file_and_key(tmp_path, data, said):
    with pytest.raises(UserError) as error:
        load(tmp_path, **data)
    assert said in str(error.value) and str(tmp_path / "run.yaml") in str(error.value)
