"""Operators for onnx's reference evaluator, in float64 and in plain NumPy, in place of its own.

Its own are wrong for LRN, for Softmax and its relatives below opset 13, for BatchNormalization below opset 14, for
pools with auto_pad SAME_*, and for ConvTranspose with groups or an output_shape; its Conv takes minutes for a network.
Others lack forms (`reference_resize`) or are functions with float32 constants. Everything here follows the operator
specification of ONNX, windows one slice of the input a kernel position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
from onnx.reference.op_run import OpRun

from .errors import UnsupportedError
from .reference_resize import Pad, Resize, Upsample

Place: TypeAlias = Any
"""An index of an array: `...` and slices or numbers, which NumPy's own types do not name."""


@dataclass(frozen=True)
class Windows:
    """Where `out` windows lie on an input of sizes `size`, one entry a dimension; the padding is as declared."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    out: tuple[int, ...]

    def padded(self, x: np.ndarray, fill: float) -> np.ndarray:
        """`x` (N, C, *size) with `fill` around it, as far as the windows reach."""
        sides = zip(self.size, self.kernel, self.stride, self.dilation, self.before, self.out, strict=True)
        reach = [(b, max((o - 1) * s + d * (k - 1) + 1 - n - b, 0)) for n, k, s, d, b, o in sides]
        return np.pad(x, [(0, 0), (0, 0), *reach], constant_values=fill)

    def taps(self, x: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Each kernel position with what it reads of the padded `x`: a view (N, C, *out)."""
        for tap in np.ndindex(*self.kernel):
            sides = zip(tap, self.dilation, self.out, self.stride, strict=True)
            place: Place = (..., *(slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in sides))
            yield tap, x[place]


def windows(size: Sequence[int], kernel: Sequence[int], attributes: dict[str, Any]) -> Windows:
    """The windows of a Conv or pool node; `size` is (H, W) and the like, `attributes` the node's."""
    rank = len(size)
    stride = tuple(attributes.get("strides") or [1] * rank)
    dilation = tuple(attributes.get("dilations") or [1] * rank)
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    mode = attributes.get("auto_pad") or "NOTSET"
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if mode.startswith("SAME"):
        out = [-(-n // s) for n, s in zip(size, stride, strict=True)]
        total = [max((o - 1) * s + r - n, 0) for o, s, r, n in zip(out, stride, reach, size, strict=True)]
        before, after = _split(total, mode)
        return Windows(tuple(size), tuple(kernel), stride, dilation, before, after, tuple(out))
    before, after = tuple(pads[:rank]), tuple(pads[rank:])
    if mode == "VALID":
        before = after = (0,) * rank
    sides = zip(size, before, after, reach, stride, strict=True)
    spans = [(n, b, n + b + a - r, s) for n, b, a, r, s in sides]
    out = [span // s + 1 for _, _, span, s in spans]
    if attributes.get("ceil_mode"):
        up = [-(-span // s) + 1 for _, _, span, s in spans]
        # A window that would start in the padding after the input is left out.
        out = [o - ((o - 1) * s >= n + b) for o, (n, b, _, s) in zip(up, spans, strict=True)]
    return Windows(tuple(size), tuple(kernel), stride, dilation, before, after, tuple(out))


def _split(total: Sequence[int], mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding in all -> before and after; SAME_UPPER puts the odd one after."""
    small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (small, large) if mode == "SAME_UPPER" else (large, small)


class Conv(OpRun):
    """`O[n, m, o] = B[m] + sum_{c, k} X[n, g(m) C/g + c, o s + k d - p] W[m, c, k]`."""

    def _run(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None, **attributes: Any) -> tuple[np.ndarray]:
        where = windows(x.shape[2:], w.shape[2:], attributes)
        groups = attributes.get("group") or 1
        grouped = w.reshape(groups, -1, *w.shape[1:])
        out = np.zeros((x.shape[0], groups, grouped.shape[1], *where.out), x.dtype)
        for tap, read in where.taps(where.padded(x, 0)):
            part = read.reshape(x.shape[0], groups, -1, prod(where.out))
            at: Place = (..., *tap)
            out += (grouped[at] @ part).reshape(out.shape)
        result = out.reshape(x.shape[0], w.shape[0], *where.out)
        return (result if b is None else result + b.reshape(-1, *[1] * len(where.out)),)


class ConvTranspose(OpRun):
    """The adjoint of Conv: every input value is spread over its window, `W` is (C, M/g, *kernel)."""

    def _run(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None, **attributes: Any) -> tuple[np.ndarray]:
        rank, groups = x.ndim - 2, attributes.get("group") or 1
        stride = attributes.get("strides") or [1] * rank
        dilation = attributes.get("dilations") or [1] * rank
        before, out = _transposed_window(x.shape[2:], w.shape[2:], stride, dilation, attributes)
        sides = zip(x.shape[2:], stride, dilation, w.shape[2:], before, out, strict=True)
        full = [max((n - 1) * s + d * (k - 1) + 1, p + o) for n, s, d, k, p, o in sides]
        grouped = w.reshape(groups, -1, *w.shape[1:])
        part = x.reshape(x.shape[0], groups, -1, prod(x.shape[2:]))
        result = np.zeros((x.shape[0], groups, w.shape[1], *full), x.dtype)
        for tap in np.ndindex(*w.shape[2:]):
            at: Place = (..., *tap)
            product = np.swapaxes(grouped[at], 1, 2) @ part
            where = zip(tap, dilation, x.shape[2:], stride, strict=True)
            place: Place = (..., *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in where))
            result[place] += product.reshape(*product.shape[:3], *x.shape[2:])
        crop: Place = (..., *(slice(p, p + o) for p, o in zip(before, out, strict=True)))
        result = result[crop].reshape(x.shape[0], -1, *out)
        return (result if b is None else result + b.reshape(-1, *[1] * rank),)


def _transposed_window(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], values: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """What is cut off before, and the output's sizes: `s (n - 1) + output_padding + d (k - 1) + 1 - p - q`."""
    rank = len(size)
    extra = values.get("output_padding") or [0] * rank
    whole = [
        s * (n - 1) + e + d * (k - 1) + 1 for n, k, s, d, e in zip(size, kernel, stride, dilation, extra, strict=True)
    ]
    mode, target = values.get("auto_pad") or "NOTSET", values.get("output_shape")
    if target is None and not mode.startswith("SAME"):
        pads = list(values.get("pads") or [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return pads[:rank], [f - p - q for f, p, q in zip(whole, pads[:rank], pads[rank:], strict=True)]
    out = list(target)[-rank:] if target is not None else [n * s for n, s in zip(size, stride, strict=True)]
    total = [max(f - o, 0) for f, o in zip(whole, out, strict=True)]
    return list(_split(total, mode)[0]), out


class MaxPool(OpRun):
    """The largest value of each window, and where it lies in the flattened input."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        where = windows(x.shape[2:], attributes["kernel_shape"], attributes)
        best = np.full((*x.shape[:2], *where.out), -np.inf)
        at = np.zeros(best.shape, np.int64)
        planes = np.arange(prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * len(where.size)) * prod(where.size)
        positions = np.arange(prod(where.size)).reshape(
            where.size, order="F" if attributes.get("storage_order") else "C"
        )
        numbers = where.padded(positions[None, None], 0)
        for (_, read), (_, number) in zip(
            where.taps(where.padded(x.astype(np.float64), -np.inf)), where.taps(numbers), strict=True
        ):
            larger = read > best
            best[larger] = read[larger]
            at[larger] = (number + planes)[larger]
        results = (best.astype(x.dtype), at)
        return results[: len(self.onnx_node.output)]


class AveragePool(OpRun):
    """The mean of each window: over the input's values, or over the declared padding too (count_include_pad)."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        where = windows(x.shape[2:], attributes["kernel_shape"], attributes)
        counted = np.ones((1, 1, *where.size))
        if attributes.get("count_include_pad"):
            sides = [(0, 0), (0, 0), *zip(where.before, where.after, strict=True)]
            counted = np.pad(counted, sides, constant_values=1.0)
            beyond = where.padded(np.zeros((1, 1, *where.size)), 0).shape
            grown = [(0, max(want - have, 0)) for want, have in zip(beyond, counted.shape, strict=True)]
            counted = np.pad(counted, grown)
        else:
            counted = where.padded(counted, 0)
        total = sum(read for _, read in where.taps(where.padded(x, 0)))
        return (np.asarray(total / sum(read for _, read in where.taps(counted)), x.dtype),)


class LpPool(OpRun):
    """`(sum |x|^p)^(1/p)` over each window."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        where, p = windows(x.shape[2:], attributes["kernel_shape"], attributes), attributes.get("p") or 2
        total = sum(np.abs(read) ** p for _, read in where.taps(where.padded(x, 0)))
        return (np.asarray(total ** (1 / p), x.dtype),)


class GlobalLpPool(OpRun):
    """`(sum |x|^p)^(1/p)` over each channel of each image."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        p = attributes.get("p") or 2
        total = (np.abs(x) ** p).sum(axis=tuple(range(2, x.ndim)), keepdims=True)
        return (np.asarray(total ** (1 / p), x.dtype),)


class LRN(OpRun):
    """`x / (bias + alpha / size sum of x^2 over the `size` channels around)^beta`."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        size = attributes["size"]
        below, above = (size - 1) // 2, size // 2
        channels = x.shape[1]
        squares = np.pad(np.square(x), [(0, 0), (below, above), *[(0, 0)] * (x.ndim - 2)])
        total = sum(squares[:, i : i + channels] for i in range(size))
        # The evaluator hands attributes over as float32, in which a quotient would be rounded.
        scale = attributes["bias"] + float(attributes["alpha"]) / size * total
        return (np.asarray(x / scale ** attributes["beta"], x.dtype),)


class BatchNormalization(OpRun):
    """`scale (x - mean) / sqrt(var + epsilon) + bias` with the statistics given, by channel; `momentum` is unused.

    With `spatial` = 0 (opsets 7 and 8) the parameters have the shape of one image. Raises UnsupportedError for
    `training_mode` = 1.
    """

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        **attributes: Any,
    ) -> tuple[np.ndarray]:
        if attributes.get("training_mode"):
            name = self.onnx_node.name
            raise UnsupportedError(f"BatchNormalization {name!r} is in training mode; export the model for inference")
        by_channel = (-1, *[1] * (x.ndim - 2))
        shape = x.shape[1:] if attributes.get("spatial") == 0 else by_channel
        scale, bias, mean, var = (p.reshape(shape) for p in (scale, bias, mean, var))
        return (np.asarray(scale * (x - mean) / np.sqrt(var + float(attributes["epsilon"])) + bias, x.dtype),)


class MeanVarianceNormalization(OpRun):
    """`(x - mean) / (deviation + 1e-9)` over `axes`."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        axes = tuple(attributes.get("axes") or (0, 2, 3))
        deviation = np.sqrt(np.maximum((x**2).mean(axes, keepdims=True) - x.mean(axes, keepdims=True) ** 2, 0))
        return ((x - x.mean(axes, keepdims=True)) / (deviation + 1e-9),)


class HardSwish(OpRun):
    """`x max(0, min(1, x / 6 + 1 / 2))`, where onnx's function has a sixth in float32."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (x * np.clip(x / 6 + 0.5, 0, 1),)


class _OverClasses(OpRun):
    """Softmax and its relatives: along one axis from opset 13 on; before, over everything from `axis` (1) on."""

    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        given = [a.i for a in self.onnx_node.attribute if a.name == "axis"]
        if self.run_params["opsets"][""] >= 13:
            return (self._along(x, given[0] if given else -1).astype(x.dtype),)
        axis = given[0] if given else 1
        flat = x.reshape(prod(x.shape[: axis % x.ndim]), -1)
        return (self._along(flat, 1).reshape(x.shape).astype(x.dtype),)

    def _along(self, x: np.ndarray, axis: int) -> np.ndarray:
        raise NotImplementedError


class Softmax(_OverClasses):
    def _along(self, x: np.ndarray, axis: int) -> np.ndarray:
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


class LogSoftmax(_OverClasses):
    def _along(self, x: np.ndarray, axis: int) -> np.ndarray:
        shifted = x - x.max(axis=axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


class Hardmax(_OverClasses):
    def _along(self, x: np.ndarray, axis: int) -> np.ndarray:
        best = np.zeros_like(x)
        np.put_along_axis(best, np.expand_dims(x.argmax(axis=axis), axis), 1, axis)
        return best


OPERATORS: tuple[type[OpRun], ...] = (
    Conv,
    ConvTranspose,
    MaxPool,
    AveragePool,
    LpPool,
    GlobalLpPool,
    LRN,
    BatchNormalization,
    MeanVarianceNormalization,
    HardSwish,
    Upsample,
    Resize,
    Pad,
    Softmax,
    LogSoftmax,
    Hardmax,
)
"""What `ReferenceEvaluator(new_ops=...)` takes."""
