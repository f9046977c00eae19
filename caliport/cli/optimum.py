"""``optimum-cli export caliport``: the export stage as a command of Hugging Face Optimum.

Optimum's ``TasksManager`` determines the library and task of a checkpoint; the export itself is
``caliport export``. Heavy libraries are imported only when the command runs, since ``optimum-cli``
imports this file at every start.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from caliport.core.errors import InputError, one_line
from caliport.core.model_files.gguf_base import as_directory
from caliport.core.outputs import forced

_LIBRARY = "transformers"
_TASK = "text-generation"


class CaliportExportCommand(BaseOptimumCLICommand):
    """``optimum-cli export caliport --model BASE --runtime RUNTIME OUT``."""

    COMMAND = CommandInfo(
        name="caliport",
        help="Export a decoder, with a LoRA adapter folded in, to ExecuTorch or ONNX.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags; they mean the same as for ``caliport export``."""
        parser.add_argument(
            "-m", "--model", required=True, help="Hugging Face directory, .gguf file or hub name."
        )
        parser.add_argument("--adapter", type=Path, help="PEFT LoRA directory to fold in.")
        parser.add_argument("--runtime", required=True, help="executorch or onnx.")
        parser.add_argument("--precision", default="fp32", help="fp32, int8 or int4.")
        parser.add_argument(
            "--context", type=int, help="Key-value cache length in tokens; default the base's."
        )
        parser.add_argument(
            "--no-preflight",
            action="store_true",
            help="Continue even if memory or disk seems too small.",
        )
        parser.add_argument(
            "--force",
            action="store_true",
            help="Replace the output even if caliport did not make it.",
        )
        parser.add_argument("output", type=Path, help="The directory to write.")

    def run(self) -> None:
        """Export; as with ``caliport export``, invalid input ends in one line and exit code 2."""
        from caliport.cli.main import guarded

        code = guarded(self._export, "optimum-cli export caliport --help", debug=False)
        if code:
            sys.exit(code)

    def _export(self) -> None:
        from caliport.export.quantization.choices import Quantization
        from caliport.export.request import Request
        from caliport.flags.export import export_one

        given = self.args
        if given.context is not None and given.context < 1:
            raise InputError(f"--context is {given.context}, expected at least 1")
        check_task(str(as_directory(given.model)))
        how = Quantization(given.precision)
        request = Request(given.model, given.runtime, how, given.context, given.adapter)
        with forced(given.force):
            export_one(request, given.output, preflight=not given.no_preflight)


def check_task(base: str) -> None:
    """Check with Optimum's ``TasksManager`` that a checkpoint is for text generation.

    optimum 2.3 cannot infer a task from a local directory, so the task is inferred from the model
    class in ``config.json``, which works for any transformers model.

    Raises:
        InputError: Not a checkpoint, or not one of transformers' text-generation models.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    try:
        library = TasksManager.infer_library_from_model(base)
    except Exception as error:
        raise InputError(
            f"{base}: no checkpoint that Optimum knows ({one_line(error)}); expected a Hugging "
            "Face directory or hub name of a decoder"
        ) from error
    if library != _LIBRARY:
        raise InputError(f"{base}: a checkpoint of {library}, expected one of {_LIBRARY}")
    config = transformers.PreTrainedConfig.get_config_dict(base)[0]
    names = config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise InputError(
            f"{base}: config.json names the architecture {names[0] if names else None!r}, expected "
            "one of transformers, such as LlamaForCausalLM"
        )
    try:
        task = TasksManager.infer_task_from_model(found)
    except ValueError:
        task = "no known task"
    if task != _TASK:
        raise InputError(f"{base}: {names[0]} is for {task}, expected a model for {_TASK}")
