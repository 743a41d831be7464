"""`gemmify explain` and `gemmify list`: every candidate with its numbers or its reason, the same choice as `plan`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_plan import make_model, refused

from gemmify import InputError, cli
from gemmify.commands import explain as commands_explain
from gemmify.commands import list as listing
from gemmify.explain import explain_model
from gemmify.layer import compile_layer
from gemmify.pipeline import plan_model
from lowering import LOWERINGS, DenseProblem, TransposedConvProblem, conv2d
from lowering.conditions import conditions, probes
from schedules import parse_target

README = Path(__file__).resolve().parent.parent / "lowering" / "README.md"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.onnx"
    onnx.save(make_model(), str(path))
    return str(path)


@pytest.fixture(scope="module")
def resnet() -> tuple[dict[str, Any], float]:
    begin = time.process_time()
    return explain_model("resnet50"), time.process_time() - begin


def group_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(group for group in found["layers"] if name in group["names"])


def test_a_large_network_takes_seconds_and_equal_layers_share_an_entry(resnet) -> None:
    found, seconds = resnet
    names = [name for group in found["layers"] for name in group["names"]]
    assert len(names) == len(set(names)) == 54 and len(found["layers"]) < 30
    assert seconds < 10
    for group in found["layers"]:
        assert sorted(c["key"] for c in group["candidates"]) == sorted(LOWERINGS)


def test_the_choice_is_that_of_plan(resnet) -> None:
    chosen = {name: group["lowering"] for group in resnet[0]["layers"] for name in group["names"]}
    assert chosen == plan_model("resnet50").plan.layers


def test_numbers_and_verdicts_go_together(resnet) -> None:
    for group in resnet[0]["layers"]:
        first, *rest = group["candidates"]
        assert first["verdict"] == "chosen" and first["key"] == group["lowering"] and first["ratio"] == 1
        for c in rest:
            if "ratio" not in c:
                assert c["verdict"].startswith("needs ") and set(c) == {"key", "verdict"}
                continue
            assert c["cycles"] / first["cycles"] == pytest.approx(c["ratio"]) and c["ratio"] >= 1
            assert c["gemms"] and c["macs"] > 0 and c["workspace_bytes"] >= 0 and 0 < c["error"] < 1e-3
            if c["ratio"] > 1.01:
                assert re.fullmatch(r"modelled [\d.]+ x slower", c["verdict"])
        ratios = [c["ratio"] for c in group["candidates"] if "ratio" in c]
        assert ratios == sorted(ratios), "best first"


def test_the_numbers_are_the_costs(model: str) -> None:
    """3 channels of 8x8, 3x3, to 8: by hand."""
    stem = group_of(explain_model(model), "stem")
    row = next(c for c in stem["candidates"] if c["key"] == "im2row")
    assert row["workspace_bytes"] == 4 * 27 * 64
    assert row["gemms"] == [{"m": 64, "n": 8, "k": 27, "count": 1}]
    assert stem["macs"] == 64 * 8 * 27 and row["macs"] >= stem["macs"]
    assert row["error"] == pytest.approx(2 * 2.0**-24 * (27**0.5 + 1))


def test_bounds_and_forced_keys_show(model: str) -> None:
    stem = group_of(explain_model(model, max_workspace=0), "stem")
    row = next(c for c in stem["candidates"] if c["key"] == "im2row")
    assert row["verdict"] == f"needs {4 * 27 * 64} bytes of workspace, the bound is 0" and row["ratio"] > 0
    stem = group_of(explain_model(model, max_error=2e-6), "stem")
    row = next(c for c in stem["candidates"] if c["key"] == "winograd-6")
    assert "has an expected error of" in row["verdict"] and "the bound is 2.0e-06" in row["verdict"]
    stem = group_of(explain_model(model, lowering="im2col"), "stem")
    assert stem["lowering"] == "im2col" and stem["why"] == "as asked"
    assert any("x faster, not what was asked for" in c["verdict"] for c in stem["candidates"])
    fallen = group_of(explain_model(model, lowering="pointwise"), "stem")
    assert fallen["why"].startswith(
        "pointwise does not apply: needs a 1x1 kernel, got 3x3; what works here, best first: "
    )


def test_the_command(model: str, tmp_path, capfd) -> None:
    assert cli.main(["explain", model, "--json", str(tmp_path / "e.json")]) == 0
    out = capfd.readouterr().out
    titles = ("1/3  stem: convolution 2-D 1x3x8x8 -> 8, 3x3 p1", "2/3  mix", "3/3  fc: fully connected layer 1x16 -> 5")
    for part in (*titles, "64x8x27", "x slower", "small: 3 layers", "cycles are modelled", "no time was measured"):
        assert part in out, part
    assert "needs a convolution, got a fully connected layer" in out
    assert json.loads((tmp_path / "e.json").read_text())["layers"][0]["names"] == ["stem"]
    assert not list(tmp_path.glob("*.so"))
    assert cli.main(["explain", model, "--layer", "mix", "--json", "-"]) == 0
    (only,) = json.loads(capfd.readouterr().out)["layers"]
    assert only["names"] == ["mix"]
    assert cli.main(["explain", model, "--layer", "mix"]) == 0
    out = capfd.readouterr().out
    assert "small: 1 layer;" in out and "stem" not in out


def test_equal_layers_are_counted(capfd) -> None:
    assert cli.main(["explain", "resnet50"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"resnet50: 54 layers of \d+ kinds \(equal layers are shown once\)", out)
    assert re.search(r"\(\d+ equal layers\): convolution 2-D 1x256x14x14 -> 256, 3x3 p1", out)
    assert len(out.splitlines()) < 54 * len(LOWERINGS) / 2


def test_wrong_calls(model: str, capfd) -> None:
    refused(capfd, ["explain", model, "--layer", "stern"], "no layer is named 'stern'", "stem, mix, fc")
    refused(capfd, ["explain", "resnet50", "--layer", "res2_1_a_1x2"], "close ones of the 54 layers", "res2_1_a_1x1")
    refused(capfd, ["explain", model, "--lowering", "im2pony"], "'im2pony' is not known")
    refused(
        capfd, ["explain", model, "--lowering", "fc=im2row", "--strict"], "layer fc: im2row does not apply", "dense"
    )


def test_nothing_fits_and_other_layers_do_not_matter(model: str, capfd) -> None:
    assert cli.main(["explain", model, "--layer", "stem", "--max-error", "1e-12"]) == 0
    out = capfd.readouterr().out
    assert "nothing fits: no lowering is expected to stay below an error of 1.0e-12" in out
    assert "the bound is 1.0e-12" in out and "im2row" in out and "chosen" not in out
    stem = group_of(explain_model(model, layer="stem", max_error=1e-12), "stem")
    assert stem["lowering"] is None and {c["ratio"] for c in stem["candidates"] if "ratio" in c} == {None}
    assert all(c["verdict"] not in ("chosen", "None") for c in stem["candidates"])
    assert group_of(explain_model(model, layer="fc", lowering="dense", strict=True), "fc")["lowering"] == "dense"


def test_threads_are_those_of_the_workspace(model: str, capfd) -> None:
    assert cli.main(["explain", model, "--threads", "1", "--json", "-"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["threads"] == 1 == explain_model(model, threads=1)["threads"]
    refused(capfd, ["explain", model, "--threads", "9999"], "9999 threads were asked for")


def test_a_mistyped_key_is_answered_with_a_close_one(model: str, capfd) -> None:
    refused(capfd, ["explain", model, "--lowering", "kn2row_aa"], "did you mean kn2row-aa", "choose auto or one of")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_breaks_no_key(model: str, width: int) -> None:
    stem = group_of(explain_model(model), "stem")
    usable = [c for c in stem["candidates"] if "gemms" in c]
    lines = commands_explain.narrow(usable, max(80, width))
    assert all(len(line) <= max(80, width) for line in lines)
    assert [line.split()[0] for line in lines[2:] if line[0] != " "] == [c["key"] for c in usable]
    blocks = listing.blocks(listing.lowerings(), width)
    assert all(len(line) <= width for line in blocks)
    assert [line.split()[0] for line in blocks if line[0] != " "] == list(LOWERINGS)
    said = " ".join(" ".join(blocks).split())
    assert all(low.source in said and low.gemm_formula in said for low in LOWERINGS.values())


# --- what would work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "key", "condition", "works"),
    [
        (conv2d(8, 9, 9, 8, 3), "pointwise", "needs a 1x1 kernel, got 3x3", "implicit-gemm"),
        (conv2d(8, 9, 9, 8, 3, 2), "winograd-2", "needs stride 1, got 2x2", "implicit-gemm"),
        (conv2d(8, 9, 9, 8, 3), "depthwise", "needs groups = C = M", "implicit-gemm"),
        (DenseProblem(1, 40, 30), "im2col", "needs a convolution, got a fully connected layer", "dense"),
        (
            TransposedConvProblem(1, 4, 4, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)),
            "im2row", "got a transposed convolution", "direct",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_condition_and_what_works(problem, key, condition, works) -> None:
    with pytest.raises(InputError) as said:
        compile_layer(problem, key, parse_target("llvm"))
    text = str(said.value)
    assert f"lowering {key} does not apply: " in text and condition in text
    named = text.rpartition("what works here, best first: ")[2].split(", ")
    assert works in named and 1 <= len(named) <= 4
    assert all(LOWERINGS[k].applicable(problem) is None for k in named)


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_the_whole_catalogue(capfd) -> None:
    assert cli.main(["list"]) == 0
    out = capfd.readouterr().out
    for key, low in LOWERINGS.items():
        for said in (key, low.gemm_formula, low.workspace_formula, low.layout, low.source, *conditions(low)):
            assert said in out, (key, said)


def test_the_readme_holds_the_table(capfd) -> None:
    text = README.read_text(encoding="utf-8")
    assert text == listing.with_catalogue(text), "run scripts/catalogue"
    assert cli.main(["list", "--markdown"]) == 0
    assert capfd.readouterr().out.strip() in text


def test_conditions_are_what_applicable_says() -> None:
    assert conditions(LOWERINGS["direct"]) == ()
    assert conditions(LOWERINGS["pointwise"]) == ("a convolution", "a 1x1 kernel", "padding 0")
    assert {"stride 1", "dilation 1"} <= set(conditions(LOWERINGS["winograd-2"]))
    for low in LOWERINGS.values():
        assert any(low.applicable(problem) is None for problem in probes()), low.key
