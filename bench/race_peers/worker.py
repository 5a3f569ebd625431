"""One side of `tlf-bench race` in a process of its own: ``python worker.py PEER MODEL PRECISION THREADS``.

It is run as a script by the peer's own Python, where this package is not installed: nothing outside the standard
library is imported here. A line of JSON comes in, one goes out: ``{"do": NAME, ...arguments}`` is a method of the
peer's Side, the reply is ``{"result": ...}`` or ``{"error": TEXT}``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import IO


def serve(side: object, lines: IO[str], replies: IO[str]) -> None:
    """Obey the lines until they end. A method's seconds are measured here, the same way for every peer."""
    for line in lines:
        order = json.loads(line)
        name = order.pop("do")
        began = time.perf_counter()
        try:
            value = _peak() if name == "peak" else getattr(side, name)(**order)
            reply = {"result": value, "seconds": time.perf_counter() - began}
        except Exception as error:  # the parent names the peer and goes on with the others
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Keep standard output for the replies, whatever an engine writes there, and serve."""
    name, model, precision, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side = importlib.import_module(name).Side(model, precision, int(threads))
    print(json.dumps({"result": "ready"}), file=replies, flush=True)
    serve(side, sys.stdin, replies)


if __name__ == "__main__":
    main()
