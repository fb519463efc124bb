"""Work beside the main thread, such as writing files while the next ones are computed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Does one job after another on a thread of its own; `waiting` of them at most, then the caller waits.

    The error of a job is raised to the caller, at the latest when the block ends, which waits for all jobs. A block that ends
    with an error, or with Ctrl-C, waits for the job that runs and leaves the others undone.
    """

    def __init__(self, waiting: int = 2):
        self.waiting = waiting
        self.jobs: deque[Future] = deque()
        self.thread = ThreadPoolExecutor(1)

    def put(self, job: Callable[[], None]) -> None:
        """Have the job done. Raises the error of an earlier one."""
        while self.jobs and (self.jobs[0].done() or len(self.jobs) >= self.waiting):
            self.jobs.popleft().result()
        self.jobs.append(self.thread.submit(job))

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            while self.jobs and kind is None:
                self.jobs.popleft().result()
        finally:
            self.thread.shutdown(wait=True, cancel_futures=True)
