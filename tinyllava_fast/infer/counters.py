"""What an engine says of its work and its load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """The work of an engine so far. prompt_tokens counts every prompt whole; computed_tokens what was really run."""

    requests: int = 0
    images_encoded: int = 0
    images_reused: int = 0  # their features came from the cache
    reused_tokens: int = 0  # of prompts: their K and V came from earlier requests
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    guessed_tokens: int = 0  # of greedy sequences, and verified in a step
    right_guesses: int = 0


@dataclass(frozen=True)
class Usage:
    """Sequences in flight, and rows of the K/V pool. kept_rows: of ended sequences, for prompts that begin alike."""

    running: int
    waiting: int
    rows: int
    free_rows: int
    kept_rows: int
