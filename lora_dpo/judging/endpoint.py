"""Questions to a model behind an OpenAI-compatible endpoint, which may be slow, busy, broken or paid.

Repeats what may succeed later, keeps to a rate, counts what is used, and asks nothing twice.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import hashlib
import ipaddress
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ConfigError, JudgeError
from lora_dpo.files import disk_errors

if TYPE_CHECKING:
    import httpx2

API_KEY = "LORA_DPO_JUDGE_API_KEY"
"""The environment variable that may hold a key. There is no other way in: an option would be seen in a process
list and in a shell's history."""

REPEATED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT = 300.0
"""Seconds. A server that asks for a longer pause is better asked again tomorrow."""
LARGEST_REPLY = 4 << 20


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """How an endpoint is used."""

    criterion: str = "The better answer is correct, helpful and clear, and no longer than it needs to be."
    """What the judge is told to look at."""
    per_minute: float | None = None
    """Most requests a minute; None is as fast as they are answered."""
    prices: tuple[float, float] | None = None
    """Price of a million prompt tokens and of a million answer tokens, to count the cost."""
    timeout: float = 120.0
    """Seconds that one request may take."""
    attempts: int = 6
    parallel: int = 4
    """Requests under way together."""


@dataclass
class Usage:
    """What has been used. Cached replies cost nothing."""

    requests: int = 0
    repeated: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def sentence(self, prices: tuple[float, float] | None) -> str:
        """`36 requests (2 repeated), 12 from the cache, 5,123 + 240 tokens, cost 0.0031`."""
        text = (
            f"{self.requests} requests ({self.repeated} repeated), {self.cached} from the cache, "
            f"{self.prompt_tokens:,} + {self.answer_tokens:,} tokens"
        )
        if prices is None:
            return text
        return f"{text}, cost {(self.prompt_tokens * prices[0] + self.answer_tokens * prices[1]) / 1e6:.4f}"


class Endpoint:
    """One model at one URL. Its methods may be called from several threads."""

    def __init__(
        self,
        model: str,
        url: str,
        settings: EndpointSettings,
        *,
        cache: Path | None = None,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: what comes before `/chat/completions`.
            cache: a SQLite file of replies, or None.
            pause: waits for a number of seconds; for tests.

        Raises:
            ConfigError: a key would go over an unencrypted connection.
        """
        import httpx2

        self.model, self.url, self.settings = model, url.rstrip("/") + "/chat/completions", settings
        self.usage = Usage()
        self._key = os.environ.get(API_KEY, "").strip()
        if self._key and not _private(httpx2.URL(self.url)):
            raise ConfigError(f"{API_KEY} is set, but {url} is not encrypted. Use https, or unset it.")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # No redirects: they could take the key and the texts to another host.
        self._client = httpx2.Client(headers=headers, timeout=settings.timeout, follow_redirects=False)
        self._cache = _Cache(cache) if cache else None
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self._lock = threading.Lock()
        self._next_start = 0.0
        self._own_temperature = False
        """True once the endpoint refused a temperature: reasoning models have one of their own."""

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's reply, at temperature 0 if it takes one.

        Raises:
            JudgeError: no usable reply after all attempts, or one that repeating will not change.
        """
        body = {"model": self.model, "messages": [dict(message) for message in messages], "temperature": 0}
        key = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        if self._cache and (known := self._cache.get(key)) is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        reply = self._ask_until_answered(body)
        if self._cache:
            self._cache.put(key, reply)
        return reply

    def close(self) -> None:
        """Stop waiting and asking, in every thread."""
        self._closed.set()
        self._client.close()

    def _ask_until_answered(self, body: Mapping[str, Any]) -> str:
        import httpx2

        problem, wait = "", 0.0
        for attempt in range(self.settings.attempts):
            with self._lock:
                self.usage.repeated += attempt > 0
            wait = min(60.0, 2.0**attempt)
            try:
                status, headers, content = self._answered(body)
            except (httpx2.TimeoutException, TimeoutError):
                problem = f"no answer within {self.settings.timeout:g} s"
            except httpx2.RequestError as error:  # a broken connection, or a damaged compressed body
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    reply = self._read(content)
                    if reply is not None:
                        return reply
                    problem = f"a reply that is no chat completion ({self._excerpt(content)})"
                elif status in REPEATED:
                    problem = f"status {status} ({self._excerpt(content)})"
                    wait = self._wait_asked_for(headers.get("retry-after"), default=wait)
                else:
                    raise JudgeError(f"{self.url} refused with status {status}: {self._refusal(status, content)}")
            if attempt + 1 < self.settings.attempts:
                self._hold_back(wait)
        raise JudgeError(
            f"{self.url} gave no usable answer in {self.settings.attempts} attempts; the last was {problem}. "
            "Run the same command again to go on: answered questions are kept."
        )

    def _answered(self, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        """What the endpoint says to `body`, or without its temperature if that is what it refuses."""
        without = {name: value for name, value in body.items() if name != "temperature"}
        if not self._own_temperature:
            status, headers, content = self._post(body)
            if status != 400 or b"temperature" not in content.lower():
                return status, headers, content
            self._own_temperature = True
        return self._post(without)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        """One request, when its turn has come.

        The time limit holds for all of it: a server may also send a byte a minute for ever.
        """
        self._wait_for_turn()
        with self._lock:
            self.usage.requests += 1
        started, content = time.monotonic(), b""
        with self._client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() - started > self.settings.timeout:
                    raise TimeoutError
                if len(content) > LARGEST_REPLY:
                    break  # no verdict is that long; what was read is not valid JSON
            return response.status_code, response.headers, content

    def _read(self, content: bytes) -> str | None:
        """The reply's text, its tokens counted; None if it is not what an endpoint should send."""
        try:
            parsed = json.loads(content)
            text = parsed["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None
        used = parsed.get("usage")
        counts = [used.get(name) if isinstance(used, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        with self._lock:
            self.usage.prompt_tokens += counts[0] if isinstance(counts[0], int) else 0
            self.usage.answer_tokens += counts[1] if isinstance(counts[1], int) else 0
        return text if isinstance(text, str) else None

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + (60.0 / self.settings.per_minute if self.settings.per_minute else 0.0)
        if start > now:
            self._pause(start - now)
        if self._closed.is_set():
            raise JudgeError("The judge was stopped.")

    def _hold_back(self, seconds: float) -> None:
        """Let no thread ask before that: a busy server is busy for all of them."""
        with self._lock:
            self._next_start = max(self._next_start, time.monotonic() + seconds)

    def _wait_asked_for(self, value: str | None, *, default: float) -> float:
        """Seconds of a `Retry-After` header, which holds a number or a date (RFC 9110, 10.2.3)."""
        if value is None:
            return default
        try:
            seconds = float(value)
        except ValueError:
            try:
                then = email.utils.parsedate_to_datetime(value)
            except ValueError:
                return default
            then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
            seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
        if not seconds <= LONGEST_WAIT:
            raise JudgeError(
                f"{self.url} asks to wait {seconds:,.0f} s. Run the same command again then: "
                "answered questions are kept."
            )
        return max(0.0, seconds)

    def _refusal(self, status: int, content: bytes) -> str:
        said = self._excerpt(content)
        if status in (401, 403):
            return f"{said}. Put a valid key into the environment variable {API_KEY}."
        if status == 404:
            return f"{said}. Check the URL, which is followed by /chat/completions, and the model's name."
        return f"{said}. Check the model's name and the URL."

    def _excerpt(self, content: bytes) -> str:
        """The start of what a server said, on one line; a key that it repeats is left out."""
        text = " ".join(content[:2000].decode("utf-8", errors="replace").split())
        if self._key:
            text = text.replace(self._key, "***")
        return text[:160].rstrip(".") or "nothing"


class _Cache:
    """Replies by the hash of their question, in one SQLite file that several processes may share."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._database = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (question TEXT PRIMARY KEY, reply TEXT)")
            self._database.commit()

    def get(self, key: str) -> str | None:
        with self._lock, self._errors():
            row = self._database.execute("SELECT reply FROM replies WHERE question = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        with self._lock, self._errors(), self._database:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JudgeError(
                f"The judge's cache {self._path} cannot be used ({error}). Remove it to begin anew."
            ) from error


def _private(url: httpx2.URL) -> bool:
    """True if nobody between here and there can read along: https, or this machine."""
    if url.scheme == "https" or url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False
