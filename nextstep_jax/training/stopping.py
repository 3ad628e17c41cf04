"""Signals that ask a run to save and end; several processes agree on the step.

A signal may reach one process only, or all at different moments, and every process has to save the
same step. Whoever is asked leaves a note. A thread in each process finds it, keeps its loop from
passing another boundary between steps, and says which one the loop passed last; the boundary after
the latest of these is the first that nobody has passed, and there all stop. It takes about a second
and costs nothing while nobody asks: neither devices nor the loop wait for other processes.
"""

import contextlib
import itertools
import logging
import signal
import threading

from nextstep_jax.parallel import distributed

_LOOK_SECONDS = 0.5
# While all loops are being held.
_ANSWER_SECONDS = 0.02
# All processes open their requests in the same order: the number tells them apart.
_counter = itertools.count()


class StopRequest(contextlib.AbstractContextManager):
    """Notes SIGTERM and the first Ctrl-C instead of dying of them.

    Attributes:
        requested: Whether this process was asked, or all have agreed to stop.
    """

    def __init__(self):
        self.requested = False
        self._previous, self._name = {}, None
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._passed, self._stop_at, self._announced = -1, None, False

    def __enter__(self):
        if distributed.is_active():
            self._name = f"nextstep/stop-{next(_counter)}"
            threading.Thread(target=self._listen, name="stop", daemon=True).start()
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        self._closing.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and self.requested and distributed.is_active():
            # The signal may reach this process later than the decision of all, which it obeys.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def reached(self, step: int) -> bool:
        """Whether to stop here, `step` steps done; all processes ask after each step."""
        if self._name is None:
            return self.requested
        if self.requested and not self._announced:
            # Not in the handler, which may interrupt anything.
            self._announced = True
            distributed.post(f"{self._name}/asked", str(step))
        with self._lock:
            self._passed = step
            return self._stop_at is not None and step >= self._stop_at

    def _listen(self) -> None:
        """Until a process has been asked; then agrees with the others."""
        try:
            while not distributed.read(f"{self._name}/asked"):
                if self._closing.wait(_LOOK_SECONDS):
                    return
            with self._lock:
                distributed.post(f"{self._name}/passed", str(self._passed))
                while len(passed := distributed.read(f"{self._name}/passed")) < (
                    distributed.num_processes()
                ):
                    # A process whose loop is over does not answer; nor is it waited for then.
                    if self._closing.wait(_ANSWER_SECONDS):
                        return
                self._stop_at = max(map(int, passed.values())) + 1
                self.requested = True
        except Exception as error:  # The service is gone, and the process with it.
            logging.debug("no longer listening for requests to stop: %s", error)
