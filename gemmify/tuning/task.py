"""What is tuned: one layer with its epilogue. Equal layers of a network, and of several networks, are one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lowering import ConvProblem, DenseProblem, Problem
from lowering.epilogue import KINDS, EpilogueOp
from lowering.problem import TransposedConvProblem

_KINDS: dict[str, type] = {"conv": ConvProblem, "conv_transpose": TransposedConvProblem, "dense": DenseProblem}


@dataclass(frozen=True)
class Task:
    """A layer's problem and the operations that its kernel applies to each output element."""

    problem: Problem
    epilogue: tuple[EpilogueOp, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The task as plain JSON data; `from_dict` is its inverse."""
        kind = next(name for name, made in _KINDS.items() if type(self.problem) is made)
        sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.problem).items()}
        return {"op": kind, **sizes, "epilogue": [_op_to_list(op) for op in self.epilogue]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """The task that `to_dict` wrote; ValueError where the data makes none."""
        made = _KINDS.get(str(data.get("op")))
        if made is None:
            raise ValueError(f"a task's op must be one of {', '.join(_KINDS)}, found {data.get('op')!r}")
        try:
            sizes = {field.name: _size(data[field.name], str(field.type)) for field in fields(made)}
            epilogue = tuple(_op_from_list(item) for item in data["epilogue"])
        except KeyError as err:
            raise ValueError(f"a task of op {data['op']} needs {err.args[0]!r}") from err
        except TypeError as err:
            raise ValueError(f"a task's sizes must be whole numbers or lists of them: {err}") from err
        return cls(made(**sizes), epilogue)

    @property
    def title(self) -> str:
        """A short text for tables: `128x28x28 -> 128 3x3 +bias+relu`."""
        p = self.problem
        tail = "".join(f"+{op.kind}" for op in self.epilogue)
        if isinstance(p, DenseProblem):
            return f"{p.c} -> {p.m} dense, {p.n} rows {tail}".rstrip()
        batch = "" if p.n == 1 else f"{p.n}x"
        stride = "" if max(p.stride) == 1 else f"/{'x'.join(map(str, p.stride))}"
        groups = "" if p.groups == 1 else f" g{p.groups}"
        size, kernel = "x".join(map(str, (p.c, *p.size))), "x".join(map(str, p.kernel))
        return f"{batch}{size} -> {p.m} {kernel}{stride}{groups} {tail}".rstrip()


def _size(value: Any, kind: str) -> Any:
    """A field of a problem from its JSON value; `kind` is the field's annotation. TypeError where it is of another."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(_size(v, "int") for v in value)
    if (whole and kind == "int") or (isinstance(value, str) and kind == "str"):
        return value
    raise TypeError(f"found {value!r}")


def _op_to_list(op: EpilogueOp) -> list[Any]:
    """`[kind, operand, *params]`: `["bias", 0]`, `["relu", null]`, `["clip", null, 0.0, 6.0]`."""
    return [op.kind, op.operand, *op.params]


def _op_from_list(item: Any) -> EpilogueOp:
    kind, operand, *params = item
    if kind not in KINDS:
        raise ValueError(f"an epilogue's operation must be one of {', '.join(KINDS)}, found {kind!r}")
    return EpilogueOp(str(kind), None if operand is None else int(operand), tuple(float(p) for p in params))
