"""A polite end: SIGTERM or a first Ctrl-C asks the loop to save and stop, a second insists.

With several processes the request may reach any one of them; all then stop at the same step.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from jaxscale.config import Stopped


class StopRequest:
    """Listens for signals while it is entered; the handlers before it come back at its exit."""

    def __init__(self, *, in_group: bool) -> None:
        """Prepare to listen; `in_group` tells whether this is one of several JAX processes."""
        self._in_group = in_group
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) there is no
        # request.
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGINT)
            # In a process group JAX's own service takes SIGTERM and tells the others.
            if not self._in_group:
                self._listen(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if self._in_group:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Tell whether to stop between steps; a group can only agree at a step."""
        return self._asked and not self._in_group

    def agreed(self, step: int) -> bool:
        """Tell whether all processes stop before this step; each calls it at every step."""
        if self._in_group:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def check(self) -> None:
        """Raise Stopped if a stop was asked for; between steps, where a loop need not wait.

        Does nothing in a group, whose processes agree at steps alone.
        """
        if self.asked():
            raise Stopped("in the middle of something that need not end")
