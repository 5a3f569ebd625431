"""The program of test_deepspeed_engine.py's processes: FOLDER, then one run after another in the same process group.

Each argument is NAME:OVERRIDE,OVERRIDE,... of the configuration in FOLDER/run.yaml; its output is FOLDER/NAME.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from tinyllava_fast.config.load import load_run
from tinyllava_fast.log import setup_logging
from tinyllava_fast.train.loop import train


def main() -> None:
    """Train every run of the command line."""
    setup_logging()
    gc.freeze()  # what is imported by now need not be visited at the end of every stage
    folder = Path(sys.argv[1])
    for run in sys.argv[2:]:
        name, _, overrides = run.partition(":")
        changes = [o for o in overrides.split(",") if o]
        train(load_run(folder / "run.yaml", [f"output_dir={folder / name}", *changes]))


if __name__ == "__main__":
    main()
