"""``caliport bench --device``: times and memory on devices, and a baseline of a device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from caliport.core.errors import InputError
from caliport.core.progress import console, progress
from caliport.export.artifact import Artifact
from caliport.on_devices.where import Where, runner_for
from caliport.run.bench import candidates_of, noise_of

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.setup import DeviceSetup
    from caliport.validation.latency.workload import Candidate, Workload
    from caliport.validation.records.latency import LatencyReport


def bench_on(
    artifacts: Sequence[Path],
    where: Where,
    workload: Workload,
    setup: DeviceSetup,
    out: Path | None,
    baseline: Path | None,
) -> bool:
    """Measure artifacts on devices, all devices at once, and show the results.

    Args:
        artifacts: Their directories; of a bundle its base and every composition are measured.
        where: The devices and what runs artifacts on them.
        workload: What each artifact does.
        setup: What turns on a device are like.
        out: Where to write ``latency.json`` and the report, of several devices in a directory of
            each; None for nowhere.
        baseline: A stored baseline of the device to compare memory and speed with.

    Returns:
        Whether nothing is worse than the baseline.

    Raises:
        InputError: A device, artifact or baseline that cannot be used; what other devices measured
            is shown and written first.
    """
    from caliport.show.tables import show_device_latency
    from caliport.validation.records.reports import LATENCY, check_reports, write_result
    from caliport.validation.report.page import write_report

    devices = where.devices
    places = {
        device: None if out is None else out / _folder(device) if len(devices) > 1 else out
        for device in devices
    }
    for place in filter(None, places.values()):
        check_reports(place)
    candidates = [c for path in artifacts for c in candidates_of(Artifact.read(path), path.name)]
    passed, troubles = True, []

    def one(device: Device) -> LatencyReport | InputError:
        try:
            return _measured(device, candidates, where, workload, setup)
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
        if (there := places[device]) is not None:
            write_result(report, there / LATENCY)
            print(f"report: {write_report(there)}")
        if baseline is not None:
            passed = _compared(report, baseline) and passed
    if troubles:
        raise troubles[0]
    return passed


def _folder(device: Device) -> str:
    """The name of a device's directory; its serial is the device's own word."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", device.serial).lstrip(".")[:100] or "device"


def _measured(
    device: Device,
    candidates: Sequence[Candidate],
    where: Where,
    workload: Workload,
    setup: DeviceSetup,
) -> LatencyReport:
    """Measure on one device; with a bar on the terminal if it is the only one."""
    from caliport.android_harness.device.facts import facts
    from caliport.android_harness.device.session import session
    from caliport.android_harness.latency import measure

    found = facts(device)
    pairs = [
        (c, runner_for(found, c.artifact.runtime, where.runners, where.llama_main))
        for c in candidates
    ]
    with session(device) as held:
        if len(where.devices) > 1:
            return measure(held, pairs, workload, setup)
        turns = len(pairs) * workload.repetitions
        with progress(f"latency on {device.serial}", turns) as advance:
            return measure(held, pairs, workload, setup, advance)


def _compared(report: LatencyReport, place: Path) -> bool:
    """Compare memory and speed with the device's baseline, and print the verdicts."""
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
