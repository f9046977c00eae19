"""Bases by hub name: fetched into the cache, checked there, and only then read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from commands import ENVIRONMENT

COMMIT = "c" * 40


@dataclass
class Hub:
    """A hub with one model, and the files that were asked for."""

    files: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place, _, name = self.path.partition("?")[0].partition("/resolve/")
        name = name.partition("/")[2]
        if place.startswith("/api/models/org/model"):
            files = [
                {"type": "file", "path": file.name, "oid": "0", "size": file.stat().st_size}
                for file in sorted(self.hub.files.iterdir())
            ]
            info = {"id": "org/model", "sha": COMMIT, "siblings": []}
            self.answer(json.dumps(files if "/tree/" in place else info).encode())
        elif place == "/org/model" and (self.hub.files / name).is_file():
            self.hub.asked.append(name)
            self.answer((self.hub.files / name).read_bytes())
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def answer(self, body: bytes, code: int = 200, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        tag = sha1(body, usedforsecurity=False).hexdigest()
        for key, value in {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, **(more or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(base_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(shutil.copytree(base_dir, tmp_path / "files"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "caliport", *arguments]
    there = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf")}
    return subprocess.run(
        command,
        cwd=place,
        env={**ENVIRONMENT, **there, "NO_PROXY": "127.0.0.1"},
        text=True,
        capture_output=True,
    )


EXPORT = ("export", "--base", "org/model", "--runtime", "onnx", "--out", "out")
Change = Callable[[Path], object]


def test_a_base_by_hub_name_is_exported(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, *EXPORT)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {*hub.asked}
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "Fetching" not in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: (d / "tokenizer.json").write_text("[" * 10_000), "not usable as a tokenizer"),
        (lambda d: (d / "tokenizer_config.json").write_text("["), "tokenizer_config.json: "),
        (lambda d: (d / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "ZeroDivisionError"),
    ],
    ids=["tokenizer", "its settings", "template"],
)
def test_a_hostile_tokenizer_of_a_hub_name(
    change: Change, says: str, hub: Hub, tmp_path: Path
) -> None:
    change(hub.files)
    done = run(hub, tmp_path, *EXPORT)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("caliport: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda d: (d / "generation_config.json").write_text('{"eos_token_id": -7}'),
            "generation_config.json: eos_token_id",
        ),
        (lambda d: (d / "config.json").write_text(" " * 10**8 + "{}"), "config.json: "),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "an adapter beside a base"),
    ],
    ids=["ends", "size", "adapter"],
)
def test_settings_of_a_hub_name_are_checked_before_weights_are_fetched(
    change: Change, says: str, hub: Hub, tmp_path: Path
) -> None:
    change(hub.files)
    done = run(hub, tmp_path, *EXPORT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "model.safetensors" not in hub.asked
