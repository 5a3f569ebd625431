"""Signals that ask a run to stop: it finishes its step, saves, and ends, in all of its processes alike."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tinyllava_fast import group
from tinyllava_fast.data.workers import STOP_SIGNALS, exit_code
from tinyllava_fast.errors import Interruption, LostError
from tinyllava_fast.log import log
from tinyllava_fast.train.failures import stopped, without_another

if TYPE_CHECKING:
    from tinyllava_fast.train.run import Run


class StopRequest(Interruption):
    """A signal asked to stop; a checkpoint is saved if steps were done.

    It comes up anywhere, like KeyboardInterrupt, and passes all code that turns errors into others. exit_code: 128 +
    the signal; 0 for SIGUSR1, by which a batch system asks for this end. said: where the run goes on, for people.
    agreed: all processes stop here; else this one was told alone, as far as it knows.
    """

    def __init__(self, number: int, *, agreed: bool = True) -> None:
        super().__init__(number)
        self.exit_code, self.agreed = exit_code(number), agreed
        self.said = ""

    def __str__(self) -> str:
        return self.said


def signal_flags(number: int) -> list[float]:
    """Return 1 for the one of STOP_SIGNALS that a process has received, and 0 for the others; to be summed over all."""
    return [float(number == one) for one in STOP_SIGNALS]


def first_signal(flags: list[float]) -> int:
    """Return the first of STOP_SIGNALS whose flag is set; 0: none."""
    return next((int(number) for number, flag in zip(STOP_SIGNALS, flags, strict=True) if flag), 0)


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """STOP_SIGNALS ask the loop to stop after the step, and stop at once what is between the steps.

    So does one that another process was told between its steps, once this one comes to wait for it. A second SIGINT
    interrupts at once. SIGHUP stays ignored where it was, as nohup has it.
    """

    def handle(number: int, _: object) -> None:
        if run.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_signal = number
        if not run.stepping:
            log.warning("%s: stopping", signal.Signals(number).name)
            raise StopRequest(number, agreed=False)
        log.warning("%s: finishing this step, then saving a checkpoint", signal.Signals(number).name)

    try:
        wanted = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        previous = {n: signal.signal(n, handle) for n in wanted}
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        with _told_to_another():
            yield
    except StopRequest as request:
        if request.number == signal.SIGTERM and not request.agreed:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come again while this process looks and speaks
            lost, stop = group.lost()
            if lost and not stop:  # torchrun sends it, too, once another process has died: that is the news
                raise LostError(without_another(run.way, run.state, lost)) from None
        request.said = stopped(run.way)
        raise
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:  # not one that is ignored by now, see group.losses_named
                signal.signal(number, handler)


@contextmanager
def _told_to_another() -> Iterator[None]:
    """The end of a process that was told to stop is the stop of this one, and no failure to start again after."""
    try:
        yield
    except LostError as error:
        if not error.stop:
            raise
        raise StopRequest(error.stop) from error
