"""What every command refuses: an option twice, an empty argument, a value out of range."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from caliport.core.errors import InputError
from caliport.core.places import check_path
from caliport.core.untrusted import number, shown
from caliport.recipe import bounds

_LONGEST = 10_000  # characters of a text
_MOST = {
    "threads": bounds.THREADS,
    "core": bounds.THREADS,
    "context": bounds.TOKENS,
    "prompt_tokens": bounds.TOKENS,
    "new_tokens": bounds.TOKENS,
    "max_new_tokens": bounds.TOKENS,
    "seed": bounds.SEED,
    "learning_rate": bounds.RATE,
}
_HINTS = {"--adapter": "caliport calibrate composes several adapters into one"}


class Once(TyperCommand):
    """A command that refuses an option's second value, where click keeps the last one, and ``""``.

    An empty argument is a shell's variable that was never set; as a path it would mean ``.``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check, then parse as usual."""
        ours = args[: args.index("--")] if "--" in args else args
        if "" in ours:
            before = ours[: ours.index("")][-1:]
            where = before[0] if before and before[0].startswith("-") else "an argument"
            raise InputError(f"{where}: found nothing, expected a value")
        seen: set[str] = set()
        for option in self._given(args):
            name = str(option.name)
            if name in seen and not option.multiple:
                flag = option.opts[0]
                hint = _HINTS.get(flag)
                raise InputError(f"{flag}: found twice, expected once{f'; {hint}' if hint else ''}")
            seen.add(name)
        rest = super().parse_args(ctx, args)
        for known in self.params:
            value = ctx.params.get(str(known.name))
            for one in value if isinstance(value, list | tuple) else [value]:
                _check(known.opts[0], str(known.name), one)
        return rest

    def _given(self, args: list[str]) -> Iterator[TyperOption]:
        """The options among the arguments, in order; values of options are not looked at."""
        known: dict[str, Any] = {
            text: option
            for option in self.params
            if isinstance(option, TyperOption)
            for text in (*option.opts, *option.secondary_opts)
        }
        rest = iter(args)
        for text in rest:
            if text == "--":
                return
            name, given, _ = text.partition("=")
            if (option := known.get(name)) is None:
                continue
            yield option
            if not given and not option.is_flag:
                next(rest, None)


def _check(flag: str, name: str, value: object) -> None:
    """Check a value's size; a command checks what it means."""
    if isinstance(value, Path):
        check_path(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _MOST.get(name, bounds.COUNT)
        number(value, flag, -most, most, whole=True)
    elif isinstance(value, float):
        most = _MOST.get(name, bounds.SECONDS)
        number(value, flag, -most, most)
    elif isinstance(value, str) and (len(value) > _LONGEST or "\0" in value):
        raise InputError(f"{flag} is {shown(value)}, expected at most {_LONGEST:,} characters")


def take_options_once(app: typer.Typer) -> None:
    """Let all commands of an app, and of its groups, be ``Once``."""
    for command in app.registered_commands:
        command.cls = Once
    for group in app.registered_groups:
        if group.typer_instance is not None:
            take_options_once(group.typer_instance)
