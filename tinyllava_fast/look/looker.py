"""A look inside: one answer of a model, token by token, and what of the pictures it came from.

The model runs plainly, with the answer given (teacher forcing), so every token's row of attention, its gradient and
its probability come from one pass. The engine that generated the answer may hold its weights in another form.

Legend: L layers, H heads, R generated tokens, T tokens, I image rows, N inputs, K tower tokens, K' rows of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request
from tinyllava_fast.look.attention import Pass, watched
from tinyllava_fast.look.curves import Fill, curves
from tinyllava_fast.look.prompt import Prompt, Prompts
from tinyllava_fast.look.types import (
    ATTENTION,
    FEATURES,
    METHODS,
    PIXELS,
    RELATIVE,
    ROWS,
    Lens,
    Look,
    Map,
    Shares,
    Sink,
    TokenLook,
)
from tinyllava_fast.models.lmm import LMM

NEUTRAL = "Write a general description of the image."
"""The question that attention is relative to."""
ALTERNATIVES = 5
FINEST = 64
"""Most cells a side of an input in maps of pixels."""
LEAST = 1e-9
"""Attention that is taken for none."""
SINK_NORM, SINK_SHARE = 10.0, 0.2
"""A position is a sink whose norm is so many medians, or that takes so much of the answer's attention."""


@dataclass(frozen=True)
class _Encoded:
    """The pictures on their way in, each kept for its gradient. reads: [N, K', K]."""

    pixels: Tensor  # [N, 3, H, W]
    features: Tensor  # [N, K, V]
    rows: Tensor  # [N, K', D]
    reads: Tensor


@dataclass(frozen=True)
class _Attended:
    """Attention to the image rows: of each layer, and that over the neutral question's, [H, R, I]; pooled, [R, I]."""

    own: list[Tensor]
    ratio: list[Tensor]
    pooled: dict[str, Tensor]


class Looker:
    """Looks inside answers of one model. Not for several threads at once.

    lmm: the plain model, in eval mode. engine: with the same tokenizer, template and reading of pictures.
    """

    def __init__(self, lmm: LMM, engine: Engine) -> None:
        self.lmm = lmm
        self.tokenizer = engine.tokenizer
        self.vocab = engine.vocab
        self.ends = engine.eos
        self.prompts = Prompts(lmm, engine.preparer())
        numbers = lmm.vision.patch_numbers
        self._side = self.prompts.side
        self._patches = torch.zeros(len(numbers), self._side**2, device=lmm.device)  # [K, patches]
        for token, patch in enumerate(numbers):
            if patch >= 0:
                self._patches[token, patch] = 1

    def look(
        self,
        request: Request,
        tokens: Sequence[int],
        *,
        neutral: str = NEUTRAL,
        fill: Fill | None = "mean",
        seed: int = 0,
        most_bytes: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Look:
        """Return the look inside an answer. tokens: as ``Answer.tokens`` has them, at least one.

        neutral: the question that attention is relative to. fill: what replaces parts of the picture in the curves;
        None: no curves. seed: of their random orders. most_bytes: memory that the look may take, as ``memory`` has it.
        between: called between passes of the model; what it raises ends the look.
        Raises UserError for a request without a picture, an answer without a token or a look that takes more memory,
        and as ``Engine.run``.
        """
        if not tokens:
            raise UserError(f"{request.named}: the answer has no token to look at; allow it more than none")
        prompt = self.prompts.prompt(request)
        needed = self.memory(prompt, len(tokens))
        if most_bytes is not None and needed > most_bytes:
            raise UserError(
                f"{request.named}: a look at {sum(prompt.inputs)} inputs of the tower and {len(prompt.ids)} tokens "
                f"takes about {needed:,} bytes, more than the {most_bytes:,} allowed; show fewer pictures or less text"
            )
        plain = self.prompts.prompt(self.prompts.asking(request, neutral))
        with torch.inference_mode(False), torch.enable_grad():
            encoded = self._encode(prompt)
            rows = torch.arange(len(tokens), device=self.lmm.device) + len(prompt.ids) - 1
            run = watched(self.lmm, self.prompts.embeds(prompt, encoded.rows, tokens), rows)
            log_p = self.lmm.logits(run.final[rows])[:, : self.vocab].float().log_softmax(-1)  # [R, V]
            gradients = self._gradients(prompt, encoded, log_p, tokens, between)
        with torch.no_grad():
            attended = self._attended(prompt, plain, encoded, run)
            found = self._found(prompt, neutral, encoded, run, log_p, attended, gradients, tokens)
            if fill is None:
                return found
            said = [t for t in tokens if t not in self.ends] or list(tokens)
            maps = {method: found.maps(method) for method in METHODS}
            made = curves(self.prompts, prompt, said, maps, self.vocab, fill, seed, between=between)
            return replace(found, curves=made)

    def memory(self, prompt: Prompt, count: int) -> int:
        """Return about how many bytes a look takes beside the weights. count: tokens of the answer.

        What gradients keep is taken for the inputs and outputs of every product with a weight. A CLIP tower and a Llama
        of 8 layers each, in float32 on a CPU, took 1.3 times as much as this says (1 and 4 pictures, 16 tokens).
        """
        lmm, inputs = self.lmm, sum(prompt.inputs)
        layers, length = lmm.family.layers(lmm.llm), len(prompt.ids) + count
        seen, rows = inputs * lmm.vision.num_tokens, sum(n for _, n, _ in prompt.spans)
        graph = length * _widths(layers) + seen * (_widths(lmm.vision) + _widths(lmm.connector))
        heads = lmm.num_layers * lmm.llm.config.num_attention_heads * count
        maps = heads * (length + 2 * rows + 3 * inputs * self._side**2) + 2 * rows**2
        return graph * lmm.dtype.itemsize + 4 * maps

    def _encode(self, prompt: Prompt) -> _Encoded:
        pixels = self.prompts.pixels(prompt.pictures).requires_grad_()
        features = self.lmm.vision(pixels)
        rows = self.lmm.connector(features)
        with torch.no_grad():
            reads = self.lmm.connector.reads(features.detach()).float()
        return _Encoded(pixels, features, rows, reads)

    def _attended(self, prompt: Prompt, plain: Prompt, encoded: _Encoded, run: Pass) -> _Attended:
        """The attention to image rows, and the same over that of the neutral question where its answer begins."""
        last = torch.tensor([len(plain.ids) - 1], device=self.lmm.device)
        other = watched(self.lmm, self.prompts.embeds(plain, encoded.rows, [0]), last)
        slots, theirs = self.prompts.slots(prompt), self.prompts.slots(plain)
        own = [w[:, :, slots] for w in run.weights]
        neutral = [w[:, :, theirs] for w in other.weights]  # [H, 1, I]
        # the ratio of the heads' means, as in the paper; no layer with a large one drowns the others
        pooled = [a.mean(0) / n.mean(0).clamp_min(LEAST) for a, n in zip(own, neutral, strict=True)]
        return _Attended(
            own=own,
            ratio=[a / n.clamp_min(LEAST) for a, n in zip(own, neutral, strict=True)],
            pooled={
                ATTENTION: torch.stack([a.mean(0) for a in own]).mean(0),
                RELATIVE: torch.stack([p / p.sum(-1, keepdim=True).clamp_min(LEAST) for p in pooled]).mean(0),
            },
        )

    def _gradients(
        self, prompt: Prompt, encoded: _Encoded, log_p: Tensor, tokens: Sequence[int], between: Callable[[], None]
    ) -> list[dict[str, list[np.ndarray]]]:
        """The maps of each token by its gradient."""
        sources = (encoded.pixels, encoded.features, encoded.rows)
        # Less their mean: through a norm, which no length changes, a vector's gradient is at right angles to it
        pixels, features, rows = (each.detach() for each in sources)
        away = pixels - pixels.mean((2, 3), keepdim=True)
        tokens_away, rows_away = features - features.mean(1, keepdim=True), rows - rows.mean(1, keepdim=True)
        found = []
        for number, token in enumerate(tokens):
            between()
            pixel, feature, row = torch.autograd.grad(log_p[number, token], sources, retain_graph=True)
            fine = _pooled((pixel * away).sum(1).abs())
            of_tokens = (feature * tokens_away).sum(-1).abs()  # [N, K]
            of_rows = (row * rows_away).sum(-1).abs()  # [N, K']
            maps = {
                PIXELS: fine,
                FEATURES: self._grid(of_tokens),
                ROWS: self._grid(torch.einsum("nr,nrk->nk", of_rows.float(), encoded.reads)),
            }
            found.append({name: self._by_picture(prompt, _normalized(values)) for name, values in maps.items()})
        return found

    def _grid(self, of_tokens: Tensor) -> Tensor:
        """[..., N, K] -> [..., N, g, g]; what is of no patch is dropped."""
        return (of_tokens.float() @ self._patches).unflatten(-1, (self._side, self._side))

    def _by_picture(self, prompt: Prompt, values: Tensor, dim: int = 0) -> list[np.ndarray]:
        return [part.detach().cpu().numpy() for part in values.split(prompt.inputs, dim)]

    def _spread(self, prompt: Prompt, encoded: _Encoded, of_slots: Tensor) -> Tensor:
        """What lies on the image rows, [..., I], as patches [..., N, g, g]: through the connector's own reading."""
        rows = encoded.reads.shape[1]
        total = of_slots.new_zeros(*of_slots.shape[:-1], sum(prompt.inputs), rows)
        starts = np.cumsum([0, *prompt.inputs])
        at = 0
        for _, count, picture in prompt.spans:
            part = of_slots[..., at : at + count].unflatten(-1, (-1, rows))
            total[..., starts[picture] : starts[picture + 1], :] += part
            at += count
        return self._grid(torch.einsum("...nr,nrk->...nk", total, encoded.reads))

    def _found(
        self,
        prompt: Prompt,
        neutral: str,
        encoded: _Encoded,
        run: Pass,
        log_p: Tensor,
        attended: _Attended,
        gradients: list[dict[str, list[np.ndarray]]],
        tokens: Sequence[int],
    ) -> Look:
        slots = self.prompts.slots(prompt)
        maps = gradients
        for name, values in attended.pooled.items():
            grids = self._spread(prompt, encoded, values)  # [R, N, g, g]
            for number, grid in enumerate(grids):
                maps[number][name] = self._by_picture(prompt, _normalized(grid))
        shares = self._shares(prompt, run, slots)
        looks = [
            TokenLook(
                id=token,
                text=self._text(token),
                probability=float(log_p[n, token].exp()),
                alternatives=self._likeliest(log_p[n]),
                shares=shares[n],
                maps={name: _placed(prompt, maps[n][name]) for name in METHODS},
                ends=token in self.ends,
            )
            for n, token in enumerate(tokens)
        ]
        said = [t for t in tokens if t not in self.ends]
        return Look(
            question=prompt.question,
            neutral=neutral,
            answer=str(self.tokenizer.decode(said, skip_special_tokens=True)).strip(),
            pictures=prompt.pictures,
            tokens=looks,
            heads=[self._by_picture(prompt, self._spread(prompt, encoded, a), 2) for a in attended.own],
            relative=[self._by_picture(prompt, self._spread(prompt, encoded, r), 2) for r in attended.ratio],
            boxes=prompt.boxes,
            lens=self._lens(run, slots),
            similarity=_similarity(self.prompts.rows(prompt, encoded.rows.detach())),
            centers=self._centers(prompt, encoded),
            sinks=self._sinks(prompt, run, slots),
        )

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _likeliest(self, log_p: Tensor) -> list[tuple[str, float]]:
        best = log_p.topk(min(ALTERNATIVES, self.vocab))
        return [(self._text(i), p) for i, p in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)]

    def _shares(self, prompt: Prompt, run: Pass, slots: Tensor) -> list[Shares]:
        pooled = torch.stack([w.mean(0) for w in run.weights]).mean(0)  # [R, T]
        image, first = pooled[:, slots].sum(-1), pooled[:, 0]
        if int(slots[0]) == 0:
            first = torch.zeros_like(first)
        answer = pooled[:, len(prompt.ids) :].sum(-1)
        rest = (1 - image - first - answer).clamp_min(0)
        rows = torch.stack([image, rest, first, answer], 1).tolist()
        return [Shares(image=i, question=q, first=f, answer=a) for i, q, f, a in rows]

    def _sinks(self, prompt: Prompt, run: Pass, slots: Tensor) -> list[Sink]:
        count = len(prompt.ids)
        norms = torch.stack([h[:count].float().norm(dim=-1) for h in run.hidden])  # [L, T]
        ratios = (norms / norms.median(-1, keepdim=True).values).amax(0)
        taken = torch.stack([w[:, :, :count].mean((0, 1)) for w in run.weights]).mean(0)
        rows = {int(slot): row for row, slot in enumerate(slots)}
        marked = ((ratios >= SINK_NORM) | (taken >= SINK_SHARE)).nonzero()[:, 0].tolist()
        texts = ["" if at in rows else self._text(prompt.ids[at]) for at in marked]
        return [
            Sink(at, rows.get(at, -1), text, float(ratios[at]), float(taken[at]))
            for at, text in zip(marked, texts, strict=True)
        ]

    def _lens(self, run: Pass, slots: Tensor) -> Lens:
        texts, best = [], []
        for hidden in run.hidden:
            found = [run.read(part)[:, : self.vocab].float().softmax(-1).max(-1) for part in hidden[slots].split(128)]
            ids = torch.cat([part.indices for part in found]).tolist()
            known = {i: self._text(i) for i in set(ids)}
            texts.append([known[i] for i in ids])
            best.append(torch.cat([part.values for part in found]))
        return Lens(texts, torch.stack(best).cpu().numpy())

    def _centers(self, prompt: Prompt, encoded: _Encoded) -> list[tuple[int, float, float]]:
        """The mean place of what each image row reads."""
        weights = self._grid(encoded.reads.transpose(0, 1)).transpose(0, 1).cpu().numpy()  # [N, K', g, g]
        found, starts = [], np.cumsum([0, *prompt.inputs])
        middle = (np.arange(self._side) + 0.5) / self._side
        for _, _, picture in prompt.spans:
            for number, (left, top, right, bottom) in enumerate(prompt.boxes[picture]):
                for grid in weights[starts[picture] + number]:
                    total = max(float(grid.sum()), 1e-9)
                    x, y = grid.sum(0) @ middle / total, grid.sum(1) @ middle / total
                    found.append((picture, left + x * (right - left), top + y * (bottom - top)))
        return found


def _widths(part: nn.Module) -> int:
    """The inputs and outputs of all weights that are matrices."""
    return sum(sum(p.shape) for p in part.parameters() if p.dim() == 2)


def _placed(prompt: Prompt, values: Sequence[np.ndarray]) -> list[Map]:
    return [Map(v, b, p.size) for v, b, p in zip(values, prompt.boxes, prompt.pictures, strict=True)]


def _normalized(values: Tensor) -> Tensor:
    """The values over their sum; evenly spread where all are zero."""
    total = values.sum()
    return values.float() / total if float(total) > 0 else torch.full_like(values, 1 / values.numel()).float()


def _pooled(values: Tensor) -> Tensor:
    """Sums [N, n, n] of pixels [N, H, W], with n at most FINEST."""
    side = values.shape[-1]
    cells = next(n for n in range(min(side, FINEST), 0, -1) if side % n == 0)
    return values.float().unflatten(1, (cells, -1)).unflatten(3, (cells, -1)).sum((2, 4))


def _similarity(rows: Tensor) -> np.ndarray:
    """Cosines [I, I] of rows less their mean."""
    centred = rows.float() - rows.float().mean(0)
    unit = torch.nn.functional.normalize(centred, dim=-1)
    return (unit @ unit.T).cpu().numpy()
