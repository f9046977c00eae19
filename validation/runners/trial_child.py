"""The child of ``caliport.validation.runners.trial``, which does all that its parent will."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from caliport.validation.runners.executorch import ExecuTorchRunner, binding, generate


def _try(program: Path) -> None:
    """Let each method take a step and the stock runner write a token; errors are the parent's."""
    module = binding()._load_for_executorch(str(program))
    for method in module.method_names():
        with contextlib.suppress(Exception):
            if module.method_meta(method).num_inputs() == 0:
                module.run_method(method, [])
                continue
            runner = ExecuTorchRunner(program.parent, threads=1, method=method)
            runner.prefill([0, 0, 0])
            runner.step(0)
    with contextlib.suppress(Exception):
        generate(program.parent, "a", 1)


if __name__ == "__main__":
    _try(Path(sys.argv[1]))
