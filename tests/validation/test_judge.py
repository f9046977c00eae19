"""The judge: a real HTTP server that answers in OpenAI's form, and a tiny local model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from caliport.core.checkpoints import encode_prompt, load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.validation.evaluation.judge import (
    EndpointJudge,
    Judge,
    Judgement,
    LocalJudge,
    Question,
    count,
    verdict,
)
from caliport.validation.evaluation.quality import decode, generate

QUESTION = Question("Translate {output} into French", "Bonjour", "Salut")


def completion(content: object) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": content}}]}
    ).encode()


class Server(ThreadingHTTPServer):
    """Answers with `replies` in turn (status and body; a float is a pause before the next one)."""

    daemon_threads = True

    def __init__(self, replies: list[tuple[int, bytes] | float]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = replies
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, dict(self.headers), body))
        reply = server.replies.pop(0)
        if isinstance(reply, float):
            time.sleep(reply)
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        if reply[0] == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server([])
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def endpoint(server: Server, **settings: Any) -> EndpointJudge:
    return EndpointJudge(server.url, "a-judge", **{"pause": 0.01, "tries": 3, **settings})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("No.", False),
        (" **Yes**\n", True),
        ("No, the tone is casual.", False),
        ("Yes\n\nIt does both.", True),
        ("yes and no", None),
        ("No doubt it is right", None),
        ("yesterday", None),
        ("The answer is yes", None),
        ("maybe", None),
        ("", None),
        (None, None),
    ],
)
def test_what_counts_as_a_verdict(answer: str | None, expected: bool | None) -> None:
    assert verdict(answer) is expected


def test_an_endpoint_answers(server: Server) -> None:
    answers = ["Yes.", "no", "I would rather not say", None, [{"type": "text"}]]
    server.replies += [(200, completion(answer)) for answer in answers]
    done: list[int] = []
    judge: Judge = endpoint(server)
    found = judge([QUESTION] * 5, lambda number, _: done.append(number))
    assert found == [True, False, None, None, None]
    assert done == [1, 2, 3, 4, 5]
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"]) == ("a-judge", 0)
    asked = body["messages"][0]["content"]
    assert "Request: Translate {output} into French\n" in asked
    assert "Example of a right answer: Bonjour\n" in asked
    assert "Answer to judge: Salut\n" in asked


def test_the_key_comes_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("SOME_KEY", "secret\n")
    server.replies += [(200, completion("yes")), (401, b"secret")]
    judge = endpoint(server, key_variable="SOME_KEY")
    assert judge([QUESTION]) == [True]
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(InputError, match="found HTTP 401 for the model a-judge; check") as caught:
        judge([QUESTION])
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", " ")
    with pytest.raises(InputError, match="environment variable SOME_KEY: not set; put the judge's"):
        judge([QUESTION])


def test_failures_that_pass_are_tried_again(server: Server) -> None:
    server.replies += [(500, b""), (429, b""), (200, completion("yes"))]
    assert endpoint(server)([QUESTION]) == [True]
    server.replies += [1.0, (200, completion("no"))]
    assert endpoint(server, timeout=0.2)([QUESTION]) == [False]
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([(500, b""), (503, b"")], r"no answer in 2 tries \(HTTP 503\); start the endpoint"),
        ([1.0, 1.0], r"no answer in 2 tries \(more than 0.2 s\)"),
        ([(404, b"")], "found HTTP 404 for the model a-judge; check the address"),
        ([(302, b"")], "found HTTP 302 for the model a-judge"),
        ([(200, b"<html>")], "the answer is no chat completion of OpenAI's form"),
        ([(200, b'{"choices": []}')], "the answer is no chat completion of OpenAI's form"),
        ([(200, b"[" * 100_000)], "the answer is no chat completion of OpenAI's form"),
        ([(200, b" " * (3 << 20))], "found an answer over 1048576 bytes; expected a chat"),
    ],
)
def test_failures_that_stay_are_one_line(
    server: Server, replies: list[tuple[int, bytes] | float], expected: str
) -> None:
    server.replies += replies
    with pytest.raises(InputError, match=expected) as caught:
        endpoint(server, tries=2, timeout=0.2)([QUESTION])
    assert str(caught.value).startswith(f"{server.url}: ")
    assert "\n" not in str(caught.value)
    assert server.replies == []


def test_nobody_at_the_address() -> None:
    closed = Server([])
    closed.server_close()
    with pytest.raises(InputError, match=r"no answer in 3 tries \(ConnectionError\)"):
        endpoint(closed)([QUESTION])
    with pytest.raises(InputError, match="file:///etc: no address of an endpoint; expected http"):
        EndpointJudge("file:///etc", "a-judge")([QUESTION])


def test_no_verdict_is_never_yes() -> None:
    found = count([True, None, False, None])
    assert found == Judgement(yes=1, no=1, none=2)
    assert found.share == 25
    with pytest.raises(InputError, match="no verdicts to count"):
        count([])


def test_a_local_model_judges(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_base(base_dir), load_tokenizer(base_dir)
    question = Question("Hi", "a", "b")
    monkeypatch.setattr(
        "caliport.validation.evaluation.judge._QUESTION", "{request} {reference} {output}?"
    )
    prompts = [encode_prompt(tokenizer, question.text())]
    said = decode(tokenizer, generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=1))
    judge: Judge = LocalJudge(str(base_dir))
    assert judge([question]) == [verdict(said[0])]
    assert judge([]) == []
    with pytest.raises(InputError, match="does not fit the context of 128; use a judge with a"):
        judge([Question("word " * 200, "a", "b")])
