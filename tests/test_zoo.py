"""The zoo: valid ONNX, the published sizes, reproducible weights of a sane scale."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from gemmify import zoo
from gemmify.errors import InputError

# Parameters without the running statistics of batch norm, from the papers (torchvision's models where they agree).
PARAMETERS = {
    "alexnet": 60_965_224,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "googlenet": 6_998_552,
    "resnet50": 25_557_032,
    "squeezenet": 1_235_496,
    "mobilenet_v2": 3_504_872,
}
SMALL = ("googlenet", "resnet50", "squeezenet", "mobilenet_v2")


def weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in model.graph.initializer}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_network_has_the_published_number_of_parameters(name: str) -> None:
    model = zoo.build(name)
    statistics = {i for n in model.graph.node if n.op_type == "BatchNormalization" for i in n.input[3:]}
    bounds = {i for n in model.graph.node if n.op_type == "Clip" for i in n.input[1:]}
    sizes = {k: int(np.prod(t.dims)) for k, t in weights(model).items() if k not in statistics | bounds}
    assert sum(sizes.values()) == PARAMETERS[name]
    assert [i.name for i in model.graph.input] == ["data"]
    assert [o.name for o in model.graph.output] == ["prob"]
    assert all(t.HasField("raw_data") and len(t.raw_data) == 4 * np.prod(t.dims) for t in model.graph.initializer)
    names = [n.name for n in model.graph.node]
    assert all(names) and len(set(names)) == len(names)


@pytest.mark.parametrize("name", SMALL)
def test_network_is_valid_onnx_and_its_shapes_fit(name: str) -> None:
    model = zoo.build(name, batch=2)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim] == [2, 1000]


def test_the_seed_alone_decides_the_weights() -> None:
    first, again, other = (weights(zoo.build("squeezenet", seed=s)) for s in (3, 3, 4))
    assert all(first[k].raw_data == again[k].raw_data for k in first)
    assert first["conv1_weight"].raw_data != other["conv1_weight"].raw_data


def test_batch_norm_variances_are_positive_and_weights_finite() -> None:
    for name, tensor in weights(zoo.build("resnet50")).items():
        values = np.frombuffer(tensor.raw_data, np.float32)
        assert np.isfinite(values).all(), name
        if name.endswith("_var"):
            assert values.min() > 0, name


@pytest.mark.parametrize("name", ["squeezenet", "mobilenet_v2"])
def test_activations_keep_a_sane_size(name: str) -> None:
    """Through the whole network, with onnx's reference: logits of order 1, a softmax that is not saturated."""
    model = zoo.build(name)
    logits = model.graph.node[-1].input[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(logits))
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    prob, raw = onnx.reference.ReferenceEvaluator(model).run(None, {"data": x})
    assert 0.05 < np.sqrt(np.mean(np.square(raw))) < 10
    assert prob.max() < 0.5 and np.unique(prob).size > 500
    np.testing.assert_allclose(prob.sum(), 1, rtol=1e-5)


def test_building_is_fast() -> None:
    zoo.build("squeezenet")  # imports and first calls
    start = time.process_time()
    zoo.build("resnet50")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", r"'resnet' is not a network of the zoo \(did you mean 'resnet50'\?\); the zoo holds alexnet, vgg16"),
        ("VGG19", r"did you mean 'vgg19'"),
        ("bert", r"'bert' is not a network of the zoo; the zoo holds"),
    ],
)
def test_unknown_name_is_refused_with_the_list(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.build(name)


@pytest.mark.parametrize("batch", [0, -1, 1.5])
def test_batch_must_be_a_positive_whole_number(batch: int) -> None:
    with pytest.raises(InputError, match="batch must be a whole number of at least 1"):
        zoo.build("squeezenet", batch=batch)
