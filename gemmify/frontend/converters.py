"""Converters of ONNX operators that replace TVM's own, with what its versions lack.

* Layers (Conv, ConvTranspose, Gemm, MatMul) are emitted under a marker by which their binding is found and named later,
  and a constant bias is reshaped at once.
* Clip becomes `relax.clip` (TVM emits anonymous kernels, which no epilogue pass recognises).
* LRN of even size and of other dtypes than float32; Elu, Selu and ThresholdedRelu of other dtypes; legacy Softmax
  without needless reshapes; Sum, Min, Max and Mean as chains of binary operators instead of a stack and a reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import tvm
from tvm import relax

Expr = Any
Attributes = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a converter may use: the block builder, the opset, and `layer(call)`, which emits a layer's call by name."""

    bb: Any
    opset: int
    layer: Callable[[Expr], Expr]


def value_of(expr: Expr) -> np.ndarray | None:
    """The array that a constant expression holds, or None."""
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None


def constant(values: np.ndarray) -> Expr:
    """A Relax constant of exactly the array's dtype (`relax.const` alone narrows float64 and int64)."""
    tensor = tvm.runtime.empty(values.shape, str(values.dtype))
    if values.size and values.dtype.kind in "fiu":
        np.from_dlpack(tensor)[...] = values  # one copy, of a transposed view too
    else:  # bool and the types that numpy only borrows travel no other way
        tensor.copyfrom(np.asarray(values, order="C"))
    return relax.const(tensor)


def _dims(expr: Expr) -> list[int]:
    return [int(d) for d in expr.ty.shape]


def _add_bias(ctx: Context, out: Expr, bias: Expr | None) -> Expr:
    if bias is None:
        return out
    shape = [1, -1] + [1] * (len(_dims(out)) - 2)
    values = value_of(bias)
    return relax.op.add(out, relax.op.reshape(bias, shape) if values is None else constant(values.reshape(shape)))


def conv(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """Conv of one to three spatial dimensions; its padding is explicit by now."""
    dims = len(_dims(inputs[0])) - 2
    op = (relax.op.nn.conv1d, relax.op.nn.conv2d, relax.op.nn.conv3d)[dims - 1]
    spatial = "DHW"[-dims:]
    call = op(
        inputs[0],
        inputs[1],
        strides=attrs["strides"],
        padding=attrs["pads"],
        dilation=attrs["dilations"],
        groups=attrs.get("group", 1),
        data_layout=f"NC{spatial}",
        kernel_layout=f"OI{spatial}",
    )
    return _add_bias(ctx, ctx.layer(call), inputs[2])


def conv_transpose(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """ConvTranspose of one to three spatial dimensions; its padding is explicit by now."""
    dims = len(_dims(inputs[0])) - 2
    op = (relax.op.nn.conv1d_transpose, relax.op.nn.conv2d_transpose, relax.op.nn.conv3d_transpose)[dims - 1]
    spatial = "DHW"[-dims:]
    call = op(
        inputs[0],
        inputs[1],
        strides=attrs["strides"],
        padding=attrs["pads"],
        dilation=attrs["dilations"],
        output_padding=attrs["output_padding"],
        groups=attrs.get("group", 1),
        data_layout=f"NC{spatial}",
        kernel_layout=f"IO{spatial}",
    )
    return _add_bias(ctx, ctx.layer(call), inputs[2])


def matmul(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    return ctx.layer(relax.op.matmul(inputs[0], inputs[1]))


def gemm(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """`Y = alpha A B + beta C`, A and B transposed as asked; constants have taken up their factors by now."""
    a, b, c = inputs[0], inputs[1], inputs[2]
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    a = ctx.bb.emit(relax.op.permute_dims(a, [1, 0])) if attrs.get("transA", 0) else a
    b = ctx.bb.emit(relax.op.permute_dims(b, [1, 0])) if attrs.get("transB", 0) else b
    out = ctx.layer(relax.op.matmul(a, b))
    if alpha != 1.0:
        out = ctx.bb.emit(relax.op.multiply(out, relax.const(alpha, out.ty.dtype)))
    if c is None or beta == 0.0:
        return out
    if beta != 1.0:
        c = ctx.bb.emit(relax.op.multiply(c, relax.const(beta, out.ty.dtype)))
    return relax.op.add(out, c)


def clip(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """Clip with bounds as attributes (opset 6) or inputs (11); a bound that is NaN or absent bounds nothing."""
    if ctx.opset < 11:
        return relax.op.clip(inputs[0], float(attrs.get("min", -np.inf)), float(attrs.get("max", np.inf)))
    bounds = [inputs[1], inputs[2]]
    fixed = [None if b is None else value_of(b) for b in bounds]
    whole = not str(inputs[0].ty.dtype).startswith(("float", "bfloat"))
    if whole or any(b is not None and v is None for b, v in zip(bounds, fixed, strict=True)):
        out = inputs[0] if bounds[0] is None else ctx.bb.emit(relax.op.maximum(inputs[0], bounds[0]))
        return out if bounds[1] is None else relax.op.minimum(out, bounds[1])
    low, high = (
        default if v is None or np.isnan(v) else float(v) for v, default in zip(fixed, (-np.inf, np.inf), strict=True)
    )
    return relax.op.clip(inputs[0], low, high)


def _chain(op: Callable[[Expr, Expr], Expr]) -> Callable[[Context, list[Expr], Attributes], Expr]:
    def convert(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
        return reduce(lambda x, y: ctx.bb.emit(op(x, y)), inputs)

    return convert


def mean(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    total = _chain(relax.op.add)(ctx, inputs, attrs)
    return relax.op.divide(total, relax.const(len(inputs), total.ty.dtype))


def _softmax(op: Callable[..., Expr]) -> Callable[[Context, list[Expr], Attributes], Expr]:
    def convert(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
        x = inputs[0]
        shape = _dims(x)
        if ctx.opset >= 13:
            return op(x, axis=attrs.get("axis", -1))
        # Before opset 13 the softmax runs over all axes from `axis` on, taken as one.
        axis = attrs.get("axis", 1) % len(shape)
        if all(d == 1 for d in shape[axis + 1 :]):
            return op(x, axis=axis)
        flat = ctx.bb.emit(relax.op.reshape(x, [*shape[:axis], int(np.prod(shape[axis:]))]))
        return relax.op.reshape(ctx.bb.emit(op(flat, axis=-1)), shape)

    return convert


def lrn(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """`x / (bias + alpha/size sum x_j^2)^beta`, for channels j from c - floor((size-1)/2) to c + ceil((size-1)/2).

    The window is an average pool over the channels that counts its padding, as in TVM's own converter, but with the
    padding that an even size needs.
    """
    x, size = inputs[0], attrs["size"]
    shape, dtype = _dims(x), x.ty.dtype
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = ctx.bb.emit(relax.op.multiply(x, x))
    if len(shape) in (3, 4):  # exactly TVM's form, which passes behind this one recognise
        flat = (0,) * (len(shape) - 2)
        pool = relax.op.nn.avg_pool3d if len(shape) == 4 else relax.op.nn.avg_pool2d
        squares = ctx.bb.emit(relax.op.expand_dims(squares, 1))
        window, strides = (size, *(1 for _ in flat)), (1, *(1 for _ in flat))
        sums = pool(squares, window, strides, (before, *flat, after, *flat), count_include_pad=True)
        sums = ctx.bb.emit(relax.op.squeeze(ctx.bb.emit(sums), [1]))
    else:
        squares = ctx.bb.emit(relax.op.reshape(squares, [shape[0], 1, shape[1], int(np.prod(shape[2:]))]))
        sums = relax.op.nn.avg_pool2d(squares, (size, 1), (1, 1), (before, 0, after, 0), count_include_pad=True)
        sums = ctx.bb.emit(relax.op.reshape(ctx.bb.emit(sums), shape))
    scaled = ctx.bb.emit(relax.op.multiply(sums, relax.const(attrs.get("alpha", 1e-4), dtype)))
    shifted = ctx.bb.emit(relax.op.add(scaled, relax.const(attrs.get("bias", 1.0), dtype)))
    powers = ctx.bb.emit(relax.op.power(shifted, relax.const(attrs.get("beta", 0.75), dtype)))
    return relax.op.divide(x, powers)


def elu(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """`max(x, 0) - alpha max(1 - exp(x), 0)`; TVM's has float32 constants, and so have the two below."""
    x, dtype, op = inputs[0], inputs[0].ty.dtype, relax.op
    below = op.nn.relu(op.subtract(relax.const(1.0, dtype), op.exp(x)))
    return op.add(op.multiply(relax.const(-float(attrs.get("alpha", 1.0)), dtype), below), op.nn.relu(x))


def selu(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """`gamma elu(x)`, with the defaults of the operator specification."""
    alpha = float(attrs.get("alpha", 1.67326319217681884765625))
    gamma = float(attrs.get("gamma", 1.05070102214813232421875))
    return relax.op.multiply(relax.const(gamma, inputs[0].ty.dtype), elu(ctx, inputs, {"alpha": alpha}))


def thresholded_relu(ctx: Context, inputs: list[Expr], attrs: Attributes) -> Expr:
    """`x` where it is above alpha, else 0."""
    x, dtype = inputs[0], inputs[0].ty.dtype
    above = relax.op.greater(x, relax.const(float(attrs.get("alpha", 1.0)), dtype))
    return relax.op.multiply(relax.op.astype(above, dtype), x)


CONVERTERS: dict[str, Callable[[Context, list[Expr], Attributes], Expr]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MatMul": matmul,
    "Gemm": gemm,
    "Clip": clip,
    "Sum": _chain(relax.op.add),
    "Min": _chain(relax.op.minimum),
    "Max": _chain(relax.op.maximum),
    "Mean": mean,
    "Softmax": _softmax(relax.op.nn.softmax),
    "LogSoftmax": _softmax(relax.op.nn.log_softmax),
    "LRN": lrn,
    "Elu": elu,
    "Selu": selu,
    "ThresholdedRelu": thresholded_relu,
}
