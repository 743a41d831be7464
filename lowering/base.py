"""The contract of a lowering: when it applies, what it costs, and how it is built, apart from any target.

A lowering is a chain of `Stage`s. Each stage is one tensor expression that reads the layer's tensors or an earlier
stage and writes one tensor: the transformed weight (folded at compile time), a workspace (which the memory planner
sees), or the output. `gemmify` compiles each stage to a kernel of its own; `lowering.passes` composes the same stages
into one PrimFunc.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import tvm
from tvm import te, tirx

from .free_sizes import Size, misfit, named_sizes
from .gradient_problem import GradientProblem
from .problem import ConvProblem, DenseProblem, Problem, TransposedConvProblem

Index = tuple[Any, ...]
ProblemT = TypeVar("ProblemT")
"""The kind of problem that a lowering solves: a layer, or one of the gradients of `lowering.backward`."""
Epilogue = Callable[[Any, Index], Any]
"""`epilogue(value, index)`: the output element at `index` (output layout) from the GEMM's `value`."""


def no_epilogue(value: Any, index: Index) -> Any:
    """The identity: the output is the GEMM itself."""
    del index
    return value


@dataclass(frozen=True)
class Reason:
    """Why a lowering does not apply: one clause that names the condition and what was found."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Tile:
    """The register tile that a GEMM is built for: `mr` rows of `m` by `nr` columns of `n`, held in registers."""

    mr: int
    nr: int

    def __post_init__(self) -> None:
        if self.mr < 1 or self.nr < 1:
            raise ValueError(f"a register tile needs mr and nr of at least 1, got {self.mr} x {self.nr}")


@dataclass(frozen=True)
class GemmAxes:
    """What a tile is chosen for: `outer` independent rows of `inner` consecutive `m`, `groups` GEMMs of `n` by `k`.

    `inner` is the only part of `m` that a register tile may span (the pixels of one output row, say). `vector_k` says
    that `A` is read as a vector along `n` (a depthwise layer), not broadcast. `nr_divides` demands that the tile's
    width divides `n`, because elements past the edge may not even be read; `mr_divides` likewise for `inner`.
    `row_bytes` is the distance in memory between consecutive rows of A, where it is constant.
    """

    outer: int
    inner: int
    n: int
    k: int
    groups: int = 1
    vector_a: bool = False
    nr_divides: bool = False
    mr_divides: bool = False
    row_bytes: int = 0


@dataclass(frozen=True)
class GemmShape:
    """`count` multiplications `C[m,n] = sum_k A[m,k] B[k,n]`."""

    m: int
    n: int
    k: int
    count: int = 1

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class LoweringCost:
    """What a lowering needs, from formulas alone. Bytes are bytes, `macs` multiply-adds that are really executed.

    `error_growth` is the expected relative error in units of the dtype's rounding unit: about `sqrt(k)` for a plain
    dot product of length `k`. `read_factor` is how much dearer than a plain load each element of A is (conditions,
    gathers); `extra_flops` counts vectorisable operations outside the GEMM (transforms);
    `weight_reads` is how many times all weights stream past, once a block of rows;
    `thread_bytes` is scratch inside the kernel, once a thread, which `workspace_bytes` does not hold, `shared_bytes`
    such scratch that all threads use together; `tasks` is
    into how many parts the work is divided among threads, where the GEMM's own shape does not tell.
    """

    gemms: tuple[GemmShape, ...]
    macs: int
    bytes_moved: int
    workspace_bytes: int
    weight_bytes: int
    error_growth: float
    workspace: dict[str, int] = field(default_factory=dict)
    read_factor: float = 1.0
    extra_flops: int = 0
    weight_reads: int = 1
    thread_bytes: int = 0
    shared_bytes: int = 0
    tasks: int | None = None
    stage_bytes: tuple[tuple[int, int], ...] = ()
    """More scratch inside the kernel: (bytes a thread, tasks) of each stage that is divided in its own way."""

    def scratch(self, threads: int) -> int:
        """Bytes of all scratch where `threads` threads are to be had."""
        busy = threads if self.tasks is None else min(threads, self.tasks)
        stages = sum(min(threads, tasks) * size for size, tasks in self.stage_bytes)
        return self.workspace_bytes + self.shared_bytes + busy * self.thread_bytes + stages


@dataclass(frozen=True)
class Stage:
    """One tensor expression of a lowering.

    `reads` names its operands: `"data"`, `"weight"`, or the name of an earlier stage; `compute` takes one te.Tensor for
    each and returns the te.Tensor that it writes. `kind` says what that tensor is. A weight stage is stored in the
    problem's dtype; `wide` stores it in the dtype of the arithmetic, because its values are computed, not moved, or
    because the GEMM reads them one by one, so that each would be widened on its own. `moves` says of a workspace that
    its values are those of what it reads, in another order, or zeros: a staged problem stores it in its own dtype.
    """

    name: str
    reads: tuple[str, ...]
    compute: Callable[..., te.Tensor]
    kind: Literal["weight", "workspace", "output"]
    wide: bool = False
    moves: bool = False


class Lowering(ABC, Generic[ProblemT]):
    """One way to compute a layer as matrix multiplications. Subclasses state the paper, the equation and the shapes.

    `key` is the name that plans, logs, the command line and the tests use. `layout` is the layout of the activations
    that it reads and writes: "NHWC" (channels last) or "NCHW".

    Each instance is a TVM pass as well, alone or in a `tvm.transform.Sequential`: `lowering.Im2col()(mod)` rewrites
    every unscheduled PrimFunc that computes a layer to which it applies, see `lowering.passes`. `tile` is the register
    tile of that pass; None takes a modest one, because the pass knows no target.
    """

    key: str
    summary: str
    gemm_formula: str
    workspace_formula: str
    source: str
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    same_macs = True
    """Whether its GEMMs are the definition's multiply-adds, no more and no fewer."""
    computes_operands = False
    """Whether what its GEMMs multiply is computed from input and weights (transforms), not moved or read in place."""
    size_names: tuple[str, ...] = ()
    """The names that `choices` may give on any problem."""

    def __init__(self, tile: Tile | None = None, **sizes: Size) -> None:
        self.tile = tile
        # A class that is not complete yet has no key: `registry.check_attributes` says so.
        self.sizes = named_sizes(getattr(self, "key", type(self).__name__), self.size_names, sizes)

    def choices(self, problem: ProblemT) -> dict[str, tuple[Size, ...]]:
        """The sizes that this lowering leaves free on `problem`, beside the register tile, by name: what a tuner may
        try, the default first; only names with at least two values, all of them in `size_names`.

        Every combination of values can be built, and what a name offers does not depend on `self.sizes`.
        """
        del problem
        return {}

    def configured(self, **sizes: Size) -> Lowering[ProblemT]:
        """The same lowering with some of its free sizes fixed: `Winograd4().configured(block=(7, 7))`; two of equal
        sizes are equal. The others take their defaults, the first of `choices`, whatever these are. ValueError for a
        name that is not in `size_names`; whether a value fits shows on a problem (`refuses`)."""
        if not sizes:
            return self
        made = copy(self)
        made.sizes = named_sizes(self.key, self.size_names, {**dict(self.sizes), **sizes})
        return made

    def refuses(self, problem: ProblemT) -> Reason | None:
        """Why `self.sizes` do not fit a `problem` to which the lowering applies, or None where they do.

        A value must be one that `choices` offers, of the same kind (True is not 1): one beyond the offer is refused
        even where the mathematics would allow it.
        """
        wrong = misfit(self.sizes, self.choices(problem)) if self.sizes else None
        return None if wrong is None else Reason(wrong)

    def require_sizes(self, problem: ProblemT) -> None:
        """ValueError, one sentence, where `self.sizes` do not fit `problem` (`refuses`)."""
        if (reason := self.refuses(problem)) is not None:
            raise ValueError(f"{self.key} {reason}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)  # a subclass may hold more

    def __hash__(self) -> int:
        return hash((type(self), self.tile, self.sizes))

    def as_pass(self) -> tvm.transform.Pass:
        """The TVM pass that this lowering is."""
        from .passes import lower_module

        def run(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
            return lower_module(self, mod)

        return tvm.transform.module_pass(run, opt_level=0, name=f"lowering.{self.key}")

    def __tvm_ffi_object__(self) -> tvm.transform.Pass:
        """What `Sequential` asks for; ObjectConvertible would not do, a callable is taken for a function before."""
        return self.as_pass()

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The module with this lowering applied to every PrimFunc that it can rewrite; the others are untouched."""
        return self.as_pass()(mod)

    @abstractmethod
    def applicable(self, problem: ProblemT) -> Reason | None:
        """None where the lowering can compute `problem`, else the condition that fails."""

    @abstractmethod
    def axes(self, problem: ProblemT) -> GemmAxes:
        """The axes that the register tile is chosen for."""

    @abstractmethod
    def cost(self, problem: ProblemT, tile: Tile) -> LoweringCost:
        """What `build` with this tile will need; pure and cheap, no IR is built."""

    @abstractmethod
    def build(self, problem: ProblemT, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        """The stages in order; the last one writes the output, its `epilogue` applied to the tile in registers.

        Written as if there were one dtype: a stage reads, and an epilogue is given, values of the problem's
        `accumulator`, and workspaces hold such; only a weight stage that is not `wide` reads the weight as it is.
        """

    def stages(self, problem: ProblemT, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        """The stages of `build` on tensors as they are stored: what is stored in half precision is widened where it
        is read, and the output narrowed behind the epilogue (see `lowering.precision`)."""
        from .precision import typed_stages

        return typed_stages(self, problem, tile, epilogue)


def require_conv(problem: Problem) -> Reason | None:
    """The reason of every convolution lowering that is given another kind of layer."""
    if isinstance(problem, ConvProblem):
        return None
    return Reason(f"needs a convolution, got a {layer_kind(problem)}")


def require_transposed(problem: Problem) -> Reason | None:
    """The reason of every lowering of transposed convolutions that is given another kind of layer."""
    if isinstance(problem, TransposedConvProblem):
        return None
    return Reason(f"needs a transposed convolution, got a {layer_kind(problem)}")


def layer_kind(problem: Problem) -> str:
    """What a problem is, in words."""
    if isinstance(problem, DenseProblem):
        return "fully connected layer"
    return "convolution" if isinstance(problem, ConvProblem) else "transposed convolution"


def activation_shape(problem: Problem, layout: str = "NHWC") -> tuple[int, ...]:
    """Shape of a layer's input: `(N, *size, C)`, `(N, C, *size)` for NCHW, or `(n, c)` of a fully connected layer."""
    if isinstance(problem, DenseProblem):
        return (problem.n, problem.c)
    if layout == "NCHW":
        return (problem.n, problem.c, *problem.size)
    return (problem.n, *problem.size, problem.c)


def operand_shapes(problem: Problem | GradientProblem, layout: str = "NHWC") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a problem is given, by the names that stages read, in the order of the call."""
    if isinstance(problem, GradientProblem):
        return problem.operand_shapes(layout)
    return {"data": activation_shape(problem, layout), "weight": weight_shape(problem)}


def output_shape(problem: Problem | GradientProblem, layout: str = "NHWC") -> tuple[int, ...]:
    """Shape of a layer's output: `(N, *out, M)`, `(N, M, *out)` for NCHW, or `(n, m)`; of a gradient, its own."""
    if isinstance(problem, GradientProblem):
        return problem.result_shape(layout)
    if isinstance(problem, DenseProblem):
        return (problem.n, problem.m)
    if layout == "NCHW":
        return (problem.n, problem.m, *problem.out_size)
    return (problem.n, *problem.out_size, problem.m)


def weight_shape(problem: Problem) -> tuple[int, ...]:
    """Shape of a layer's untransformed weight: `(M, *kernel, C/g)`, or `(m, c)`."""
    if isinstance(problem, DenseProblem):
        return (problem.m, problem.c)
    return (problem.m, *problem.kernel, problem.c_group)


def zero(dtype: str) -> Any:
    """The constant 0 of a dtype."""
    return tirx.const(0, dtype)


def dtype_of(value: Any) -> str:
    """The dtype of a scalar expression."""
    return str(value.ty.dtype)


STACK_BYTES = 1024
"""A kernel keeps a buffer below this size on its stack."""


def off_stack(size: int) -> int:
    """What a buffer of `size` bytes inside a kernel allocates: nothing where it lies on the stack."""
    return size if size >= STACK_BYTES else 0


def ceil_div(a: int, b: int) -> int:
    """`ceil(a / b)`."""
    return -(-a // b)
