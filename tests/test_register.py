"""A lowering from outside the package: registered, checked, explained, planned and compiled like one of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
from oracle import reference
from test_plan import make_model
from tvm import te

import gemmify
import lowering
from gemmify import CheckError, InputError, cli
from gemmify.explain import explain_model
from gemmify.layer import compile_layer
from gemmify.pipeline import plan_model
from gemmify.select import make_policy
from lowering import LOWERINGS, ConvProblem, GemmAxes, GemmShape, Lowering, LoweringCost, Problem, Reason, Stage, Tile
from lowering import registry as registry_module
from lowering.base import ceil_div, no_epilogue, require_conv, zero
from lowering.tile_gemm import pack_panels, read_panels, tile_gemm
from schedules import parse_target


class RowPatches(Lowering):
    """All patches stored with the taps innermost: `P[n, y, x, c, k] = I[n, y s + kh d - p, x s + kw d - p, c]`.

    GEMM `[Ho Wo x C K^2]·[C K^2 x M]`, with the taps innermost; workspace `e N C K^2 Ho Wo` bytes.
    """

    key = "row-patches"
    summary = "patches with the taps innermost"
    gemm_formula = "[Ho Wo x C K^2]·[C K^2 x M]"
    workspace_formula = "e N C K^2 Ho Wo"
    source = "this test"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        return None if problem.groups == 1 else Reason(f"needs one group, got {problem.groups}")

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        outer, inner = problem.n * prod(problem.out_size[:-1]), problem.out_size[-1]
        return GemmAxes(outer, inner, problem.m, problem.taps * problem.c)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        k, rows = problem.taps * problem.c, problem.n * prod(problem.out_size[:-1])
        columns = ceil_div(problem.m, tile.nr) * tile.nr
        patches = problem.scratch_element * problem.n * problem.pixels * k
        weights = problem.element * columns * k
        return LoweringCost(
            gemms=(GemmShape(problem.n * problem.pixels, problem.m, k),),
            macs=rows * ceil_div(problem.out_size[-1], tile.mr) * tile.mr * columns * k,
            bytes_moved=weights + 3 * patches,
            workspace_bytes=patches,
            weight_bytes=weights,
            error_growth=sqrt(k),
            workspace={"patches": patches},
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Any = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)

        def patches(data: te.Tensor) -> te.Tensor:
            def element(*index: Any) -> Any:
                n, at, c, tap = (
                    index[0],
                    index[1 : 1 + problem.dims],
                    index[1 + problem.dims],
                    index[2 + problem.dims :],
                )
                where = [
                    o * s + t * d - p
                    for o, s, t, d, p in zip(at, problem.stride, tap, problem.dilation, problem.pad_before, strict=True)
                ]
                inside = [test for w, size in zip(where, problem.size, strict=True) for test in (w >= 0, w < size)]
                return te.if_then_else(te.all(*inside), data(n, *where, c), zero(problem.accumulator))

            return te.compute((problem.n, *problem.out_size, problem.c, *problem.kernel), element, name="patches")

        def pack(weight: te.Tensor) -> te.Tensor:
            turned = te.compute(
                (problem.m, problem.c, *problem.kernel), lambda m, c, *tap: weight(m, *tap, c), name="turned"
            )
            return pack_panels(turned, 1, problem.m, (problem.c, *problem.kernel), tile.nr)

        def gemm(stored: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return tile_gemm(
                outer=(problem.n, *problem.out_size[:-1]),
                inner=problem.out_size[-1],
                n=problem.m,
                k_extents=(problem.c, *problem.kernel),
                read_a=lambda at, x, g, n, k: stored(*at, x, *k),
                read_b=read_panels(packed),
                tile=tile,
                epilogue=epilogue,
            )

        return (
            Stage("patches", ("data",), patches, "workspace"),
            Stage("packed", ("weight",), pack, "weight"),
            Stage("gemm", ("patches", "packed"), gemm, "output"),
        )


@pytest.fixture
def toy() -> Iterator[Lowering]:
    with lowering.registered(made := RowPatches()):
        yield made
    assert "row-patches" not in LOWERINGS


def test_it_stands_before_direct(toy: Lowering) -> None:
    assert list(LOWERINGS)[-2:] == ["row-patches", "direct"] and LOWERINGS["row-patches"] is toy


def test_the_check_passes_and_needs_no_registration() -> None:
    found = gemmify.check_lowering(RowPatches(), count=9)
    assert found.key == "row-patches" and len(found.problems) == 9
    assert {p.dtype for p in found.problems} == {"float32", "float64"}
    assert "row-patches" not in LOWERINGS


class WrongBytes(RowPatches):
    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        cost = super().cost(problem, tile)
        sizes = {name: size + 4 for name, size in cost.workspace.items()}
        return LoweringCost(**{**vars(cost), "workspace": sizes, "workspace_bytes": sum(sizes.values())})


class WrongScratch(RowPatches):
    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        return LoweringCost(**{**vars(super().cost(problem, tile)), "thread_bytes": 1 << 16})


class WrongNumbers(RowPatches):
    """A patch matrix that is off by a thousandth."""

    def build(self, problem: Problem, tile: Tile, epilogue: Any = no_epilogue) -> tuple[Stage, ...]:
        first, *rest = super().build(problem, tile, epilogue)

        def scaled(data: te.Tensor) -> te.Tensor:
            good = first.compute(data)
            return te.compute(good.shape, lambda *i: good(*i) * te.const(1 + 1e-3, problem.accumulator), name="patches")

        return (Stage("patches", ("data",), scaled, "workspace"), *rest)


class Unwritten(RowPatches):
    """NaN reaches the output, as where an element of a workspace is left out."""

    def build(self, problem: Problem, tile: Tile, epilogue: Any = no_epilogue) -> tuple[Stage, ...]:
        patches, pack, gemm = super().build(problem, tile, epilogue)

        def partly(data: te.Tensor) -> te.Tensor:
            good = patches.compute(data)
            return te.compute(good.shape, lambda *i: te.sqrt(zero(problem.accumulator) - 1) + good(*i), name="patches")

        return (Stage("patches", ("data",), partly, "workspace"), pack, gemm)


class Fickle(RowPatches):
    calls = 0

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        Fickle.calls += 1
        return LoweringCost(**{**vars(super().cost(problem, tile)), "macs": Fickle.calls})


class Unnamed(RowPatches):
    """Its cost forgets the workspace that its stages hold."""

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        return LoweringCost(**{**vars(super().cost(problem, tile)), "workspace": {}, "workspace_bytes": 0})


class BareFalse(RowPatches):
    def applicable(self, problem: Problem) -> Any:
        return super().applicable(problem) and False


class NoCost(RowPatches):
    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        raise KeyError("patches")


class NoAnswer(RowPatches):
    def applicable(self, problem: Problem) -> Any:
        raise AttributeError("no such thing")


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (NoCost, r"row-patches fails its check: \w+Problem\(.*cost raises KeyError: 'patches'"),
        (NoAnswer, r"row-patches fails its check: \w+Problem\(.*applicable raises AttributeError: no such thing"),
        (WrongBytes, "bytes of workspace"),
        (WrongScratch, "65536 bytes of scratch"),
        (WrongNumbers, "limit"),
        (Unwritten, "patches: not filled"),
        (Fickle, "differs from call to call"),
        (Unnamed, "the stages hold the workspaces"),
        (BareFalse, "applicable answers False"),
    ],
)
def test_what_is_wrong_is_found(cls: type[RowPatches], said: str) -> None:
    with pytest.raises(CheckError, match=said):
        gemmify.check_lowering(cls(), count=3)


def test_problems_that_it_refuses_are_an_error() -> None:
    with pytest.raises(InputError, match="needs one group, got 2"):
        gemmify.check_lowering(RowPatches(), [lowering.conv2d(4, 5, 5, 4, 3, g=2)])


def test_a_network_with_it(toy: Lowering, tmp_path, capfd) -> None:
    import onnx

    path = str(tmp_path / "small.onnx")
    onnx.save(make_model(), path)
    stem = next(g for g in explain_model(path)["layers"] if g["names"] == ["stem"])
    row = next(c for c in stem["candidates"] if c["key"] == "row-patches")
    assert row["workspace_bytes"] == 4 * 27 * 64 and row["verdict"] != "chosen" and row["ratio"] > 1
    fc = next(g for g in explain_model(path)["layers"] if g["names"] == ["fc"])
    assert {"key": "row-patches", "verdict": "needs a convolution, got a fully connected layer"} in fc["candidates"]
    planned = plan_model(path, lowering="row-patches").plan.layers
    assert planned == {"stem": "row-patches", "mix": "row-patches", "fc": "dense"}
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    with_toy = gemmify.compile(path, lowering="row-patches")
    assert [layer["lowering"] for layer in with_toy.layers] == ["row-patches", "row-patches", "dense"]
    np.testing.assert_allclose(with_toy(x), gemmify.compile(path, lowering="direct")(x), rtol=1e-4, atol=1e-5)
    assert cli.main(["list", "--json", "-"]) == 0
    rows = {low["key"]: low for low in json.loads(capfd.readouterr().out)["lowerings"]}
    assert rows["row-patches"]["needs"] == "a convolution; one group"


def test_another_lowering_under_the_same_key_is_not_served_from_a_cache() -> None:
    problem, target = lowering.conv2d(3, 6, 6, 8, 3), parse_target("llvm")
    rng = np.random.default_rng(0)
    data, weight = (rng.standard_normal(s).astype("float32") for s in ((1, 6, 6, 3), (8, 3, 3, 3)))
    want = reference(problem, data, weight)
    for cls, right in ((RowPatches, True), (WrongNumbers, False), (RowPatches, True)):
        with lowering.registered(cls()):
            got = compile_layer(problem, "row-patches", target, epilogue=()).run(data, weight)
        assert (np.abs(got - want).max() < 1e-4 * np.abs(want).max()) == right


# --- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_lowerings_are_refused() -> None:
    def changed(**attributes: Any) -> Lowering:
        return type("Changed", (RowPatches,), attributes)()

    before = list(LOWERINGS)
    for key in ("Row", "row_patches", "-row", "row-", "row--patches", "1row", "row patches", "auto", "plain", "größe"):
        with pytest.raises(ValueError, match="must be lower-case words"):
            lowering.register(changed(key=key))
    with pytest.raises(ValueError, match=r"'im2row' is taken by lowering\.im2row\.Im2row"):
        lowering.register(changed(key="im2row"))
    for attribute in ("key", "summary", "gemm_formula", "workspace_formula", "source"):
        for value in (None, "", 3):
            with pytest.raises(ValueError, match=f"Changed needs the attribute {attribute}"):
                lowering.register(changed(**{attribute: value}))
    with pytest.raises(ValueError, match="layout NHWC or NCHW, found 'CHWN'"):
        lowering.register(changed(layout="CHWN"))
    with pytest.raises(TypeError, match=r"give an instance: RowPatches\(\)"):
        lowering.register(RowPatches)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="derive it from"):
        lowering.register("im2row")  # type: ignore[arg-type]
    assert list(LOWERINGS) == before


def test_only_what_was_registered_can_be_taken_out() -> None:
    lowering.register(RowPatches())
    with pytest.raises(ValueError, match="'row-patches' is taken"), lowering.registered(RowPatches()):
        pass
    assert "row-patches" in LOWERINGS, "it was there before the block"
    lowering.unregister("row-patches")
    for key, said in (("row-patches", "no lowering of key"), ("direct", "belongs to the catalogue")):
        with pytest.raises(ValueError, match=said):
            lowering.unregister(key)
    with pytest.raises(InputError, match="'row-patches' is not known"):
        make_policy("row-patches", False, None)


def test_entry_points_are_loaded_once_and_a_broken_one_is_named(monkeypatch) -> None:
    group = registry_module.ENTRY_POINTS
    entries = [
        EntryPoint("row-patches", f"{__name__}:RowPatches", group),
        EntryPoint("gone", "no_such_package:Form", group),
        EntryPoint("again", f"{__name__}:RowPatches", group),
    ]
    asked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return entries

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    table = dict(LOWERINGS)
    registry = registry_module.Registry(table)
    assert not asked, "nothing is loaded before it is asked for"
    with pytest.warns(RuntimeWarning) as said:
        assert registry.catalogue() is table
    assert [str(w.message).partition(" (")[0] for w in said] == ["the lowering 'gone'", "the lowering 'again'"]
    assert "ModuleNotFoundError" in str(said[0].message) and "is taken" in str(said[1].message)
    assert isinstance(table["row-patches"], RowPatches) and list(table)[-1] == "direct"
    assert registry.catalogue() is table and asked == [group]
