"""The ways in which a program of this project ends early, and the one line in which an error is told."""

from collections.abc import Sequence

MOST_LISTED = 5  # faults that one message names; it counts the others


class UserError(Exception):
    """Something that the user can mend: an option, a file, a checkpoint. One line says what to do. Exit code 2."""


class Stopped(Exception):
    """A run cannot go on (disk, numbers, a dead judge); once that is mended, `--resume` continues it. Exit code 1."""


class ScoringError(Stopped):
    """Too many samples have no score, or the renderer or a reward broke its contract; what was learnt can be saved."""


def one_line(error: BaseException, most: int = 200) -> str:
    """The text of an error on one line of at most `most` characters, or its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def listed(faults: Sequence[str], between: str = "; ") -> str:
    """The first `MOST_LISTED` of `faults`, each of 300 characters at most, and the number of the others."""
    more = [f"and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
    return between.join([*(fault[:300] for fault in faults[:MOST_LISTED]), *more])
