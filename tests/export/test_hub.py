"""Pushing, against a server on this machine that answers as the Hub does where we ask it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from commands import ENVIRONMENT

from caliport.core.directories import check_files, read_manifest
from caliport.core.errors import InputError
from caliport.export.package.hub import check_repo_id, push

TOKEN = "stand-in"
LARGE = 20_000


@dataclass
class Hub:
    """What was asked and what is kept; ``refuse`` names a path to answer with 403."""

    asked: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: str = "nothing"
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        hub = self.hub
        hub.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or hub.refuse in self.path:
            self.answer({"error": f"You may not {self.path}"}, 403)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            name = f"{hub.created[-1]['organization']}/{hub.created[-1]['name']}"
            self.answer({"url": f"{hub.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/me/thing/preupload/"):
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["size"] > LARGE],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path == "/me/thing.git/info/lfs/objects/batch":
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.answer({"objects": objects, "transfer": "basic"})
        elif self.path.startswith("/api/models/me/thing/commit/"):
            for line in body.splitlines():
                self.commit(**json.loads(line))
            self.answer({"commitUrl": f"{hub.url}/me/thing/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": "not in this stand-in"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append("PUT")
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        self.answer({"error": "not in this stand-in"}, 404)

    def commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.hub.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.hub.files[value["path"]] = self.hub.objects[value["oid"]]

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def export(
    artifacts: Path, base: Path, adapter: Path, place: Path, url: str, *options: str
) -> subprocess.CompletedProcess:
    """``caliport export`` onto an artifact that is up to date, so that only the push is left."""
    if not (place / "art").exists():
        shutil.copytree(artifacts / "onnx", place / "art")
    command = [sys.executable, "-m", "caliport", "export", "--base", base, "--adapter", adapter]
    command += ["--runtime", "onnx", "--precision", "int8", "--context", "96", "--out", "art"]
    return subprocess.run(
        [*map(str, command), *options],
        cwd=place,
        env={
            **ENVIRONMENT,
            "HF_ENDPOINT": url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(place / "hf"),
            "NO_PROXY": "127.0.0.1",
        },
        text=True,
        capture_output=True,
    )


@pytest.fixture
def given(
    artifacts: Path, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> tuple[Path, Path, Path, Path]:
    return artifacts, base_dir, adapter_dirs[0], tmp_path


def test_a_push_brings_every_file(given: tuple[Path, Path, Path, Path], hub: Hub) -> None:
    """Small files as they are, large ones through LFS, and what arrives is a valid artifact."""
    place = given[-1]
    done = export(*given, hub.url, "--push-to-hub", "me/thing", "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/me/thing/commit/1" in done.stderr
    assert "up to date, skipped" in done.stderr
    assert hub.created == [{"name": "thing", "organization": "me", "visibility": "private"}]
    assert hub.files == {path.name: path.read_bytes() for path in (place / "art").iterdir()}
    assert hub.objects.keys() <= {
        f["sha256"] for f in read_manifest(place / "art")["files"].values()
    }
    assert "PUT" in hub.asked
    (place / "fetched").mkdir()
    for name, content in hub.files.items():
        (place / "fetched" / name).write_bytes(content)
    check_files(place / "fetched")
    done = export(*given, hub.url, "--push-to-hub", "me/thing")
    assert done.returncode == 0, done.stderr
    assert "visibility" not in hub.created[1]


def test_nothing_is_pushed_unasked(given: tuple[Path, Path, Path, Path], hub: Hub) -> None:
    assert export(*given, hub.url).returncode == 0
    assert hub.asked == []


@pytest.mark.parametrize(
    "path", ["/api/repos/create", "/preupload/", "/objects/batch", "/commit/", "no server"]
)
def test_a_failed_push_is_one_line_and_the_artifact_stays(
    given: tuple[Path, Path, Path, Path], hub: Hub, path: str
) -> None:
    url = hub.url
    if path == "no server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
    hub.refuse = path
    done = export(*given, url, "--push-to-hub", "me/thing")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("caliport: --push-to-hub me/thing: ")
    assert last.endswith("the artifact stays in art")
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("caliport: ")] == [last]
    check_files(given[-1] / "art")


def test_a_changed_artifact_is_not_pushed(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    art = shutil.copytree(artifacts / "onnx", tmp_path / "art")
    (art / "README.md").write_text("another card")
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(InputError, match=r"README\.md: .* manifest\.json records"):
        push(art, "me/thing")


@pytest.mark.parametrize("name", ["a/b/c", "me/thing.git", "-me/thing", "me/th ing", ""])
def test_a_wrong_name_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        check_repo_id(name)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--private"], "--private only goes with --push-to-hub"),
        (["--push-to-hub", "a/b/c"], "expected OWNER/NAME"),
    ],
)
def test_options_that_do_not_fit(
    given: tuple[Path, Path, Path, Path], options: list[str], says: str
) -> None:
    done = export(*given, "http://127.0.0.1:9", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
