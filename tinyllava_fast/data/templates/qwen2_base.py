"""Qwen2 base models: answers end with ``<|endoftext|>``, without ChatML headers."""

from __future__ import annotations

from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("qwen2_base")(Template(eos="<|endoftext|>"))
