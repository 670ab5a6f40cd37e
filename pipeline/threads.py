"""Threads for the host's work on pixels: each torch operation in them runs on one core, and work is begun ahead.

The decision that shaped it: a batch under way is a `Job`, so that a loader can begin the next batches before this one
is asked for. Left out: what the work is (assemble.py, hostfinish.py).
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Job(Generic[T]):
    """Work under way in threads, and what is left to be done by whoever asks for its result."""

    def __init__(self, futures: Iterable[Future[object]], finish: Callable[[], T]) -> None:
        self._futures, self._finish = list(futures), finish

    def wait(self) -> None:
        """Until the threads are done with it, whatever came of it."""
        wait(self._futures)

    def result(self) -> T:
        """To be called once. The first error is raised when all work has ended."""
        self.wait()
        for future in self._futures:
            if (error := future.exception()) is not None:
                raise error
        return self._finish()


def begin_all(
    threads: ThreadPoolExecutor, work: Callable[[int], object], items: Iterable[int], finish: Callable[[], T]
) -> Job[T]:
    """work(item) for every item, in the threads; then `finish()` is the job's result."""
    return Job([threads.submit(work, item) for item in items], finish)


def run_all(threads: ThreadPoolExecutor, work: Callable[[int], object], items: Iterable[int]) -> None:
    """work(item) for every item, in the threads; the first error is raised when all have ended."""
    begin_all(threads, work, items, lambda: None).result()


def start_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads in which each torch operation runs on one core: theirs. The rest of the process keeps its own number."""
    num_torch_threads = torch.get_num_threads()
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="alexnet-pixels")
    barrier = threading.Barrier(num_threads)  # so that every thread takes one

    def begin(_: int) -> None:
        barrier.wait()
        torch.get_num_threads()  # a thread takes the default at its first look, even if its own was set before
        torch.set_num_threads(1)  # of this thread, and the default of threads to come, which is set right below

    run_all(threads, begin, range(num_threads))
    torch.set_num_threads(num_torch_threads)
    return threads
