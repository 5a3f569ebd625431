"""One logger for the package. Rank filtering lives in the handler, so call sites never ask for the rank."""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger("tinyllava_fast")
_said: set[str] = set()


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to stderr through rich on rank 0 and silence other ranks below WARNING."""
    if int(os.environ.get("RANK", "0")) != 0:
        level = max(level, logging.WARNING)
    log.setLevel(level)
    if log.handlers:
        return
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(show_path=False, rich_tracebacks=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.propagate = False


def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message the first time it is seen in this process: notices of a slower path taken."""
    if message not in _said:
        _said.add(message)
        log.log(level, message)
