"""The bookkeeping of `ConvertLayout`: in which order of its axes each value of the source is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax
from tvm.relax import op

from ._rewrite import Emitter, Expr, Graph, is_const, is_tensor, is_var, shape_of

Perm = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A value of the new function: axis `i` of `expr` is axis `perm[i]` of the value that the source means.

    `flat = (C, S)` marks a matrix `[N, C S]` of the source (a flattened image) that is stored as `[N, S C]`. For
    tuples, `perm` holds for every field.
    """

    expr: Expr
    perm: Perm
    flat: tuple[int, int] | None = None


def identity(expr: Expr) -> Perm:
    """The permutation that moves nothing; empty for what is no tensor."""
    return tuple(range(len(shape_of(expr)))) if is_tensor(expr) else ()


def channels_last(rank: int) -> Perm:
    """The stored order N, spatial..., C of a channels-first value."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def permuted(values: Sequence[int], perm: Perm) -> tuple[int, ...]:
    """`values`, one an axis of the source, in stored order."""
    return tuple(values[p] for p in perm)


class LayoutState:
    """The values stored so far, and conversions between orders, each emitted once."""

    def __init__(self, graph: Graph, emitter: Emitter) -> None:
        self.graph = graph
        self.emitter = emitter
        self._values: dict[Expr, Stored] = {}
        self._converted: dict[tuple[Expr, Perm], Expr] = {}

    def store(self, var: Expr, value: Stored) -> None:
        """Remember how the source's `var` is stored."""
        self._values[var] = value

    def stored(self, expr: Expr) -> Stored:
        """How an expression of the source is stored; constants as they are."""
        return self._values[expr] if is_var(expr) else Stored(expr, identity(expr))

    def cl_perm(self, expr: Expr) -> Perm:
        """The channels-last order of an expression of the source."""
        return channels_last(len(shape_of(expr)))

    def convert(self, expr: Expr, perm: Perm) -> Expr:
        """The source's `expr` in the order `perm`."""
        return self.reorder(self._unflattened(expr), perm, getattr(expr, "name", "constant"))

    def reorder(self, stored: Stored, perm: Perm, name: str) -> Expr:
        """A stored value in another order."""
        axes = tuple(stored.perm.index(p) for p in perm)
        if is_const(stored.expr):
            return self.emitter.permute(stored.expr, axes)
        key = (stored.expr, axes)
        if key not in self._converted:
            suffix = "channels_first" if perm == tuple(range(len(perm))) else "channels_last"
            self._converted[key] = self.emitter.permute(stored.expr, axes, f"{name}_{suffix}")
        return self._converted[key]

    def plain(self, expr: Expr) -> Expr:
        """The source's `expr` in the source's own order."""
        return self.convert(expr, identity(expr))

    def plain_or_tuple(self, expr: Expr) -> Expr:
        """`plain` for tensors; a tuple of plain tensors for tuples; anything else as it is stored."""
        if is_tensor(expr):
            return self.plain(expr)
        source = self.graph.resolve(expr)
        if isinstance(source, relax.Tuple):
            return relax.Tuple([self.plain_or_tuple(f) for f in source.fields])
        return self.stored(expr).expr

    def channels_last(self, expr: Expr) -> Expr:
        """The source's `expr` with its channels last."""
        return self.convert(expr, self.cl_perm(expr))

    def at_rank(self, expr: Expr, rank: int, perm: Perm) -> Expr:
        """An operand that broadcasts against rank `rank`, in the order `perm` of the broadcast result."""
        shape = shape_of(expr)
        if len(shape) == rank:
            return self.convert(expr, perm)
        if len(shape) == 0 or all(d == 1 for d in shape):
            return self.emitter.reshape(self.plain(expr), ()) if is_const(expr) else self.plain(expr)
        widened = self.emitter.reshape(self.plain(expr), (1,) * (rank - len(shape)) + shape)
        return self.emitter.permute(widened, perm)

    def _unflattened(self, expr: Expr) -> Stored:
        stored = self.stored(expr)
        if stored.flat is None:
            return stored
        c, s = stored.flat
        n = shape_of(expr)[0]
        image = self.emitter.reshape(stored.expr, (n, s, c))
        channels_first = self.emitter.emit(op.permute_dims(image, (0, 2, 1)), f"{expr.name}_channels_first")
        result = Stored(self.emitter.reshape(channels_first, (n, c * s)), (0, 1))
        self._values[expr] = result
        return result
