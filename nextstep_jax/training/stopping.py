"""Signals that ask a run to save and end."""

import contextlib
import signal


class StopRequest(contextlib.AbstractContextManager):
    """Notes SIGTERM and the first Ctrl-C instead of dying of them."""

    requested = False

    def __enter__(self):
        self._previous = {}
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
