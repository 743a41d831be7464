"""One candidate of a bundle, in the process that runs it."""

from __future__ import annotations

import os
import zlib
from typing import Any

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the bundle."""
FLUSH = "cache_flush_cpu_non_first_arg"
"""TVM's function that drives all arguments of a call but the first, the layer's input, out of the caches."""
ROUNDS = 5
GIVE_UP_FACTOR = 2.5
SHORTEST = 200e-6  # seconds of a warm sample


def arrays_of(task: Any) -> dict[str, Any]:
    """The random arrays of a task by name: the same, number by number, that the expected results were made from."""
    import numpy as np

    seed, dtype, shapes = task["seed"], task["dtype"], task["shapes"]
    first, second = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    found = {}
    for name in ("data", "weight"):
        found[name] = first.standard_normal(shapes[name]).astype(dtype)
    for number in range(len(shapes) - 2):
        name = f"operand {number}"
        found[name] = second.standard_normal(shapes[name]).astype(dtype)
    for name, array in found.items():
        if zlib.crc32(np.ascontiguousarray(array).tobytes()) != task["checksums"][name]:
            raise RuntimeError(f"numpy {np.__version__} makes other random numbers than the bundle's; use numpy 2")
    return found


class Candidate:
    """A library with its tensors."""

    def __init__(self, tvm: Any, bundle: Any, item: Any, arrays: dict[str, Any]) -> None:
        import numpy as np

        task, gpu = bundle["tasks"][item["task"]], bundle.get("gpu")
        self.device = tvm.cuda(0) if gpu else tvm.cpu()
        self.flush = {"cache_flush_bytes": gpu["flush"]} if gpu else {"f_preproc": FLUSH}
        self.tvm, self.spec, self.task, self.limit = tvm, item["spec"], task, item["tolerance"]
        load = tvm.get_global_func("ffi.Module.load_from_file.so")
        self.module = load(os.path.join(HERE, item["library"]), "so")
        self.tensors = {}
        for name, (shape, dtype) in self.spec["tensors"].items():
            if name in arrays:
                array = arrays[name]
            else:
                array = np.full(shape, np.nan if "float" in dtype else np.iinfo(dtype).max, dtype)
            self.tensors[name] = tvm.runtime.tensor(array, self.device)
        for name, (shape, source) in self.spec["views"].items():
            self.tensors[name] = self.tensors[source]._create_view(shape)
        self.arguments = [self.tensors[name] for name in self.spec["entry"]]

    def check(self) -> tuple[float, str | None]:
        """Run once; the largest deviation of the sampled elements relative to the largest result, and what is wrong."""
        import numpy as np

        for call in self.spec["weights"]:
            names = [*call["reads"], *call["scratch"], call["writes"]]
            self.module[call["symbol"]](*[self.tensors[name] for name in names])
        self.module["layer"](*self.arguments)
        got = self.tensors[self.spec["output"]].numpy().reshape(-1)
        bad = int((~np.isfinite(got)).sum())
        if bad:
            return float("inf"), f"{bad} of {got.size} output elements are not finite"
        expected = np.load(os.path.join(HERE, self.task["expected"]))
        worst = float(np.max(np.abs(got[expected["at"]].astype("float64") - expected["values"])))
        largest = self.task["largest"]
        if worst <= self.limit:
            return worst / largest, None
        allowed = self.limit / largest
        return worst / largest, f"off by {worst / largest:.1e} of the largest output, {allowed:.1e} is allowed"

    def times(self, number: int, repeat: int, flush: bool) -> list[float]:
        """Seconds of a call, one entry each of `repeat` samples of `number` calls."""
        cooled = self.flush if flush else {}
        timer = self.module.time_evaluator("layer", self.device, number=number, repeat=repeat, **cooled)
        return [float(t) for t in timer(*self.arguments).results]

    def sample(self, best: float | None) -> tuple[list[float], list[float]]:
        """(warm, cold) times; two cold ones only where the candidate is far slower than the best one known."""
        cold = self.times(1, 2, True)
        if best is not None and min(cold) > GIVE_UP_FACTOR * best:
            return self.times(1, 1, False), cold
        cold += self.times(1, fitting(0.12, max(cold), 5, 10) - 2, True)
        call = min(self.times(1, 2, False))
        number = max(1, -int(-SHORTEST // max(call, 1e-7)))
        return self.times(number, fitting(0.04, number * call, 5, 30), False), cold


def fitting(budget: float, seconds: float, least: int, most: int) -> int:
    """How many samples of `seconds` fit into `budget`, between `least` and `most`."""
    return max(least, min(most, int(budget / max(seconds, 1e-7))))


def set_threads(tvm: Any, threads: int) -> None:
    places = [str(i) for i in range(threads)]
    tvm.get_global_func("runtime.config_threadpool")(-3, threads, places)


def one_trial(tvm: Any, bundle: Any, item: Any, best: float | None) -> dict[str, Any]:
    set_threads(tvm, bundle["threads"])
    task = bundle["tasks"][item["task"]]
    candidate = Candidate(tvm, bundle, item, arrays_of(task))
    error, wrong = candidate.check()
    if wrong:
        return {"outcome": "wrong", "why": wrong, "error": error}
    warm, cold = candidate.sample(best)
    return {"outcome": "ok", "warm": warm, "cold": cold, "error": error}


def one_final(tvm: Any, bundle: Any, items: list[Any]) -> list[dict[str, Any]]:
    """The finalists of one task in turns, every second round backwards."""
    set_threads(tvm, bundle["threads"])
    task = bundle["tasks"][items[0]["task"]]
    arrays = arrays_of(task)
    candidates = [Candidate(tvm, bundle, item, arrays) for item in items]
    answers: list[dict[str, Any]] = []
    for candidate in candidates:
        error, wrong = candidate.check()
        answers.append(
            {"outcome": "wrong" if wrong else "ok", "why": wrong or "", "error": error, "warm": [], "cold": []}
        )
    for number in range(ROUNDS):
        order = list(range(len(items)))[:: 1 if number % 2 == 0 else -1]
        for i in (i for i in order if answers[i]["outcome"] == "ok"):
            cold = candidates[i].times(1, 4, True)
            answers[i]["cold"] += cold
            calls = max(1, -int(-SHORTEST // max(min(cold), 1e-7)))
            answers[i]["warm"] += candidates[i].times(calls, 4, False)
    return answers
