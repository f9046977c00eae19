"""``make fuzz``: thousands of cases, in several processes. ``KIND:NUMBER`` tries one of them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fuzz.cases import MAKES
from tests.fuzz.table import TABLE
from tests.fuzz.trying import forget, ready, trial

BUILD = Path("build/fuzz")


def _one(name: str) -> tuple[str, str, list[str], str | None, float]:
    found = trial(name, BUILD / "seeds")
    return name, found.asked.what, list(found.asked.arguments), found.bad, found.ended.seconds


def main() -> int:
    """Try cases; exit code 1 if any ended badly."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="KIND:NUMBER", help="cases to try, or kinds")
    parser.add_argument("--cases", type=int, default=3000, help="number of them")
    parser.add_argument("--seed", type=int, default=0, help="first number of each kind")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    named = [name for name in given.names if ":" in name]
    kinds = [name for name in given.names if ":" not in name and name != "table"]
    kinds = kinds or ([] if given.names else list(MAKES))
    each = -(-given.cases // max(1, len(kinds)))
    names = named + [f"{kind}:{given.seed + n}" for n in range(each) for kind in kinds]
    if not given.names or "table" in given.names:
        names += [f"table:{number}" for number in range(len(TABLE))]
    ready(BUILD / "seeds")
    forget()  # each process has a server of its own
    if len(names) == 1:
        return _show(names[0])
    start, tried, bad = time.monotonic(), Counter[str](), []
    slowest: list[tuple[float, str]] = []
    with ProcessPoolExecutor(given.processes) as pool:
        for count, (name, what, arguments, reason, seconds) in enumerate(pool.map(_one, names), 1):
            tried[name.partition(":")[0]] += 1
            slowest = sorted([*slowest, (seconds, name)])[-5:]
            if reason is not None:
                bad.append({"case": name, "bad": reason, "what": what, "arguments": arguments})
                print(f"{name}: {reason}\n    {what}\n    {' '.join(arguments)[:200]}", flush=True)
            if count % 200 == 0:
                spent = time.monotonic() - start
                print(f"{count} of {len(names)}, {len(bad)} bad, {spent:.0f} s", flush=True)
    by_kind = Counter(str(one["case"]).partition(":")[0] for one in bad)
    for kind, count in tried.items():
        print(f"{kind:10} {count:6} cases {by_kind[kind]:6} bad")
    print("slowest:", ", ".join(f"{name} {seconds:.0f} s" for seconds, name in slowest))
    (BUILD / "bad.json").write_text(json.dumps(bad, indent=1))
    return 1 if bad else 0


def _show(name: str) -> int:
    """Try one case and keep its directory."""
    kept = Path(tempfile.gettempdir(), "caliport-fuzz")
    shutil.rmtree(kept, ignore_errors=True)
    found = trial(name, BUILD / "seeds", kept)
    print(
        f"{found.asked.what}\nin {kept / 'up/up/work'}: caliport {' '.join(found.asked.arguments)}"
    )
    print(found.ended.out[-3000:] + found.ended.errors[-5000:])
    print(f"exit {found.ended.code}, {found.ended.seconds:.1f} s, {found.ended.peak / 1e9:.1f} GB")
    print(found.bad or "as promised")
    return 1 if found.bad else 0


if __name__ == "__main__":
    sys.exit(main())
