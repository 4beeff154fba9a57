"""An endpoint that is busy, breaks off, refuses, talks nonsense; and one that answers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fettle.core import FettleError
from fettle.generate import Sampling
from fettle.generate.answers import Answers
from fettle.generate.remote import Remote

Reply = tuple[int, Any, dict[str, str]]


class Endpoint:
    """A server of OpenAI's protocol that `answer` speaks for; what it was sent is in `seen`."""

    def __init__(self, answer: Callable[[Endpoint, str, dict[str, Any]], Reply]) -> None:
        self.answer, self.seen, self.headers = answer, [], []
        self.lock, self.at_once, self.most = threading.Lock(), 0, 0
        self.asked: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[str]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    endpoint.seen.append((self.path, body))
                    endpoint.headers.append(dict(self.headers))
                    endpoint.asked[said(body)] += 1
                    endpoint.at_once += 1
                    endpoint.most = max(endpoint.most, endpoint.at_once)
                status, reply, headers = endpoint.answer(endpoint, self.path, body)
                with endpoint.lock:
                    endpoint.at_once -= 1
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def said(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def completion(body: dict[str, Any], text: str, **more: Any) -> dict[str, Any]:
    choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    return {
        "choices": [choice | {"finish_reason": "stop"} | more],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
    }


def echo(_: Endpoint, __: str, body: dict[str, Any]) -> Reply:
    return 200, completion(body, f"<{said(body)}>"), {}


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def texts(found: list[Any]) -> list[str]:
    return [c.text for c in found]


def test_answers_in_order_and_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    server, ticks = Endpoint(echo), []
    with server.running() as url:
        remote = Remote(url=url, model="m", key="A_KEY", concurrency=3, price=(2.0, 5.0))
        asked = [talk(str(i)) for i in range(8)] + ["plain"]
        found = remote.generate(
            asked, Sampling(max_tokens=7, temperature=0.5, top_k=3, stop=("X",)), n=2, progress=ticks.append
        )
    assert texts(found) == [f"<{i}>" for i in range(8) for _ in range(2)] + ["<plain>"] * 2
    assert sum(ticks) == 18 and server.most <= 3
    assert {path for path, _ in server.seen} == {"/v1/chat/completions", "/v1/completions"}
    body = server.seen[0][1]
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_k", "stop")} == {
        "model": "m", "max_tokens": 7, "temperature": 0.5, "top_k": 3, "stop": ["X"],
    }  # fmt: skip
    assert "min_p" not in body and len({b["seed"] for _, b in server.seen}) == 18
    assert all(h["Authorization"] == "Bearer secret" for h in server.headers)
    ledger = remote.ledger
    assert (ledger.requests, ledger.retries, ledger.prompt_tokens, ledger.answer_tokens) == (18, 0, 180, 72)
    assert ledger.cost == pytest.approx((180 * 2 + 72 * 5) / 1e6) and ledger.seconds > 0


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    server = Endpoint(echo)
    with server.running() as url:
        remote = Remote(url=url, model="m", cache=tmp_path / "a" / "answers.jsonl")
        first = remote.generate([talk("1"), talk("2"), talk("1")])  # greedy: the same question has one answer
        assert sum(server.asked.values()) == 2
        again = Remote(url=url, model="m", cache=tmp_path / "a" / "answers.jsonl")
        assert again.generate([talk("2"), talk("1"), talk("3")])[:2] == [first[1], first[0]]
        assert sum(server.asked.values()) == 3 and again.ledger.cached == 2
        Remote(url=url, model="other", cache=tmp_path / "a" / "answers.jsonl").generate([talk("1")])
        assert sum(server.asked.values()) == 4
    assert "secret" not in (tmp_path / "a" / "answers.jsonl").read_text()


@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_endpoint_that_fails_half_way_loses_nothing(tmp_path: Path, concurrency: int) -> None:
    broken = threading.Event()
    broken.set()

    def half(server: Endpoint, path: str, body: dict[str, Any]) -> Reply:
        if said(body) == "5" and broken.is_set():
            return 400, {"error": {"message": "this one is too long"}}, {}
        return echo(server, path, body)

    cache = tmp_path / "answers.jsonl"
    asked = [talk(str(i)) for i in range(10)]
    server = Endpoint(half)
    with server.running() as url:
        remote = Remote(url=url, model="m", concurrency=concurrency, cache=cache)
        with pytest.raises(
            FettleError, match=r"400 \(this one is too long\); \d of 10 answers had come and are kept in .*jsonl"
        ):
            remote.generate(asked)
        assert len(cache.read_text().splitlines()) == server.asked.total() - 1  # all that was under way came in
        assert concurrency > 1 or list(server.asked) == list("012345")  # and no more began
        with cache.open("a") as torn:
            torn.write('{"key": "abc", "ans')
        broken.clear()
        assert texts(remote.generate(asked)) == [f"<{i}>" for i in range(10)]
    assert server.asked.total() == 11 and len(Answers(cache).known) == 10


def test_busy_for_a_while() -> None:
    def busy(server: Endpoint, path: str, body: dict[str, Any]) -> Reply:
        match server.asked[said(body)]:
            case 1:
                return 429, {"error": "slow down"}, {"Retry-After": "0"}
            case 2:
                return 503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
            case 3:
                return 200, b"<html>a proxy</html>", {"Retry-After": "0"}
        return echo(server, path, body)

    server = Endpoint(busy)
    with server.running() as url:
        remote = Remote(url=url, model="m", retries=3)
        # a page in place of JSON names no time to wait, so this one waits between one and two seconds
        assert texts(remote.generate([talk("1"), talk("2")])) == ["<1>", "<2>"]
    assert remote.ledger.retries == 6


def test_busy_for_good() -> None:
    server = Endpoint(lambda *_: (429, {"error": "slow down"}, {"Retry-After": "0"}))
    with server.running() as url:
        with pytest.raises(
            FettleError, match="429 .*slow down.*, 3 times in a row; 0 of 1 answers had come and are lost; set 'cache'"
        ):
            Remote(url=url, model="m", retries=2).generate([talk("1")])
    assert server.asked["1"] == 3
    patient = Endpoint(lambda *_: (503, "", {"Retry-After": "3600"}))
    with patient.running() as url:
        with pytest.raises(FettleError, match="asks to wait 3600 s, over the patience of 300"):
            Remote(url=url, model="m").generate([talk("1")])


def test_what_is_refused_is_not_asked_again() -> None:
    server = Endpoint(lambda *_: (401, {"error": {"message": "no such key"}}, {}))
    with server.running() as url:
        with pytest.raises(FettleError, match="401 .*no such key.*is OPENAI_API_KEY set"):
            Remote(url=url, model="m").generate([talk("1")])
    assert server.asked["1"] == 1
    with pytest.raises(FettleError, match="no answer .*Connect"):
        Remote(url=url, model="m", retries=0).generate([talk("1")])
    with pytest.raises(FettleError, match="2 seeds for 1 prompts and n 1"):
        Remote(url=url, model="m").generate([talk("1")], seeds=[1, 2])


def test_log_probabilities_reasons_and_fields_besides() -> None:
    def answer(_: Endpoint, __: str, body: dict[str, Any]) -> Reply:
        content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]
        logps = {"token_logprobs": [-0.25]} if "prompt" in body else {"content": content}
        reason = {"cut": "length", "held": "content_filter"}.get(said(body), "stop")
        return (
            200,
            completion(body, None if reason == "content_filter" else "ab", logprobs=logps, finish_reason=reason),
            {},
        )

    server = Endpoint(answer)
    with server.running() as url:
        remote = Remote(url=url, model="m", logps=True, body={"max_tokens": None, "max_completion_tokens": 9})
        found = remote.generate([talk("x"), talk("cut"), talk("held"), "text"])
    assert [c.reason for c in found] == ["end", "length", "filter", "end"]
    assert [c.logps for c in found] == [(-0.5, -1.5)] * 3 + [(-0.25,)] and found[2].text == ""
    bodies = {said(body): body for _, body in server.seen}
    assert bodies["x"]["logprobs"] is True and bodies["text"]["logprobs"] == 0
    assert "max_tokens" not in bodies["x"] and bodies["x"]["max_completion_tokens"] == 9 and "seed" not in bodies["x"]


@pytest.mark.parametrize("around", ["{}\r", "{}\r\n", " {}\t"])
def test_what_stands_around_a_key_is_no_part_of_it(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", around.format("sk-123"))
    server = Endpoint(echo)
    with server.running() as url:
        assert texts(Remote(url=url, model="m", key="A_KEY", retries=0).generate([talk("1")])) == ["<1>"]
    assert server.headers[0]["Authorization"] == "Bearer sk-123"


@pytest.mark.parametrize("key", ["sk-sécret", "sk-1\nsecret", "sk-\udcffsecret"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(FettleError, match="^A_KEY: .* other than printable ASCII") as refused:
        Remote(url="http://localhost:1/v1", model="m", key="A_KEY").generate([talk("1")])
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("status", [401, 429, 200])
def test_a_key_that_an_endpoint_repeats_is_not_shown(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what is shown of its answer ends in the middle of the key."""
    monkeypatch.setenv("A_KEY", "sk-" + "7" * 300)
    server = Endpoint(lambda s, *_: (status, {"error": {"message": f"no: {s.headers[0]['Authorization']}"}}, {}))
    with server.running() as url:
        with pytest.raises(FettleError, match=r"\(no: Bearer \.\.\.\)"):
            Remote(url=url, model="m", key="A_KEY", retries=0).generate([talk("1")])


@pytest.mark.parametrize("url", ["localhost:1/v1", "127.0.0.1:1/v1", "", "http://host:port/v1"])
def test_what_is_no_url_is_not_asked_again(url: str) -> None:
    with pytest.raises(FettleError, match="as https://host/v1") as refused:
        Remote(url=url, model="m", retries=3).generate([talk("1")])
    assert "in a row" not in str(refused.value)
