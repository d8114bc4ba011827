"""Work shared among threads on the CPU: a pool, stripes taken in order, BLAS held to one thread meanwhile."""

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import threadpoolctl


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return the process's pool of so many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gpugrad")


if hasattr(os, "register_at_fork"):  # the threads of a pool do not survive a fork
    os.register_at_fork(after_in_child=pool.cache_clear)


@functools.cache
def _blas() -> list[Any]:
    return list(threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers)


class single_threaded_blas:  # used like a function
    """Hold BLAS to one thread. The setting is the process's: the first caller makes it, the last one undoes it."""

    _lock = threading.Lock()
    _users = 0
    _before: tuple[int, ...] = ()

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            if not cls._users:
                cls._before = tuple(library.get_num_threads() for library in _blas())
                for library in _blas():
                    library.set_num_threads(1)
            cls._users += 1

    def __exit__(self, *_exc: object) -> None:
        cls = type(self)
        with cls._lock:
            cls._users -= 1
            if not cls._users:
                for library, count in zip(_blas(), cls._before, strict=True):
                    library.set_num_threads(count)


class _Worker(threading.local):
    busy = False


_worker = _Worker()
Stripe = TypeVar("Stripe")


def _work(run: Callable[[int], Stripe], k: int) -> Stripe:
    """Run a stripe in a worker; work within it does not wait for the pool that it is in."""
    _worker.busy = True
    try:
        return run(k)
    finally:
        _worker.busy = False


def in_order(run: Callable[[int], Stripe], count: int, threads: int, stop: list[bool]) -> list[Stripe]:
    """Run stripes 0 to count - 1 by the thread pool, with BLAS held to one thread, and return them in order.

    stop: gets an item when one has raised or was interrupted; the others are to end then.
    """
    if count == 1 or _worker.busy:
        return [run(k) for k in range(count)]
    with single_threaded_blas():
        if threads == 1:
            return [run(k) for k in range(count)]
        # a copied context hands numpy.errstate on to the workers
        futures = [pool(threads).submit(contextvars.copy_context().run, _work, run, k) for k in range(count)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.append(True)  # an error or Ctrl-C: the others end after their block
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()
            raise
