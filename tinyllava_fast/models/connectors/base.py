"""Connectors map tower features [N, K, V] to language-model rows [N, K', D]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tinyllava_fast.models.architecture import ConnectorPart, Values
from tinyllava_fast.registry import Registry

INIT_STD = 0.02  # TinyLLaVA's connectors: N(0, 0.02) weights and zero biases, not torch's default

W = TypeVar("W")


class Connector(nn.Module, ABC):
    """vision_size: V. llm_size: D. options: the class's own ``Options``. Draw weights by ``reset``."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this connector alone."""

    name: ClassVar[str]

    def __init__(self, vision_size: int, llm_size: int, options: Options | None = None) -> None:
        super().__init__()
        self.vision_size = vision_size
        self.llm_size = llm_size
        self.options = options if options is not None else self.Options()

    @classmethod
    def tiny(cls) -> Values:
        """Return options of a small one, for tests."""
        return {}

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, num_tokens(K), D]."""

    def num_tokens(self, num_features: int) -> int:
        """K' for K; the same unless the connector resamples. UserError for a K that it cannot take."""
        return num_features

    def reads(self, features: Tensor) -> Tensor:
        """Return the share of each tower token in each row, [N, K, V] -> [N, num_tokens(K), K]; rows sum to 1.

        Where tokens and rows are as many, each row is its token. Otherwise by how much a row changes with a token: the
        norm of the gradient of a random projection of the row. A connector that knows better says so.
        """
        images, tokens, _ = features.shape
        if self.num_tokens(tokens) == tokens:
            return torch.eye(tokens, dtype=features.dtype, device=features.device).expand(images, -1, -1)
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            rows = self(leaf)
            signs = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0)).to(rows)
            each = (rows @ signs).sum(0)  # [K'], the images' rows do not mix
            grads = [torch.autograd.grad(one, leaf, retain_graph=True)[0].norm(dim=-1) for one in each]
        shares = torch.stack(grads, 1)
        return shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)

    def check_widths(self, widths: tuple[int, ...]) -> None:
        """Raise UserError if features concatenated from towers of these widths (their sum is V) do not fit."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw linear weights from N(0, 0.02) and zero the biases, in module order."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """Return the weights under TinyLLaVA Factory's names, its prefix ``_connector.`` removed, under ours."""
        return dict(state)

    def describe(self) -> ConnectorPart:
        """Return the description from which the connector is rebuilt."""
        return ConnectorPart(type=self.name, options=asdict(self.options))


CONNECTORS: Registry[type[Connector]] = Registry("connector", "tinyllava_fast.models.connectors")
