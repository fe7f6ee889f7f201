"""Thread pool that never keeps the process from exiting, even if a thread is stuck reading from a dead disk."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

_END_WITHIN_S = 2.0  # At the end of the process; threads that are still busy after that are abandoned

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DaemonThreads(Executor):
    """Like ThreadPoolExecutor with `count` threads, but only `shutdown` waits for busy threads, not process exit.

    `initializer` is called first in each thread.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], object] | None = None) -> None:
        self._calls: _Calls = SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(self._calls, initializer), name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        # Also at process exit: the interpreter must not go away under a thread that runs torch code
        self._finalizer = weakref.finalize(self, _end, self._calls, self._threads, _END_WITHIN_S)

    def submit(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()
        self._calls.put((future, partial(call, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; with `cancel_futures`, also cancel those that have not started."""
        if cancel_futures:
            _cancel(self._calls)
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _serve(calls: _Calls, initializer: Callable[[], object] | None) -> None:
    if initializer:
        initializer()
    while (given := calls.get()) is not None:
        future, call = given
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        del given, future, call  # Else they would be kept alive until the next call


def _cancel(calls: _Calls) -> None:
    while True:
        try:
            given = calls.get_nowait()
        except Empty:
            return
        if given is not None:
            given[0].cancel()


def _end(calls: _Calls, threads: list[threading.Thread], within_s: float) -> None:
    _cancel(calls)
    for _ in threads:
        calls.put(None)
    until_s = time.monotonic() + within_s
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until_s - time.monotonic()))
