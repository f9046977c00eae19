"""Android's SDK: where it is, what of it is missing, and its tools."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

from caliport.core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KVM = Path("/dev/kvm")
_SECONDS = 300.0  # for a tool, which may have to start Java


def check_name(what: str, name: str) -> None:
    """Check that a name is one that paths and command lines take as it is.

    Raises:
        InputError: It is not.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{what} {name!r}: expected letters, digits, _, . and -, without . or - in front"
        )


@dataclass(frozen=True)
class Image:
    """A system image. None of its parts may hold anything else than a name does.

    Attributes:
        api: Android's API level, such as ``34``.
        tag: What is in it, such as ``default`` or ``google_apis``.
        abi: ``x86_64`` or ``arm64-v8a``.
    """

    api: str
    tag: str
    abi: str

    def __post_init__(self) -> None:
        for field in fields(self):
            check_name(field.name, getattr(self, field.name))

    @property
    def package(self) -> str:
        """What ``sdkmanager`` calls it."""
        return f"system-images;android-{self.api};{self.tag};{self.abi}"


@dataclass(frozen=True)
class Sdk:
    """An SDK that has all that an emulator needs; made by ``find_sdk``.

    Attributes:
        root: Its directory.
        avds: Where its tools keep AVDs.
    """

    root: Path
    avds: Path

    @property
    def emulator(self) -> str:
        """The emulator."""
        return str(self.root / "emulator/emulator")

    def environment(self) -> dict[str, str]:
        """The variables that its tools are started with."""
        root = str(self.root)
        places = {"ANDROID_HOME": root, "ANDROID_SDK_ROOT": root}
        return {**os.environ, **places, "ANDROID_AVD_HOME": str(self.avds)}

    def ask(self, *command: str, answers: str = "") -> tuple[int, str]:
        """A tool's exit code, and the last sentence that it said.

        Raises:
            InputError: It does not end.
        """
        try:
            done = subprocess.run(
                command,
                input=answers,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=self.environment(),
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{command[0]}: no end within {_SECONDS:.0f} s") from None
        lines = [line.strip() for line in re.split(r"[\r\n]+", done.stdout)]
        said = [line for line in lines if " " in line] or [f"exit code {done.returncode}"]
        return done.returncode, said[-1][:300]

    def tool(self, name: str) -> str:
        """One of its command-line tools.

        Raises:
            InputError: It is not there.
        """
        versions = sorted(self.root.glob(f"cmdline-tools/*/bin/{name}"))  # "latest" comes last
        found = str(versions[-1]) if versions else shutil.which(name)
        if found is None:
            raise InputError(
                f"{name}: neither in {self.root} nor on PATH; unpack the SDK's command-line tools "
                f"to {self.root}/cmdline-tools/latest"
            )
        return found

    def missing(self, image: Image) -> list[str]:
        """Packages that are not there and that an emulator of an image needs."""
        places = {
            "emulator": "emulator/emulator",
            "platform-tools": "platform-tools",  # or the emulator takes no directory for an SDK
            image.package: image.package.replace(";", "/"),
        }
        return [name for name, place in places.items() if not (self.root / place).exists()]

    def check_acceleration(self) -> None:
        """Check that the emulator can use the processor's virtualization.

        Raises:
            InputError: It cannot.
        """
        code, said = self.ask(self.emulator, "-accel-check")
        if code == 0:
            return
        if platform.system() == "Linux" and not _KVM.exists():
            said = (
                f"no {_KVM}; turn virtualization on in the firmware (in a virtual machine: nested "
                "virtualization) and load kvm_intel or kvm_amd"
            )
        elif platform.system() == "Linux" and not os.access(_KVM, os.R_OK | os.W_OK):
            said = (
                f"{_KVM} is not this user's to open; sudo usermod -aG kvm $USER (or the group it "
                "has) and log in anew"
            )
        raise InputError(f"acceleration: {said}; --no-accel goes on without, many times slower")


def find_sdk(image: Image, avds: Path, *, install: bool = False) -> Sdk:
    """The SDK, with all that an emulator of an image needs.

    Args:
        image: The image.
        avds: Where AVDs are kept.
        install: Let ``sdkmanager`` install what is missing; it may ask to accept licences.

    Raises:
        InputError: There is none, or parts of it are missing; it says what to install.
    """
    root = _root()
    if root is None:
        wanted = _quoted(["emulator", "platform-tools", image.package])
        raise InputError(
            "Android SDK: none by ANDROID_HOME, ANDROID_SDK_ROOT or PATH; unpack its command-line "
            f"tools to DIR/cmdline-tools/latest, set ANDROID_HOME=DIR, then: sdkmanager {wanted}"
        )
    sdk = Sdk(root, avds)
    missing = sdk.missing(image)
    if missing and install:
        command = [sdk.tool("sdkmanager"), f"--sdk_root={root}", *missing]
        subprocess.run(command, stdout=2, env=sdk.environment(), check=False)
        missing = sdk.missing(image)
    if missing:
        raise InputError(f"Android SDK {root}: incomplete; run: sdkmanager {_quoted(missing)}")
    return sdk


def _quoted(packages: list[str]) -> str:
    return " ".join(f'"{name}"' for name in packages)  # a shell takes ; for an end


def _root() -> Path | None:
    for variable in ("ANDROID_HOME", "ANDROID_SDK_ROOT"):
        place = os.environ.get(variable)
        if place and Path(place).is_dir():
            return Path(place).resolve()
    for name in ("emulator", "avdmanager", "sdkmanager"):
        found = shutil.which(name)
        for parent in Path(found).resolve().parents if found else ():
            if (parent / "emulator").is_dir() or (parent / "cmdline-tools").is_dir():
                return parent
    return None
