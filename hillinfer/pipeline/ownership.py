"""A cache belongs to the process that made it, and to one thread at a time."""

import os
import threading

from hillinfer.errors import UsageError


class CacheOwner:
    """Rejects use from a forked process, or from a second thread in mid-step.

    Another thread may continue where one has finished. Two that alternate in mid-answer would each attend to the
    other's tokens, so the one that comes back is refused.
    """

    def __init__(self, layers: int):
        self.layers, self.pid = layers, os.getpid()
        self._lock = threading.Lock()
        self.free()

    @property
    def here(self) -> bool:
        """True in the process that made the cache, False in a fork of it."""
        return os.getpid() == self.pid

    def free(self) -> None:
        """Drop all claims: an unfinished step is abandoned."""
        self._owner, self._number, self._reached, self._mine = None, 0, self.layers - 1, threading.local()

    def take(self, layer: int, tokens: int) -> None:
        """Claim the cache before `tokens` tokens enter a layer. UsageError, with nothing changed, if it is in use."""
        if not self.here:
            raise UsageError("this cache was made before a fork, by another process: make or open one in this process")
        with self._lock:
            me = threading.current_thread()
            if layer == 0 and self._owner is not me:
                last = getattr(self._mine, "number", None)
                if self.under_way or (tokens == 1 and last not in (None, self._number)):
                    self._refuse()
                self._owner, self._number = me, self._number + 1
            elif self._owner not in (None, me):
                self._refuse()
            self._mine.number, self._reached = self._number, layer

    def check(self) -> None:
        """UsageError if another thread is in mid-step."""
        with self._lock:
            if self.under_way and self._owner is not threading.current_thread():
                self._refuse()

    @property
    def under_way(self) -> bool:
        return self._owner is not None and self._reached < self.layers - 1 and self._owner.is_alive()

    def _refuse(self) -> None:
        raise UsageError(
            f"thread {self._owner.name} uses this cache: give each thread a cache of its own, "
            "or crop it once that one has ended"
        )
