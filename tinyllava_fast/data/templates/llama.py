"""Llama, TinyLlama, OpenELM: answers end with ``</s>``."""

from __future__ import annotations

from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("llama")(Template(eos="</s>", reference_masks="llama"))
