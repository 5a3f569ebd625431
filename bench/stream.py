"""`tlf-bench stream`: a set of any size through a stream: records a second, memory from beginning to end, resumption.

Records are drawn here: two turns of some ten words each, as text (JSONL) or with a picture of 16 x 16 pixels (tar
archives), in shards. They pass once through the product's own loader; what comes out is counted and dropped. Memory is
the resident set of each process; of what forked processes share each counts its part (PSS).
"""

from __future__ import annotations

import gc
import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import StreamSettings
from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.bpe import train_tokenizer
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.streamed import StreamedDataset
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.pace import EVERY_S, Pace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = 5000
_POINTS = 20  # times that memory is looked at
_IMAGE_TOKENS = 16


def benchmark(settings: StreamSettings) -> Report:
    """Return {rows: [{records, seconds, processes, main_mib, all_mib}], records_per_s, growth, start_s, resume_s, ...}.

    growth: MiB that the main process and all together have gained from the first look to the largest one. resume_s:
    from a position near the end to the first pack, construction included, as start_s is from the beginning.
    """
    with tempfile.TemporaryDirectory(prefix="tlf-stream-") as folder:
        shards = Path(folder)
        began = time.perf_counter()
        _write(shards, settings)
        written = time.perf_counter() - began
        size = sum(path.stat().st_size for path in shards.iterdir())
        tokenizer = train_tokenizer((" ".join(_say(random.Random(n))) for n in range(200)), 2048)
        return {
            **_measure(shards, settings, tokenizer),
            "written_s": written,
            "mib": size / 2**20,
            "settings": asdict(settings),
            "machine": machine.describe("cpu"),
        }


def _measure(shards: Path, settings: StreamSettings, tokenizer: PreTrainedTokenizerBase) -> Report:
    began = time.perf_counter()
    loader = _loader(shards, settings, tokenizer)
    batches = iter(loader)
    seen, rows = next(batches).num_samples, [_look(0, began)]
    start, near = time.perf_counter() - began, 0
    expected: list[str] = []
    state: dict[str, object] = {}
    pace = Pace(wait_s=EVERY_S)
    for batch in batches:
        seen += batch.num_samples
        if pace.due():
            log.info("stream: %d of %d records", seen, settings.records)
        if near and not expected:
            expected = batch.sample_ids
        if seen >= 0.95 * settings.records and not near:
            near, state = seen, json.loads(json.dumps(loader.state_dict()))
        if seen >= len(rows) * settings.records / _POINTS:
            rows.append(_look(seen, began))
        if seen >= settings.records:
            break
    seconds = time.perf_counter() - began - start
    loader.close()
    if not expected:
        raise UserError(f"--records {settings.records}: too few to go on near their end")
    del loader, batches
    gc.collect()
    began = time.perf_counter()
    again = _loader(shards, settings, tokenizer)
    again.load_state_dict(state)
    first = next(iter(again))
    resumed = time.perf_counter() - began
    again.close()
    if first.sample_ids != expected:
        raise UserError("the stream went on elsewhere than where it had stopped")
    return {
        "rows": rows,
        "records_per_s": seen / seconds,
        "start_s": start,
        "resume_s": resumed,
        "resumed_at": near,
        "growth": {key: max(row[key] for row in rows[1:]) - rows[1][key] for key in ("main_mib", "all_mib")},
    }


def _loader(shards: Path, settings: StreamSettings, tokenizer: PreTrainedTokenizerBase) -> Loader:
    from transformers import SiglipImageProcessorPil

    batch = BatchConfig(tokens=settings.tokens, max_segments=512, max_images=256)
    dataset = StreamedDataset(
        DataConfig(records=str(shards), stream=True, shuffle_buffer=settings.shuffle_buffer),
        batch,
        tokenizer=tokenizer,
        processor=SiglipImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokens_per_image=_IMAGE_TOKENS,
        seed=0,
    )
    return Loader(dataset, max_steps=10**9, workers=settings.workers)


def _write(folder: Path, settings: StreamSettings) -> None:
    """Write the shards."""
    rng, made = random.Random(settings.seed), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(made, "PNG")
    bounds = [settings.records * n // settings.shards for n in range(settings.shards + 1)]
    for number, (first, last) in enumerate(pairwise(bounds)):
        records = (_record(index, rng, settings.form == "tar") for index in range(first, last))
        if settings.form == "jsonl":
            with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in records)
            continue
        with tarfile.open(folder / f"{number:05}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for record in records:
                for ending, content in (("png", made.getvalue()), ("json", json.dumps(record).encode())):
                    info = tarfile.TarInfo(f"{record['id']}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def _record(index: int, rng: random.Random, shown: bool) -> dict[str, object]:
    talk = [{"from": ("human", "gpt")[n % 2], "value": " ".join(_say(rng))} for n in range(4)]
    if shown:
        talk[0]["value"] = f"<image>\n{talk[0]['value']}"
    return {"id": f"{index:09}", "conversations": talk}


def _say(rng: random.Random) -> Iterator[str]:
    return (f"w{rng.randrange(_WORDS)}" for _ in range(rng.randint(3, 17)))


def _look(records: int, began: float) -> Report:
    """Return a row."""
    main, *others = _tree("self")
    sizes = [_kept(process) for process in (main, *others)]
    return {
        "records": records,
        "seconds": time.perf_counter() - began,
        "processes": len(sizes),
        "main_mib": sizes[0] / 2**20,
        "all_mib": sum(sizes) / 2**20,
    }


def _tree(process: str) -> list[str]:
    """Return a process and all below it."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _tree(child)
    return found


def _kept(process: str) -> int:
    """Return the bytes that a process has in memory, its part of shared ones; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


COLUMNS = {
    "records": "{records:,}",
    "seconds": "{seconds:.0f}",
    "processes": "{processes}",
    "main, MiB": "{main_mib:.0f}",
    "all, MiB": "{all_mib:.0f}",
}


def show(result: Report) -> None:
    """Print the report as a table."""
    title = "{records:,} records in {shards} shards of {form}, {workers} workers, {shuffle_buffer:,} records at a time"
    report.table(report.fill(title, result["settings"]), COLUMNS, result["rows"])
    columns = {
        "records/s": "{records_per_s:,.0f}",
        "first pack": "{start_s:time}",
        "going on at": "{resumed_at:,}",
        "its first pack": "{resume_s:time}",
        "growth of main, MiB": "{main_mib:.1f}",
        "of all, MiB": "{all_mib:.1f}",
    }
    report.table("", columns, [result | result["growth"]])
