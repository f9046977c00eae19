"""``caliport doctor``: check installed packages, memory, disk and what can be imported."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from caliport.core.progress import PlainConsole
from caliport.core.untrusted import shown
from caliport.export.runtime import get, names

_SMALL_MEMORY = 4e9
_SMALL_DISK = 5e9


def abilities() -> dict[str, tuple[str, ...]]:
    """Modules that each ability imports; an installed package can still fail to load."""
    runtimes = [get(name) for name in names()]
    return {
        "train and calibrate": ("torch", "transformers", "peft"),
        "quantize": ("torchao",),
        **{f"export and run {Path(each.program).suffix}": each.modules for each in runtimes},
        "reports": ("jinja2", "matplotlib", "rouge_score", "sacrebleu"),
    }


def examine() -> bool:
    """Print versions, cores, memory and abilities; return whether everything would work."""
    import psutil

    from caliport.validation.records.reports import this_machine
    from caliport.validation.report.plots.drawing import without_settings

    console = PlainConsole()
    versions = Table("package", "installed", "wanted", "", title="Packages", title_justify="left")
    problems = []
    for requirement in _requirements():
        found = _installed(requirement.name)
        right = found is not None and requirement.specifier.contains(found, prereleases=True)
        versions.add_row(
            requirement.name,
            found or "-",
            str(requirement.specifier),
            "ok" if right else Text("untested version", "red"),
        )
        if not right:
            problems.append(
                f"{requirement.name} is {found or 'missing'}, wanted {requirement.specifier}"
            )
    console.print(versions)

    cores = this_machine().cores
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    console.print(
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; "
        f"{cores} usable cores ({psutil.cpu_count(logical=False)} physical); "
        f"memory {memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free; "
        f"disk here {disk.free / 1e9:.1f} GB free"
    )
    telemetry = os.environ.get("ORT_DISABLE_TELEMETRY", "")
    said = "off" if telemetry == "1" else f"as ORT_DISABLE_TELEMETRY={shown(telemetry)} says"
    console.print(f"ONNX Runtime's usage events: {said}", markup=False)
    if memory.available < _SMALL_MEMORY:
        problems.append(f"only {memory.available / 1e9:.1f} GB of memory free; demo needs about 4")
    if disk.free < _SMALL_DISK:
        problems.append(f"only {disk.free / 1e9:.1f} GB of disk free here")
    table = Table("ability", "", title="Abilities", title_justify="left")
    for ability, modules in abilities().items():
        with without_settings():
            reason = _import_problem(modules)
        table.add_row(ability, Text(reason, "red") if reason else "ok")
        if reason:
            problems.append(f"{ability}: {reason}")
    console.print(table)
    for problem in problems:
        console.print(Text.assemble(("would not work:", "red"), f" {problem}"))
    if not problems:
        console.print("everything would work")
    return not problems


def _requirements() -> list[Requirement]:
    """Requirements that the installed package declares, without extras."""
    try:
        declared = metadata.requires("caliport") or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in declared]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_problem(modules: tuple[str, ...]) -> str | None:
    """Why one of the modules does not import, or None."""
    from caliport.core.patching import quiet

    for module in modules:
        try:
            with quiet():
                importlib.import_module(module)
        except Exception as error:
            return f"{module} does not load: {type(error).__name__}: {error}"
    return None
