"""Emitting statements with TVMScript's builder: named scalars, loops that the C compiler unrolls, vectors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from .intrinsics import keep_size


def shared_memory(size: int, dtype: str, align: int) -> Var:
    """The block's dynamic shared memory as `size` elements of `dtype`.

    CUDA C++ takes all declarations of one name in a text for one array, which they must then agree on: the name says
    what they could differ in. One element is named alone: TVM declares what is only read and written in vectors as an
    array of such.
    """
    memory = T.alloc_buffer((size,), dtype, scope="shared.dyn", align=align)
    IRBuilder.name(f"shared_{dtype}_{align}", memory)
    keep_size(memory, size)
    return memory


def named(name: str, value: Any) -> Any:
    """A scalar of that name with the value; a constant or a variable stays what it is."""
    if isinstance(value, int | tirx.IntImm | Var):
        return value
    return T.bind(value, var=Var(name, str(value.ty.dtype)))


def repeat(extent: int) -> AbstractContextManager[Any]:
    """A loop of constant extent that the C compiler writes out."""
    return T.serial(extent, unroll=True)


def when(condition: Any) -> AbstractContextManager[None]:
    """The statements in it run where `condition` holds; always where it is None."""
    return _When(condition)


class _When(AbstractContextManager[None]):
    def __init__(self, condition: Any) -> None:
        self.frames = [] if condition is None else [T.If(condition), T.Then()]

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *found: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*found)


def every(conditions: list[Any]) -> Any:
    """All conditions together; None for none."""
    return tirx.all(*conditions) if conditions else None


def copy_vector(to: Var, at: Any, source: Var, start: Any, width: int) -> None:
    """`to[at .. at + width] = source[start ..]`, in one access where the width has a vector type."""
    if width == 1:
        T.buffer_store(to, source[start], [at])
        return
    with T.vectorized(width) as lane:
        T.buffer_store(to, source[start + lane], [at + lane])


def fill_vector(to: Var, at: Any, value: Any, width: int) -> None:
    """`to[at .. at + width] = value`."""
    if width == 1:
        T.buffer_store(to, value, [at])
        return
    with T.vectorized(width) as lane:
        T.buffer_store(to, value, [at + lane])
