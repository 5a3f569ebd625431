"""`tlf-bench look`: its arithmetic, and that it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny import make_model, make_tokenizer, tiny_config
from tinyllava_fast.bench.look import CONTRAST, benchmark, paired_p, shape_box
from tinyllava_fast.bench.look_settings import LookSettings
from tinyllava_fast.data import easy_vqa
from tinyllava_fast.errors import DataError
from tinyllava_fast.look.curves import RANDOM
from tinyllava_fast.look.types import METHODS
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model


def test_paired_p_is_students() -> None:
    # tables of Student's t: 2.228 and 4.587 of 10 degrees of freedom leave 5 % and 0.1 %
    for t, p in ((2.228, 0.05), (4.587, 0.001)):
        values = np.linspace(-1, 1, 11)
        values = values / (values.std(ddof=1) / 11**0.5) + t
        assert paired_p(values) == pytest.approx(p, rel=2e-3)
    assert paired_p(np.zeros(5)) == 1


def test_the_box_of_a_shape() -> None:
    pixels = np.full((20, 30, 3), 240, np.uint8)
    pixels[3:7, 10:15] = (200, 0, 0)
    assert shape_box(pixels) == (10, 3, 15, 7)
    with pytest.raises(DataError, match="shows no shape"):
        shape_box(np.zeros((4, 4, 3), np.uint8))


def test_it_measures_every_kind_of_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(easy_vqa, "_is_current", lambda out: True)  # two pictures instead of five thousand
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for number in range(2):
        from PIL import Image

        picture = Image.new("RGB", (64, 64), (240, 240, 240))
        picture.paste((200, 0, 0), (10 + 20 * number, 8, 30 + 20 * number, 30))
        picture.save(data / "images" / f"{number}.png")
        rows.append(
            f'{{"id": "{number}", "image": "{number}.png", "question": "what?", "answer": "red", "type": "color"}}'
        )
    (data / "test.json").write_text(f"[{','.join(rows)}]")
    save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), tmp_path / "final")
    result = benchmark(str(tmp_path / "final"), LookSettings(images=2, data=str(data)))
    assert [row["map"] for row in result["rows"]] == [*METHODS, CONTRAST, RANDOM]
    chance = result["rows"][-1]
    assert chance["mass_over_chance"] == pytest.approx(1) and result["images"] == 2
    assert result["rows"][5]["mass_over_chance"] > 2 and result["box_share"] == pytest.approx(20 * 22 / 64**2)
