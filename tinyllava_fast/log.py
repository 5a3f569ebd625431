"""One logger for the package. Rank filtering lives in the handler, so call sites never ask for the rank."""

from __future__ import annotations

import io
import logging
import os
import sys

log = logging.getLogger("tinyllava_fast")
_said: set[str] = set()
# What other libraries say at every start and a user can do nothing about: logger, beginnings of its messages. The
# kernels that they miss are replaced by ours.
_NOISE = {
    "transformers.integrations.hub_kernels": ("`kernels` is either not installed", "`kernels` is not installed"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": ("Setting ds_accelerator to", "Setting accelerator to"),
}


class _Quiet(logging.Filter):
    """Drops messages with one of some beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the message stays."""
        return not record.getMessage().startswith(self.beginnings)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to stderr through rich on rank 0 and silence other ranks below WARNING.

    What stdout cannot write (a path that is not UTF-8, a sign that its encoding lacks) it then writes escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") not in ("", "0"):
        level = max(level, logging.WARNING)
    log.setLevel(level)
    if log.handlers:
        return
    _quieten()
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(show_path=False, rich_tracebacks=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.propagate = False


def _quieten() -> None:
    """Drop other libraries' noise; and their progress bars, which a log file shows line by line, off a terminal.

    tqdm reads its variable once, when it is first imported: commands set up the log before anything large.
    """
    for name, beginnings in _NOISE.items():
        logging.getLogger(name).addFilter(_Quiet(beginnings))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def place_of(error: BaseException) -> str:
    """Return the kind of an error, and the file and line that raised it, for a log that must hold no user's text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "?" if trace is None else f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
    return f"{type(error).__name__} at {where}"


def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message the first time it is seen in this process: notices of a slower path taken."""
    if message not in _said:
        _said.add(message)
        log.log(level, message)
