"""What every client of an HTTP API shares: which URLs are spoken to, when to ask again, when to stop asking.

The judges' client (`clients.chat`), the teacher's (`scripts.teacher`) and the remote renderer (`rendering.remote`)
differ in what they say; here is what they have in common. Only the standard library, so that a program that only asks
starts at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import time
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from run.signals import leaving

BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds before the second attempt, doubled each time, and their most
CONNECT_TIMEOUT, CHECK_TIMEOUT = 10.0, 10.0  # seconds
LISTEN = 0.5  # seconds between looks whether the run was told to leave
RETRIED = {408, 429}  # and 5xx
ALIVE = {400, 413, 422, 429}  # this question was refused, which says nothing against the server

Key, Result = TypeVar("Key"), TypeVar("Result")


def back_off(attempt: int) -> float:
    """Seconds to wait after that failed attempt; drawn outside the random state that a run is seeded with."""
    longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** min(attempt - 1, 10))
    return longest * random.SystemRandom().uniform(0.5, 1.0)


async def finished(calls: Mapping[Key, asyncio.Task[Result]], deadline: float) -> dict[Key, Result]:
    """Results of the calls that end before `deadline` (of time.monotonic) and before the run is told to leave.

    The others are cancelled and absent here. An error that is no failure of a call (a bug) is raised.
    """
    if not calls:
        return {}
    late, failed = set(calls.values()), False
    while late and not failed and (time_left := deadline - time.monotonic()) > 0 and not leaving():
        done, late = await asyncio.wait(late, timeout=min(time_left, LISTEN), return_when=asyncio.FIRST_EXCEPTION)
        failed = any(call.exception() for call in done)
    for call in late:
        call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return {key: call.result() for key, call in calls.items() if call not in late}


def is_url(name: str) -> bool:
    """Whether a model is named by the address of a server, not by a folder or a hub name."""
    return name.startswith(("http://", "https://"))


def checked_url(url: str, whose: str, refusal: type[Exception]) -> tuple[str, bool]:
    """The URL without a closing slash, and whether it is on this machine.

    Args:
        url: base of an API.
        whose: "judge", "teacher", "render": as in the environment's WHOSE_API_KEY and WHOSE_ALLOW_HTTP.
        refusal: what is raised.

    Raises:
        refusal: it is no URL of an API, carries a login, would send `whose` key unencrypted to another machine, or the
            key cannot be sent.
    """
    checked_key(whose, refusal)
    example = 'give the base of an OpenAI-compatible API, such as "http://127.0.0.1:8080/v1"'
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise refusal(f"{whose} URL {url!r} cannot be read ({error}): {example}") from error
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise refusal(f"{whose} URL {url!r} is none: {example}")
    if parts.username is not None:
        raise refusal(
            f"the {whose} URL of {host} carries a login: remove it, keys go into environment {whose.upper()}_API_KEY"
        )
    loopback = is_loopback(host)
    if parts.scheme == "http" and not loopback and os.environ.get(f"{whose.upper()}_ALLOW_HTTP") != "1":
        raise refusal(
            f"{whose} URL {url!r} would send questions and key unencrypted to another machine: use https, or set "
            f"environment {whose.upper()}_ALLOW_HTTP=1 if you trust the network"
        )
    return url.rstrip("/"), loopback


def checked_key(whose: str, refusal: type[Exception]) -> str:
    """The key of WHOSE_API_KEY, "" if there is none.

    Raises:
        refusal: it cannot be a header; the text does not show it, as that of a client's own error would.
    """
    key = os.environ.get(f"{whose.upper()}_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise refusal(f"environment {whose.upper()}_API_KEY must be one line of printable ASCII characters")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Circuit:
    """Open (calls fail at once) after `trip` failures in a row; then one call per `pause` seconds is a probe."""

    def __init__(self, trip: int, pause: float):
        self.trip, self.pause = trip, pause
        self.failures, self.since, self.reason = 0, 0.0, ""

    @property
    def is_open(self) -> bool:
        return self.failures >= self.trip

    def lets_through(self) -> bool:
        """Whether a call may be made now; an open circuit's probe is thereby taken."""
        if not self.is_open:
            return True
        if time.monotonic() - self.since < self.pause:
            return False
        self.since = time.monotonic()  # the others wait for this one
        return True

    def failed(self, reason: str) -> None:
        """A call failed in a way that speaks against the server."""
        self.failures, self.since, self.reason = self.failures + 1, time.monotonic(), reason

    def succeeded(self) -> None:
        """The server answered."""
        self.failures = 0
