"""Any endpoint that speaks OpenAI's protocol as an engine: hosted models, vLLM, llama.cpp, another fettle.

A conversation goes to /chat/completions and a text to /completions, one answer a request, so that each is kept on its own as
it comes. An endpoint that is busy or breaks is asked again, after as long as it says itself (Retry-After) or as doubles from
try to try; one that refuses ends the run with a sentence, and what was answered before stays for the next run.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from fettle.core import FettleError, Spec
from fettle.core.terminal import shown
from fettle.generate.answers import Answers, Ledger, hashed
from fettle.generate.protocol import Prompt
from fettle.generate.request import Completion, Reason, Sampling

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # answers that say: not now
REASONS: dict[str, Reason] = {"stop": "end", "length": "length", "content_filter": "filter"}
USUAL = Sampling()
URL = "give the url up to the version, as https://host/v1"


class Remote(Spec):
    """An endpoint, how it is asked, and what that costs. `ledger` counts all that this object has asked for."""

    url: str = Field(description="up to the version, as https://host/v1")
    model: str = Field(description="the model's name there")
    key: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key; none is sent where it is empty"
    )
    concurrency: int = Field(8, ge=1, description="requests under way at once")
    retries: int = Field(6, ge=0, description="how often a request is sent again")
    timeout: float = Field(120.0, gt=0, description="seconds that an answer may take")
    patience: float = Field(300.0, ge=0, description="most seconds to wait before a request is sent again")
    cache: Path | None = Field(
        None, description="a file of JSON lines that keeps every answer; none are asked for twice"
    )
    logps: bool = Field(False, description="ask for log-probabilities of the answer's tokens")
    price: tuple[float, float] = Field((0.0, 0.0), description="of a million tokens read, and of a million written")
    body: dict[str, Any] = Field({}, description="fields of the request besides; null leaves one out")
    _ledger: Ledger = PrivateAttr(default_factory=Ledger)

    @property
    def ledger(self) -> Ledger:
        """What was asked for so far, and what it took."""
        return self._ledger

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, *, n: int = 1, seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See `Engine`. FettleError where the endpoint refuses, or breaks more often than `retries`."""
        count = len(prompts) * n
        if n < 1 or seeds is not None and len(seeds) != count:
            raise FettleError(
                f"remote: {len(seeds or ())} seeds for {len(prompts)} prompts and n {n}; each answer takes a seed"
            )
        numbers = range(count) if seeds is None else seeds
        asked = [_request(self, prompts[i // n], sampling or USUAL, numbers[i]) for i in range(count)]
        keys = [hashed([self.url, *request]) for request in asked]
        answers = Answers(self.cache)
        try:
            missing = {key: request for key, request in zip(keys, asked, strict=True) if key not in answers.known}
            self._ledger.cached += count - len(missing)
            if progress and count > len(missing):
                progress(count - len(missing))
            if missing:
                self._ask(missing, answers, progress)
            return [_completion(answers.known[key], (sampling or USUAL).stop) for key in keys]
        finally:
            answers.close()

    def _ask(
        self, missing: dict[str, tuple[str, dict[str, Any]]], answers: Answers, progress: Callable[[int], None] | None
    ) -> None:
        """Send the requests, `concurrency` at once, and keep each answer as it comes; the first failure ends it."""
        left, done = list(missing.items())[::-1], 0
        with _client(self) as client, ThreadPoolExecutor(self.concurrency) as workers:
            under_way: dict[Future[dict[str, Any]], str] = {}
            failure: BaseException | None = None
            halt = threading.Event()  # whatever breaks this off, nobody sleeps on until it is time to ask again
            try:
                while under_way or left and failure is None:
                    while left and failure is None and len(under_way) < self.concurrency:
                        key, request = left.pop()
                        under_way[workers.submit(_answer, self, client, halt, *request)] = key
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        key = under_way.pop(future)
                        if (error := future.exception()) is not None:
                            failure = failure or error
                            continue
                        answers.keep(key, found := future.result())
                        done += 1
                        self._book(found)
                        if progress:
                            progress(1)
            finally:
                halt.set()
        if isinstance(failure, FettleError):
            kept = f"are kept in {self.cache}" if self.cache else "are lost; set 'cache' to keep them"
            raise FettleError(f"{failure}; {done} of {len(missing)} answers had come and {kept}") from failure
        if failure is not None:
            raise failure

    def _book(self, answer: dict[str, Any]) -> None:
        read, written = answer["usage"]
        self._ledger.requests += 1
        self._ledger.retries += answer["retries"]
        self._ledger.seconds += answer["seconds"]
        self._ledger.prompt_tokens += read
        self._ledger.answer_tokens += written
        self._ledger.cost += (read * self.price[0] + written * self.price[1]) / 1e6


def _secret(variable: str) -> str:
    """The key that an environment variable holds; FettleError, which does not show it, where no request can carry it."""
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise FettleError(
            f"{variable}: the key in this environment variable has characters other than printable ASCII, which no request can "
            "carry; set it to the key alone"
        )
    return secret


def _client(remote: Remote) -> Any:
    """What sends the requests, with the key in their head."""
    httpx, secret = _httpx(), _secret(remote.key)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    pool = httpx.Limits(max_connections=remote.concurrency)
    try:
        return httpx.Client(base_url=remote.url.rstrip("/"), headers=headers, timeout=remote.timeout, limits=pool)
    except httpx.InvalidURL as error:
        raise FettleError(f"{remote.url}: {error}; {URL}") from None


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise FettleError(
            "an endpoint needs the library httpx; install it with: pip install 'fettle[remote]'"
        ) from error
    return httpx


def _request(remote: Remote, prompt: Prompt, sampling: Sampling, number: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of one answer. Settings that are not OpenAI's own are sent only where they are not the usual ones."""
    talk = None if isinstance(prompt, str) else [dict(message) for message in prompt]
    body: dict[str, Any] = {
        "model": remote.model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    body |= {"prompt": prompt} if talk is None else {"messages": talk}
    for name in ("top_p", "presence_penalty", "top_k", "min_p", "repetition_penalty"):
        if (value := getattr(sampling, name)) != getattr(USUAL, name):
            body[name] = value
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.temperature:
        body["seed"] = int(hashed([sampling.seed, number])[:8], 16) >> 1  # 31 bits
    if remote.logps:
        body["logprobs"] = 0 if talk is None else True
    body = {key: value for key, value in (body | remote.body).items() if value is not None}
    return "/completions" if talk is None else "/chat/completions", body


def _answer(remote: Remote, client: Any, halt: threading.Event, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One answer as the cache keeps it; asks again while the endpoint is busy or breaks off."""
    began = time.monotonic()
    for turn in range(remote.retries + 1):
        found, pause = _try(remote, client, path, body)
        if isinstance(found, dict):
            return found | {"retries": turn, "seconds": round(time.monotonic() - began, 3)}
        if turn == remote.retries or halt.is_set():
            break
        pause = 2.0**turn * random.uniform(0.25, 0.5) if pause is None else pause
        if pause > remote.patience:
            raise FettleError(
                f"{remote.url}: {found}, and asks to wait {pause:.0f} s, over the patience of {remote.patience:g}"
            )
        halt.wait(pause)
    raise FettleError(f"{remote.url}: {found}, {turn + 1} times in a row")


def _try(remote: Remote, client: Any, path: str, body: dict[str, Any]) -> tuple[dict[str, Any] | str, float | None]:
    """The answer, or what went wrong and the seconds that the endpoint asks for. FettleError where it refuses for good."""
    httpx = _httpx()
    try:
        reply = client.post(path, json=body)
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:  # what it says may show a header
        raise FettleError(f"{remote.url}: no request can be sent there ({type(error).__name__}); {URL}") from None
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__}: {error})", None
    if reply.status_code in AGAIN:
        return f"answered {reply.status_code} ({_said(reply)})", _pause(reply.headers.get("retry-after"))
    if reply.status_code != 200:
        hint = f"; is {remote.key} set to a key for it?" if reply.status_code in (401, 403) else ""
        raise FettleError(f"{remote.url}{path}: answered {reply.status_code} ({_said(reply)}){hint}")
    try:
        return _read(reply.json()), None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return f"answered what is no completion ({_said(reply)})", None


def _read(reply: Any) -> dict[str, Any]:
    """Of a completion's JSON: text, reason, log-probabilities, tokens read and written."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    logprobs = choice.get("logprobs") or {}
    logps = (
        [t["logprob"] for t in logprobs["content"] or ()]
        if "content" in logprobs
        else logprobs.get("token_logprobs") or []
    )
    tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
    return {
        "text": str(text or ""),
        "reason": str(choice.get("finish_reason")),
        "logps": [float(p) for p in logps],
        "usage": tokens,
    }


def _completion(answer: dict[str, Any], stop: tuple[str, ...]) -> Completion:
    """OpenAI's protocol does not tell an end token from a stop text: with stop texts, 'stop' may be either."""
    reason = REASONS.get(answer["reason"], "end")
    return Completion((), answer["text"], tuple(answer["logps"]), "stop" if stop and reason == "end" else reason)


def _pause(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _said(reply: Any) -> str:
    """What an endpoint said of an error, or the beginning of whatever it said, on one line and without the key."""
    text = reply.text
    try:
        text = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    if secret := reply.request.headers.get("authorization", "").removeprefix("Bearer "):
        text = text.replace(secret, "...")
    return shown(" ".join(text.split())[:200]) or "nothing"
