"""Measures the candidates of a bundle on this machine.

    python run.py [--results results.jsonl] [--limit MINUTES]

Needs Python 3.10, numpy, and TVM's runtime (pip install apache-tvm apache-tvm-ffi, of the versions that the bundle
names); no compiler and nothing of gemmify. Every candidate runs in a process of its own, within a time limit; its
numbers are checked before its time counts. Each result is added to the file at once: started again, the runner goes on
where it was stopped. Bring the file back and run `gemmify logs import results.jsonl`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from functools import partial
from typing import Any

from .apart import apart
from .candidate import HERE, one_final, one_trial
from .gpu import check_gpu
from .machine import check_machine, fail, load_runtime
from .results import BUNDLE_FORMAT, RESULTS_FORMAT, append, median, read_results, sealed

FINALISTS = 4


class Run:
    """What is done and what is left."""

    def __init__(self, bundle: Any, machine: dict[str, Any], tvm: Any, path: str, minutes: float) -> None:
        self.bundle, self.machine, self.tvm, self.path = bundle, machine, tvm, path
        self.end = time.monotonic() + 60 * minutes if minutes else None
        self.results = read_results(path, bundle)

    def late(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def trials(self) -> bool:
        """Every candidate without a result, in the bundle's order: the default of each task is its first."""
        done = {r["candidate"] for r in self.results if r["stage"] == "trial"}
        for number, item in enumerate(self.bundle["candidates"]):
            if item["id"] in done:
                continue
            if self.late():
                return False
            best = min((median(r["cold"]) for r in self.of_task(item["task"], "trial")), default=None)
            kind, value = apart(partial(one_trial, self.tvm, self.bundle, item, best), self.bundle["limit"])
            self.keep("trial", [(item, value if kind == "value" else {"outcome": kind, "why": value})], "")
            self.tell(f"{number + 1} of {len(self.bundle['candidates'])}", item, self.results[-1])
        return True

    def finals(self) -> bool:
        """The best candidates of every task in turns with its default."""
        items = {item["id"]: item for item in self.bundle["candidates"]}
        for task in range(len(self.bundle["tasks"])):
            if any(r["stage"] == "final" and items[r["candidate"]]["task"] == task for r in self.results):
                continue
            ranked = sorted(self.of_task(task, "trial"), key=lambda r: median(r["cold"]))
            names = [r["candidate"] for r in ranked[:FINALISTS]]
            names += [
                r["candidate"] for r in ranked if items[r["candidate"]]["default"] and r["candidate"] not in names
            ]
            if len(names) < 2:
                continue
            if self.late():
                return False
            chosen = [items[name] for name in names]
            limit = self.bundle["limit"] * len(chosen)
            kind, value = apart(partial(one_final, self.tvm, self.bundle, chosen), limit)
            if kind != "value":
                print(f"final of layer {task + 1}: {kind} ({value})", flush=True)
                continue
            group = f"{self.bundle['id']}-{task}-{int(time.time())}"
            self.keep("final", list(zip(chosen, value, strict=True)), group)
            for item, answer in zip(chosen, value, strict=True):
                self.tell("final", item, answer)
        return True

    def of_task(self, task: int, stage: str) -> list[dict[str, Any]]:
        """The good results of one task."""
        own = {item["id"] for item in self.bundle["candidates"] if item["task"] == task}
        return [r for r in self.results if r["candidate"] in own and r["stage"] == stage and r["outcome"] == "ok"]

    def keep(self, stage: str, answers: list[tuple[Any, Any]], group: str) -> None:
        """Add the answers to the results, together."""
        made = [self.result(item, stage, answer, group) for item, answer in answers]
        append(self.path, made)
        self.results += made

    def result(self, item: Any, stage: str, answer: Any, group: str) -> dict[str, Any]:
        error = answer.get("error")
        now = datetime.datetime.now(datetime.timezone.utc)
        result = {
            "format": RESULTS_FORMAT,
            "bundle": self.bundle["id"],
            "candidate": item["id"],
            "when": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "stage": stage,
            "group": group,
            "outcome": answer["outcome"],
            "why": answer.get("why", ""),
            "cold": answer.get("cold", []),
            "warm": answer.get("warm", []),
            "error": None if error is None or error != error or error == float("inf") else error,
            "task": self.bundle["tasks"][item["task"]]["task"],
            "point": item["point"],
            "machine": self.machine,
            "versions": self.bundle["versions"],
        }
        return {**result, "sum": sealed(result)}

    def tell(self, where: str, item: Any, answer: Any) -> None:
        said = answer["outcome"]
        if said == "ok":
            said = "{:.1f} us cold, {:.1f} us warm".format(1e6 * median(answer["cold"]), 1e6 * median(answer["warm"]))
        elif answer.get("why"):
            said += ": " + answer["why"]
        print("{}  {}  {}".format(where, item["title"], said), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the candidates of a gemmify bundle on this machine.")
    parser.add_argument("--results", default=os.path.join(HERE, "results.jsonl"), help="where the results are added")
    parser.add_argument("--limit", type=float, default=0.0, metavar="MINUTES", help="stop after so many minutes")
    given = parser.parse_args()
    try:
        with open(os.path.join(HERE, "bundle.json"), encoding="utf-8") as file:
            bundle = json.load(file)
    except (OSError, ValueError) as err:
        fail(f"bundle.json cannot be read beside run.py ({err}); unpack the bundle again")
    if bundle.get("format") != BUNDLE_FORMAT:
        fail("this runner knows the format {}, the bundle is {}".format(BUNDLE_FORMAT, bundle.get("format")))
    machine, tvm = check_machine(bundle), load_runtime(bundle)
    if "gpu" in bundle:
        machine = check_gpu(tvm, bundle, machine)
    try:
        run = Run(bundle, machine, tvm, given.results, given.limit)
        complete = run.trials() and run.finals()
    except OSError as err:
        fail(f"{given.results}: {err.strerror or err}; give --results a place that can be written")
    except KeyboardInterrupt:
        complete = False
    rest = "" if complete else "; start again to go on"
    print(f"{given.results}: {len(run.results)} results{rest}")
    print("bring it back and run: gemmify logs import " + os.path.basename(given.results))
