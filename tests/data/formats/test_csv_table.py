from __future__ import annotations

import pytest

from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError


@pytest.mark.parametrize(
    ("separator", "name"), [(",", "comma"), (";", "semicolon"), ("\t", "tab")], ids=["comma", "semicolon", "tab"]
)
def test_a_table_of_questions(tmp_path, separator, name):
    path = tmp_path / name
    rows = [
        ["id", "image", "question", "answer", "note"],
        ["a", "1.png", "what ?", "red", "x"],
        ["", "", '"two, ""three"";\nlines"', "", ""],
        ["c", "2.png", "<image> is it ?", "3", ""],
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(separator.join(row) for row in rows).encode())
    first, second, third = read_records(path)
    assert (first.id, first.images, first.turns) == ("a", ("1.png",), (("<image>\nwhat ?", "red"),))
    assert (second.id, second.images, second.turns) == ("1", (), (('two, "three";\nlines', ""),))
    assert (third.turns, third.line) == ((("<image> is it ?", "3"),), 5)


def test_a_cell_may_be_a_long_document(tmp_path):
    path = tmp_path / "x"
    path.write_text(f"question,answer\n{'q' * 200_000},a\n")
    assert [len(record.turns[0][0]) for record in read_records(path)] == [200_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\nq,a\nq, x, a\n", r"x: line 3: 3 values under 2 columns; put text with ','"),
        ("question,answer,answer\nq,a,b\n", r"x: line 1: the column 'answer' stands twice"),
        ("question,answer\n", r"x: holds no records"),
        ('question,answer\n"q,a\n', r"x: line 2: not CSV \(unexpected end of data\)"),
        ("image,question,answer\ndata:x,q,a\n", r"record 0 \(id '0', line 2\): image: a data URI in a table of text"),
        ("img,question,answer\nx.png,q,a\n", r"unknown field 'img'; did you mean 'image'\?"),
        ('question,answer,"x', r"x: line 1: not CSV \(unexpected end of data\)"),
        ("question,answers\nq,a\n", r"x: line 1, record 0: malformed JSON"),
        ("question,answer\nq,\xe9\n", r"x: not UTF-8 text"),
    ],
    ids=range(9),
)
def test_faults_name_the_line(tmp_path, text, message):
    path = tmp_path / "x"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        list(read_records(path))
