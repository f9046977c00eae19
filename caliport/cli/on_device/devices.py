"""The command ``devices``: what adb sees, and which artifacts fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from caliport.android_harness.device.facts import Facts
    from caliport.export.artifact import Artifact


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(devices)


def devices(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ARTIFACT...]", help="Artifacts to check: would they run?"),
    ] = None,
    connect: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Connect to it over the network first; repeatable."),
    ] = None,
) -> None:
    """List the devices that adb sees, their state, and which artifacts would run on them."""
    from caliport.android_harness.device import adb
    from caliport.android_harness.device.facts import all_facts
    from caliport.core.errors import InputError
    from caliport.export.artifact import Artifact

    for address in connect or ():
        adb.connect(address)
    found, troubles = all_facts()
    if not found:
        raise InputError(troubles[0] if troubles else adb.NO_DEVICE)
    _show(found)
    for trouble in troubles:
        print(trouble)
    for artifact in artifacts or ():
        _show_fit(found, Artifact.read(artifact))


def _show(found: Sequence[Facts]) -> None:
    from caliport.core.progress import PlainConsole
    from caliport.show.tables import table_of

    heads = ("device", "", "model", "Android", "ABI", "cores", "features")
    table = table_of("devices", heads)
    room = table_of(
        "their state", ("device", "memory", "free", "space", "battery", "°C", "thermal")
    )
    for facts in found:
        table.add_row(
            facts.serial,
            facts.kind,
            facts.model,
            facts.android or "-",
            facts.abi,
            str(facts.cores),
            " ".join(facts.features) or "-",
        )
        room.add_row(
            facts.serial,
            *(f"{n / 1e9:.1f} GB" for n in (facts.memory, facts.free_memory, facts.free_space)),
            "-" if facts.battery is None else f"{facts.battery:.0%}",
            "-" if facts.celsius is None else f"{facts.celsius:.1f}",
            "-" if facts.thermal is None else str(facts.thermal),
        )
    console = PlainConsole()
    console.print(table)
    console.print(room)


def _show_fit(found: Sequence[Facts], artifact: Artifact) -> None:
    from caliport.android_harness.device.facts import obstacles

    for facts in found:
        reasons = obstacles(facts, artifact)
        print(f"{artifact.directory} on {facts.serial}: {'; '.join(reasons) or 'would run'}")
