"""What the tuner says of candidates for a GPU, with nothing compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemmify.accuracy import UNIT
from gemmify.conformance import expected, tolerance
from gemmify.tuning import features
from gemmify.tuning.measure import library
from gemmify.tuning.measure.library import LibrarySpec, build_library
from gemmify.tuning.point import Point
from gemmify.tuning.task import Task
from lowering import Tile, conv2d
from lowering.staged import as_staged
from schedules import Gpu, machine_of, parse_target

LAYER = conv2d(16, 8, 8, 24, 3)


@pytest.fixture
def spec_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], LibrarySpec]:
    monkeypatch.setattr(library.tvm, "compile", lambda *_, **__: None)
    monkeypatch.setattr(library, "write_library", lambda *_: None)

    def made(target: str) -> LibrarySpec:
        point = Point("implicit-gemm", Tile(1, 1))
        return build_library(Task(LAYER, ()), point, target, str(tmp_path / "candidate.so"))

    return made


def test_a_candidate_in_tf32_is_allowed_the_rounding_of_its_factors(spec_for: Callable[[str], LibrarySpec]) -> None:
    want = expected(LAYER, ())
    plain, rounded = (
        tolerance("float32", want, spec_for(target).growth, ())
        for target in ("cuda -arch=sm_90", "cuda -arch=sm_90 -tf32")
    )
    assert rounded > UNIT["tf32"] * want.peak > 100 * plain


def test_half_precision_is_measured_against_the_tensor_cores() -> None:
    gpu = machine_of(parse_target("cuda -arch=sm_90"))
    assert isinstance(gpu, Gpu)
    half = features._macs_a_unit(as_staged(replace(LAYER, dtype="float16")), gpu)
    assert half / features._macs_a_unit(LAYER, gpu) == pytest.approx(gpu.half / gpu.fma)
