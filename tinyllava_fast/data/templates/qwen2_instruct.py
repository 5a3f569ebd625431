"""Qwen2 instruct models: answers end with ``<|im_end|>``, without ChatML headers."""

from __future__ import annotations

from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("qwen2_instruct")(Template(eos="<|im_end|>"))
