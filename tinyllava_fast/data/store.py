"""Tokenized samples in a few flat arrays: small, and shared with forked workers without being copied."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from zlib import crc32

from tinyllava_fast.data.templates.base import Segment


class SampleStore:
    """Append-only list of samples (lists of Segments), each with an id and the image of each of its markers."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._spans = array("i")
        self._segments = array("q")  # (end in ids, end in spans, on_prefix) of each segment
        self._samples = array("q", [0])  # first segment of each sample, and the end
        self._names = _Strings()
        self._images = _Strings()  # the images of all samples
        self._views = array("i")  # (number of the image in its sample, inputs of the tower) of each showing
        self._pictures = array("q", [0, 0])  # first image and first showing of each sample, and the end

    def __len__(self) -> int:
        return len(self._samples) - 1

    def append(
        self, sample: Sequence[Segment], name: str, images: Sequence[str] = (), shown: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Add one sample. images: paths. shown: (number of the image, inputs of the tower) wherever one is shown."""
        for segment in sample:
            self._ids.extend(segment.ids)
            for span in segment.spans:
                self._spans.extend(span)
            self._segments.extend((len(self._ids), len(self._spans), int(segment.on_prefix)))
        self._samples.append(len(self._segments) // 3)
        self._names.append(name)
        for image in images:
            self._images.append(image)
        for view in shown:
            self._views.extend(view)
        self._pictures.extend((len(self._images), len(self._views) // 2))

    def sample(self, index: int) -> list[Segment]:
        """The segments of one sample."""
        found = []
        for number in range(self._samples[index], self._samples[index + 1]):
            begin, spans_begin = self._segments[3 * number - 3 : 3 * number - 1] if number else (0, 0)
            end, spans_end, on_prefix = self._segments[3 * number : 3 * number + 3]
            spans = self._spans[spans_begin:spans_end].tolist()
            pairs = list(zip(spans[0::2], spans[1::2], strict=True))
            found.append(Segment(self._ids[begin:end].tolist(), pairs, bool(on_prefix)))
        return found

    def name(self, index: int) -> str:
        """The record id of one sample."""
        return self._names[index]

    def images(self, index: int) -> list[str]:
        """The image paths of one sample; empty for text alone."""
        return [self._images[i] for i in range(self._pictures[2 * index], self._pictures[2 * index + 2])]

    def shown(self, index: int) -> list[tuple[int, int]]:
        """(number of the image, inputs of the tower) of every place of one sample that shows an image, in order."""
        start, stop = self._pictures[2 * index + 1], self._pictures[2 * index + 3]
        flat = self._views[2 * start : 2 * stop].tolist()
        return list(zip(flat[0::2], flat[1::2], strict=True))

    def fingerprint(self) -> int:
        """A checksum of all tokens and labels: a saved position is valid only for the same data."""
        total = 0
        for column in (self._ids, self._spans, self._segments, self._samples):
            total = crc32(memoryview(column).cast("B") if len(column) else b"", total)
        return total

    def sources(self) -> int:
        """A checksum of all record ids and image paths, which no position depends on."""
        return self._images.checksum(self._names.checksum(0))


class _Strings:
    """Strings as one blob: no Python object each, whose reference count would unshare memory in forked workers."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, text: str) -> None:
        """Add one string."""
        self._blob += text.encode()
        self._ends.append(len(self._blob))

    def checksum(self, start: int) -> int:
        """CRC-32 of all of them, going on from another."""
        return crc32(self._blob, start)

    def __getitem__(self, index: int) -> str:
        return self._blob[self._ends[index] : self._ends[index + 1]].decode()
