"""Devices named on the command line, and what runs artifacts on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.directories import MANIFEST
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.device.facts import Facts
    from caliport.android_harness.parity import HostReference
    from caliport.android_harness.runners.kinds import JobRunner
    from caliport.validation.evaluation.evaluation import Answers
    from caliport.validation.records.device import DeviceResult

    DeviceAnswers = tuple[DeviceResult, Answers | None]

SECONDS = 3600.0
"""The longest that an artifact may take where nothing else is said."""
_ANY = "any"
_BUILT = ("android", "aarch64", "x86_64", "host")


@dataclass(frozen=True)
class Where:
    """Devices and what runs artifacts on them.

    Attributes:
        devices: At least one; they work at once.
        runners: Directories that ``caliport runner build`` made; none for those in ``build``.
        llama_main: ExecuTorch's own runner, for devices that have no other for ``.pte``.
        seconds: The longest that an artifact may take.
    """

    devices: tuple[Device, ...]
    runners: Sequence[Path] = ()
    llama_main: Path | None = None
    seconds: float = SECONDS

    @property
    def shown(self) -> str:
        """The devices' names."""
        return ", ".join(device.serial for device in self.devices)

    def check(self, host: HostReference) -> tuple[list[DeviceAnswers], list[InputError]]:
        """Compare an artifact on every device with itself here.

        Returns:
            The verdict of each device with its answers, and why others gave none.
        """
        from caliport.android_harness.device.facts import facts
        from caliport.android_harness.parity import check, job_of, same_processor
        from caliport.android_harness.run import run_all

        job = job_of(host)
        runners: dict[Device, JobRunner] = {}
        found: list[DeviceAnswers] = []
        troubles = []
        for device in self.devices:
            try:
                runner = runner_for(facts(device), job.runtime, self.runners, self.llama_main)
                if isinstance(runner, Path):
                    found.append((self._texts(device, host, runner), None))
                else:
                    runners[device] = runner
            except InputError as error:
                troubles.append(error)
        answers = run_all(dict.fromkeys(runners, job), host.artifact, runners, self.seconds)
        for device, ran in answers.items():
            try:
                if isinstance(ran, InputError):
                    raise ran
                found.append(check(host, ran, same_processor(device)))
            except InputError as error:
                troubles.append(error)
        return found, troubles

    def _texts(self, device: Device, host: HostReference, program: Path) -> DeviceResult:
        from caliport.android_harness.device.session import session
        from caliport.android_harness.texts import check_texts

        with session(device) as held:
            return check_texts(held, host, program, self.seconds)


def chosen(wanted: Sequence[str]) -> list[Device]:
    """The devices of serials or requirements, each once; of none the only one there is.

    Raises:
        InputError: One that is not there, or several and none was chosen.
    """
    from caliport.android_harness.device.adb import NO_DEVICE, Device
    from caliport.android_harness.device.facts import all_facts, choose

    found = []
    for word in wanted or (None,):
        if word == _ANY:
            usable, troubles = all_facts()
            if not usable:
                raise InputError(troubles[0] if troubles else NO_DEVICE)
            found.append(Device(usable[0].serial))
        else:
            found.append(choose(word))
    return list(dict.fromkeys(found))


def runner_for(
    facts: Facts, runtime: str, runners: Sequence[Path] = (), llama_main: Path | None = None
) -> JobRunner | Path:
    """What runs artifacts of a runtime on a device; a path is that of ``llama_main``.

    Args:
        facts: The device.
        runtime: The artifacts'.
        runners: Directories to choose from; none for those in ``build``.
        llama_main: ExecuTorch's own runner, which is used where no other fits; None for
            ``build/llama_main``, if that is there.

    Raises:
        InputError: None of them fits the device, or one is no runner.
    """
    from caliport.android_harness.device.facts import check_abi
    from caliport.android_harness.runners import by_runtime
    from caliport.android_harness.runners.kinds import read_runner

    there = runners or [p for p in map(Path("build").joinpath, _BUILT) if (p / MANIFEST).is_file()]
    for directory in there:
        runner = read_runner(directory)
        with suppress(InputError):
            check_abi(facts, sorted(path for path in directory.iterdir() if path.is_file()))
            if runner.runtime == runtime:
                return runner
    return by_runtime.get(runtime).default_runner(facts, llama_main)
