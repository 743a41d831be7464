"""What PyTorch, and with it cuDNN and cuBLAS, make of the same layer on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from .box import Box
from .loaded import Loaded
from .timing import Contestant

Work = Callable[[], Any]


def set_precision(torch: Any, precision: str) -> None:
    """TF32 for precision "tf32" alone; the fastest of cuDNN's algorithms, found at the first call."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


class Peer:
    """A layer with bias and ReLU in PyTorch, over the arrays of ours: channels last there is channels_last here."""

    def __init__(self, box: Box, layer: Loaded) -> None:
        self.torch, self.box, self.problem = box.torch, box, layer.entry["problem"]
        problem, arrays = self.problem, layer.arrays
        self.data, self.weight = arrays["data"].as_torch(), arrays["weight"].as_torch()
        self.bias = arrays["bias"].as_torch()
        self.got = arrays[layer.entry["output"]].as_torch().reshape(layer.entry["output_shape"])
        if problem["kind"] == "conv":
            self.data, self.weight, self.got = (t.permute(0, 3, 1, 2) for t in (self.data, self.weight, self.got))
            self.window = {key: list(problem[key]) for key in ("stride", "dilation")}
            self.window["padding"] = list(problem["pad_before"])

    @staticmethod
    def refuses(problem: dict[str, Any]) -> str:
        """Why PyTorch has no such layer, or nothing."""
        if problem["kind"] == "dense":
            return ""
        if problem["kind"] != "conv" or len(problem["size"]) != 2:
            return "the comparison knows 2-D convolutions and fully connected layers"
        return "" if list(problem["pad_before"]) == list(problem["pad_after"]) else "the padding is not symmetric"

    def variants(self) -> dict[str, Work]:
        """Ways to compute it by name: `eager` and `fused` are the layer with bias and ReLU, `alone` without both."""
        functional = self.torch.nn.functional
        if self.problem["kind"] == "dense":
            turned = self.weight.t()
            return {
                "eager": lambda: functional.linear(self.data, self.weight, self.bias).relu_(),
                "fused": lambda: self.torch._addmm_activation(self.bias, self.data, turned),
                "alone": lambda: functional.linear(self.data, self.weight),
            }
        groups, window = self.problem["groups"], self.window
        sizes = (window["stride"], window["padding"], window["dilation"], groups)
        return {
            "eager": lambda: functional.conv2d(self.data, self.weight, self.bias, *sizes).relu_(),
            "fused": lambda: self.torch.cudnn_convolution_relu(self.data, self.weight, self.bias, *sizes),
            "alone": lambda: functional.conv2d(self.data, self.weight, None, *sizes),
        }

    def error(self) -> float:
        """The difference of our last output from PyTorch's in float32 without TF32, over the largest output."""
        torch, functional = self.torch, self.torch.nn.functional
        set_precision(torch, "float32")
        torch.backends.cudnn.benchmark = False  # one call: nothing is to be searched for
        data, weight, bias = (t.float() for t in (self.data, self.weight, self.bias))
        if self.problem["kind"] == "dense":
            want = functional.linear(data, weight, bias).relu_()
        else:
            window = self.window
            sizes = (window["stride"], window["padding"], window["dilation"], self.problem["groups"])
            want = functional.conv2d(data, weight, bias, *sizes).relu_()
        return float((self.got.float() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def captured(box: Box, work: Work, calls: Callable[[float], int]) -> Contestant:
    """`work` of PyTorch as a graph of as many calls as `calls` says for the seconds that one takes."""
    torch = box.torch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(3):
            work()
        side.synchronize()
        count = calls(box.cuda.seconds(work, side.cuda_stream))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for _ in range(count):
            work()

    def launch() -> None:
        with torch.cuda.stream(side):
            graph.replay()

    return Contestant(launch, int(side.cuda_stream), count, graph.reset)


def contestants(
    box: Box, layer: Loaded, precision: str, calls: Callable[[float], int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """PyTorch's variants as graphs by name, and why the others are none."""
    set_precision(box.torch, precision)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, work in Peer(box, layer).variants().items():
        try:
            found[name] = captured(box, work, calls)
        except Exception as err:  # a dtype or a form that this version of cuDNN does not take
            failed[name] = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
            with contextlib.suppress(Exception):
                box.torch.cuda.synchronize()
    return found, failed
