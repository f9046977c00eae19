"""Commands inside a directory of a stranger's: nothing in it is imported, and no settings read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from commands import ENVIRONMENT
from exports import to_onnx

MODULES = ("json", "signal", "tokenizers", "numpy", "regex", "onnxruntime", "sitecustomize")
MAIN = "from caliport.cli.main import main; main()"  # as the installed script


def test_nothing_of_the_directory_counts(base_dir: Path, tmp_path: Path) -> None:
    """Modules named like those that processes and their children import, and a matplotlibrc."""
    place = shutil.copytree(to_onnx(base_dir, tmp_path / "art", context=96), tmp_path / "theirs")
    for name in MODULES:
        marker = tmp_path / f"ran-{name}"
        (place / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(9)\n")
    (place / "matplotlibrc").write_text("backend: nonsense\nfont.size: -3\n")
    bench = ["bench", tmp_path / "art", "--repetitions", "1", "--new-tokens", "2"]
    bench += ["--prompt-tokens", "4", "--out", tmp_path / "bench"]
    check = ["validate", ".", "--base", base_dir, "--no-latency"]
    for call, code in ((bench, 0), (check, 2)):  # files that the manifest does not record
        done = subprocess.run(
            [sys.executable, "-P", "-c", MAIN, *map(str, call)],
            cwd=place,
            env=ENVIRONMENT,
            text=True,
            capture_output=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "bench" / "report.html").is_file()
    assert not list(tmp_path.glob("ran-*"))
