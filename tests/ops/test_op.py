"""define_op: dispatch, messages and refusals."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyllava_fast import log as log_module
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import _cpp, splice
from tinyllava_fast.ops._op import OPS, Op, define_op, force_backend

IDS, WEIGHT = torch.tensor([0, 1]), torch.ones(2, 3)
NONE = (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown backend 'ccp'; did you mean 'cpp'"), force_backend("ccp"):
        pass


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["splice_fwd"]
    args = (IDS, WEIGHT, *NONE)
    monkeypatch.setenv("TLF_BACKEND", "reference")
    assert op.pick(args) is op.reference
    monkeypatch.setenv("TLF_BACKEND", "auto")
    assert op.pick(args) is op.cpp
    monkeypatch.setenv("TLF_BACKEND", "cuda")
    with pytest.raises(UserError, match="TLF_BACKEND='cuda'"):
        op.pick(args)


def test_a_missing_extension_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_cpp, "load", lambda: (None, "the C++ extension does not load (gone); run `make setup`"))
    monkeypatch.setattr(log_module, "_said", set())
    monkeypatch.setattr(log_module.log, "propagate", True)
    with caplog.at_level(logging.WARNING, "tinyllava_fast"):
        for _ in range(2):
            assert torch.equal(splice(IDS, WEIGHT, *NONE), WEIGHT)
    assert [r.message for r in caplog.records] == [
        "splice_fwd: not running on cpp because the C++ extension does not load (gone); run `make setup`; "
        "using the torch reference"
    ]
    with pytest.raises(RuntimeError, match="run `make setup`"):
        _cpp.extension()


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _cpp.load.cache_clear()
    monkeypatch.setattr(_cpp, "ABI", -1)
    module, reason = _cpp.load()
    _cpp.load.cache_clear()
    assert module is None and "needs -1; run `make setup`" in reason


def test_backends_say_why_they_cannot_run() -> None:
    op = OPS["splice_bwd"]
    half = (torch.ones(2, 3).half(), IDS, NONE[1], 2, True, True)
    assert op.why_not("cpp", half) == "its C++ kernel takes torch.float32 or torch.bfloat16, got torch.float16"
    assert op.why_not("triton", half) == "its Triton kernel takes CUDA tensors, got cpu"
    assert "takes CPU tensors, got meta" in str(op.why_not("cpp", (torch.ones(2, 3, device="meta"), *half[1:])))
    assert op.why_not("reference", half) is None


def test_an_op_needs_a_name_of_its_own_and_no_defaults() -> None:
    def define(reference: Any, name: str) -> Op:
        return define_op(module="x", check=lambda *_: None, fake=lambda x: x, name=name)(reference)

    def twice(x: Tensor) -> Tensor:
        return x * 2

    def by(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="op splice_fwd is defined twice"):
        define(twice, "splice_fwd")
    with pytest.raises(TypeError, match=r"give no defaults in the reference.*factor"):
        define(by, "by")


def test_large_buffers_are_aligned_and_zero() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.int32):
        big = _cpp.zeros(1 << 12, 600, dtype=dtype)
        assert big.shape == (1 << 12, 600) and big.dtype == dtype and not big.any()
        assert big.data_ptr() % 64 == 0 and big.is_contiguous()
    assert _cpp.empty(0, 7, dtype=torch.bfloat16).shape == (0, 7)
