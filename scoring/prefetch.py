"""Asking ahead: judges get a group as soon as all its pictures are drawn, while other groups are being drawn.

Only scorers that wait for another machine are asked (`Reward.prefetch`). Each has its own thread, so it never meets
two calls at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from interfaces import Reward, Sample


class Prefetcher:
    """A context manager around the drawing, at whose end it waits for the judges.

    Args:
        scorers: in any order; those that cannot `prefetch` are left alone.
    """

    def __init__(self, scorers: Sequence[Reward]):
        self.scorers = [scorer for scorer in scorers if scorer.can_prefetch]
        self._pools = {scorer.name: ThreadPoolExecutor(1, f"score {scorer.name}") for scorer in self.scorers}
        self._ready: dict[str, SimpleQueue[Sample]] = {scorer.name: SimpleQueue() for scorer in self.scorers}
        self._jobs: list[Future[None]] = []

    def ready(self, group: Sequence[Sample]) -> None:
        """All pictures of `group` are there."""
        for scorer in self.scorers:
            for sample in group:
                if sample.images and None not in sample.images:
                    self._ready[scorer.name].put(sample)
            self._jobs.append(self._pools[scorer.name].submit(self._take, scorer))

    def _take(self, scorer: Reward) -> None:
        """Ask about all that is ready at once, so that many calls are in flight."""
        queue = self._ready[scorer.name]
        scorer.prefetch([queue.get() for _ in range(queue.qsize())])

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_) -> None:
        """Wait for what is under way; what is not begun is left to the judges' own call. Raises what a job raised."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        if failure is None:
            for job in self._jobs:
                if not job.cancelled():
                    job.result()
