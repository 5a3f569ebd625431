"""Samples to one PackedBatch. All bookkeeping of the packed row is here: slots, shifted labels, positions, prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX, PackedBatch

# T token budget, S max segments, N images (blank ones included), K tokens an image


def width(sample: Iterable[Segment], tokens_per_image: int) -> int:
    """Return the number of positions that segments take once their images are widened."""
    return sum(len(s.ids) + s.ids.count(IMAGE_INDEX) * (tokens_per_image - 1) for s in sample)


def targets(sample: Iterable[Segment]) -> int:
    """Return the number of positions of segments that carry a label.

    These are the supervised text tokens, except the first token of a segment, which no token predicts.
    """
    learnt = (segment.ids[max(start, 1) : stop] for segment in sample for start, stop in segment.spans)
    return sum(len(ids) - ids.count(IMAGE_INDEX) for ids in learnt)


def truncate(
    sample: Sequence[Segment], budget: int, tokens_per_image: int, inputs: Iterable[int] | None = None
) -> list[Segment]:
    """Cut the end of a sample to fit a budget of positions, never through an image.

    inputs: the number of tower inputs of the image at each marker, in order; None: one each.
    """
    kept: list[Segment] = []
    each = repeat(1) if inputs is None else iter(inputs)
    for segment in sample:
        count = shown = 0
        for token in segment.ids:
            need = tokens_per_image * next(each) if token == IMAGE_INDEX else 1
            if need > budget:
                break
            budget -= need
            count += 1
            shown += token == IMAGE_INDEX
        if count == len(segment.ids):
            kept.append(segment)
            continue
        if count:
            spans = [(start, min(stop, count)) for start, stop in segment.spans if start < count]
            kept.append(Segment(segment.ids[:count], spans, segment.on_prefix, segment.images[:shown]))
        break
    return kept


def widen(sample: Sequence[Segment], inputs: Iterable[int]) -> list[Segment]:
    """Put one marker for each tower input instead of one for each image; inputs: as for ``truncate``."""
    each = iter(inputs)
    return [_widened(segment, [next(each) for token in segment.ids if token == IMAGE_INDEX]) for segment in sample]


def _widened(segment: Segment, inputs: Sequence[int]) -> Segment:
    if all(count == 1 for count in inputs):
        return segment
    each = iter(inputs)
    ids: list[int] = []
    starts: list[int] = []  # where each token of the segment went
    for token in segment.ids:
        starts.append(len(ids))
        ids += [token] * (next(each) if token == IMAGE_INDEX else 1)
    starts.append(len(ids))
    images = [image for image, count in zip(segment.images, inputs, strict=False) for _ in range(count)]
    return Segment(ids, [(starts[a], starts[b]) for a, b in segment.spans], segment.on_prefix, tuple(images))


def collate(
    samples: Sequence[Sequence[Segment]],
    pixels: Tensor,
    *,
    tokens: int,
    max_segments: int,
    tokens_per_image: int,
    image_multiple: int = 1,
    shared_prefixes: bool = True,
    sample_ids: Sequence[str] = (),
    levels: Tensor | None = None,
) -> PackedBatch:
    """Lay samples end to end in one row of T = tokens positions.

    samples: segments of each sample, as Template.encode gives them, widened. pixels: [n, 3, H, W] float32, or uint8 and
    the table of ``levels``, one input of the tower for each marker, in order. Their number is rounded up to a multiple
    of image_multiple with blank ones that fill no position. shared_prefixes: False leaves ``prefix`` out, for data of
    which no sample has one.
    Raises ValueError if the samples do not fit.
    """
    segments = [segment for sample in samples for segment in sample]
    total = width(segments, tokens_per_image)
    if total > tokens or len(segments) > max_segments:
        raise ValueError(
            f"collate: {total} tokens in {len(segments)} segments exceed the pack of {tokens} in {max_segments}; "
            "raise batch.tokens or batch.max_segments"
        )
    if not shared_prefixes and any(segment.on_prefix for segment in segments):
        raise ValueError("collate: a segment shares a prefix, but shared_prefixes is False")
    flat = _Flat(segments, tokens_per_image)
    images = len(flat.image_starts)
    if images != len(pixels):
        raise ValueError(f"collate: {images} image markers but {len(pixels)} images")
    blank = -images % image_multiple
    if blank:
        pixels = torch.cat([pixels, pixels.new_zeros(blank, *pixels.shape[1:])])
    slots = np.full((images + blank, tokens_per_image), tokens, np.int64)
    slots[:images] = flat.image_starts[:, None] + np.arange(tokens_per_image)
    input_ids = np.zeros(tokens, np.int64)
    input_ids[:total] = flat.ids
    labels = np.full(tokens, IGNORE_INDEX, np.int64)
    labels[: max(total - 1, 0)] = flat.labels[1:]
    labels[flat.ends - 1] = IGNORE_INDEX  # the next token belongs to another segment
    position_ids = np.zeros(tokens, np.int64)
    position_ids[:total] = flat.positions
    cu_seqlens = np.full(max_segments + 1, total, np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(segments) + 1] = flat.ends
    prefix = np.zeros((max_segments, 2), np.int32)
    prefix[: len(segments)] = flat.prefix
    supervised = np.full(tokens, tokens, np.int64)
    found = np.flatnonzero(labels != IGNORE_INDEX)
    supervised[: len(found)] = found
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        prefix=torch.from_numpy(prefix) if shared_prefixes else None,
        image_slots=torch.from_numpy(slots.reshape(-1)),
        supervised=torch.from_numpy(supervised),
        pixel_values=pixels,
        levels=levels,
        num_blank=blank,
        num_supervised=len(found),
        num_tokens=total,
        num_samples=len(samples),
        sample_ids=list(sample_ids),
    )


class _Flat:
    """All segments end to end, image markers widened; one array operation for the whole pack instead of one a segment.

    ids, labels (not shifted), positions: [total]; ends: [n], of each segment; prefix: [n, 2]; image_starts: [images].
    """

    def __init__(self, segments: Sequence[Segment], tokens_per_image: int) -> None:
        ids = np.array([token for segment in segments for token in segment.ids], np.int64)
        bounds = np.cumsum([len(segment.ids) for segment in segments], dtype=np.int64)
        learnt = np.zeros(len(ids), bool)
        owner = 0  # the segment that following segments share as a prefix
        owners = np.arange(len(segments))
        for number, (segment, bound) in enumerate(zip(segments, bounds, strict=True)):
            begin = bound - len(segment.ids)
            for start, stop in segment.spans:
                learnt[begin + start : begin + stop] = True
            owner = owner if segment.on_prefix else number
            owners[number] = owner
        image = ids == IMAGE_INDEX
        repeats = np.where(image, tokens_per_image, 1)
        stops = np.cumsum(repeats)
        self.image_starts = stops[image] - tokens_per_image
        self.ids = np.repeat(np.where(image, 0, ids), repeats)
        self.labels = np.repeat(np.where(learnt & ~image, ids, IGNORE_INDEX), repeats)
        self.ends = stops[bounds - 1]
        starts = np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]
        lengths = self.ends - starts
        shared = owners != np.arange(len(segments))
        self.prefix = np.stack([starts[owners], lengths[owners]], axis=1) * shared[:, None]
        self.positions = np.arange(len(self.ids)) + np.repeat(self.prefix[:, 1] - starts, lengths)
