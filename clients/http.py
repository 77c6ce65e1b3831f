"""What every client of an HTTP API shares: which URLs it may call, when it repeats a request, when it stops calling.

The chat client (`clients.chat`) and the remote renderer (`rendering.remote`) use it. Only the standard library.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from errors import UserError
from run.signals import leaving

BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds before the second attempt, doubled each time, and their most
CONNECT_TIMEOUT, CHECK_TIMEOUT = 10.0, 10.0  # seconds
LISTEN = 0.5  # seconds between looks whether the run was told to leave
RETRIED = {408, 429}  # and 5xx
ALIVE = {400, 413, 422, 429}  # this question was refused, which says nothing against the server

Key, Result = TypeVar("Key"), TypeVar("Result")


class CallFailed(Exception):
    """A request was not answered; the message says why. `status` is 0 where there was no HTTP answer."""

    def __init__(self, reason: str, *, status: int = 0, code: str = "", retry_after: float = 0.0):
        super().__init__(reason)
        self.status, self.code, self.retry_after = status, code, retry_after


class Circuit:
    """Open (calls fail at once) after `trip` failures in a row; then one call per `pause` seconds is a probe."""

    def __init__(self, trip: int, pause: float):
        self.trip, self.pause = trip, pause
        self.failures, self.since, self.reason = 0, 0.0, ""

    @property
    def is_open(self) -> bool:
        return self.failures >= self.trip

    def lets_through(self) -> bool:
        """Whether a call may be made now; if the circuit is open, that call is its probe."""
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


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of `work`; from within a running event loop too (ComfyUI, notebooks), in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def repeat(request: Callable[[], Awaitable[Result]], circuit: Circuit, attempts: int, timeout: float) -> Result:
    """The answer to a request; it is repeated after a lost connection, 408, 429 and 5xx.

    Raises:
        CallFailed: after `attempts` failures, one that cannot pass, or `timeout` seconds; or the circuit is open.
    """
    attempt = 0
    try:
        async with asyncio.timeout(timeout):
            while circuit.lets_through():
                attempt += 1
                try:
                    answer = await request()
                    circuit.succeeded()
                    return answer
                except CallFailed as error:
                    if error.status in ALIVE:
                        circuit.succeeded()
                    else:
                        circuit.failed(str(error))
                    may_pass = error.status in {0, *RETRIED} or error.status >= 500
                    if attempt == attempts or not may_pass:
                        raise
                    await asyncio.sleep(max(back_off(attempt), error.retry_after))
    except TimeoutError as error:
        circuit.failed(f"no answer within {timeout:g} s")
        raise CallFailed(circuit.reason) from error
    raise CallFailed(f"not asked after {circuit.trip} failures in a row, {circuit.reason}")


def back_off(attempt: int) -> float:
    """Seconds to wait after that failed attempt; drawn outside the random state that a run is seeded with."""
    longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** min(attempt - 1, 10))
    return longest * random.SystemRandom().uniform(0.5, 1.0)


async def finished(calls: Mapping[Key, asyncio.Task[Result]], deadline: float) -> dict[Key, Result]:
    """Results of the calls that end before `deadline` (of time.monotonic) and before the run is told to leave.

    The others are cancelled and absent here. An error that is no failure of a call (a bug) is raised.
    """
    late = set(calls.values())
    while late and (time_left := deadline - time.monotonic()) > 0 and not leaving():
        _, late = await asyncio.wait(late, timeout=min(time_left, LISTEN))
    for call in late:
        call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return {key: call.result() for key, call in calls.items() if call not in late}


def is_url(name: str) -> bool:
    """Whether a model is named by the address of a server, not by a folder or a hub name."""
    return name.startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_url(url: str, whose: str) -> tuple[str, bool]:
    """The base of an API without a closing slash, and whether it is on this machine.

    `whose` is "judge", "teacher" or "render", as in the environment's WHOSE_API_KEY and WHOSE_ALLOW_HTTP.

    Raises:
        UserError: it is no such URL, has a login in it, or would send the key unencrypted to another machine.
    """
    checked_key(whose)
    if "@" in url:
        raise UserError(f"the {whose} URL has a login in it: remove it, keys go into {whose.upper()}_API_KEY")
    try:
        parts = urlsplit(url)
        usable = parts.hostname and parts.port != 0 and parts.scheme in ("http", "https") and not parts.query
    except ValueError:  # of a port
        usable = False
    if not usable:
        raise UserError(f"{whose} URL {url!r} is none: give the base of an API, such as http://127.0.0.1:8080/v1")
    loopback = is_loopback(parts.hostname)
    if parts.scheme == "http" and not loopback and os.environ.get(f"{whose.upper()}_ALLOW_HTTP") != "1":
        raise UserError(
            f"{whose} URL {url!r} would send questions and key unencrypted to another machine: use https, or set "
            f"environment {whose.upper()}_ALLOW_HTTP=1 if you trust the network"
        )
    return url.rstrip("/"), loopback


def checked_key(whose: str) -> str:
    """The key in WHOSE_API_KEY, "" if there is none; a UserError, which does not show it, if no header can hold it."""
    key = os.environ.get(f"{whose.upper()}_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"environment {whose.upper()}_API_KEY must be one line of printable ASCII characters")
    return key
