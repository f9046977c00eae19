"""``optimum-cli export caliport``: the export stage as a command of Hugging Face Optimum.

Optimum's ``TasksManager`` determines the library and task of a checkpoint; the export itself is
``caliport export``. Heavy libraries are imported only when the command runs, since ``optimum-cli``
imports this file at every start.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from caliport.core.errors import InputError, one_line
from caliport.core.model_files.gguf_base import as_directory

if TYPE_CHECKING:
    from typer.core import TyperOption

_LIBRARY = "transformers"
_TASK = "text-generation"
_LEFT_OUT = ("base", "out", "overrides", "runs", "into", "help")
"""Options of ``caliport export`` that are ``--model`` and ``OUT`` here, or go with a recipe or a
finished bundle."""


class CaliportExportCommand(BaseOptimumCLICommand):
    """``optimum-cli export caliport --model BASE --runtime RUNTIME OUT``."""

    COMMAND = CommandInfo(
        name="caliport",
        help="Export a decoder, with a LoRA adapter folded in, to ExecuTorch or ONNX.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags of ``caliport export``, but those that name its input and output."""
        parser.add_argument(
            "-m", "--model", required=True, help="Hugging Face directory, .gguf file or hub name."
        )
        for option in _options():
            more: dict[str, Any] = {"action": "store_true"}
            if not option.is_flag:  # caliport export itself refuses what is given twice
                more = {"action": "append", "metavar": option.metavar or str(option.name).upper()}
                more["required"] = option.name == "runtime"
            help_ = str(option.help).replace("%", "%%")
            parser.add_argument(_flag(option), dest=option.name, help=help_, **more)
        parser.add_argument("output", help="The directory to write.")

    def run(self) -> None:
        """Export; as with ``caliport export``, invalid input ends in one line and exit code 2."""
        from caliport.cli.main import guarded

        code = guarded(self._export, "optimum-cli export caliport --help", debug=False)
        if code:
            sys.exit(code)

    def _export(self) -> object:
        from caliport.cli.app import app

        given = self.args
        words = ["export", f"--base={given.model}", f"--out={given.output}"]
        for option in _options():
            value = getattr(given, str(option.name))
            if option.is_flag:
                words += [_flag(option)] * value
            else:
                words += [f"{_flag(option)}={each}" for each in value or ()]
        check_task(str(as_directory(given.model)))
        return app(words, standalone_mode=False)


def _options() -> Iterator[TyperOption]:
    """The options of ``caliport export`` that make sense for one base and one output."""
    import typer
    from typer.core import TyperOption

    from caliport.cli.app import app

    group = typer.main.get_command(app)
    for option in group.commands["export"].params:  # type: ignore[attr-defined]
        if isinstance(option, TyperOption) and option.name not in _LEFT_OUT:
            yield option


def _flag(option: TyperOption) -> str:
    """What changes an option from its default, such as ``--no-preflight``."""
    return (option.secondary_opts or option.opts)[0]


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
