"""A cache belongs to the process that made it, and to one thread for the length of a step."""

import os
import threading

from hillinfer.errors import UsageError


class CacheOwner:
    """Rejects use from a forked process, or from a second thread in mid-step.

    Between steps any thread may continue: the steps of one conversation may hop over the threads of a pool.
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
        """Drop the claim: an unfinished step is abandoned."""
        self._owner, self._reached, self.entered = None, self.layers - 1, self.layers - 1

    def take(self, layer: int) -> None:
        """Claim the cache before tokens enter a layer. UsageError, with nothing changed, if it is in use."""
        if not self.here:
            raise UsageError("this cache was made before a fork, by another process: make or open one in this process")
        with self._lock:
            self._refuse_others()
            if layer == 0 and self.entered < self.layers - 1:  # the last layer that took in tokens
                raise UsageError(
                    "the last step was interrupted, and its token is in some layers only: go back to the tokens before "
                    "it with cache.crop(n), or reset the cache"
                )
            self._owner, self._reached = threading.current_thread(), layer

    def check(self) -> None:
        """UsageError if another thread is in mid-step."""
        with self._lock:
            self._refuse_others()

    @property
    def under_way(self) -> bool:
        return self._owner is not None and self._reached < self.layers - 1 and self._owner.is_alive()

    def _refuse_others(self) -> None:
        if self.under_way and self._owner is not threading.current_thread():
            raise UsageError(
                f"thread {self._owner.name} uses this cache: give each thread a cache of its own, "
                "or reset it if that thread has abandoned its step"
            )
