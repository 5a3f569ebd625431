"""The shapes of a record: LLaVA's, ShareGPT's, OpenAI's, and plain columns."""

from __future__ import annotations

import base64
import json

import pytest

from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}


def read(tmp_path, *rows):
    path = tmp_path / "x"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(read_records(path))


def said(record):
    return record.turns, record.images, record.interleaved, record.system


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, SAID]}, ((("q", "a"),), (), False, None)),
        ({"conversations": [ASKED, SAID]}, ((("q", "a"),), (), False, None)),
        (
            {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ((("q", "a"),), (), False, None),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be"},
                    {"from": "User", "value": "q"},
                    {"from": "Assistant", "value": "a"},
                ]
            },
            ((("q", "a"),), (), False, "be"),
        ),
        ({"messages": [{"role": "developer", "content": "be"}, ASKED, SAID]}, ((("q", "a"),), (), False, "be")),
        ({"system": "be", "messages": [ASKED, SAID]}, ((("q", "a"),), (), False, "be")),
        ({"system": " ", "messages": [ASKED, SAID]}, ((("q", "a"),), (), False, None)),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "q"},
                            {"type": "image_url", "image_url": {"url": "a.png"}},
                        ],
                    },
                    SAID,
                ]
            },
            ((("<image>\nq", "a"),), ("a.png",), True, None),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": ["x", {"type": "image", "image": "a.png"}, "y", {"type": "image", "path": "b.png"}],
                    },
                    SAID,
                ]
            },
            ((("x\n<image>\ny\n<image>", "a"),), ("a.png", "b.png"), True, None),
        ),
        (
            {
                "images": ["a.png"],
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
                    SAID,
                ],
            },
            ((("<image>\nq", "a"),), ("a.png",), True, None),
        ),
        (
            {
                "image": "file:///x/a.png",
                "messages": [
                    {"role": "user", "content": "<image>q"},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ],
            },
            ((("<image>q", "a"),), ("/x/a.png",), False, None),
        ),
        (
            {"image": {"path": "a.png", "bytes": None}, "question": "q", "answer": 3},
            ((("<image>\nq", "3"),), ("a.png",), False, None),
        ),
        ({"question": "q", "answer": ""}, ((("q", ""),), (), False, None)),
        (
            {"images": ["a", "b"], "question": "q", "answer": "a"},
            ((("<image>\n<image>\nq", "a"),), ("a", "b"), True, None),
        ),
        ({"image": "a.png", "caption": "a cat"}, ((("<image>", "a cat"),), ("a.png",), False, None)),
    ],
    ids=range(15),
)
def test_shapes(tmp_path, row, expected):
    [record] = read(tmp_path, row)
    assert said(record) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [ASKED, {"role": "system", "content": "be"}, SAID]},
            r"messages\[1\].role: a system message stands before all others",
        ),
        (
            {"system": "x", "messages": [{"role": "system", "content": "be"}, ASKED, SAID]},
            r"system: given beside a system message in 'messages'",
        ),
        ({"system": 3, "messages": [ASKED, SAID]}, r"system: expected text, got 3"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            r"messages\[1\].content: expected text, or a list of parts, got null",
        ),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [1]}]},
            r"messages\[1\].tool_calls: calls of tools cannot be learnt",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}, SAID]},
            r"messages\[0\].content\[0\].type: expected 'text', 'image' or 'image_url', got 'audio'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, SAID]},
            r"messages\[0\].content\[0\].text: expected text, got null",
        ),
        (
            {"messages": [{"role": "user", "content": [3]}, SAID]},
            r"messages\[0\].content\[0\]: expected a part, .*, got 3",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "low"}}]}, SAID]},
            r"content\[0\].image_url: expected a path",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
            r"messages\[1\].content: holds an image; only questions",
        ),
        (
            {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}, SAID]},
            r"images: given beside images inside the messages",
        ),
        ({"message": [ASKED, SAID]}, r"conversations: missing; did you mean 'message'\?"),
        ({"question": "q"}, r"no field 'answer'; it has 'question'"),
        ({"question": " ", "answer": "a"}, r"question: expected text that is not empty"),
        ({"caption": "a cat"}, r"caption: there is no image that it could be of"),
        ({"image": {"path": None, "bytes": None}, "caption": "x"}, r"image: holds neither 'bytes' nor a 'path'"),
        ({"image": {"bytes": True}, "caption": "x"}, r"image: holds neither"),
        ({"image": True, "caption": "x"}, r"image: expected a path or a list of paths, got true"),
    ],
    ids=range(18),
)
def test_faults_name_the_field(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, {"question": "q", "answer": "a"}, row)
    assert str(error.value).startswith(f"{tmp_path / 'x'}: record 1 (id '1', line 2): ")


@pytest.mark.parametrize("shape", ["lines", "list", "indented"])
def test_data_uris_stay_in_the_file(tmp_path, picture, levels, shape):
    def uri(level):
        return "data:image/png;base64," + base64.b64encode(picture(level)).decode()

    parts = [{"type": "text", "text": "é"}, {"type": "image_url", "image_url": {"url": uri(60)}}]
    rows = [
        {"id": "é", "image": uri(20), "question": "q", "answer": "a"},
        {"images": ["a.png", uri(40)], "question": "<image><image>q", "answer": "a"},
        {"messages": [{"role": "user", "content": parts}, SAID]},
    ]
    path = tmp_path / "x"
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if shape != "lines":
        text = json.dumps(rows, ensure_ascii=False, indent=1 if shape == "indented" else None)
    path.write_bytes(b"\xef\xbb\xbf" * (shape == "list") + text.encode())
    (tmp_path / "a.png").write_bytes(picture(30))
    records = list(read_records(path))
    assert all(len(image) < 200 for record in records for image in record.images)
    assert [levels(path, record, tmp_path) for record in records] == [[20], [30, 40], [60]]
    moved = tmp_path / "moved"
    moved.mkdir()
    path.rename(moved / "x")
    assert levels(moved / "x", records[0]) == [20]
    (moved / "x").write_text(text[:50])
    with pytest.raises(DataError, match=r"moved/x at \d+, \d+, image: cannot be read .*has the file changed\?"):
        levels(moved / "x", records[0])


def test_damaged_data_uris_are_named_when_they_are_read(tmp_path, levels):
    for uri, why in (("data:image/png;base64,%%", "base64 is damaged"), ("data:,nothing", "truncated or not an image")):
        [record] = read(tmp_path, {"image": uri, "caption": "x"})
        with pytest.raises(DataError, match=why):
            levels(tmp_path / "x", record)
