"""What must hold of the catalogue and of the packages as they stand, whatever is added to them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from oracle import random_problem

import lowering
from lowering import LOWERINGS, ConvProblem, Lowering, Problem, Reason, TransposedConvProblem, conv2d
from lowering.passes import pass_tile

ROOT = Path(lowering.__file__).parent.parent
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ALL = pytest.mark.parametrize("key", LOWERINGS)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports by an absolute name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "others"), [("schedules", {"lowering", "gemmify"}), ("lowering", {"schedules", "gemmify"})]
)
def test_dependencies_point_one_way(package: str, others: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): sorted(imported(path) & others) for path in files if imported(path) & others}
    assert not wrong


def test_keys_are_unique_and_in_order() -> None:
    assert [low.key for low in LOWERINGS.values()] == list(LOWERINGS)
    assert len({type(low) for low in LOWERINGS.values()}) == len(LOWERINGS)
    assert list(LOWERINGS)[-1] == "direct"


@ALL
def test_names_are_mechanical(key: str) -> None:
    """Key "kn2row-aa": class Kn2RowAA in kn2row_aa.py; a family "winograd-4" may share the file winograd.py."""
    cls = type(LOWERINGS[key])
    assert cls.__name__.lower() == key.replace("-", "")
    stem = Path(inspect.getfile(cls)).stem
    family = key.replace("-", "_")
    number = family.rpartition("_")[2]
    assert stem == family or (number.isdigit() and stem == family.removesuffix(f"_{number}"))
    assert getattr(lowering, cls.__name__) is cls


@ALL
def test_every_lowering_says_what_it_is(key: str) -> None:
    low = LOWERINGS[key]
    for name in ("summary", "gemm_formula", "workspace_formula", "source"):
        assert getattr(low, name).strip(), name
    assert low.layout in ("NHWC", "NCHW")
    assert type(low).__doc__ and type(low).__doc__ != Lowering.__doc__
    assert low.summary not in [other.summary for other in LOWERINGS.values() if other is not low]


@QUICK
@given(random_problem())
def test_a_refusal_says_why(problem: Problem) -> None:
    for low in LOWERINGS.values():
        reason = low.applicable(problem)
        assert reason is None or (isinstance(reason, Reason) and "needs" in reason.text and "got" in reason.text)
    assert LOWERINGS["direct"].applicable(problem) is None


@QUICK
@given(random_problem())
def test_costs_are_consistent(problem: Problem) -> None:
    for low in LOWERINGS.values():
        if low.applicable(problem) is not None:
            continue
        tile = pass_tile(low, problem)
        cost = low.cost(problem, tile)
        assert cost == low.cost(problem, tile)
        executed = sum(gemm.macs for gemm in cost.gemms)
        assert cost.macs >= executed, "padding a tile adds work, it saves none"
        # What the pads of a transposed convolution cut off need not be computed, what its phases read outside is 0.
        exact = low.key == "col2im" or not isinstance(problem, TransposedConvProblem)
        if exact and low.same_macs:
            assert cost.macs >= problem.macs and executed == problem.macs
        assert cost.workspace_bytes == sum(cost.workspace.values()) >= 0
        assert cost.weight_bytes >= problem.element * problem.m
        assert cost.bytes_moved >= cost.weight_bytes + 2 * cost.workspace_bytes
        assert cost.error_growth >= 1 and cost.read_factor >= 1


@QUICK
@given(random_problem())
def test_stages_form_a_chain(problem: Problem) -> None:
    """Stages read what stands before them, the last alone writes the output, and workspaces are those of the cost."""
    for low in LOWERINGS.values():
        if low.applicable(problem) is not None:
            continue
        tile = pass_tile(low, problem)
        stages = low.build(problem, tile)
        known = {"data", "weight"}
        for stage in stages:
            assert set(stage.reads) <= known and stage.name not in known
            known.add(stage.name)
        assert [stage.kind for stage in stages].count("output") == 1 and stages[-1].kind == "output"
        workspaces = {stage.name for stage in stages if stage.kind == "workspace"}
        assert workspaces == set(low.cost(problem, tile).workspace)


def test_the_workspace_formulas_of_the_specification() -> None:
    """Worked by hand for 8 channels of 10x12, 3x3, stride 1, pad 1: float32, a tile of 4 x 16."""
    problem = conv2d(8, 10, 12, 16, 3)
    by_hand = {
        "implicit-gemm": 4 * 8 * 12 * 14,
        "im2row": 4 * 8 * 9 * 10 * 12,
        "im2col": 4 * 8 * 9 * 128,
        "direct": 0,
    }
    for key, size in by_hand.items():
        low = LOWERINGS[key]
        assert low.cost(problem, lowering.Tile(4, 16)).workspace_bytes == size, key


def test_wrong_problems_are_refused() -> None:
    good = {"n": 1, "c": 4, "m": 4, "size": (5,), "kernel": (3,), "stride": (1,), "pad_before": (0,), "pad_after": (0,)}
    good["dilation"] = (1,)
    ConvProblem(**good)  # type: ignore[arg-type]
    for change, text in [
        ({"kernel": (7,)}, "does not fit"),
        ({"groups": 3}, "must divide"),
        ({"stride": (0,)}, "too small"),
        ({"dtype": "int8"}, "is not one of"),
        ({"size": (5, 5)}, "needs 2 entries"),
    ]:
        with pytest.raises(ValueError, match=text):
            ConvProblem(**{**good, **change})  # type: ignore[arg-type]
