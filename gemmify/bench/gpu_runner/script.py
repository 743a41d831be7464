"""Measures the bundle's layers and networks on the GPU of this machine.

    python3 run.py --json result.json [--minutes 8] [--sections check,layer] [--only PATTERN] [--seed N]

Needs Python 3.10, numpy and a driver; PyTorch for the comparison. The result is written after every step: what is
stopped keeps what it has. Bring the file back and run `gemmify bench --import result.json`.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import random
import sys
import tempfile
import time
from typing import Any, NoReturn

from .parent import Entry, Refused, Section
from .timing import median

BUNDLE_FORMAT = "gemmify-gpu-bundle/1"
RESULTS_FORMAT = "gemmify-gpu-results/1"
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARES = {"peak": 0.06, "check": 0.26, "network": 0.30, "layer": 0.38}
"""Of the minutes, what each section may take, in this order; what one leaves over goes to those behind it."""
LIMITS = {"peak": 60.0, "check": 60.0, "network": 150.0, "layer": 90.0}
"""Seconds that one entry may take."""
FULL_MINUTES = 8.0


def fail(text: str) -> NoReturn:
    """End with exit code 2 and a sentence."""
    print("error: " + text, file=sys.stderr)
    raise SystemExit(2)


class Run:
    """A run of a bundle: what is known so far, written to the file after every step."""

    def __init__(self, folder: str, bundle: dict[str, Any], path: str, seed: int, minutes: float) -> None:
        self.folder, self.bundle, self.path, self.seed = folder, bundle, path, seed
        self.minutes, self.begin = minutes, time.monotonic()
        self.results: dict[str, Any] = {
            "format": RESULTS_FORMAT,
            "bundle": {key: bundle[key] for key in bundle if key not in ("entries", "format")},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seed": seed,
            "minutes": minutes,
            "machine": {},
            "entries": [],
            "not_run": [],
            "seconds": {},
        }

    def section(self, name: str, entries: list[Entry], share: float) -> None:
        """Run the entries of one section within its share of what is left."""
        begin = time.monotonic()
        end = begin + share * (60 * self.minutes - (begin - self.begin))
        small = {key: self.bundle[key] for key in ("capabilities", "exact", "archs")}
        request = {"bundle": small, "seed": self.seed, "share": min(1.0, self.minutes / FULL_MINUTES)}
        section = Section(self.folder, request, self.keep, self.machine)
        print(f"{name}: {len(entries)} entries, {end - begin:.0f} s at most", flush=True)
        left = section.run(entries, LIMITS[name], end)
        self.results["not_run"] += [entry["id"] for entry in left]
        self.results["seconds"][name] = time.monotonic() - begin
        if left:
            print(f"{name}: {len(left)} entries were not reached in time", flush=True)
        self.write()

    def keep(self, entry: Entry, line: dict[str, Any]) -> None:
        """Add what became of an entry."""
        described = {key: entry[key] for key in _DESCRIBED if key in entry}
        found = {**described, **line.get("result", {})}
        if "failed" in line:
            found["crashed"] = line["failed"]
        self.results["entries"].append(found)
        self.write()
        print(f"  {time.monotonic() - self.begin:5.0f} s  {entry['id']}  {said(found)}", flush=True)

    def machine(self, found: dict[str, Any]) -> None:
        self.results["machine"] = found

    def write(self) -> None:
        """The results so far, in place of the old file, complete or not at all."""
        folder = os.path.dirname(os.path.abspath(self.path))
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(self.results, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path)


_DESCRIBED = (
    *("id", "section", "kind", "name", "lowering", "variant", "precision", "batch", "problem", "macs", "bytes"),
    *("workspace_bytes", "epilogue"),
)


def said(found: dict[str, Any]) -> str:
    """An entry's result in a few words."""
    if "crashed" in found:
        return f"FAILED: {found['crashed']}"
    if "skipped" in found:
        return f"left out: {found['skipped']}"
    if found["section"] == "peak":
        return f"{found['tflops']:.1f} TFLOP/s" if "tflops" in found else f"{found['gbytes']:.0f} GB/s"
    parts = [] if found.get("right", True) else [f"WRONG: {found['why']}"]
    if found.get("error") is not None:
        parts.append(f"error {found['error']:.1e}")
    for name, times in found.get("times", {}).items():
        parts.append(f"{name} {times['median'] * 1e6:.1f} us")
    if "ratio" in found:
        parts.append(f"ratio {found['ratio']:.2f}")
    return ", ".join(parts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the layers and networks of a gemmify bundle on this GPU.")
    parser.add_argument("--json", default="result.json", metavar="FILE", help="where the result is written")
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="wall time at most (default: 8)")
    parser.add_argument("--sections", default=",".join(SHARES), help=f"some of {','.join(SHARES)}")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="entries whose id matches")
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs (default: a new one)")
    return parser.parse_args()


def main() -> None:
    """Run the bundle that this runner lies in."""
    given = parse()
    try:
        with open(os.path.join(HERE, "bundle.json"), encoding="utf-8") as file:
            bundle = json.load(file)
    except (OSError, ValueError) as err:
        fail(f"bundle.json cannot be read beside run.py ({err}); unpack the bundle again")
    if bundle.get("format") != BUNDLE_FORMAT:
        fail(f"this runner knows the format {BUNDLE_FORMAT}, the bundle is {bundle.get('format')}")
    sections = given.sections.split(",")
    if unknown := [name for name in sections if name not in SHARES]:
        fail(f"there is no section {unknown[0]!r}; choose from {', '.join(SHARES)}")
    if not given.minutes > 0:
        fail(f"--minutes must be above 0, got {given.minutes:g}")
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    run = Run(HERE, bundle, given.json, seed, given.minutes)
    try:
        run.write()
        print(f"seed {seed}", flush=True)
        measured = run_sections(run, [name for name in SHARES if name in sections], given.only)
    except Refused as err:
        fail(str(err))
    except OSError as err:
        fail(f"{given.json}: {err.strerror or err}; give --json a place that can be written")
    except KeyboardInterrupt:
        measured = True
        print("stopped", flush=True)
    if not measured:
        fail(f"no entry matches {given.only!r}")
    for line in summary(run.results["entries"]):
        print(line)
    print(f"{given.json}: bring it back and run: gemmify bench --import {os.path.basename(given.json)}")
    raise SystemExit(1 if any(is_bad(entry) for entry in run.results["entries"]) else 0)


def run_sections(run: Run, sections: list[str], only: str) -> bool:
    """Run them in order; whether there was anything to do."""
    chosen = {
        name: [e for e in run.bundle["entries"] if e["section"] == name and fnmatch.fnmatchcase(e["id"], only)]
        for name in sections
    }
    remaining = sum(SHARES[name] for name in sections if chosen[name])
    for name in sections:
        if chosen[name]:
            run.section(name, chosen[name], SHARES[name] / remaining)
            remaining -= SHARES[name]
    return any(chosen.values())


def is_bad(entry: Entry) -> bool:
    """Whether an entry crashed or is wrong."""
    return "crashed" in entry or not entry.get("right", True)


def summary(entries: list[Entry]) -> list[str]:
    """What was found, in lines."""
    checks = [e for e in entries if e["section"] == "check"]
    lines = [f"correctness: {sum(not is_bad(e) for e in checks)} of {len(checks)} are right"] if checks else []
    for section in ("layer", "network"):
        mine = [e for e in entries if e["section"] == section and "ratio" in e and e.get("right", True)]
        for precision in dict.fromkeys(e["precision"] for e in mine):
            ratios = [e["ratio"] for e in mine if e["precision"] == precision]
            mean = 1.0
            for ratio in ratios:
                mean *= ratio ** (1 / len(ratios))
            lines.append(
                f"{section} {precision}: PyTorch's time over ours, geometric mean {mean:.2f}, median "
                f"{median(ratios):.2f}, least {min(ratios):.2f} of {len(ratios)}"
            )
    return lines
