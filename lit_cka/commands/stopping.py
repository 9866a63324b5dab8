"""Commands that are told to stop, by Ctrl-C or by SIGTERM (a cluster's way): they clean up, and say so in a line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lit_cka.commands.hub import chain
from lit_cka.commands.messages import fail

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit statuses, as shells have them


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever cleans up after Ctrl-C cleans up after this."""


@contextmanager
def stopping_in_a_line(advice: str = "") -> Iterator[None]:
    """While active, Ctrl-C and SIGTERM end the process with a line on stderr, and the status 130 or 143.

    Both are exceptions in the main thread, so that files in the making are removed, and what was done is kept. While a
    Trainer runs, its own handling of signals is left alone: it comes to the end of a batch, and tells callbacks. Where
    somebody else handles SIGTERM already, nothing is changed.

    Args:
        advice: what to say behind, such as how to go on.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is not signal.SIG_DFL:
        yield
        return
    process, has_come = os.getpid(), False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        if os.getpid() != process:  # forked, and not ours to explain
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        has_come = True
        if signal.getsignal(signal.SIGTERM) is terminate:  # else the Trainer's handler has called this one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # many send it twice: cleaning up is not to be stopped
            raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException as error:
        if not has_come and not any(isinstance(each, KeyboardInterrupt) for each in chain(error)):
            raise
        _end(TERMINATED if has_come else INTERRUPTED, advice)
    else:
        if has_come:
            _end(TERMINATED, advice)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(status: int, advice: str) -> NoReturn:
    said = "Stopped by SIGTERM." if status == TERMINATED else "Interrupted."
    fail(f"{said} {advice}".rstrip(), status)
