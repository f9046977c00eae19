"""Chat templates of strangers, rendered in a child process with limits on time and memory.

A template is a program: in Jinja's sandbox it can still loop for ever or build a list of a billion
entries. One child serves all templates of a process and is started again where one was too much.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError, one_line
from caliport.core.files import GENERATION_CONFIG
from caliport.core.model_files import templates_child
from caliport.core.model_files.templates_child import LONGEST, TOO_LONG
from caliport.core.untrusted import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, asks: bool = True
) -> str:
    """Messages in a tokenizer's chat template, with what begins the model's answer.

    The text is that of ``tokenizer.apply_chat_template(messages, tokenize=False,
    add_generation_prompt=asks, enable_thinking=False)`` on the day ``templates_child.TODAY``: a
    template that puts the date into the prompt gives the same tokens tomorrow.

    Args:
        tokenizer: A base's.
        messages: Turns with ``role`` and ``content``.
        asks: Whether to end with what begins the model's answer.

    Raises:
        InputError: There is no such template, or it does not parse, raises, calls ``lipsum`` or
            ``random``, or takes too much time, memory or text.
    """
    where = f"{tokenizer.name_or_path}: chat template"
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            listed = one_line(", ".join(map(str, template)), 60)
            raise InputError(f"{where}: found only {listed}; expected one named default")
        template = template["default"]
    if not isinstance(template, str):
        raise InputError(f"{where}: found {type(template).__name__}, expected text")
    words = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    job = {"template": template, "messages": list(messages), "words": words, "asks": asks}
    answer = _ask(job, where)
    if "error" in answer:
        raise InputError(f"{where}: {one_line(answer['error'])}")
    return str(answer["text"])


def template_pins(directory: Path) -> dict[str, str]:
    """What is held fixed in prompts and answers of a base, for the key and manifest of a stage.

    Empty for a base whose chat template asks for neither the date nor whether to think, and that
    stops at one token only, so that nothing there depends on how templates are rendered.
    """
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = [path for name in names if (path := directory / name).is_file()]
    text = b"".join(path.read_bytes() for path in files)
    pins = {}
    if b"strftime_now" in text:
        pins["today"] = f"{templates_child.TODAY:%Y-%m-%d}"
    if b"enable_thinking" in text:
        pins["enable_thinking"] = "false"
    settings = directory / GENERATION_CONFIG
    ends = read_object(settings).get("eos_token_id") if settings.is_file() else None
    if isinstance(ends, list) and len(ends) > 1 and b"assistant" in text:
        pins["answers_end"] = "as the chat template ends them"
    return pins


def start_ahead(directory: Path) -> None:
    """Start the child where a tokenizer may have a template: it imports while others work."""
    names = ("chat_template.jinja", "chat_template.json", "chat_templates")
    config = directory / "tokenizer_config.json"
    if any((directory / name).exists() for name in names) or (
        config.is_file() and b'"chat_template"' in config.read_bytes()
    ):
        with _lock:
            _child()


_lock = threading.Lock()
_children: dict[int, subprocess.Popen[bytes]] = {}  # by the process that asks it


def _child() -> subprocess.Popen[bytes]:
    found = _children.get(os.getpid())
    if found is None or found.poll() is not None:
        found = _children[os.getpid()] = subprocess.Popen(
            [sys.executable, "-P", templates_child.__file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's; the child ends with its input
        )
    return found


def _ask(job: Mapping[str, Any], where: str) -> dict[str, Any]:
    with _lock:
        child = _child()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline(13 * LONGEST)
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        except BrokenPipeError:
            pass
        except BaseException:  # its answer would be taken for that to the next question
            child.kill()
            _end(child)
            raise
        code = _end(child)
    if code == -signal.SIGPROF:
        raise InputError(f"{where}: {TOO_LONG}")
    if code < 0:
        raise InputError(f"{where}: rendering it ends with {signal.Signals(-code).name}")
    raise InputError(f"{where}: the process that renders it ends with exit code {code}")


def _end(child: subprocess.Popen[bytes]) -> int:
    """End a child; its exit status, which is its own if it has ended by itself."""
    _children.pop(os.getpid(), None)
    try:
        child.wait(timeout=1)
    except subprocess.TimeoutExpired:
        child.kill()
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):
            stream.close()
    return child.wait()


@atexit.register
def _end_all() -> None:
    child = _children.get(os.getpid())
    if child is not None:
        child.kill()
        _end(child)
