"""Messages of other libraries that reach a user: not what is said at every start, and no progress bar in a log file."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from tinyllava_fast.log import setup_logging
setup_logging()
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
logger = logging.getLogger({logger!r})
logger.warning({noise!r})
logger.warning("this matters")
from tqdm.auto import tqdm
for _ in tqdm(range(3), desc="a bar"):
    pass
"""


@pytest.mark.parametrize(
    ("logger", "noise"),
    [
        ("transformers.integrations.hub_kernels", "`kernels` is either not installed or uses an incompatible version."),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels"),
        ("DeepSpeed", "Setting ds_accelerator to cpu (auto detect)"),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
    ],
)
def test_noise_is_dropped_and_nothing_else(logger: str, noise: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TQDM", "HF_HUB"))}
    script = SCRIPT.format(logger=logger, noise=noise)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == f"{logger}: this matters\n" and not done.stdout
