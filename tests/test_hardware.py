import ctypes
import os
import subprocess
import sys

from tinyllava_fast import hardware

FAULTS = """
import resource, sys
if sys.argv[1] == "prepared":
    from tinyllava_fast.hardware import prepare_memory
    assert prepare_memory()
import torch
x = torch.ones(8 * 2**20)
y = x + 1
del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    y = x + 1
    del y
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def faults(mode):
    env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    return int(
        subprocess.run([sys.executable, "-c", FAULTS, mode], env=env, capture_output=True, text=True, check=True).stdout
    )


def test_freed_tensors_are_reused_without_page_faults():
    assert faults("prepared") < faults("plain") / 10


def test_without_glibc_it_says_no(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not hardware.prepare_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # the user's own value stays
