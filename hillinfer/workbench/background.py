"""Work in a background thread that a notebook can wait for, interrupt and stop."""

import threading


class Background:
    """`start` it, optionally `stop` it, then `join`. `result` re-raises the error of the work.

    A subclass implements `_work`, which looks at `_stop`, and `_outcome`, and sets `error`.
    """

    thread_name = "hillinfer-run"
    error: BaseException | None = None

    def __init__(self):
        self._stop, self._finished, self._thread = threading.Event(), threading.Event(), None

    def start(self):
        self._thread = threading.Thread(target=self._body, name=self.thread_name, daemon=True)
        self._thread.start()
        return self

    def _body(self) -> None:
        try:
            self._work()
        finally:
            self._finished.set()

    def stop(self) -> None:
        """Request a stop."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end; False on timeout. Ctrl-C or a kernel interrupt stops the work."""
        if self._thread is None:
            return True
        try:
            ended = self._finished.wait(timeout)
        except KeyboardInterrupt:  # an interrupted Thread.join would consider the thread dead (Python 3.11)
            self.stop()
            self._finished.wait()
            raise
        finally:
            if self._finished.is_set():
                self._thread.join()
        return ended

    @property
    def alive(self) -> bool:
        return self._thread is not None and not self._finished.is_set()

    def result(self):
        """Wait for the end and return the outcome."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._outcome()
