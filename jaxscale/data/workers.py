"""Numbered tasks, one after the other or in processes that end when their parent does.

A task is `(number, documents)`. The function that does it is sent to each worker once, is told how
to find out that it should stop, and then returns None. `prepare` calls this.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from jaxscale.config import ConfigError

T = TypeVar("T")
Stop = Callable[[], bool]
Task = tuple[int, range]
Function = Callable[[int, range, Stop], T | None]

# How often the parent looks up from waiting for its workers.
POLL_SECONDS = 0.2
# How long a worker that was told to stop waits for the pool to end it.
END_SECONDS = 1.0


def never() -> bool:
    """Answer that nobody asks to stop."""
    return False


def run_in_line(
    function: Function[T], tasks: Sequence[Task], *, stop: Stop
) -> Generator[tuple[int, T]]:
    """Yield the number and the result of each task, until told to stop."""
    for number, documents in tasks:
        result = function(number, documents, stop)
        if result is None:
            return
        yield number, result


def run_in_processes(
    function: Function[T], tasks: Sequence[Task], *, workers: int, stop: Stop
) -> Generator[tuple[int, T]]:
    """Yield the number and the result of each task as it is done, until told to stop.

    When the caller closes the generator, the workers stop too.

    Raises:
      ConfigError: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    # Its end tells the workers to stop. Unlike a lock, a pipe has no owner who may die with it.
    reader, writer = context.Pipe(duplex=False)
    with (
        reader,
        writer,
        concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(function, reader)
        ) as pool,
    ):
        try:
            with _signals_blocked():
                numbers = {pool.submit(_do_in_worker, *task): task[0] for task in tasks}
            waiting = set(numbers)
            while waiting and not stop():
                done, waiting = concurrent.futures.wait(
                    waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield numbers[future], future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"one of {workers} worker processes was killed, as where memory ends; go on with "
                "jaxscale prepare and a lower --workers"
            ) from error
        finally:
            writer.close()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Let processes that start inside be deaf to Ctrl-C and SIGTERM, which a whole group may get.

    The parent alone answers; its workers stop when it says so, or when it is no more.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process: the function, whether to stop, and a lock that is held during a task.
_in_worker: tuple[Function[Any], threading.Event, threading.Lock]


def _start_worker(function: Function[Any], reader: Connection) -> None:
    global _in_worker
    _in_worker = function, threading.Event(), threading.Lock()
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()


def _end_with_parent(reader: Connection) -> None:
    """End this process when the parent closes its end of the pipe, or is no more."""
    _, stop, busy = _in_worker
    reader.poll(None)
    stop.set()
    with busy:
        pass
    # Where the pool does not end it: a worker that was killed may have locked the pool's queues.
    time.sleep(END_SECONDS)
    os._exit(1)


def _do_in_worker(number: int, documents: range) -> Any:
    function, stop, busy = _in_worker
    with busy:
        return function(number, documents, stop.is_set)
