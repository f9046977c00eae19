"""Run a stranger's ExecuTorch program once in a process of its own, since it may crash that.

The binding asks for a program's verification, but the wheel of executorch 1.5.1 is built without it
and follows any offset. Hashes in a manifest say only who wrote both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from caliport.core.directories import made_here
from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER, file_hash

_SECONDS = 300  # that loading, and a step of each method, may take
_BYTES_A_SECOND = 1 << 23  # and more for large programs
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
        raise InputError(
            f"{program}: ExecuTorch did not end a step in {seconds} seconds; expected a sound "
            "program"
        ) from None
    if done.returncode < 0:
        crash = signal.Signals(-done.returncode).name
        raise InputError(f"{program}: ExecuTorch crashed on it ({crash}); expected a sound program")
    _sound.add(content)
