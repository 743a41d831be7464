"""One form of a reduction against the definition of a convolution: roles, numbers, and a check of every point.

Used by `recognize`, which says what the steps are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.ir import prim

from .problem import ConvProblem, DenseProblem, Problem
from .raise_te import Block, Load, NotUnderstood, Var, evaluate, grid, loads, shape_of, substitute, variables

BATCH, CHANNEL = "n", "c"
Role = str | int
"""What an axis stands for: "n", "c", or a spatial dimension's number (0 outermost)."""


@dataclass(frozen=True, eq=False)
class Recognized:
    """The problem of a function and where its tensors are.

    `blocks` are the function's blocks and `blocks[at]` the reduction. `data` is the buffer that it reads, the role of
    each of its axes in `data_roles`. `weight` is the weight's element for the variables `weight_vars` `(m, *kernel, c)`
    (None for one that the function has not). `out_roles` are the roles of the output's axes, "c" standing for `m`, None
    for an axis of extent 1 without a role.
    """

    problem: Problem
    blocks: tuple[Block, ...]
    at: int
    data: Any
    data_roles: tuple[Role, ...]
    weight: Any
    weight_vars: tuple[Any, ...]
    out_roles: tuple[Role | None, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """One way to see the left factor: `data[index]` where every condition holds, else 0."""

    data: Any
    index: tuple[Any, ...]
    conditions: tuple[Any, ...]


@dataclass(eq=False)
class Axis:
    """One axis of the data: its address, and the variables that move it (output position and tap)."""

    index: Any
    size: int
    out: Any | None = None
    tap: Any | None = None
    role: Role | None = None


def same(left: Any, right: Any) -> bool:
    """Whether two variables, or None, are one."""
    return left is not None and right is not None and bool(left.same_as(right))


def among(var: Any, others: Any) -> bool:
    """Whether a variable is one of several."""
    return any(same(var, other) for other in others)


class Match:
    """One form of the data against one weight: roles, numbers, and the check of both on every point."""

    def __init__(self, block: Block, form: Form, weight: Any) -> None:
        self.block, self.form, self.weight = block, form, weight
        self.extents = block.extents
        self.dtype = str(block.buffer.dtype)
        dtypes = {str(form.data.dtype), self.dtype, str(weight.ty.dtype)}
        if len(dtypes) != 1:
            raise NotUnderstood(f"needs one dtype for data, weight and output, found {', '.join(sorted(dtypes))}")
        if any(load.source.same_as(block.buffer) for load in loads(weight)) or form.data.same_as(block.buffer):
            raise NotUnderstood("needs factors that do not read the output")
        self.m = self._output_channel()
        self.axes = [Axis(index, size) for index, size in zip(form.index, shape_of(form.data), strict=True)]

    # 2. roles

    def _wide(self, var: Any) -> bool:
        return self.extents.get(var, 2) > 1

    def _one(self, candidates: Sequence[Any], what: str) -> Any | None:
        """The one variable that counts: of several, those of extent 1 do not."""
        wide = [v for v in candidates if self._wide(v)]
        if len(wide) > 1:
            raise NotUnderstood(f"needs {what}, found {', '.join(str(v.name) for v in wide)}")
        return (wide or list(candidates) or [None])[0]

    def _output_channel(self) -> Any | None:
        """The output axis that the weight depends on; the weight is one element, each axis moved by one variable."""
        if not isinstance(self.weight, Load):
            raise NotUnderstood(f"needs factors that are elements of a tensor, found {self.weight}")
        for index in self.weight.indices:
            self._one(variables(index), "each axis of the weight moved by at most one variable")
        spatial = [v for v in variables(self.weight) if among(v, self.block.spatial)]
        return self._one(spatial, "a weight that depends on one axis of the output")

    def _assign_roles(self) -> None:
        used: list[Any] = []
        for axis in self.axes:
            of = [v for v in variables(axis.index) if self._wide(v) or not among(v, used)]
            outs = [v for v in of if among(v, self.block.spatial) and not same(v, self.m)]
            taps = [v for v in of if among(v, self.block.reduction)]
            axis.out = self._one(outs, "each axis of the data moved by at most one output axis")
            axis.tap = self._one(taps, "each axis of the data moved by at most one reduction axis")
            if self.m is not None and self._wide(self.m) and among(self.m, of):
                axis.role = CHANNEL
            used += of
        if not any(axis.role == CHANNEL for axis in self.axes):
            self._pick(CHANNEL, [axis for axis in self.axes if self._plain(axis, axis.tap)])
        self._pick(BATCH, [axis for axis in self.axes if axis.role is None and self._plain(axis, axis.out)])
        spatial = [axis for axis in self.axes if axis.role is None]
        for number, axis in enumerate(spatial):
            axis.role = number
        if len(spatial) > 3:
            raise NotUnderstood(f"needs at most 3 spatial dimensions, found {len(spatial)}")

    def _plain(self, axis: Axis, var: Any | None) -> bool:
        """Whether an axis is run through by one variable, or has one element."""
        if isinstance(axis.index, Var):
            return same(axis.index, var) and self.extents[axis.index] == axis.size
        return axis.size == 1 and not variables(axis.index)

    def _pick(self, role: Role, candidates: list[Axis]) -> None:
        """Any candidate is right. Prefer a channel where the output has its own, a batch that comes first."""
        same_rank = len(self.axes) == len(self.block.spatial)

        def preference(axis: Axis) -> tuple[bool, bool]:
            place = self.axes.index(axis)
            if role == BATCH:
                return place != 0, axis.out is None
            return not (same_rank and same(self.block.spatial[place], self.m)), axis.tap is None

        if candidates:
            min(candidates, key=preference).role = role

    # 3. numbers

    def _window(self, axis: Axis) -> tuple[int, int, int, int, int, int, int]:
        """(size, kernel, stride, pad before, pad after, dilation, out) of a spatial axis."""
        kernel = self.extents[axis.tap] if axis.tap is not None else 1
        out = self.extents[axis.out] if axis.out is not None else 1
        at = {v: 0 for v in (axis.out, axis.tap) if v is not None}
        if set(variables(axis.index)) - set(at) - self._units():
            raise NotUnderstood(f"needs addresses of one output axis and one reduction axis, found {axis.index}")
        at |= {v: 0 for v in self._units() if v not in at}
        start = int(evaluate(axis.index, at))
        stride = int(evaluate(axis.index, at | {axis.out: 1})) - start if axis.out is not None else 1
        dilation = int(evaluate(axis.index, at | {axis.tap: 1})) - start if axis.tap is not None else 1
        before = -start
        dilation = 1 if kernel == 1 else dilation
        if before < 0 or dilation < 1 or (out > 1 and stride < 1):
            raise NotUnderstood(f"needs addresses o s + k d - p with s, d >= 1 and p >= 0, found {axis.index}")
        reach = (kernel - 1) * dilation + 1
        after = max(0, (out - 1) * stride + reach - axis.size - before)
        if out == 1:
            # One position has no stride: the least that leaves one position keeps the original where that is valid.
            stride = max(stride, 1, axis.size + before + after - reach + 1)
        if (axis.size + before + after - reach) // stride + 1 != out:
            raise NotUnderstood(f"needs every output position of the window, found {out} along {axis.index}")
        return axis.size, kernel, stride, before, after, dilation, out

    def _units(self) -> set[Any]:
        return {v for v, extent in self.extents.items() if extent == 1}

    def _problem(self) -> Problem:
        by_role = {axis.role: axis for axis in self.axes}
        batch, channel = by_role.get(BATCH), by_role.get(CHANNEL)
        spatial = [axis for axis in self.axes if isinstance(axis.role, int)]
        n = batch.size if batch is not None else 1
        c = channel.size if channel is not None else 1
        m = self.extents[self.m] if self.m is not None else 1
        c_group = self.extents[channel.tap] if channel is not None and channel.tap is not None else 1
        if c % c_group or m % (c // c_group):
            raise NotUnderstood(f"needs groups that divide the channels, found C={c}, C/g={c_group}, M={m}")
        groups = c // c_group
        if not spatial and groups == 1:
            return DenseProblem(n, c, m, self.dtype)
        windows = [self._window(axis) for axis in spatial] or [(1, 1, 1, 0, 0, 1, 1)]
        size, kernel, stride, before, after, dilation, _ = (tuple(v) for v in zip(*windows, strict=True))
        return ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, self.dtype)

    # 4. the check

    def _claimed(self, axis: Axis, problem: Problem, at: Mapping[Any, Any]) -> Any:
        """The address that the problem gives to an axis."""
        out = at[axis.out] if axis.out is not None else 0
        tap = at[axis.tap] if axis.tap is not None else 0
        if axis.role == BATCH:
            return out
        if axis.role == CHANNEL:
            if not isinstance(problem, ConvProblem) or problem.groups == 1:
                return tap
            return at[self.m] // problem.m_group * problem.c_group + tap
        assert isinstance(problem, ConvProblem) and isinstance(axis.role, int)
        d = axis.role
        return out * problem.stride[d] + tap * problem.dilation[d] - problem.pad_before[d]

    def _check(self, problem: Problem) -> None:
        for axis in self.axes:
            moved = [axis.out, axis.tap, self.m if axis.role == CHANNEL else None, *variables(axis.index)]
            at = grid({v for v in moved if v is not None}, self.extents)
            if not np.all(np.equal(evaluate(axis.index, at), self._claimed(axis, problem, at))):
                raise NotUnderstood(f"needs the address of a convolution, found {axis.index}")
        self._check_conditions()
        self._check_variables(problem)

    def _check_conditions(self) -> None:
        """The conditions hold exactly where every axis is inside its tensor, checked for each set of linked axes."""
        parts: list[tuple[list[Axis], list[Any], set[Any]]] = []
        items: list[tuple[list[Axis], list[Any], set[Any]]]
        items = [([axis], [], set(variables(axis.index))) for axis in self.axes]
        items += [([], [condition], set(variables(condition))) for condition in self.form.conditions]
        for axes, conditions, names in items:
            linked = [part for part in parts if part[2] & names]
            parts = [part for part in parts if not part[2] & names]
            for part in linked:
                axes, conditions, names = axes + part[0], conditions + part[1], names | part[2]
            parts.append((axes, conditions, names))
        for part in parts:
            self._check_part(*part)

    def _check_part(self, axes: Sequence[Axis], conditions: Sequence[Any], names: set[Any]) -> None:
        at = grid(names, self.extents)
        holds: Any = np.True_
        for condition in conditions:
            holds = np.logical_and(holds, evaluate(condition, at))
        inside: Any = np.True_
        for axis in axes:
            where = evaluate(axis.index, at)
            inside = np.logical_and(inside, np.logical_and(where >= 0, where < axis.size))
        if not np.all(np.equal(holds, inside)):
            text = " and ".join(str(c) for c in conditions) or "no condition"
            raise NotUnderstood(f"needs zeros exactly outside the tensor, found {text}")

    def _check_variables(self, problem: Problem) -> None:
        """Every variable that takes more than one value has exactly one role, and the weight uses only its own."""
        roles = [v for axis in self.axes for v in (axis.out, axis.tap) if v is not None]
        roles += [self.m] if self.m is not None else []
        for var, extent in self.extents.items():
            count = sum(same(var, v) for v in roles)
            if extent > 1 and count != 1:
                raise NotUnderstood(f"needs every loop in one role of a convolution, {var.name} has {count}")
        weight_vars = self._weight_vars(problem)
        for var in variables(self.weight):
            if self._wide(var) and not among(var, weight_vars):
                raise NotUnderstood(f"needs a weight of channels and kernel position alone, found {self.weight}")

    def _weight_vars(self, problem: Problem) -> tuple[Any, ...]:
        taps = {axis.role: axis.tap for axis in self.axes}
        dims = problem.dims if isinstance(problem, ConvProblem) else 0
        return (self.m, *(taps.get(d) for d in range(dims)), taps.get(CHANNEL))

    def recognized(self, blocks: tuple[Block, ...], at: int) -> Recognized:
        """The match, or NotUnderstood with the condition that fails."""
        self._assign_roles()
        try:
            problem = self._problem()
        except ValueError as error:
            raise NotUnderstood(str(error)) from error
        self._check(problem)
        outs = [(axis.out, axis.role) for axis in self.axes if axis.out is not None]
        outs += [(self.m, CHANNEL)] if self.m is not None else []
        roles = tuple(next((role for v, role in outs if same(v, var)), None) for var in self.block.spatial)
        unused = {v: prim.IntImm("int32", 0) for v in self._units() if not among(v, self._weight_vars(problem))}
        weight = substitute(self.weight, unused) if unused else self.weight
        return Recognized(
            problem,
            blocks,
            at,
            self.form.data,
            tuple(axis.role for axis in self.axes if axis.role is not None),
            weight,
            self._weight_vars(problem),
            roles,
        )
