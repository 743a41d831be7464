"""What the GPU suite measures: the problems of its correctness part, its layers and its networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from gemmify.bench.shapes import network_convolutions
from lowering import ConvProblem, DenseProblem, Problem, catalogue, conv2d
from lowering.epilogue import EpilogueOp
from lowering.problem import TransposedConvProblem

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
"""What a layer is stored in; "tf32" is float32 whose products may be rounded."""
BATCHES = (32, 1, 256)
"""In the order in which they are measured."""
CHECKED = 2
"""Problems at least of each lowering in each precision."""
EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("relu"))
_EPILOGUES = (
    (EpilogueOp("bias", 0), EpilogueOp("leaky_relu", None, (0.25,))),  # it hides no output, as a ReLU does
    (EpilogueOp("bias", 0), EpilogueOp("add", 1)),
    (),
)


@dataclass(frozen=True)
class Wanted:
    """One entry of the suite before it is built: a layer in one lowering and one precision.

    `variant` tells apart what belongs to one row: "auto" is what `compile` takes, else the lowering's key.
    """

    section: str
    name: str
    problem: Problem
    lowering: str
    precision: str
    epilogue: tuple[EpilogueOp, ...]
    batch: int = 0
    variant: str = ""

    @property
    def id(self) -> str:
        batch = f"/batch{self.batch}" if self.batch else ""
        return f"{self.section}/{self.name}{batch}/{self.precision}/{self.variant or self.lowering}"


@dataclass(frozen=True)
class WantedNetwork:
    """A network of the zoo, its batch norms folded into its convolutions, in one precision and batch."""

    name: str
    precision: str
    batch: int

    @property
    def id(self) -> str:
        return f"network/{self.name}/batch{self.batch}/{self.precision}"


def dtype_of(precision: str) -> str:
    """The dtype that a precision is stored in."""
    return "float32" if precision == "tf32" else precision


def in_precision(problem: Problem, precision: str) -> Problem:
    """The problem with its tensors in the dtype of a precision."""
    return replace(problem, dtype=dtype_of(precision))


def check_problems() -> dict[str, Problem]:
    """About forty small layers: every kind of window, odd sizes, one pixel, one channel, groups, long reductions."""
    same1, same3 = (0, 0), (1, 1)
    found: dict[str, Problem] = {
        "dense:1x512x1000": DenseProblem(1, 512, 1000),
        "dense:7x65x33": DenseProblem(7, 65, 33),
        "dense:64x256x128": DenseProblem(64, 256, 128),
        "dense:130x200x72": DenseProblem(130, 200, 72),
        "dense:5x4608x40": DenseProblem(5, 4608, 40),
        "1x1": conv2d(64, 14, 15, 96, 1, n=2),
        "1x1:odd": conv2d(13, 9, 11, 17, 1, n=3),
        "1x1:stride2": conv2d(48, 15, 15, 40, 1, 2, n=2),
        "1x1:deep": conv2d(512, 7, 7, 128, 1, n=4),
        "1x1:groups": conv2d(48, 8, 8, 64, 1, g=4),
        "1x1:pixel": conv2d(72, 1, 1, 56, 1, n=9),
        "3x3:rgb": conv2d(3, 32, 32, 16, 3),
        "3x3": conv2d(16, 14, 14, 32, 3, n=2),
        "3x3:odd": conv2d(17, 13, 11, 19, 3, n=3),
        "3x3:wide": conv2d(64, 28, 28, 64, 3, n=2),
        "3x3:deep": conv2d(256, 7, 7, 128, 3, n=2),
        "3x3:batch": conv2d(32, 8, 8, 64, 3, n=16),
        "3x3:stride2": conv2d(24, 15, 15, 40, 3, 2, n=2),
        "3x3:nopad": conv2d(40, 12, 10, 24, 3, 1, 0, n=2),
        "3x3:dilated": conv2d(16, 16, 16, 24, 3, d=2),
        "3x3:groups2": conv2d(32, 12, 12, 48, 3, g=2, n=2),
        "3x3:groups4": conv2d(64, 9, 9, 64, 3, g=4),
        "3x3:single": conv2d(1, 20, 20, 1, 3),
        "3x3:depthwise": conv2d(32, 17, 17, 32, 3, g=32, n=2),
        "3x3:depthwise2": conv2d(48, 16, 16, 48, 3, 2, g=48),
        "3x3:multiplier": conv2d(16, 12, 12, 32, 3, g=16),
        "5x5:depthwise": conv2d(24, 15, 13, 24, 5, g=24),
        "5x5": conv2d(16, 20, 20, 24, 5),
        "5x5:stride2": conv2d(12, 21, 19, 20, 5, 2, n=2),
        "5x5:gray": conv2d(1, 28, 28, 8, 5),
        "7x7:rgb": conv2d(3, 40, 40, 32, 7, 2),
        "11x11:rgb": conv2d(3, 63, 63, 24, 11, 4, 0),
        "11x11": conv2d(8, 18, 18, 8, 11),
        "2x2": conv2d(20, 10, 10, 28, 2, 2, 0),
        "1x7": ConvProblem(2, 24, 32, (17, 17), (1, 7), (1, 1), (0, 3), (0, 3), (1, 1)),
        "3x3:uneven": ConvProblem(1, 16, 20, (14, 14), (3, 3), (2, 2), same1, same3, (1, 1)),
        "1d": ConvProblem(2, 16, 24, (50,), (5,), (1,), (2,), (2,), (1,)),
        "3d": ConvProblem(1, 8, 12, (6, 7, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        "up:4x4": TransposedConvProblem(1, 16, 24, (9, 9), (4, 4), (2, 2), same3, same3, (1, 1), (0, 0)),
        "up:3x3": TransposedConvProblem(2, 12, 8, (7, 6), (3, 3), (2, 2), same3, same3, (1, 1), (1, 1)),
        "up:2x2": TransposedConvProblem(1, 32, 16, (8, 8), (2, 2), (2, 2), same1, same1, (1, 1), (0, 0)),
    }
    return found


def wanted_checks(least: int = CHECKED) -> list[Wanted]:
    """Each lowering x precision on at least `least` of the problems it takes (those that were used least), and each
    problem at least once in each precision."""
    problems, found = check_problems(), list[Wanted]()
    for number, precision in enumerate(PRECISIONS):
        used = dict.fromkeys(problems, 0)
        for key, lowering in catalogue().items():
            names = [n for n, p in problems.items() if lowering.applicable(_staged(p, precision)) is None]
            names.sort(key=lambda name: used[name])  # the sort is stable: the order of the table decides
            for name in names[:least]:
                used[name] += 1
                found.append(_check(name, problems[name], key, precision, number))
        for name in (name for name, count in used.items() if not count):
            usable = [k for k, lo in catalogue().items() if lo.applicable(_staged(problems[name], precision)) is None]
            found.append(_check(name, problems[name], usable[0], precision, number))
    return found


def _staged(problem: Problem, precision: str) -> Problem:
    from lowering.staged import as_staged

    staged: Problem = as_staged(in_precision(problem, precision))
    return staged


def _check(name: str, problem: Problem, key: str, precision: str, number: int) -> Wanted:
    epilogue = _EPILOGUES[(len(name) + len(key) + number) % len(_EPILOGUES)]
    return Wanted("check", name, in_precision(problem, precision), key, precision, epilogue)


_LAYERS = (
    "resnet50:conv1",
    "resnet50:res2_1_a_1x1",
    "resnet50:res2_1_b_3x3",
    "resnet50:res2_1_c_1x1",
    "resnet50:res3_1_b_3x3",
    "resnet50:res3_1_shortcut_1x1",
    "resnet50:res4_1_b_3x3",
    "resnet50:res4_2_a_1x1",
    "resnet50:res5_1_b_3x3",
    "resnet50:res5_1_c_1x1",
    "vgg16:conv1_2",
    "vgg16:conv3_2",
    "vgg16:conv5_1",
    "alexnet:conv1",
    "alexnet:conv2",
    "googlenet:inception_4a_5x5",
    "mobilenet_v2:block2_expand",
    "mobilenet_v2:block3_depthwise",
    "squeezenet:fire4_expand3x3",
)
_DENSE = {"vgg16:fc6": (25088, 4096), "resnet50:fc": (2048, 1000)}
GEMM = "gemm:8192x8192x8192"
"""The large product that shows the peak, whatever the batch."""


def layer_problems() -> dict[str, Problem]:
    """The layers that are timed, at batch 1: of each network those that differ in what limits them."""
    networks = {name.partition(":")[0] for name in _LAYERS}
    every = {f"{n}:{layer}": p for n in networks for layer, p in network_convolutions(n).items()}
    found: dict[str, Problem] = {name: every[name] for name in _LAYERS}
    return {**found, **{name: DenseProblem(1, c, m) for name, (c, m) in _DENSE.items()}}


def wanted_layers(
    machine: Any,
    batches: Sequence[int] = BATCHES,
    precisions: Sequence[str] = ("float16", "float32", "tf32", "bfloat16"),
    pattern: str = "*",
) -> list[Wanted]:
    """The layers as `compile` would build them on `machine` (a Gpu), what matters most first; bfloat16 at batch 32."""
    found = []
    for precision in precisions:
        if fnmatchcase(GEMM, pattern):
            problem = in_precision(DenseProblem(8192, 8192, 8192), precision)
            found.append(_layer(GEMM, problem, precision, 0, machine))
    for batch in batches:
        for precision in precisions:
            if precision == "bfloat16" and batch != BATCHES[0]:
                continue
            for name, problem in layer_problems().items():
                if fnmatchcase(name, pattern):
                    sized = replace(in_precision(problem, precision), n=batch)
                    found.append(_layer(name, sized, precision, batch, machine))
    return found


def _layer(name: str, problem: Problem, precision: str, batch: int, machine: Any) -> Wanted:
    from gemmify.select import Policy, choose
    from schedules.cuda.device import with_tf32

    key = choose(name, problem, with_tf32(machine, precision == "tf32"), Policy()).lowering.key
    return Wanted("layer", name, problem, key, precision, EPILOGUE, batch, "auto")


NETWORKS = (
    WantedNetwork("resnet50", "float16", 32),
    WantedNetwork("resnet50", "float32", 32),
    WantedNetwork("resnet50", "float16", 1),
    WantedNetwork("resnet50", "float32", 1),
    WantedNetwork("resnet50", "float16", 256),
    WantedNetwork("resnet50", "float32", 256),
    WantedNetwork("vgg16", "float16", 32),
    WantedNetwork("mobilenet_v2", "float16", 32),
    WantedNetwork("squeezenet", "float16", 32),
)


def described(problem: Problem) -> dict[str, Any]:
    """The problem as the runner's float64 reference takes it."""
    if isinstance(problem, DenseProblem):
        return {"kind": "dense", **asdict(problem)}
    kind = "conv" if isinstance(problem, ConvProblem) else "transposed"
    return {"kind": kind, **asdict(problem), "out_size": list(problem.out_size)}
