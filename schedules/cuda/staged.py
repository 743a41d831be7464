"""A product of matrices between two chains (transform, multiply, transform back) as one kernel, nothing in memory.

    V = chain(input)        P[batch, m, n] = sum_k V[batch, m, k] U[batch, n, k]        result = chain(P)

The chain ahead letters its axes (`gemmify.chain`): those lettered `o` tell blocks apart. A block of threads

1. owns one block of V and a range of n; its threads compute V, a tile each (chain.py), into shared memory;
2. multiplies it with U, which it reads from memory, `channels` columns of n at a time: a thread holds a tile of TILE x
   TILE products in registers, and puts them into shared memory;
3. takes them through the chain behind, a tile a thread, to the result.

Only what fits in SHARED_BYTES is made like this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import Var

from ..cpu.tir_tools import substitute, uses
from .chain import Chain, is_kept, letters_of, plain, readers_of
from .emit import VECTOR_BITS
from .equation import Equation, bits_of, number

SHARED_BYTES = 48 << 10
"""What every GPU gives a block without being asked; TVM would set barriers of its own between two tensors in memory
that a kernel asks for, inside conditions, where none may stand."""
CHANNELS = (32, 16)
"""Columns of n whose products are in shared memory at a time: the first that fits."""

Extents = tuple[tuple[Var, int], ...]


@dataclass(frozen=True, eq=False)
class Staged:
    """A product between chains.

    `v` and `u` are the loads of `total`; its axes are `block` (in the order of V's dimensions), `batch`, `m` and `n`.
    `places` says of every axis of the last equation behind that tells tiles apart what it is: (the axis of `total` of
    which it is the whole or the high part, None for none; the extent of its low part, which lies within the block).
    """

    ahead: Chain
    total: Equation
    stored: Equation
    behind: Chain
    v: TensorLoad
    u: TensorLoad
    block: Extents
    batch: Extents
    m: Extents
    n: Extents
    places: dict[int, tuple[Var | None, int]]

    @property
    def bits(self) -> int:
        return bits_of(self.total.buffer.dtype)

    @property
    def row(self) -> int:
        """Elements from one row of V in shared memory to the next: neighbouring rows begin in other banks."""
        depth, width = self.total.depth, VECTOR_BITS // self.bits
        return depth + width if depth % width == 0 else depth | 1

    @property
    def v_dims(self) -> list[int]:
        """The dimensions of V that lie within a block."""
        return [d for d, letter in enumerate(letters_of(self.ahead.last) or "") if letter != "o"]

    @property
    def v_elements(self) -> int:
        return prod(self.ahead.last.extents[d] for d in self.v_dims[:-1]) * self.row

    @property
    def channels(self) -> int:
        fits = [c for c in CHANNELS if self._bytes(min(c, size_of(self.n))) <= SHARED_BYTES]
        return min(fits[0] if fits else CHANNELS[-1], size_of(self.n))

    def _bytes(self, channels: int) -> int:
        return (self.v_elements + size_of(self.batch) * size_of(self.m) * channels) * self.bits // 8

    @property
    def p_elements(self) -> int:
        return size_of(self.batch) * size_of(self.m) * self.channels

    @property
    def bytes(self) -> int:
        """Shared memory of a block."""
        return self._bytes(self.channels)


def size_of(axes: Extents) -> int:
    """Points of some axes together."""
    return prod(extent for _, extent in axes)


def find_staged(
    ahead: Chain, gemm: tuple[Equation, ...], behind: Chain, everyone: list[Equation], kept: list[Any]
) -> Staged | None:
    """`gemm`, a product and its copy, with the chains on both sides of it; None where these do not fit together."""
    total, stored = gemm
    last = ahead.last
    if ahead.behind is not None or not plain(last) or is_kept(last, kept) or is_kept(stored, kept):
        return None
    if readers_of(last, everyone) != [total] or any(r not in behind.steps for r in readers_of(stored, everyone)):
        return None
    if (loads := _operands(total, last)) is None or (axes := _axes(total, last, *loads)) is None:
        return None
    block, batch, m, n = axes
    if stored.annotations or copied(total, stored) is None:
        return None
    found = Staged(ahead, total, stored, behind, *loads, block, batch, m, n, places={})
    places = _places(found)
    return None if places is None or found.bytes > SHARED_BYTES else replace(found, places=places)


def _operands(total: Equation, last: Equation) -> tuple[TensorLoad, TensorLoad] | None:
    """(load of V, load of U) of a plain product over one axis, the last one of V."""
    term = total.value.b if isinstance(total.value, tirx.Add) else None
    if not isinstance(term, tirx.Mul) or len(total.reduced) != 1 or not plain(total_of(total)):
        return None
    if not isinstance(term.a, TensorLoad) or not isinstance(term.b, TensorLoad):
        return None
    dtypes = {str(buffer.dtype) for buffer in (total.buffer, term.a.source, term.b.source)}
    if float(getattr(total.init, "value", 1)) != 0 or len(dtypes) != 1:
        return None
    v, u = (term.a, term.b) if term.a.source.same_as(last.buffer) else (term.b, term.a)
    right = v.source.same_as(last.buffer) and not u.source.same_as(last.buffer)
    return (v, u) if right and v.indices[-1].same_as(total.reduced[0][0]) else None


def total_of(total: Equation) -> Equation:
    """The sum without its reduction axes."""
    axes, extents = tuple(a for a, _ in total.spatial), tuple(e for _, e in total.spatial)
    return replace(total, axes=axes, extents=extents, reduction=(False,) * len(axes))


def _axes(total: Equation, last: Equation, v: TensorLoad, u: TensorLoad) -> tuple[Extents, ...] | None:
    """(block, batch, m, n): the axes of `total` by what depends on them."""
    extents = {axis: extent for axis, extent in total.spatial if extent > 1}
    letters = letters_of(last) or ""
    block: dict[Var, int] = {}
    for index, letter, extent in zip(v.indices, letters, last.extents, strict=True):
        if letter == "o" and extent > 1:
            if index not in extents or extents[index] != extent:
                return None
            block[index] = extent
    kinds: dict[str, dict[Var, int]] = {"batch": {}, "m": {}, "n": {}}
    inner = [index for index, letter in zip(v.indices, letters, strict=True) if letter != "o"]
    for axis, extent in extents.items():
        in_v, in_u = any(uses(index, [axis]) for index in inner), uses(u, [axis])
        if axis in block:
            if in_v or in_u:
                return None
            continue
        if not (in_v or in_u):
            return None
        kinds["batch" if in_v and in_u else "m" if in_v else "n"][axis] = extent
    if letters[-1] == "o" or not kinds["n"]:
        return None
    return tuple(block.items()), *(tuple(kind.items()) for kind in kinds.values())


def copied(total: Equation, stored: Equation) -> list[Var | None] | None:
    """The axis of `total` behind each dimension of what is stored; None for one of a single element. None where it is
    more than a copy."""
    if not isinstance(stored.value, TensorLoad) or not plain(replace(stored, axes=stored.indices)):
        return None
    own = {axis: extent for axis, extent in total.spatial}
    axis_of = {
        index: axis for index, axis in zip(stored.value.indices, total.indices, strict=True) if isinstance(index, Var)
    }
    found = [axis_of.get(index) if isinstance(index, Var) else None for index in stored.indices]
    met = {axis for axis in found if axis is not None}
    whole = all(extent == 1 or axis in met for axis, extent in own.items())
    sizes = [int(extent) for extent in stored.buffer.shape]
    same = all((own[axis] if axis is not None else 1) == size for axis, size in zip(found, sizes, strict=True))
    return found if whole and same else None


def _places(staged: Staged) -> dict[int, tuple[Var | None, int]] | None:
    """`Staged.places`, found by where the steps behind read the products; None where a tile needs those of more than
    one block, or not of one column of n."""
    last = staged.behind.last
    sizes = [int(size) for size in last.annotations.get("gemmify.block", ())]
    analyzer = sym.Analyzer()
    at: dict[int, Any] = {}
    high: dict[Var, tuple[int, int, int]] = {}  # the place, extents of its high and low parts
    for i, letter in enumerate(letters_of(last) or ""):
        if letter == "u":
            continue
        low = sizes.pop(0) if letter == "b" else 1
        parts = Var(f"high{i}", "int32"), Var(f"low{i}", "int32")
        for var, extent in zip(parts, (last.extents[i] // low, low), strict=True):
            analyzer.bind(var, Range(0, extent))
        at[i] = analyzer.simplify(parts[0] * number(low) + parts[1])
        high[parts[0]] = (i, last.extents[i] // low, low)
    axis_of = copied(staged.total, staged.stored)
    assert axis_of is not None
    outer = dict(staged.block) | dict(staged.n)
    found: dict[int, tuple[Var | None, int]] = {i: (None, low) for i, _, low in high.values()}
    for step in staged.behind.steps:
        moved = {a: at[t] for a, t in zip(step.axes, staged.behind.tiles[step.name], strict=True) if t is not None}
        for load in step.reads(staged.stored.buffer):
            for index, axis in zip(load.indices, axis_of, strict=True):
                if axis is None or axis not in outer:
                    continue
                where = analyzer.simplify(substitute(index, moved))
                if not isinstance(where, Var) or where not in high or high[where][1] != outer[axis]:
                    return None
                i, _, low = high[where]
                if (low > 1 and axis not in dict(staged.block)) or found[i][0] not in (None, axis):
                    return None
                found[i] = (axis, low)
    missing = any(extent > 1 and found[i][0] is None for i, extent, _ in high.values())
    placed = [axis for axis, _ in found.values() if axis is not None]
    return None if missing or len(set(placed)) != len(placed) or set(placed) != set(outer) else found
