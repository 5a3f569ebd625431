"""Phi, StableLM and other models whose end token is ``<|endoftext|>``."""

from __future__ import annotations

from tinyllava_fast.data.templates.base import TEMPLATES, Template

TEMPLATES.register("phi")(Template(eos="<|endoftext|>"))
