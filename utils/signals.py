"""A request to stop that waits for a good moment: SIGTERM from a scheduler or torchrun, SIGINT from Ctrl-C, SIGUSR1 or SIGUSR2
from SLURM (--signal), SIGHUP from a terminal that is gone."""

import os
import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Seconds within which a signal is the same request again: torchrun passes on what the terminal or the scheduler has sent to
# everyone already.
REPEATED_WITHIN = 5.0


class Stopped(SystemExit):
    """A stop was requested where nothing could go on; the process ends with 128 and the signal's number unless it is caught."""


class StopRequest:
    """While entered, the first of these signals is remembered in `number` (0 until then); a later one acts as usual."""

    current: "StopRequest | None" = None  # the one that is entered

    def __init__(self):
        self.number = 0
        self._since = 0.0
        self._usual: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._usual = {number: signal.signal(number, self._remember) for number in SIGNALS}
        StopRequest.current = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        StopRequest.current = None
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > REPEATED_WITHIN:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)


def check_stopped() -> None:
    """Stopped where a stop has been requested: for loops that wait for something that may never come."""
    if StopRequest.current is not None and StopRequest.current.number:
        raise Stopped(128 + StopRequest.current.number)


def ignore_requests() -> None:
    """For processes that load images, which get the same signals as the one that they work for: that one ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
