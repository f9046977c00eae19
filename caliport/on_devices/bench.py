"""``caliport bench --device``: times and memory on devices, and a baseline of a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from caliport.core.errors import InputError
from caliport.core.progress import console, progress
from caliport.on_devices.where import chosen, runner_for
from caliport.run.bench import noise_of, parts_of

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.latency import Course
    from caliport.validation.latency.measure import Subject
    from caliport.validation.records.latency import LatencyReport


def bench_on(
    artifacts: Sequence[Path],
    wanted: Sequence[str],
    runners: Sequence[Path],
    llama_main: Path | None,
    numbers: Mapping[str, Any],
    out: Path | None,
    baseline: Path | None,
) -> bool:
    """Measure artifacts on devices, all devices at once, and show them.

    Args:
        artifacts: Their directories; of a bundle its base and every composition are measured.
        wanted: The devices.
        runners: What ``caliport runner build`` made; none for those in ``build``.
        llama_main: ExecuTorch's own runner; None for ``build/llama_main``.
        numbers: Fields of ``caliport.android_harness.latency.Course``.
        out: Where to write ``latency.json`` and the report, of several devices in a directory of
            each; None for nowhere.
        baseline: A stored baseline of the device to hold memory and speed to.

    Returns:
        Whether nothing is worse than the baseline.

    Raises:
        InputError: A device, artifact or baseline that cannot be used; what other devices measured
            is shown and written first.
    """
    from caliport.android_harness.latency import Course
    from caliport.show.tables import show_device_latency
    from caliport.validation.records.reports import LATENCY, write_result
    from caliport.validation.report.page import write_report

    course = Course(**numbers)
    subjects = [subject for path in artifacts for subject in parts_of(path, path.name)]
    devices = chosen(wanted)
    passed, troubles = True, []

    def one(device: Device) -> LatencyReport | InputError:
        try:
            return _measured(device, subjects, runners, llama_main, course, len(devices) == 1)
        except InputError as error:
            return error

    with ThreadPoolExecutor(len(devices)) as pool:
        found = dict(zip(devices, pool.map(one, devices), strict=True))
    for device, report in found.items():
        if isinstance(report, InputError):
            troubles.append(report)
            continue
        show_device_latency(report)
        for line in dict.fromkeys(noise_of(report)):
            console.print(Text(f"latency: {line}", "yellow"))
        if out is not None:
            place = out if len(devices) == 1 else out / device.serial.replace(":", "-")
            write_result(report, place / LATENCY)
            print(f"report: {write_report(place)}")
        if baseline is not None:
            passed = _held(report, baseline) and passed
    if troubles:
        raise troubles[0]
    return passed


def _measured(
    device: Device,
    subjects: Sequence[Subject],
    runners: Sequence[Path],
    llama_main: Path | None,
    course: Course,
    shown: bool,
) -> LatencyReport:
    """Measure on one device, with a bar on the terminal if it is to be ``shown``."""
    from caliport.android_harness.device.facts import facts
    from caliport.android_harness.device.session import session
    from caliport.android_harness.latency import measure
    from caliport.validation.artifact import artifact_form

    found = facts(device)
    pairs = [
        (subject, runner_for(found, artifact_form(subject.directory)[0], runners, llama_main))
        for subject in subjects
    ]
    with session(device) as held:
        if not shown:
            return measure(held, pairs, course)
        with progress(f"latency on {device.serial}", len(pairs) * course.rounds) as advance:
            return measure(held, pairs, course, advance)


def _held(report: LatencyReport, place: Path) -> bool:
    """Hold memory and speed to the device's baseline, and say what was found."""
    from caliport.validation.baseline.baseline import read_baseline
    from caliport.validation.baseline.regression import hold_times

    file, baseline = read_baseline(place, report.machine)
    verdicts, notes = hold_times(report, baseline)
    for note in notes:
        console.print(Text(f"{file}: {note}", "yellow"))
    for name, gates in verdicts.items():
        for gate in gates:
            style = "green" if gate.passed else "red"
            verdict = ("pass" if gate.decided else "undecided") if gate.passed else "FAIL"
            console.print(
                Text.assemble(f"{name}: {gate.name}: ", (verdict, style), f": {gate.reason}")
            )
    return all(gate.passed for gates in verdicts.values() for gate in gates)
