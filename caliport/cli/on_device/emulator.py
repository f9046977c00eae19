"""The commands ``caliport emulator …``: create, start, stop, list and run Android emulators."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caliport.core.errors import InputError

if TYPE_CHECKING:
    from caliport.android_harness.emulator.emulator import Running
    from caliport.android_harness.emulator.sdk import Image

emulators = typer.Typer(
    help="Manage headless Android emulators with the SDK's tools.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Api = Annotated[str, typer.Option(help="Android API level.")]
Tag = Annotated[str, typer.Option(help="Kind of image: default, google_apis, aosp_atd, ….")]
Abi = Annotated[str | None, typer.Option(help="x86_64 or arm64-v8a; default the host's.")]
Name = Annotated[str | None, typer.Option(help="AVD name; default caliport-API-TAG-ABI.")]
Install = Annotated[
    bool, typer.Option("--install", help="Install missing SDK packages with sdkmanager.")
]
Port = Annotated[int | None, typer.Option(help="Console port; default first free from 5554.")]
Ram = Annotated[int, typer.Option(help="Memory in MiB.", min=1536, max=8192)]
Accel = Annotated[
    bool, typer.Option("--accel/--no-accel", help="Use KVM; many times slower without it.")
]
Timeout = Annotated[float, typer.Option(help="Maximum boot time in seconds.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.add_typer(emulators, name="emulator")


@emulators.command()
def create(
    api: Api = "34",
    abi: Abi = None,
    tag: Tag = "default",
    name: Name = None,
    install: Install = False,
) -> None:
    """Create an AVD, unless it exists."""
    _create(name, _image(api, tag, abi), install)


@emulators.command()
def start(
    api: Api = "34",
    abi: Abi = None,
    tag: Tag = "default",
    name: Name = None,
    port: Port = None,
    ram: Ram = 4096,
    accel: Accel = True,
    timeout: Timeout = 600,
) -> None:
    """Start an existing AVD with wiped data and wait until it has booted; it runs until stop."""
    avd = name or _name(_image(api, tag, abi))
    with _booted(avd, port=port, ram=ram, accelerated=accel, seconds=timeout, keep=True) as one:
        print(one.serial)


@emulators.command()
def stop(
    serials: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SERIAL|AVD]...", help="Default the only running one."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all running emulators.")] = False,
) -> None:
    """Stop emulators, and clean up after emulators that died."""
    from caliport.android_harness.emulator.emulator import running

    found = running()
    seen = ", ".join(one.serial for one in found) or "none"
    if not serials and not every and len(found) > 1:
        raise InputError(f"emulators: {seen} are running; name one, or use --all")
    for wanted in serials or ():
        if not any(wanted in (one.serial, one.avd) for one in found):
            raise InputError(f"emulator {wanted}: not running; found {seen}")
    for one in found:
        if not serials or one.serial in serials or one.avd in serials:
            one.stop()
            print(f"{one.serial}: stopped")


@emulators.command("list")
def show() -> None:
    """List the AVDs, and which of them are running."""
    from caliport.android_harness.emulator.emulator import avds, running
    from caliport.core.progress import PlainConsole
    from caliport.show.tables import table_of

    runs = {one.avd: one for one in running()}
    table = table_of("AVDs", ("name", "image", "runs as", "MiB", "until"))
    for name, image in avds().items():
        one = runs.get(name)
        cells = ("-", "", "") if one is None else (one.serial, str(one.ram), _until(one))
        table.add_row(name, image.package, *cells)
    PlainConsole().print(table)


@emulators.command()
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    api: Api = "34",
    abi: Abi = None,
    tag: Tag = "default",
    name: Name = None,
    install: Install = False,
    port: Port = None,
    ram: Ram = 4096,
    accel: Accel = True,
    timeout: Timeout = 600,
) -> None:
    """Create an AVD if needed, start it, run a command with ANDROID_SERIAL set, and stop it.

    The exit code is the command's.
    """
    import os
    import subprocess

    avd = _create(name, _image(api, tag, abi), install)
    with _booted(avd, port=port, ram=ram, accelerated=accel, seconds=timeout) as one:
        try:
            environment = {**os.environ, "ANDROID_SERIAL": one.serial}
            code = subprocess.run(command, env=environment, check=False).returncode
        except OSError as error:
            raise InputError(f"{command[0]}: {error.strerror}; expected a command") from None
    raise typer.Exit(code if code >= 0 else 128 - code)


def _image(api: str, tag: str, abi: str | None) -> Image:
    from caliport.android_harness.emulator.emulator import native_abi
    from caliport.android_harness.emulator.sdk import Image

    return Image(api, tag, abi or native_abi())


def _name(image: Image) -> str:
    return f"caliport-{image.api}-{image.tag}-{image.abi}"


def _create(name: str | None, image: Image, install: bool) -> str:
    """Create an AVD unless it exists; return its name."""
    from caliport.android_harness.emulator.emulator import create

    name = name or _name(image)
    made = create(name, image, install=install)
    _say(f"AVD {name}: {'made' if made else 'up to date'}, {image.package}")
    return name


@contextmanager
def _booted(avd: str, **how: Any) -> Iterator[Running]:
    """``booted`` with progress messages, and with an orderly exit on SIGTERM."""
    from caliport.android_harness.emulator.emulator import booted

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    _say(f"AVD {avd}: starting")
    with booted(avd, **how) as one:
        _say(f"{one.serial}: booted in {time.monotonic() - began:.0f} s, {one.ram} MiB")
        yield one


def _until(one: Running) -> str:
    return "stopped" if one.owner is None else f"process {one.owner.pid} ends"


def _say(line: str) -> None:
    """Print to standard error: standard output belongs to the command."""
    print(line, file=sys.stderr)
