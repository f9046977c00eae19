"""The two reports in ``docs/examples``: of a sound run, and of the same run with one fault.

    .venv/bin/python -m tests.validation.example_reports recipes/toy.yaml runs/toy

The run must be complete. Its ONNX int4 artifact is copied and given a key/value cache that one
layer reads one place off; everything else is what ``caliport validate`` finds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from caliport.validation.records.reports import REPORT
from caliport.validation.report.page import write_report
from tests.faults.making import agree
from tests.faults.table import FAULTS

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FAULT = "cache position off by one"


def write_examples(recipe: Path, run: Path) -> None:
    """Write ``report-pass.html`` and ``report-fail.html``.

    Args:
        recipe: That the run was made from.
        run: Its directory, named after the recipe; left as it is but for its ``report.html``.
    """
    change = next(f.after["onnx"] for f in FAULTS if f.name == FAULT and f.after)
    shutil.copy(write_report(run / "reports"), EXAMPLES / "report-pass.html")
    with TemporaryDirectory(dir=run.parent) as place:
        copy = Path(place) / run.name
        shutil.copytree(run, copy)
        for artifact in copy.glob("artifacts/*/onnx-int4"):
            change(artifact)
            agree(artifact, None)
        command = [sys.executable, "-m", "caliport", "validate", str(recipe), "--runs", place]
        code = subprocess.run(command).returncode
        if code != 1:
            raise SystemExit(f"caliport validate ended with {code}; 1, a failed gate, is right")
        shutil.copy(copy / "reports" / REPORT, EXAMPLES / "report-fail.html")


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]), Path(sys.argv[2]))
