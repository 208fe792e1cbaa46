"""Signals that ask a run to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the numbers of stop signals; only the main thread can, in others none arrives."""
    received = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in STOP]
    try:
        yield received
    finally:
        for number, handler in zip(STOP, before, strict=True):
            signal.signal(number, handler)
