"""Scoring ahead: the scorers get a group as soon as all its pictures are drawn, while other groups are being drawn.

Judges, which wait for another machine, are always asked ahead (`Reward.prefetch`). Models of this process are asked
ahead only where another machine draws, because on one device two at once would take turns. Each scorer has its own
thread, so it never meets two calls at once; a model is given one group at once, never what happened to be ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from interfaces import Reward, Sample

Column = Callable[[Reward, Sequence[Sample]], list[float | None]]


class Prefetcher:
    """Scores groups while others are drawn: a context manager around the drawing, at whose end it waits for scorers.

    Args:
        scorers: in any order; those that neither `can_prefetch` nor are scored `locally` are left alone.
        column: scores of whole groups.
        locally: whether scorers that do not `can_prefetch` are asked too.

    Attributes:
        prefetched: scorer's name -> row of the batch -> its score, of the groups that a local scorer has done.
    """

    def __init__(self, scorers: Sequence[Reward], column: Column, *, locally: bool):
        self.column = column
        self.scorers = [scorer for scorer in scorers if scorer.can_prefetch or (locally and scorer.needs_images)]
        self.prefetched: dict[str, dict[int, float | None]] = {scorer.name: {} for scorer in scorers}
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._ready: dict[str, SimpleQueue[tuple[int, list[Sample]]]] = {s.name: SimpleQueue() for s in self.scorers}
        self._jobs: list[Future[None]] = []

    def ready(self, first: int, group: list[Sample]) -> None:
        """All pictures of `group` are there; its first sample is row `first` of the batch."""
        for scorer in self.scorers:
            self._ready[scorer.name].put((first, group))
            self._jobs.append(self._pools[scorer.name].submit(self._take, scorer))

    def _take(self, scorer: Reward) -> None:
        """Do all that is ready: a judge gets it at once, so that many calls are in flight, a model group by group."""
        queue = self._ready[scorer.name]
        ready = [queue.get() for _ in range(queue.qsize())]
        if scorer.can_prefetch:
            samples = [sample for _, group in ready for sample in group]
            scorer.prefetch([sample for sample in samples if sample.images and None not in sample.images])
            return
        for first, group in ready:
            self.prefetched[scorer.name].update(enumerate(self.column(scorer, group), first))

    def __enter__(self) -> Prefetcher:
        self._pools = {scorer.name: ThreadPoolExecutor(1, f"score {scorer.name}") for scorer in self.scorers}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_) -> None:
        """Wait for what is under way; what is not begun is left to the scorers' own call. Raises what a job raised."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        if failure is None:
            for job in self._jobs:
                if not job.cancelled():
                    job.result()
