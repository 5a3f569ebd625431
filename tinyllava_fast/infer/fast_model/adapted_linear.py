"""A linear layer of the prepared model beside low-rank adapters (LoRA, arXiv 2106.09685), one for each row or none.

    y[n] = W x[n] + bias + B[i] (A[i] x[n])        i: the adapter of row n; alpha / R is in B

The weight is read once for all rows. Where the rows of a pass are few and their adapters several, all A are one matrix
and all B another, and of the product between them each row keeps its own adapter's columns; elsewhere each adapter
multiplies its own rows. Both are the forward of ops.lora_linear for each row; like ops.linear it has no backward.

Legend: T rows of a pass, K inputs, O outputs, C the ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyllava_fast.ops.linear import finish_product

MASKED_ROWS = 64
"""Most rows of a pass that the products with all adapters are made for."""
_LEAST_MASKED = 3  # adapters in a pass: fewer multiply their own rows in as many calls
_MOST_IDLE = 4  # adapters that a layer has for each one in the pass, beyond which the columns of the others cost more


class Update(NamedTuple):
    """The change of one layer by one adapter: W <- W + B A."""

    a: Tensor  # [R, K]
    b: Tensor  # [O, R], alpha / R in it


class Pass:
    """The adapter of each row of the pass that runs, for all layers of a model to look at; none outside ``of``."""

    def __init__(self) -> None:
        self.numbers: Tensor | None = None  # [T] int64, 0: no adapter
        self.rows: dict[int, slice | Tensor] = {}  # by adapter
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    @contextmanager
    def of(self, numbers: Sequence[int] | np.ndarray, device: torch.device) -> Iterator[None]:
        """Let rows go through the adapters of these numbers inside the block."""
        given = np.asarray(numbers, dtype=np.int64)
        for number in np.unique(given[given > 0]).tolist():
            places = np.flatnonzero(given == number)
            first, last = int(places[0]), int(places[-1])
            together = last - first + 1 == len(places)
            self.rows[number] = slice(first, last + 1) if together else torch.from_numpy(places).to(device)
        self.numbers = torch.from_numpy(given).to(device)
        try:
            yield
        finally:
            self.numbers = None
            self.rows.clear()
            self._foreign.clear()

    def is_mixed(self, adapters: int) -> bool:
        """Return whether a layer that has so many adapters multiplies all rows by all of them."""
        used = len(self.rows)
        few = self.numbers is not None and len(self.numbers) <= MASKED_ROWS
        return few and used >= _LEAST_MASKED and used * _MOST_IDLE >= adapters

    def foreign(self, owners: tuple[int, ...]) -> Tensor:
        """[T, C], true where a column is not of the row's adapter. owners: the adapter of each column."""
        assert self.numbers is not None  # noqa: S101 asked for inside a pass alone
        if owners not in self._foreign:
            self._foreign[owners] = self.numbers[:, None] != torch.tensor(owners, device=self.numbers.device)
        return self._foreign[owners]


class AdaptedLinear(nn.Module):
    """The same function as the layer it stands for, plus the adapters of the rows of the pass."""

    def __init__(self, base: nn.Module, sizes: Sequence[int], current: Pass) -> None:
        """base: nn.Linear or DecodeLinear. sizes: outputs of each of its layers. current: of the model."""
        super().__init__()
        self.base = base
        self.current = current
        self._ends = np.cumsum(sizes).tolist()
        self._updates: dict[tuple[int, int], Update] = {}  # by the layer's place and the adapter; views of the below
        self._a = torch.empty(0)  # [C, K], by the layer's place and then by the adapter
        self._owners: tuple[int, ...] = ()
        self._count = 0  # adapters
        self._b: dict[int, tuple[slice, Tensor]] = {}  # by place: columns of x Aᵀ, and [their number, outputs]

    def put(self, place: int, number: int, update: Update | None) -> None:
        """Let an adapter change a layer, or no longer change it."""
        if update is None:
            self._updates.pop((place, number), None)
        else:
            self._updates[place, number] = update
        self._lay_out()

    def _lay_out(self) -> None:
        """Put all A side by side, and all B of each layer."""
        keys = sorted(self._updates)
        self._count = len({number for _, number in keys})
        self._b.clear()
        if not keys:
            self._a, self._owners = torch.empty(0), ()
            return
        self._a = torch.cat([self._updates[key].a for key in keys])
        self._owners = tuple(number for place, number in keys for _ in self._updates[place, number].a)
        start = 0
        for place in dict.fromkeys(place for place, _ in keys):
            own = [key for key in keys if key[0] == place]
            b = torch.cat([self._updates[key].b for key in own], 1)
            self._b[place] = (slice(start, start + b.shape[1]), b)
            column = 0
            for key in own:
                rank = self._updates[key].a.shape[0]
                at = start + column
                self._updates[key] = Update(self._a[at : at + rank], b[:, column : column + rank])
                column += rank
            start += b.shape[1]

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., O], as DecodeLinear takes it; nn.Linear's layers have neither of the two others."""
        current = self.current
        if current.numbers is None:
            more = () if activation == "none" and residual is None else (activation, residual)
            out: Tensor = self.base(x, *more)
            return out
        y = self.base(x)
        flat = y.view(-1, y.shape[-1])
        rows = x.reshape(len(flat), x.shape[-1])
        if self._updates:
            (self._add_all if current.is_mixed(self._count) else self._add_each)(rows, flat)
        shared = None if residual is None else residual.reshape(len(flat), -1)
        return finish_product(flat, activation, shared).view(*x.shape[:-1], -1)

    def _outputs(self, place: int) -> slice:
        return slice(self._ends[place - 1] if place else 0, self._ends[place])

    def _add_all(self, x: Tensor, y: Tensor) -> None:
        # filled, not multiplied: in float16 the product with another adapter may be no number
        u = (x @ self._a.t()).masked_fill_(self.current.foreign(self._owners), 0)
        for place, (columns, b) in self._b.items():
            y[:, self._outputs(place)].addmm_(u[:, columns], b.t())

    def _add_each(self, x: Tensor, y: Tensor) -> None:
        for (place, number), (a, b) in self._updates.items():
            rows = self.current.rows.get(number)
            if rows is None:
                continue
            own, u = y[:, self._outputs(place)], x[rows] @ a.t()
            if isinstance(rows, slice):
                own[rows].addmm_(u, b.t())
            else:
                own.index_add_(0, rows, u @ b.t())
