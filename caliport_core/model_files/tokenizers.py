"""Tokenizers of strangers: their files checked, tried in a process of its own, then opened.

The tokenizers library is native code. What it cannot read may panic, end the process or take all
memory, so a short child process with limits reads ``tokenizer.json`` first.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.errors import InputError, one_line
from caliport.core.files import file_hash
from caliport.core.model_files.base_files import snapshot
from caliport.core.untrusted import (
    SETTINGS_BYTES,
    TOKENIZER_BYTES,
    check_regular,
    number,
    read_object,
    read_text,
    shown,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
_OBJECTS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEMPLATES = ("*.jinja", "chat_templates/*", "additional_chat_templates/*")
_LARGE = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json")
_TEMPLATE_BYTES = 2**20
_SECONDS = 120
_TRY = f"""
import resource, sys
for kind, most in (("AS", 6 * 2**30), ("CPU", {_SECONDS}), ("CORE", 0)):
    number = getattr(resource, "RLIMIT_" + kind)
    given = resource.getrlimit(number)[1]  # which may be lower already and cannot be raised
    most = most if given == resource.RLIM_INFINITY else min(most, given)
    resource.setrlimit(number, (most, given))
try:
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(sys.argv[1])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("Hello, 12 \\u00e4\\u4e2d\\U0001f600\\n").ids
    tokenizer.decode(ids)
except BaseException as error:
    print(ascii(f"{{type(error).__name__}}: {{error}}"[:300]))
    sys.exit(1)
"""


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a hub name; no code from it runs.

    Raises:
        InputError: A file that is not regular, too large, or outside the directory, or a tokenizer
            that cannot be read, panics or crashes.
    """
    from transformers import AutoTokenizer

    directory = Path(path) if Path(path).is_dir() else snapshot(path)
    if directory is not None:
        check_tokenizer_files(directory)
        for file in sorted(directory.glob("tokenizer.*json")):
            try_tokenizer(file)
    try:
        with no_panic(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not loadable as a tokenizer ({one_line(error)})") from error


def open_file(file: Path) -> Tokenizer:
    """A ``tokenizer.json`` as the tokenizers library reads it, for what needs no transformers.

    Raises:
        InputError: As ``open_tokenizer``.
    """
    from tokenizers import Tokenizer

    check_regular(file, TOKENIZER_BYTES, file.parent)
    try_tokenizer(file)
    with no_panic(file):
        return Tokenizer.from_file(str(file))


def check_tokenizer_files(directory: Path) -> None:
    """Check the files that a tokenizer may be read from, before any is opened.

    Raises:
        InputError: One of them is not a regular file, too large, outside the directory, or not what
            its name says.
    """
    for pattern in (*_LARGE, *_TEMPLATES):
        for path in sorted(directory.glob(pattern)):
            check_regular(path, TOKENIZER_BYTES, directory)
    for pattern in _TEMPLATES:
        for path in sorted(directory.glob(pattern)):
            read_text(path, _TEMPLATE_BYTES, directory)
    for name in _OBJECTS:
        path = directory / name
        if path.exists() or path.is_symlink():
            found = read_object(path, 4 * SETTINGS_BYTES, directory)
            files = found.get("fast_tokenizer_files", []) if name == TOKENIZER_CONFIG else []
            if name == TOKENIZER_CONFIG and (most := found.get("model_max_length")) is not None:
                number(most, f"{path}: model_max_length", 1, 1e31)  # transformers writes 1e30
            if files and not (
                isinstance(files, list) and all(isinstance(f, str) and "/" not in f for f in files)
            ):
                raise InputError(
                    f"{path}: fast_tokenizer_files is {shown(files)}, expected names of files"
                )


def try_tokenizer(file: Path) -> None:
    """Read a ``tokenizer.json`` and encode a short text in a process of its own, with limits.

    Raises:
        InputError: It cannot be read, panics, crashes, takes too long or too much memory.
    """
    wrong = _trial(str(file), file_hash(file))
    if wrong is not None:
        raise InputError(f"{file}: not usable as a tokenizer ({wrong})")


@lru_cache(maxsize=16)
def _trial(file: str, digest: str) -> str | None:
    """What is wrong with a ``tokenizer.json``, or None; once for each content."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TRY, file],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=2 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {2 * _SECONDS} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the tokenizers library ends with {signal.Signals(-done.returncode).name}"
    return one_line(done.stdout.decode(errors="replace").strip("\n'\"") or "it cannot be read")


@contextmanager
def no_panic(what: object) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no ``Exception``, into an ``InputError``."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: the tokenizers library panics ({one_line(error)})") from None
