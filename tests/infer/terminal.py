"""A pseudo terminal with tlf-chat, for what only a terminal has: keys, signals, readline."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time


class Terminal:
    """tlf-chat at a pseudo terminal."""

    def __init__(self, *words: str) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "tinyllava_fast.infer.chat", *words]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def until(self, *texts: bytes) -> None:
        for text in texts:
            while text not in self.seen:
                self.seen += os.read(self.ours, 4096)
            self.seen = self.seen.partition(text)[2]

    def type(self, text: str, *then: bytes) -> None:
        os.write(self.ours, text.encode())
        self.until(*then)

    def press_ctrl_c(self, *then: bytes) -> None:
        time.sleep(0.5)  # readline shows its prompt a moment before signals wake it
        self.process.send_signal(signal.SIGINT)
        self.until(*then)
