"""The same work on many things, in processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from convnext_cli.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def iter_done(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, doing: str
) -> Iterator[Result]:
    """What the work on each task gives, as it is finished.

    Args:
        work: A function of a module, which processes can import.
        tasks: What it is called with.
        workers: Processes; 1: this one.
        doing: What is done, for messages.

    Raises:
        DataError: A process died.
    """
    if min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=follow_parent
    )
    try:
        # Ctrl-C is for the parent alone. Workers inherit that it is ignored; told it by themselves,
        # they would hear it too late while they start.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures: list[Future[Result]] = [pool.submit(work, task) for task in tasks]
        finally:
            signal.signal(signal.SIGINT, before)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process died while {doing}, perhaps for want of memory",
            hint="give fewer: --workers 1; the same command goes on where it stopped",
        ) from error
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def follow_parent() -> None:
    """End with the parent; a worker would otherwise wait for ever for one that was killed."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
