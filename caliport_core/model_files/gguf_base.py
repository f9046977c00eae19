"""A ``.gguf`` file as a base: converted once to a Hugging Face directory in the user's cache.

The file may be a stranger's, so its header is checked here and a child process with limits, which
sees nothing but the file, converts it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from caliport.core.directories import key, read_manifest
from caliport.core.errors import InputError, one_line, printable
from caliport.core.files import file_hash
from caliport.core.machine import available_memory, free_disk
from caliport.core.model_files import gguf_child
from caliport.core.model_files.gguf_header import SUFFIX, GgufHeader, read_gguf_header
from caliport.core.outputs import new_directory
from caliport.core.places import cache_directory
from caliport.core.processes import alone, is_main
from caliport.core.progress import working
from caliport.core.untrusted import check_regular

_STAGE = "gguf"
_FORM = {"converter": 1, "dtype": "float32"}
_LIBRARIES, _PER_VALUE = 800_000_000, 5  # bytes in memory, measured
_ADDRESSES = 12 * 2**30  # bytes of address space that libraries take
_SECONDS, _VALUES_PER_SECOND = 900, 2_000_000


def is_gguf(path: str | Path) -> bool:
    """Whether a base is given as a ``.gguf`` file that is there."""
    return str(path).lower().endswith(SUFFIX) and os.path.exists(path) and not os.path.isdir(path)


def as_directory(path: str | Path) -> str | Path:
    """A base as everything reads it: of a ``.gguf`` file the directory it is converted to.

    Another path, or a hub name, is returned as it is. The directory is named by the file and by
    what is in it, and made once.

    Raises:
        InputError: See ``read_gguf_header``; something that transformers cannot read or would leave
            out; too little memory or disk.
    """
    if not is_gguf(path):
        return path
    file = Path(path)
    check_regular(file)
    digest = file_hash(file)
    settings = {**_FORM, "gguf": metadata.version("gguf")}
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", file.stem)[:100]
    out = cache_directory(_STAGE) / f"{name}-{digest[:16]}"
    wanted = key(_STAGE, {"file": digest}, settings)
    if _is_made(out, wanted):
        return out
    header = read_gguf_header(file)
    with alone(out, wait=True):
        if _is_made(out, wanted):  # another process has made it
            return out
        _check_room(file, header, out)
        if is_main():
            print(f"{printable(str(file))}: converting it once, into {out}", flush=True)
        with (
            working(f"converting {file.name}"),
            new_directory(out, _STAGE, {"file": digest}, settings) as (partial, _),
        ):
            _convert(file, header, partial)
            if file_hash(file) != digest:
                raise InputError(f"{file}: changed while it was read; try again")
    return out


def _is_made(out: Path, wanted: str) -> bool:
    """Whether the directory is there, by the sizes of its files: to hash all takes seconds."""
    try:
        manifest = read_manifest(out)
        sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        found = {name: (out / name).stat().st_size for name in sizes}
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False
    return manifest.get("key") == wanted and found == sizes


def _check_room(file: Path, header: GgufHeader, out: Path) -> None:
    for kind, needed, there in (
        ("memory", _LIBRARIES + _PER_VALUE * header.values, available_memory()),
        ("disk", 4 * header.values, free_disk(out)),
    ):
        if needed > there:
            raise InputError(
                f"{file}: converting it needs about {needed / 1e9:.1f} GB of {kind}, "
                f"{there / 1e9:.1f} GB are there; free some, or use its safetensors directory"
            )


def _convert(file: Path, header: GgufHeader, out: Path) -> None:
    memory = _ADDRESSES + 4 * _PER_VALUE * header.values
    seconds = _SECONDS + header.values // _VALUES_PER_SECOND
    with TemporaryDirectory(
        prefix="caliport-gguf-"
    ) as alone:  # transformers reads what lies beside
        (Path(alone) / gguf_child.FILE).symlink_to(file.resolve())
        child = [sys.executable, "-P", gguf_child.__file__]
        try:
            done = subprocess.run(
                [*child, alone, str(out), str(memory), str(seconds)],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=4 * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{file}: converting it takes more than {4 * seconds} s") from None
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise InputError(
            f"{file}: converting it ends with {signal.Signals(-done.returncode).name}; expected "
            "the model's safetensors directory"
        )
    raise InputError(f"{file}: {_said(done.stdout)}")


def _said(output: bytes) -> str:
    lines = output.decode(errors="replace").splitlines()
    try:
        return one_line(json.loads(lines[-1])["error"], 1000)
    except (IndexError, ValueError, KeyError, TypeError):
        return "the process that converts it fails; expected the model's safetensors directory"
