"""Networks built in process with seeded weights, so that everything runs offline: `build("resnet50")`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import onnx

from gemmify.errors import InputError
from gemmify.zoo import networks
from gemmify.zoo.builder import Builder, Tensor

# The preferred spelling of each name; what `gemmify list` shows.
ZOO: dict[str, Callable[[Builder, Tensor], Tensor]] = {
    "alexnet": networks.alexnet,
    "vgg16": networks.vgg16,
    "vgg19": networks.vgg19,
    "googlenet": networks.googlenet,
    "resnet50": networks.resnet50,
    "squeezenet": networks.squeezenet,
    "mobilenet_v2": networks.mobilenet_v2,
}


def build(name: str, batch: int = 1, seed: int = 0) -> onnx.ModelProto:
    """Build a network of the zoo: input `data` of [batch, 3, 224, 224] float32, output `prob` of [batch, 1000].

    The weights follow from `seed` alone. Raises InputError for a name that is not in the zoo or a batch below 1.
    """
    if name not in ZOO:
        raise InputError(unknown_name(name))
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"the batch must be a whole number of at least 1, got {batch!r}")
    builder = Builder(name, seed)
    return builder.finish(ZOO[name](builder, builder.input("data", (batch, 3, 224, 224))))


def unknown_name(name: str) -> str:
    """The sentence that says that `name` is not in the zoo, what is, and which name may have been meant."""
    near = difflib.get_close_matches(name.lower(), ZOO, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{name!r} is not a network of the zoo{hint}; the zoo holds {', '.join(ZOO)}"
