"""A linear layer of the prepared model beside low-rank adapters (LoRA, arXiv 2106.09685), one for each row or none.

    y[n] = W x[n] + bias + B[i] (A[i] x[n])        i: the adapter of row n; alpha / R is in B

The weight is read once for all rows. Where the rows of a pass are few and their adapters several, all A are one matrix
and all B another, and of the product between them each row keeps its own adapter's columns; elsewhere each adapter
multiplies its own rows. Both are the forward of ops.lora_linear for each row; like ops.linear it has no backward.

Legend: T rows of a pass, K inputs, O outputs, C the ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyllava_fast.ops.linear import finish_product, linear

MIXED_ROWS = 64
"""Most rows of a pass that the products with all adapters are made for."""
_LEAST_MIXED = 2  # adapters in a pass: one alone multiplies its own rows
_MOST_IDLE = 4  # adapters that a layer has for each one in the pass, beyond which the columns of the others cost more


class Update(NamedTuple):
    """The change of one layer by one adapter: W <- W + B A."""

    a: Tensor  # [R, K]
    b: Tensor  # [O, R], alpha / R in it


class _Factors(NamedTuple):
    """The same of all layers of a module: zeros where one is of another layer."""

    down: Tensor  # [C, K]
    up: Tensor  # [O, C]


class Pass:
    """The adapter of each row of the pass that runs, for all layers of a model to look at; none outside ``of``."""

    def __init__(self) -> None:
        self.numbers: Tensor | None = None  # [T] int64, 0: no adapter
        self.rows: dict[int, slice | Tensor | None] = {}  # by adapter; None: all
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    @contextmanager
    def of(self, numbers: Sequence[int] | np.ndarray, device: torch.device) -> Iterator[None]:
        """Let rows go through the adapters of these numbers inside the block."""
        given = np.asarray(numbers, dtype=np.int64)
        for number in np.unique(given[given > 0]).tolist():
            places = np.flatnonzero(given == number)
            first, stop = int(places[0]), int(places[-1]) + 1
            if stop - first > len(places):
                self.rows[number] = torch.from_numpy(places).to(device)
            else:
                self.rows[number] = None if len(places) == len(given) else slice(first, stop)
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
        few = self.numbers is not None and len(self.numbers) <= MIXED_ROWS
        return few and used >= _LEAST_MIXED and used * _MOST_IDLE >= adapters

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
        self._sizes = tuple(sizes)
        self._own: dict[int, _Factors] = {}  # by adapter
        self._all = _Factors(torch.empty(0), torch.empty(0))  # where there are several
        self._owners: tuple[int, ...] = ()  # the adapter of each column of x Aᵀ

    def put(self, number: int, updates: Mapping[int, Update]) -> None:
        """Let an adapter change some of the layers. updates: by their place among the layers."""
        places = sorted(updates)
        down = torch.cat([updates[place].a for place in places])
        up = down.new_zeros(sum(self._sizes), len(down))
        column = 0
        for place in places:
            b = updates[place].b
            up.split(self._sizes)[place][:, column : column + b.shape[1]] = b
            column += b.shape[1]
        self._lay_out({**self._own, number: _Factors(down, up)})

    def drop(self, number: int) -> None:
        """Forget an adapter."""
        self._lay_out({key: factors for key, factors in self._own.items() if key != number})

    def _lay_out(self, own: dict[int, _Factors]) -> None:
        """Put the factors of all adapters side by side."""
        self._own = own
        if len(own) < _LEAST_MIXED:
            self._all = _Factors(torch.empty(0), torch.empty(0))
            return
        self._all = _Factors(torch.cat([f.down for f in own.values()]), torch.cat([f.up for f in own.values()], 1))
        self._owners = tuple(number for number, factors in own.items() for _ in factors.down)

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., O], as DecodeLinear takes it; nn.Linear's layers have neither of the two others."""
        if self.current.numbers is None:
            more = () if activation == "none" and residual is None else (activation, residual)
            plain: Tensor = self.base(x, *more)
            return plain
        y: Tensor = self.base(x)
        flat = y.view(-1, y.shape[-1])
        if self._own:
            flat = self._added(x.reshape(len(flat), x.shape[-1]), flat)
        shared = None if residual is None else residual.reshape(len(flat), residual.shape[-1])
        out = finish_product(flat, activation, shared)
        return out.view(*x.shape[:-1], out.shape[1])

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y [T, O] with what the adapters make of x [T, K]. y may be changed."""
        current = self.current
        if len(self._own) >= _LEAST_MIXED and current.is_mixed(len(self._own)):
            # filled, not multiplied: in float16 the product with another adapter may be no number
            u = linear(x, self._all.down).masked_fill_(current.foreign(self._owners), 0)
            return linear(u, self._all.up, residual=y)
        for number, rows in current.rows.items():
            if (own := self._own.get(number)) is None:
                continue
            if rows is None:
                y = linear(linear(x, own.down), own.up, residual=y)
            elif isinstance(rows, slice):
                y[rows] += linear(linear(x[rows], own.down), own.up)
            else:
                y.index_add_(0, rows, linear(linear(x[rows], own.down), own.up))
        return y
