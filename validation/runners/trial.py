"""Try what a stranger's artifact does to a runtime in a process of its own, which it may end.

The binding asks for a program's verification, but the wheel of executorch 1.5.1 is built without it
and follows any offset. Hashes in a manifest say only who wrote both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from caliport.core.directories import made_here
from caliport.core.errors import InputError
from caliport.core.files import CHAT_TEMPLATE, TOKENIZER, file_hash
from caliport.core.untrusted import TOKENIZER_BYTES, read_object

_SECONDS = 300  # that loading, and a step of each method, may take
_BYTES_A_SECOND = 1 << 23  # and more for large programs
_CONFIG = "tokenizer_config.json"
_TEMPLATE = 1 << 14  # characters, which onnxruntime_genai reads in seconds whatever they are
_TEMPLATE_SECONDS = 60
_READ = "import sys, onnxruntime_genai as g; g.Tokenizer(g.Model(g.Config(sys.argv[1])))"
_sound: set[tuple[str, ...]] = set()


def try_program(program: Path) -> None:
    """Load a program in a child, let each method take a step and the stock runner write a token.

    Programs that this process exported are no stranger's. One that was tried is remembered by its
    content.

    Raises:
        InputError: The child crashed or did not end. What else is wrong is said by what opens it.
    """
    files = [program, program.with_name(TOKENIZER)]
    files = [file for file in files if file.is_file()]
    content = tuple(map(file_hash, files))
    if content in _sound or all(map(made_here, files)):
        return
    command = [sys.executable, "-P", "-m", "caliport.validation.runners.trial_child", str(program)]
    seconds = _SECONDS + program.stat().st_size // _BYTES_A_SECOND
    ended = _ended(command, seconds)
    if ended is not None:
        raise InputError(f"{program}: ExecuTorch {ended}; expected a sound program")
    _sound.add(content)


def try_template(directory: Path) -> None:
    """Let onnxruntime_genai read a long chat template in a child.

    The time that 0.18 takes goes by the square of a template's expressions, and nothing ends it.

    Args:
        directory: An artifact whose configuration was checked (``read_config``).

    Raises:
        InputError: The child did not end in time, or crashed.
    """
    file, config = directory / CHAT_TEMPLATE, directory / _CONFIG
    size = file.stat().st_size if file.is_file() else 0
    if config.is_file():
        size = max(size, len(str(read_object(config, TOKENIZER_BYTES).get("chat_template"))))
    if size <= _TEMPLATE:
        return
    ended = _ended([sys.executable, "-P", "-c", _READ, str(directory)], _TEMPLATE_SECONDS)
    if ended is None:
        return
    raise InputError(
        f"{directory}: onnxruntime_genai, which reads its chat template of {size:,} characters, "
        f"{ended}; expected a shorter one"
    )


def _ended(command: Sequence[str], seconds: int) -> str | None:
    """How a child ended that crashed or did not end; None for any exit code of its own.

    What else is wrong is said by what opens the file in this process.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"did not end in {seconds} seconds"
    if done.returncode >= 0:
        return None
    return f"crashed on it ({signal.Signals(-done.returncode).name})"
