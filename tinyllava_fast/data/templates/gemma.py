"""Gemma as the reference trains it: answers end with ``<eos>``."""

from __future__ import annotations

from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("gemma")(Template(eos="<eos>", reference_masks="gemma"))
