"""Resampling and padding for onnx's reference evaluator; see `reference_ops`.

Its own Upsample knows whole factors and "nearest" only, its Resize no opset 10, its Pad no negative widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_resize import Resize as _Resize


def resample(x: np.ndarray, scales: Sequence[float], mode: str) -> np.ndarray:
    """`x` with each axis `floor(n s)` long, where output o reads position `o / s`: opsets 7 to 10.

    "nearest" rounds the position down, or up on an axis that shrinks (the example `resize_downsample_nearest` of
    opset 10); "linear" mixes the two neighbours and repeats the last value beyond it.
    """
    for axis, scale in enumerate(scales):
        # Positions as in float32, for the same neighbour as other engines where rounding decides.
        factor, last = np.float32(scale), x.shape[axis] - 1
        if factor == 1:
            continue
        at = np.arange(int(np.floor(np.float32(last + 1) * factor)), dtype=np.float32) / factor
        if mode == "nearest":
            near = np.ceil(at) if factor < 1 else np.floor(at)
            x = np.take(x, np.minimum(near.astype(np.int64), last), axis)
            continue
        low = np.minimum(at.astype(np.int64), last)
        share = (at.astype(np.float64) - low).clip(0, 1).reshape(-1, *[1] * (x.ndim - 1 - axis)).astype(x.dtype)
        x = (1 - share) * np.take(x, low, axis) + share * np.take(x, np.minimum(low + 1, last), axis)
    return x


class Upsample(OpRun):
    """Scales as an attribute in opsets 7 and 8, as an input in 9."""

    def _run(self, x: np.ndarray, given: np.ndarray | None = None, **attributes: Any) -> tuple[np.ndarray]:
        scales = attributes["scales"] if given is None else given
        return (resample(x, list(scales), attributes.get("mode") or "nearest"),)


class Resize(_Resize):
    """Opset 10 is Upsample that may shrink; from 11 on onnx's own is right."""

    def _run(self, x: np.ndarray, *inputs: Any, **attributes: Any) -> tuple[np.ndarray]:
        if self.run_params["opsets"][""] >= 11:
            return super()._run(x, *inputs, **attributes)
        return (resample(x, list(inputs[0]), attributes.get("mode") or "nearest"),)


class Pad(OpRun):
    """Widths and value as attributes before opset 11, as inputs since; a negative width cuts off."""

    def _run(
        self,
        x: np.ndarray,
        given: np.ndarray | None = None,
        constant: np.ndarray | None = None,
        axes: np.ndarray | None = None,
        **attributes: Any,
    ) -> tuple[np.ndarray]:
        widths = [int(p) for p in (attributes["pads"] if given is None else given)]
        mode: Any = attributes.get("mode") or "constant"
        value = (attributes.get("value") or 0.0) if constant is None else np.asarray(constant).item()
        padded = [(0, 0)] * x.ndim
        for i, axis in enumerate(range(x.ndim) if axes is None else axes):
            padded[axis] = (widths[i], widths[len(widths) // 2 + i])
        x = x[tuple(slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(x.shape, padded, strict=True))]
        grown = [(max(b, 0), max(a, 0)) for b, a in padded]
        options: dict[str, Any] = {"constant_values": value} if mode == "constant" else {}
        return (np.pad(x, grown, mode=mode, **options),)
