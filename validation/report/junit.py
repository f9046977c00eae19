"""Gates as JUnit XML, the format in which every CI shows tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from caliport.core.places import write_text
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.reports import ArtifactResult

# Characters that XML 1.0 forbids even escaped (XML 1.0, section 2.2).
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(artifacts: Sequence[ArtifactResult | DeviceResult], path: Path) -> None:
    """Write one test suite an artifact and one test case a gate; a failed gate is a failure."""
    root = ElementTree.Element("testsuites", name="caliport")
    for artifact in artifacts:
        failures = sum(not gate.passed for gate in artifact.gates)
        name = f"{artifact.composition} {artifact.runtime} {artifact.form}"
        if isinstance(artifact, DeviceResult):
            name += f" on {artifact.device.shown}"
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_clean(name),
            tests=str(len(artifact.gates)),
            failures=str(failures),
            errors="0",
            time=f"{artifact.seconds:.3f}",
        )
        for gate in artifact.gates:
            case = ElementTree.SubElement(
                suite, "testcase", classname=_clean(artifact.path), name=_clean(gate.name)
            )
            if not gate.passed:
                message = _clean(f"lost at {gate.stage}: {gate.reason}")
                failure = ElementTree.SubElement(
                    case, "failure", message=message, type=_clean(gate.stage)
                )
                found = f"{gate.measure}: limit {gate.limit:g}, found {gate.found}"
                failure.text = _clean(found)
            elif not gate.decided:
                ElementTree.SubElement(case, "system-out").text = _clean(gate.reason)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode("utf-8")
    write_text(path, text)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
