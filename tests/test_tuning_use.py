"""Using the log: which records a compilation rests on, what it says of them, and plans that do without it."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from test_plan import make_model

import gemmify
from gemmify import cli
from gemmify.errors import GemmifyWarning, InputError
from gemmify.kernels import tile_for
from gemmify.pipeline import plan_model, resolve_target
from gemmify.plan import Plan
from gemmify.select import consider
from gemmify.threads import default_threads
from gemmify.tuning import use
from gemmify.tuning.layers import network
from gemmify.tuning.line import encode
from gemmify.tuning.log import folder_of, this_machine, this_versions
from gemmify.tuning.point import Point, knobs
from gemmify.tuning.record import Record
from gemmify.tuning.task import Task
from gemmify.tuning.verdict import decide
from lowering import Tile, catalogue
from lowering.epilogue import EpilogueOp
from schedules import Machine

TARGET = resolve_target("llvm")
MACHINE = Machine.from_target(TARGET)
HERE = this_machine(TARGET, default_threads())
VERSIONS = this_versions()
MODEL = make_model()
TASKS = dict(network(MODEL, None, MACHINE).layers)
WINOGRAD = Point("winograd-2", Tile(4, 16), knobs({"block": (2, 2), "fused": True}))
POINTWISE = Point("pointwise", Tile(4, 16), knobs({"span": "image"}), knobs({"k_unroll": 2}))
IM2COL = Point("im2col", Tile(2, 16))


def default(name: str, key: str | None = None) -> Point:
    """The untuned point of a layer of MODEL."""
    key = plan_model(MODEL, logs=False).plan.layers[name] if key is None else key
    return Point(key, tile_for(catalogue()[key], TASKS[name].problem, MACHINE))


def times(micro: float, spread: float = 0.0) -> tuple[float, ...]:
    """Five times around `micro` microseconds, the quartiles `spread` of it to either side."""
    return tuple(micro * 1e-6 * (1 + spread * side) for side in (-1.5, -1, 0, 1, 1.5))


def record(task: Task, point: Point, micro: float, stage: str = "final", spread: float = 0.0, **other: Any) -> Record:
    fields = {"group": "g1" if stage != "trial" else "", "when": "2026-11-21T10:00:00Z"} | other
    return Record(task, point, HERE, VERSIONS, cold=times(micro, spread), stage=stage, **fields)


def finals(name: str, best: Point, ratio: float = 1.5, **other: Any) -> list[Record]:
    """A group in which `best` was `ratio` x as fast as the default of the layer `name`."""
    base = record(TASKS[name], default(name), 100, spread=0.01, **other)
    return [base, record(TASKS[name], best, 100 / ratio, spread=0.01, **other)]


def write(folder: Path, records: list[Record], file: str = "a.jsonl") -> Path:
    """`records` as a log in `folder`, in the part of this machine's target."""
    place = folder / folder_of(HERE)
    place.mkdir(parents=True, exist_ok=True)
    (place / file).write_bytes(b"".join(map(encode, records)))
    return folder


def all_finals() -> list[Record]:
    kept = [record(TASKS["fc"], default("fc"), 10), record(TASKS["fc"], Point("dense", Tile(1, 32)), 9.95)]
    return finals("stem", WINOGRAD, 1.18) + finals("mix", POINTWISE, 2.0) + kept


def planned(**options: Any) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in plan_model(MODEL, **options).layers}


# The verdict.

TASK = TASKS["stem"]
BASE, A, B = (Point("direct", Tile(1, nr)) for nr in (16, 32, 48))


def verdict(*records: Record) -> Any:
    found = decide(list(records), BASE)
    for seed in range(5):
        mixed = list(records)
        random.Random(seed).shuffle(mixed)
        assert decide(mixed, BASE) == found, "whatever the order of the records"
    return found


def test_a_finalist_wins_by_more_than_the_spread():
    found = verdict(record(TASK, BASE, 118, spread=0.02), record(TASK, A, 100, spread=0.03), record(TASK, B, 110))
    assert (found.point, found.kept) == (A, False) and found.ratio == pytest.approx(1.18)
    assert found.seconds == pytest.approx(100e-6) and found.default_seconds == pytest.approx(118e-6)
    assert found.spread == pytest.approx(0.06) and "1.18 x the default" in found.why and len(found.used) == 2


def test_the_default_is_kept_within_the_spread_and_below_one_percent():
    noisy = verdict(record(TASK, BASE, 105, spread=0.04), record(TASK, A, 100, spread=0.04))
    assert noisy.point == BASE and noisy.kept and noisy.ratio == 1.0 and "more than the spread" in noisy.why
    close = verdict(record(TASK, BASE, 100.5), record(TASK, A, 100))
    assert close.point == BASE and close.kept and "more than 1 %" in close.why
    assert verdict(record(TASK, BASE, 101.1), record(TASK, A, 100)).point == A
    assert verdict(record(TASK, BASE, 100)).kept


def test_a_steady_second_wins_where_the_first_is_too_noisy():
    found = verdict(record(TASK, BASE, 100, spread=0.01), record(TASK, A, 90, spread=0.2), record(TASK, B, 92))
    assert found.point == B


def test_the_latest_group_decides():
    old = [record(TASK, BASE, 100), record(TASK, A, 50)]
    later = {"group": "g0", "when": "2026-11-21T11:00:00Z"}
    assert verdict(*old, record(TASK, BASE, 100, **later), record(TASK, B, 90, **later)).point == B
    network_ = {"group": "resnet", "when": "2026-11-21T12:00:00+01:00", "stage": "network"}  # the same moment
    found = verdict(*old, record(TASK, BASE, 100, **network_), record(TASK, A, 99.9, **network_))
    assert found.kept, "inside the network it was no faster"
    alone = {"group": "g2", "when": "2026-11-21T12:00:00Z"}
    assert verdict(*old, record(TASK, BASE, 100, **alone)).point == A, "a group of the default alone settles nothing"
    failed = {"group": "g3", "when": "2026-11-21T12:00:00Z", "outcome": "wrong"}
    assert verdict(*old, record(TASK, BASE, 100, **failed), record(TASK, B, 1, **failed)).point == A


def test_a_group_without_the_default_yields_to_the_defaults_own_times():
    """As where a bound makes another default than the one that the finalists were measured against."""
    apart = record(TASK, BASE, 100, "trial")
    assert verdict(apart, record(TASK, A, 80), record(TASK, B, 120)).point == A
    found = verdict(apart, record(TASK, B, 120))
    assert found.point == BASE and found.kept, "it is slower, though no final holds the default"


def test_times_inside_a_network_do_not_stand_beside_times_alone():
    inside = {"stage": "network", "group": "net", "when": "2026-11-21T12:00:00Z"}
    trials = [record(TASK, BASE, 100, "trial"), record(TASK, A, 95, "trial")]
    assert verdict(*trials, record(TASK, BASE, 200, **inside)).kept, "95 is not 10 % below 100"


def test_trials_that_were_never_repeated_need_a_larger_gain():
    base = record(TASK, BASE, 100, "trial")
    assert verdict(base, record(TASK, A, 91, "trial")).kept
    found = verdict(base, record(TASK, A, 89, "trial"))
    assert found.point == A and "measured apart" in found.why


def test_without_a_time_of_the_default_the_least_median_is_taken_and_ties_go_by_the_text():
    found = verdict(record(TASK, A, 100), record(TASK, B, 100), record(TASK, BASE, 1, outcome="crash"))
    assert found.point == A and found.ratio is None and "the default has no time" in found.why
    nothing = verdict(record(TASK, BASE, 1, outcome="timeout"), replace(record(TASK, A, 1), cold=(), warm=(1e-6,)))
    assert nothing.point is None and nothing.seconds is None and not nothing.kept


# Compiling with a log.


def test_compile_takes_what_the_log_proves_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(use, "LOCAL", write(tmp_path / "logs", all_finals()))
    made, plain = gemmify.compile(MODEL), gemmify.compile(MODEL, logs=False)
    stem, mix, fc = made.layers
    assert (stem["lowering"], stem["tile"]) == ("winograd-2", [4, 16])
    assert stem["sizes"] == {"block": (2, 2), "fused": True} and stem["reason"].startswith("tuned: 1.18 x the default")
    assert mix["schedule"] == {"k_unroll": 2} and mix["tuned"]["ratio"] == pytest.approx(2.0)
    assert fc["reason"].startswith("default kept") and fc["tuned"]["kept"] and fc["lowering"] == "dense"
    place = str(tmp_path / "logs" / folder_of(HERE))
    counts = {"layers": 3, "tuned": 3, "kept": 1, "planned": 0, "model": 0, "logs": [place], "unused": {}}
    assert made.manifest.tuning == counts and len(made.manifest.log_hash) == 16
    assert plain.manifest.log_hash is None and plain.manifest.tuning["logs"] is None
    assert all(layer["tuned"] is None and not layer["sizes"] for layer in plain.layers)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(made(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_hash_and_the_plan_do_not_depend_on_order_or_files(tmp_path):
    records = all_finals()
    one = write(tmp_path / "one", records)
    two = write(write(tmp_path / "two", records[::-1][:4], "z.jsonl"), records[::-1][2:], "b.jsonl")
    plans = [plan_model(MODEL, logs=folder).plan.save(tmp_path / f"{folder.name}.json") for folder in (one, one, two)]
    assert len({plan.read_bytes() for plan in plans}) == 1
    hashes = {gemmify.compile(MODEL, logs=folder).manifest.log_hash for folder in (one, two)}
    assert len(hashes) == 1
    other = write(tmp_path / "other", finals("stem", WINOGRAD, 1.2))
    assert gemmify.compile(MODEL, logs=other).manifest.log_hash not in hashes


def test_records_for_something_else_are_counted_and_not_used(tmp_path):
    foreign = [
        replace(r, machine=replace(HERE, cpu="Another CPU"), when=f"2026-11-21T10:00:0{i}Z")
        for i, r in enumerate(finals("stem", WINOGRAD))
    ]
    foreign += [replace(r, machine=replace(HERE, threads=HERE.threads + 1)) for r in finals("mix", POINTWISE)]
    foreign += [replace(foreign[0], machine=HERE, versions=replace(VERSIONS, tvm="0.26.0"))]
    logs = write(tmp_path / "logs", foreign)
    with pytest.warns(GemmifyWarning, match="5 of 5 records are not used here") as told:
        found = plan_model(MODEL, logs=logs)
    assert len(told) == 1 and "Another CPU" in str(told[0].message) and "0.26.0" in str(told[0].message)
    assert found.tuning["tuned"] == 0 and sum(found.tuning["unused"].values()) == 5
    assert found.plan == plan_model(MODEL, logs=False).plan


def test_only_the_targets_folder_is_read_and_only_once(tmp_path, monkeypatch):
    logs = write(tmp_path / "logs", finals("stem", WINOGRAD))
    (logs / "llvm-other").mkdir()
    (logs / "llvm-other" / "a.jsonl").write_text("rubbish\n")
    read: list[Path] = []
    from gemmify.tuning import log

    original = log.read
    monkeypatch.setattr(log, "read", lambda path: read.append(path) or original(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planned(logs=logs)["stem"]["lowering"] == "winograd-2"
        assert planned(logs=[logs])["stem"]["lowering"] == "winograd-2"
    assert read == [logs / folder_of(HERE)]
    later = [replace(r, when="2026-11-21T12:00:00Z", group="g2") for r in finals("stem", IM2COL)]
    write(logs, later, "b.jsonl")
    assert planned(logs=logs)["stem"]["lowering"] == "im2col", "the files have changed"
    (logs / folder_of(HERE) / "a.jsonl").write_text("rubbish\n")
    with pytest.warns(GemmifyWarning, match="1 damaged text was set aside, 2 records of the log were read"):
        assert planned(logs=logs)["stem"]["lowering"] == "im2col"


def test_without_any_log_nothing_is_asked_of_the_machine(monkeypatch):
    from gemmify.tuning import log

    monkeypatch.setattr(log, "this_machine", lambda *_: pytest.fail("there is no log to look into"))
    assert plan_model(MODEL).tuning["tuned"] == 0


def test_the_users_log_goes_before_the_shipped_one(tmp_path, monkeypatch):
    shipped = write(tmp_path / "shipped", finals("stem", IM2COL) + finals("mix", POINTWISE))
    monkeypatch.setattr(use, "SHIPPED", shipped)
    monkeypatch.setattr(use, "LOCAL", write(tmp_path / "local", finals("stem", WINOGRAD)))
    found = planned()
    assert found["stem"]["lowering"] == "winograd-2" and found["mix"]["schedule"] == {"k_unroll": 2}
    assert found["mix"]["tuned"]["log"].endswith("(shipped)") and found["fc"]["tuned"] is None
    assert planned(logs=False)["mix"]["tuned"] is None
    monkeypatch.setattr(use, "LOCAL", shipped)
    assert planned()["stem"]["lowering"] == "im2col", "one folder in both roles"
    assert {layer["tuned"]["log"] for layer in planned().values() if layer["tuned"]} == {str(shipped / folder_of(HERE))}


def test_trials_of_an_interrupted_run_do_not_hide_shipped_finals(tmp_path, monkeypatch):
    monkeypatch.setattr(use, "SHIPPED", write(tmp_path / "shipped", finals("stem", WINOGRAD)))
    trials = [record(TASKS["stem"], default("stem"), 100, "trial"), record(TASKS["stem"], IM2COL, 95, "trial")]
    local = write(tmp_path / "local", trials)
    monkeypatch.setattr(use, "LOCAL", local)
    assert planned()["stem"]["lowering"] == "winograd-2"
    write(local, finals("stem", IM2COL), "later.jsonl")
    assert planned()["stem"]["lowering"] == "im2col"


def test_the_same_problem_with_another_epilogue_serves_and_says_so(tmp_path):
    other = Task(TASKS["stem"].problem, (EpilogueOp("relu"),))
    records = [replace(r, task=other) for r in finals("stem", WINOGRAD)]
    layer = planned(logs=write(tmp_path / "logs", records))["stem"]
    assert layer["lowering"] == "winograd-2" and "another epilogue" in layer["reason"] and not layer["tuned"]["exact"]
    exact = [replace(r, when="2026-11-20T10:00:00Z") for r in finals("stem", IM2COL)]
    layer = planned(logs=write(tmp_path / "both", records + exact))["stem"]
    assert layer["lowering"] == "im2col" and "another epilogue" not in layer["reason"]


def test_a_key_that_is_asked_for_takes_its_own_best_record(tmp_path):
    base = record(TASKS["stem"], default("stem", "im2col"), 100)
    logs = write(tmp_path / "logs", [*finals("stem", WINOGRAD), base, record(TASKS["stem"], IM2COL, 80)])
    stem = planned(logs=logs, lowering="im2col")["stem"]
    assert (stem["lowering"], stem["tile"]) == ("im2col", [2, 16]) and stem["tuned"]["ratio"] == pytest.approx(1.25)
    stem = planned(logs=logs, lowering={"stem": "kn2row"})["stem"]
    assert stem["lowering"] == "kn2row" and stem["tuned"] is None and stem["reason"] == "as asked"
    mix = planned(logs=write(tmp_path / "mix", finals("mix", POINTWISE)), lowering="winograd-2")["mix"]
    assert mix["schedule"] and "winograd-2 does not apply" in mix["reason"] and mix["reason"].startswith("tuned")


def test_bounds_hold_for_tuned_points(tmp_path):
    logs = write(tmp_path / "logs", [*finals("stem", WINOGRAD), record(TASKS["stem"], IM2COL, 90)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = planned(logs=logs)["stem"]
        assert free["lowering"] == "winograd-2" and free["workspace_bytes"] > 0
        bound = planned(logs=logs, max_workspace=free["workspace_bytes"] - 1)["stem"]
        assert bound["lowering"] != "winograd-2" and bound["workspace_bytes"] < free["workspace_bytes"]
        loose = Point("winograd-6", tile_for(catalogue()["winograd-6"], TASKS["stem"].problem, MACHINE))
        fast = write(tmp_path / "fast", [*finals("stem", loose), record(TASKS["stem"], IM2COL, 90)])
        assert planned(logs=fast)["stem"]["lowering"] == "winograd-6"
        errors = {c.key: c.error for c in consider(TASKS["stem"].problem, MACHINE)}
        exact = planned(logs=fast, max_error=(errors["im2col"] + errors["winograd-6"]) / 2)["stem"]
        assert exact["lowering"] == "im2col", "the next best that is accurate enough"


@pytest.mark.parametrize(
    "wrong",
    [
        Point("im2pony", Tile(4, 16)),
        replace(WINOGRAD, sizes=knobs({"block": (3, 3)})),
        replace(WINOGRAD, sizes=knobs({"bloc": (2, 2)})),
        Point("dense", Tile(1, 16)),
        replace(IM2COL, schedule=knobs({"k_unrol": 3})),
        replace(IM2COL, schedule=knobs({"k_unroll": 999})),
        replace(IM2COL, schedule=knobs({"k_unroll": "many"})),
    ],
    ids=lambda point: point.title,
)
def test_a_point_that_cannot_be_built_is_passed_over(tmp_path, wrong):
    records = [record(TASKS["stem"], wrong, 10), *finals("stem", WINOGRAD)]
    with pytest.warns(GemmifyWarning, match="stem: ") as told:
        assert planned(logs=write(tmp_path / "next", records))["stem"]["lowering"] == "winograd-2"
    assert len(told) == 1 and wrong.title in str(told[0].message)
    with pytest.warns(GemmifyWarning, match="cannot be compiled"):
        made = gemmify.compile(MODEL, logs=write(tmp_path / "none", records[:1]))
    assert made.layers[0]["lowering"] == default("stem").lowering and made.layers[0]["tuned"] is None
    with pytest.raises(InputError, match=r"layer stem"):
        plan_model(MODEL, plan=Plan({"stem": wrong}), strict=True)


def test_frozen_names_the_layers_without_a_record(tmp_path):
    some = write(tmp_path / "some", finals("stem", WINOGRAD))
    with pytest.raises(InputError, match=r"no record covers 2 of 3 layers: mix, fc .*gemmify tune"):
        gemmify.compile(MODEL, logs=some, frozen=True)
    with pytest.raises(InputError, match=r"3 of 3 layers.*switched off"):
        plan_model(MODEL, logs=False, frozen=True)
    whole = write(tmp_path / "whole", all_finals())
    assert gemmify.compile(MODEL, logs=whole, frozen=True).manifest.tuning["tuned"] == 3
    held = plan_model(MODEL, logs=some).plan
    assert plan_model(MODEL, plan=held, logs=False, frozen=True).tuning["planned"] == 3


# Plans.


def kernels(tmp_path: Path, name: str, **options: Any) -> tuple[list[Any], Any]:
    """The layers of a compilation, and the module of its kernels."""
    made = gemmify.compile(MODEL, dump_dir=tmp_path / name, **options)
    return made.layers, (tmp_path / name / "3_lowered.py").read_text()


def test_a_plan_leads_to_the_same_kernels_without_the_log(tmp_path):
    logs = write(tmp_path / "logs", all_finals())
    path = plan_model(MODEL, logs=logs).plan.save(tmp_path / "p.json")
    data = json.loads(path.read_text())["layers"]
    assert data["stem"] == {
        "lowering": "winograd-2",
        "tile": [4, 16],
        "sizes": {"block": [2, 2], "fused": True},
        "schedule": {},
    }
    assert data["mix"]["schedule"] == {"k_unroll": 2} and data["fc"] == "dense"
    tuned, tuned_text = kernels(tmp_path, "tuned", logs=logs)
    held, held_text = kernels(tmp_path, "held", plan=path, logs=False)
    assert held_text == tuned_text and "k_unroll" not in held_text
    for a, b in zip(tuned, held, strict=True):
        assert {k: v for k, v in a.items() if k not in ("reason", "tuned")} == {
            k: b[k] for k in a if k not in ("reason", "tuned")
        }
    assert tuned_text != kernels(tmp_path, "plain", logs=False)[1]
    later = [replace(r, when="2026-11-22T10:00:00Z", group="g9") for r in finals("fc", Point("dense", Tile(1, 32)))]
    changed = write(tmp_path / "changed", [*all_finals(), *later])
    assert kernels(tmp_path, "changed", plan=path, logs=changed)[1] == tuned_text, "a plan is not changed by a log"
    assert planned(plan=Plan({"stem": "auto", "mix": "direct"}), logs=logs)["stem"]["lowering"] == "winograd-2"
    assert Plan.load(path) == Plan.load(Plan.load(path).save(tmp_path / "q.json"))
    assert Plan.load(path).layers == {"stem": "winograd-2", "mix": "pointwise", "fc": "dense"}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([], "a lowering's key, auto or {lowering"),
        ({"lowering": "im2col"}, "give layer 'stem' a tile too"),
        ({"tile": [4, 16]}, "give layer 'stem' a lowering too"),
        ({"lowering": "auto", "tile": [4, 16]}, "a lowering's key for its point"),
        ({"lowering": "im2pony", "tile": [4, 16]}, "'im2pony' (of layer stem)"),
        ({"lowering": "im2col", "tile": [4]}, "a point that makes sense"),
        ({"lowering": "im2col", "tile": [0, 16]}, "at least 1"),
        ({"lowering": "im2col", "tile": [4.5, 16]}, "two whole numbers"),
        ({"lowering": "im2col", "tile": [4, 16], "size": {}}, "only lowering, tile, sizes, schedule"),
        ({"lowering": "im2col", "tile": [4, 16], "sizes": 3}, "a point that makes sense"),
        ({"lowering": "winograd-2", "tile": [4, 16], "sizes": {"block": [2.5, 2]}}, "whole numbers"),
        (
            {"lowering": "winograd-2", "tile": [4, 16], "sizes": {"block": [3, 3]}},
            "layer stem: winograd-2 4x16 block=3,3",
        ),
        ({"lowering": "im2col", "tile": [4, 16], "schedule": {"k_unrol": 3}}, "no kernel here has the knob 'k_unrol'"),
    ],
)
def test_plans_with_points_that_make_no_sense_are_refused_in_words(tmp_path, capfd, value, part):
    model, path = tmp_path / "m.onnx", tmp_path / "p.json"
    onnx.save(MODEL, str(model))
    path.write_text(json.dumps({"format": 1, "layers": {"stem": value}}))
    assert cli.main(["plan", str(model), "--plan", str(path), "-o", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert "p.json" in err and part in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


def test_a_planned_point_above_a_bound_gives_way_or_is_refused(tmp_path):
    plan = Plan({"stem": WINOGRAD})
    stem = planned(plan=plan, max_workspace=0)["stem"]
    assert stem["lowering"] != "winograd-2" and "the plan's winograd-2" in stem["reason"]
    with pytest.raises(InputError, match=r"layer stem: winograd-2 .* does not apply"):
        plan_model(MODEL, plan=plan, max_workspace=0, strict=True)
    with pytest.raises(InputError, match=r'a plan must give "\*"'):
        Plan({"*": WINOGRAD})


# The command line.


@pytest.fixture
def model(tmp_path: Path) -> str:
    onnx.save(MODEL, str(tmp_path / "small.onnx"))
    return str(tmp_path / "small.onnx")


def test_the_command_line_takes_logs_and_says_what_they_settled(model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = write(tmp_path / "logs", all_finals()[:-2])
    assert cli.main(["compile", model, "-o", "a.so", "--logs", str(logs)]) == 0
    out = capfd.readouterr().out
    assert f"2 of 3 layers tuned (log {logs / folder_of(HERE)}), 1 by the model" in out and "tuned: 1.18 x" in out
    assert gemmify.load("a.so").manifest.log_hash and json.loads(Path("a.so.json").read_text())["tuning"]["tuned"] == 2
    assert cli.main(["plan", model, "--logs", str(logs), "-o", "p.json"]) == 0
    assert "2 of 3 layers tuned" in capfd.readouterr().out
    assert cli.main(["plan", model, "--no-logs", "--plan", "p.json", "-o", "q.json"]) == 0
    assert "0 of 3 layers tuned, 3 as planned" in capfd.readouterr().out
    assert Path("p.json").read_bytes() == Path("q.json").read_bytes()
    assert cli.main(["explain", model, "--logs", str(logs), "--json", "-"]) == 0
    group = next(g for g in json.loads(capfd.readouterr().out)["layers"] if g["names"] == ["stem"])
    assert group["lowering"] == "winograd-2" and group["point"]["sizes"]["block"] == [2, 2]
    chosen = next(c for c in group["candidates"] if c["verdict"] == "chosen")
    assert chosen["key"] == "winograd-2" and group["why"].startswith("tuned: 1.18 x")
    assert 0 < chosen["measured"] < 1, "the fastest trial in the log, in seconds"
    assert cli.main(["verify", model, "--logs", str(logs)]) == 0
    assert cli.main(["run", model, "--no-logs"]) == 0
    capfd.readouterr()


def test_wrong_logs_are_refused_in_words(model, tmp_path, capfd):
    def refused(words: list[str], *parts: str) -> None:
        assert cli.main(words) == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err and all(part in err for part in parts), err

    logs = str(write(tmp_path / "logs", finals("stem", WINOGRAD)))
    refused(["plan", model, "--logs", str(tmp_path / "nowhere")], "there is no log", "nowhere", "gemmify tune")
    refused(["plan", model, "--logs", logs, "--no-logs"], "both --logs", "leave one out")
    for verb in ("plan", "compile", "run", "verify", "explain", "bench"):
        refused([verb, model, "--logs", logs, "--frozen"], "no record covers 2 of 3 layers: mix, fc", "gemmify tune")
    refused(["bench", "--suite", "layers", "--frozen"], "--frozen belongs to a model")
    with pytest.raises(InputError, match="logs must be a folder"):
        plan_model(MODEL, logs=3)
    (tmp_path / "empty").mkdir()
    with pytest.warns(GemmifyWarning, match="holds no log for"):
        plan_model(MODEL, logs=tmp_path / "empty")


def test_the_target_decides_which_folder_is_read(tmp_path):
    logs = write(tmp_path / "logs", finals("stem", WINOGRAD))
    other = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2", "num-cores": 2})
    with pytest.warns(GemmifyWarning, match="holds no log for llvm-x86-64-v2"):
        assert plan_model(MODEL, target=other, logs=logs).tuning["tuned"] == 0
