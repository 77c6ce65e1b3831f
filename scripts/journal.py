"""The journal of `scripts/make_sft.py`: what was answered and scored so far, in a file that only grows.

A line is written as soon as its answer is there, so neither Ctrl-C nor kill -9 loses any; a last line that a kill tore
is cut off. One process at a time holds the file. Its first line holds the settings, and a run with other ones is
refused. Left out: fsync, so a power cut may cost the last seconds.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path

from errors import UserError, one_line
from interfaces import Prompt
from run.files import differences

START = b'{"settings": '  # of every journal


class Journal:
    """What is done, held while the `with` block lasts; a run that added nothing leaves no file behind.

    Lines after the first are answers {"id", "slot", "attempt", "drop", ...} and scores {"id", "totals", "parts"}.

    Args:
        out: the file of examples; the journal lies beside it.
        settings: all that an example depends on, as JSON has it.

    Attributes:
        answers: prompt id -> slot -> its rows, first attempt first; the last one of a slot may have been kept.
        scores: prompt id -> row.
        counts: answers by what became of them: "kept", or why they were dropped; and each kind of thing that was lost.
        tokens: (read, written) by the teacher for all answers; `uncounted` answers came without these numbers.

    Raises:
        UserError: not writable, in use, of other settings, or no such file.
    """

    def __init__(self, out: Path, settings: dict):
        self.path = out.with_name(out.name + ".journal")
        self.answers: dict[str, dict[int, list[dict]]] = {}
        self.scores: dict[str, dict] = {}
        self.counts: Counter[str] = Counter()
        self.tokens, self.uncounted = (0, 0), 0
        if out.exists() and not self.path.exists():
            raise UserError(f"{out} is there without {self.path.name}: name another --out, or remove it")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is in use by another run: wait for it, or name another --out") from error
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror}): name another") from error
        self._settings = settings
        old = self._load()
        self._begun = old is not None
        if old not in (None, settings):
            changed = differences(old, settings)
            raise UserError(f"{out} was begun with other settings ({changed}): use those, or name another --out")

    def _load(self) -> dict | None:
        """Take in all whole lines and cut off a torn one; returns the settings, None if the file is new."""
        self._file.seek(0)
        text = self._file.read()
        try:
            if not text.startswith(START) and not START.startswith(text):
                raise ValueError(f"it begins with {text[:20]!r}")
            rows = [json.loads(line) for line in text.split(b"\n")[:-1]]
            settings = rows[0]["settings"] if rows else None
            for row in rows[1:]:
                self._take(row)
        except (ValueError, KeyError, TypeError) as error:
            why = one_line(error)
            raise UserError(f"{self.path} is no journal of this program ({why}): name another --out") from error
        self._file.truncate(text.rfind(b"\n") + 1)
        return settings

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._begun:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def add(self, row: dict) -> None:
        """Write the row down at once and take it in.

        Raises:
            UserError: it could not be written (full disk).
        """
        lines = [row] if self._begun else [{"settings": self._settings}, row]
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        try:
            if self._file.write(text) < len(text):
                raise OSError("disk full")
        except OSError as error:
            why = one_line(error)
            raise UserError(f"{self.path} cannot be written ({why}): make room and run again") from error
        self._begun = True
        self._take(row)

    def kept(self, prompt: Prompt) -> list[dict]:
        """The answers to `prompt` that can be used, in the order of their slots."""
        slots = self.answers.get(prompt.id, {})
        return [slots[slot][-1] for slot in sorted(slots) if not slots[slot][-1]["drop"]]

    def _take(self, row: dict) -> None:
        if "totals" in row:
            self.scores[row["id"]] = row
            return
        self.answers.setdefault(row["id"], {}).setdefault(row["slot"], []).append(row)
        self.counts.update([row["drop"] or "kept", *{thing.split()[0] for thing in row.get("lost", ())}])
        if row["tokens"] is None:
            self.uncounted += 1
        else:
            self.tokens = tuple(map(sum, zip(self.tokens, row["tokens"], strict=True)))
