"""Files of Debian packages, also of another suite or architecture: unpacked, never installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from caliport.core.errors import InputError

_SECONDS = 600.0


def fetch_packages(
    names: Sequence[str],
    suite: str,
    architecture: str,
    out: Path,
    dependencies: bool = False,
) -> Path:
    """Unpack packages from the archive that this machine's own apt uses; needs no root.

    apt runs with a configuration and a state of its own, so that nothing of the machine's changes.

    Args:
        names: Packages.
        suite: Such as ``trixie``.
        architecture: Such as ``arm64``.
        out: The directory to make; one that has files is taken as it is.
        dependencies: Whether to unpack what they depend on too.

    Returns:
        ``out``, a root with ``usr`` and so on in it.

    Raises:
        InputError: No apt of Debian's, or it cannot find or fetch a package.
    """
    if out.is_dir() and any(out.iterdir()):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    aside = partial / "apt"
    root = partial / "root"
    try:
        for folder in ("etc", "state/lists/partial", "cache/archives/partial"):
            (aside / folder).mkdir(parents=True)
        root.mkdir()
        (aside / "status").touch()
        source = f"deb {_archive()} {suite} main\n"
        (aside / "etc/sources.list").write_text(source, encoding="utf-8")
        apt = ["apt-get", "--quiet", "--yes", "--no-install-recommends"]
        for name, value in {
            "Dir::Etc": aside.resolve() / "etc",
            "Dir::Etc::trustedparts": "/etc/apt/trusted.gpg.d",
            "Dir::State": aside.resolve() / "state",
            "Dir::State::status": aside.resolve() / "status",
            "Dir::Cache": aside.resolve() / "cache",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",  # the usual one cannot write here
            "Acquire::Languages": "none",
        }.items():
            apt += ["--option", f"{name}={value}"]
        archives = aside / "cache/archives"
        _run([*apt, "update"], archives)
        verb = ["install", "--download-only"] if dependencies else ["download"]
        _run([*apt, *verb, *names], archives)
        for package in sorted(archives.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package.resolve()), str(root.resolve())], archives)
        root.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _archive() -> str:
    """Address of the archive from which this machine's own release comes."""
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line).get("VERSION_CODENAME", "")
    told = _run(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"], Path("/"))
    rows = (line.split() for line in told.splitlines())
    found = next((row[1] for row in rows if len(row) == 2 and row[0] == release.strip('"')), None)
    if found is None:
        raise InputError(f"apt's sources: none of {release or 'a release'}, expected Debian's")
    return found


def _run(command: Sequence[str], place: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found; expected Debian's apt and dpkg") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]}: no end after {_SECONDS:.0f} s") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("E:")]
        raise InputError(f"{command[0]}: {' '.join((errors or said or ['failed'])[-1].split())}")
    return done.stdout
