"""Build the ONNX runner into a directory that can be pushed to a device as it is.

Its ``manifest.json`` says the target, ONNX Runtime's version, every file's hash and the command to
start it, in which ``{runner}`` stands for the directory.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from caliport.android_harness.runners.onnx import NAME
from caliport.android_harness.toolchain.packages import fetch_packages
from caliport.core.directories import content_hash, key, up_to_date
from caliport.core.errors import InputError, one_line
from caliport.core.outputs import check_output, new_directory
from caliport.core.places import check_place, replacing
from caliport.core.processes import alone
from caliport.core.untrusted import check_regular

TARGETS = ("host", "x86_64", "aarch64", "android")
PROGRAM = "caliport-onnx"
CACHE = Path("build/runner")
"""Where what is fetched and compiled is kept; git ignores it."""
_SOURCES = Path(__file__).parents[1] / "onnx_runner"
_HEADERS = ("libonnxruntime-dev", "nlohmann-json3-dev")
_SUITE = "trixie"  # the first whose header knows adapters, ONNX Runtime's interface 20
_CROSS = "aarch64-linux-gnu-g++"
_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_ABI = "arm64-v8a"
_AAR = re.compile(r"onnxruntime-android-\w[\w.-]*\.aar")
_AAR_BYTES = 2**30
_AAR_FILES = 200


@dataclass(frozen=True)
class _Parts:
    """What a build stands on.

    Attributes:
        library: ``libonnxruntime.so`` of the target.
        include: Where ``onnxruntime_cxx_api.h`` lies.
        json: Where ``nlohmann/json.hpp`` lies.
        version: Of ONNX Runtime.
        settings: CMake's, beside these places.
        compiler: What brings the target's system libraries into the bundle; None leaves them to
            the device.
    """

    library: Path
    include: Path
    json: Path
    version: str
    settings: Mapping[str, str]
    compiler: str | None = None


def build_runner(
    target: str,
    out: Path,
    cache: Path = CACHE,
    ndk: Path | None = None,
    aar: Path | None = None,
) -> Path:
    """Compile the runner and lay what it needs beside it; skipped where ``out`` is up to date.

    Args:
        target: ``host``; ``x86_64`` or ``aarch64``, any Linux on such a processor, with its own
            loader and C library; or ``android``, with the NDK.
        out: The directory to make.
        cache: Where headers, wheels and compiled parts are kept.
        ndk: For ``android``: the NDK's directory.
        aar: For ``android``: the archive ``onnxruntime-android``.

    Raises:
        InputError: An unknown target, something missing that is needed, or the build fails.
    """
    if target not in TARGETS:
        raise InputError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    check_output(out, "runner", [path for path in (ndk, aar) if path is not None])
    with alone(cache, inside=True, wait=True):
        return _built(target, out, cache, ndk, aar)


def _built(target: str, out: Path, cache: Path, ndk: Path | None, aar: Path | None) -> Path:
    _check_cache(cache, target, aar)
    if target == "android":
        parts = _for_android(cache, ndk, aar)
    else:
        make = {"host": _for_host, "x86_64": _for_x86_64, "aarch64": _for_aarch64}
        parts = make[target](cache)
    inputs = {"sources": content_hash(_SOURCES), "onnxruntime": content_hash(parts.library)}
    settings = {"target": target, **parts.settings}
    if up_to_date(out, key("runner", inputs, settings)):
        return out
    program = _compile(parts, cache / target)
    with new_directory(out, "runner", inputs, settings) as (partial, extra):
        soname = _dynamic(parts.library, "SONAME")[0]
        shutil.copy2(program, partial / PROGRAM)
        shutil.copy2(parts.library, partial / soname)
        command = [f"{{runner}}/{PROGRAM}"]
        if parts.compiler is not None:
            loader = _add_system_libraries(partial, parts.compiler)
            command = [f"{{runner}}/{loader}", "--library-path", "{runner}", *command]
        extra |= {
            "target": target,
            "runtime": NAME,
            "runtime_version": parts.version,
            "command": command,
        }
    return out


def _check_cache(cache: Path, target: str, aar: Path | None) -> None:
    """Check that what a build would write into lies in directories that are new or its own."""
    check_place(cache / target, "a directory for what is compiled")
    made = {
        "headers": "usr/include",
        target: "CMake*",
        "wheels": "onnxruntime-*.whl",
        "onnxruntime-*-aarch64": "*libonnxruntime.so.*",
        **({} if aar is None else {glob.escape(aar.stem): "headers/onnxruntime_c_api.h"}),
    }
    for pattern, sign in made.items():
        for place in cache.glob(pattern):
            if not place.is_dir() or (any(place.iterdir()) and not any(place.glob(sign))):
                raise InputError(
                    f"{place}: was not made by caliport; name another --cache, or move it elsewhere"
                )


def _for_host(cache: Path) -> _Parts:
    version = metadata.version("onnxruntime")
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return _Parts(library, *_headers(cache), version, {})


def _for_x86_64(cache: Path) -> _Parts:
    if platform.machine() != "x86_64":
        raise InputError(f"x86_64: found {platform.machine()}, expected to be built on x86-64")
    return replace(_for_host(cache), compiler="g++")


def _for_aarch64(cache: Path) -> _Parts:
    if shutil.which(_CROSS) is None:
        raise InputError(f"{_CROSS}: not found; expected Debian's package g++-aarch64-linux-gnu")
    version = metadata.version("onnxruntime")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": _CROSS,
    }
    return _Parts(_wheel_library(version, cache), *_headers(cache), version, settings, _CROSS)


def _for_android(cache: Path, ndk: Path | None, aar: Path | None) -> _Parts:
    """Never run so far: neither the NDK nor the archive can be had from apt or PyPI."""
    toolchain = (ndk or Path()) / "build/cmake/android.toolchain.cmake"
    if ndk is None or not toolchain.is_file():
        raise InputError(f"{toolchain}: no such file; expected --ndk DIR, Android's NDK")
    if aar is None or not _AAR.fullmatch(aar.name):
        raise InputError(f"{aar}: expected --aar FILE, onnxruntime-android-VERSION.aar")
    unpacked = cache / aar.stem
    _unpack(aar, unpacked)
    settings = {
        "CMAKE_TOOLCHAIN_FILE": str(toolchain.resolve()),
        "ANDROID_ABI": _ABI,
        "ANDROID_PLATFORM": "android-24",
        "ANDROID_STL": "c++_static",
    }
    library = unpacked / "jni" / _ABI / "libonnxruntime.so"
    if not library.is_file():
        raise InputError(f"{aar}: no jni/{_ABI}/libonnxruntime.so; expected onnxruntime-android")
    version = aar.stem.rpartition("-")[2]
    return _Parts(library, unpacked / "headers", _headers(cache)[1], version, settings)


def _unpack(aar: Path, out: Path) -> None:
    """Unpack what a build needs of an archive, within bounds; nothing of it is a link.

    Raises:
        InputError: Not an archive of ONNX Runtime's, or a damaged one.
    """
    check_regular(aar, _AAR_BYTES)
    try:
        with zipfile.ZipFile(aar) as archive:
            needed = [
                entry
                for entry in archive.infolist()
                if re.fullmatch(rf"headers/[\w.]+|jni/{_ABI}/libonnxruntime\.so", entry.filename)
            ]
            size = sum(entry.file_size for entry in needed)
            if len(needed) > _AAR_FILES or size > _AAR_BYTES:
                raise InputError(
                    f"{aar}: {len(needed):,} headers and libraries of {size:,} bytes, expected at "
                    f"most {_AAR_FILES} of {_AAR_BYTES:,}"
                )
            archive.extractall(out, needed)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(
            f"{aar}: not a whole archive ({one_line(error)}); expected onnxruntime-android-*.aar"
        ) from None


def _headers(cache: Path) -> tuple[Path, Path]:
    """Directories of ONNX Runtime's and of nlohmann's header; an older interface is kept by ORT."""
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    root = fetch_packages(_HEADERS, _SUITE, architecture, cache / "headers")
    header = next(root.rglob("onnxruntime_cxx_api.h"), None)
    if header is None:
        raise InputError(f"{root}: no onnxruntime_cxx_api.h; remove it to fetch it again")
    return header.parent, root / "usr/include"


def _wheel_library(version: str, cache: Path) -> Path:
    """``libonnxruntime.so`` for aarch64, from the wheel of the installed version."""
    library = cache / f"onnxruntime-{version}-aarch64" / f"libonnxruntime.so.{version}"
    if not library.is_file():
        wheels = cache / "wheels"
        tags = [f"--platform={tag}" for tag in _WHEELS]
        _run(
            [
                *(sys.executable, "-P", "-m", "pip", "download", "--quiet"),
                *("--only-binary=:all:", "--no-deps", *tags),
                *(f"--dest={wheels}", f"onnxruntime=={version}"),
            ]
        )
        (wheel,) = wheels.glob(f"onnxruntime-{version}-*aarch64.whl")
        library.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, replacing(library) as beside:
            beside.write_bytes(archive.read(f"onnxruntime/capi/{library.name}"))
    return library


def _compile(parts: _Parts, place: Path) -> Path:
    """The stripped program; ``place`` keeps what was compiled."""
    settings = {
        "CMAKE_BUILD_TYPE": "MinSizeRel",
        "ORT_LIBRARY": str(parts.library.resolve()),
        "ORT_INCLUDE": str(parts.include.resolve()),
        "JSON_INCLUDE": str(parts.json.resolve()),
        **parts.settings,
    }
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    _run(["cmake", "-S", str(_SOURCES), "-B", str(place), *flags])
    _run(["cmake", "--build", str(place), "--parallel", "2"])
    return place / PROGRAM


def _add_system_libraries(bundle: Path, compiler: str) -> str:
    """Copy what the files of a bundle are linked to, and the loader; the loader's name."""
    headers = _run(["readelf", "--program-headers", "--wide", str(bundle / PROGRAM)])
    loader = re.search(r"program interpreter: (.+)]", headers)
    assert loader is not None
    left = [Path(loader[1]).name]
    left += [name for file in bundle.iterdir() for name in _dynamic(file, "NEEDED")]
    while left:
        name = left.pop()
        if not (bundle / name).exists():
            source = Path(_run([compiler, f"-print-file-name={name}"]).strip())
            if not source.is_absolute():
                raise InputError(f"{compiler}: has no {name}, which the runner needs")
            shutil.copy2(source.resolve(), bundle / name)
            left += _dynamic(bundle / name, "NEEDED")
    return Path(loader[1]).name


def _dynamic(file: Path, kind: str) -> list[str]:
    """Entries of a kind (``NEEDED``, ``SONAME``) in a library's or program's dynamic section."""
    told = _run(["readelf", "--dynamic", "--wide", str(file)])
    return re.findall(rf"\({kind}\).*\[(.+)]", told)


def _run(command: Sequence[str]) -> str:
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        raise InputError(
            f"{command[0]}: not found; expected Debian's packages cmake, make and g++"
        ) from None
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = [line for line in said if "error" in line.lower()]
        raise InputError(f"{command[0]}: {(wrong or said or ['failed'])[0][:300]}")
    return done.stdout
