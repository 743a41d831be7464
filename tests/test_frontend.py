"""The front end: cleaning, names, every kind of model, and one clear sentence for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import tvm
from frontend_helpers import check, ints, layer_names, normal, op_names, run
from models import make_model, single
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax, te

from gemmify.errors import GemmifyWarning, InputError, UnsupportedError
from gemmify.frontend import TensorSpec, import_model

# ---- cleaning and folding -----------------------------------------------------------------------------------------


def test_initializers_listed_as_inputs_and_unused_ones_do_not_become_parameters() -> None:
    model = models.small_cnn()
    model.graph.initializer.append(numpy_helper.from_array(normal(3), "unused"))
    for t in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    imported = import_model(model)
    assert [p.name for p in imported.mod["main"].params] == ["x"]


def test_weights_made_by_nodes_are_folded_to_constants() -> None:
    nodes = [
        helper.make_node(
            "ConstantOfShape", ["shape"], ["flat"], value=numpy_helper.from_array(np.array([0.5], np.float32))
        ),
        helper.make_node("Constant", [], ["to"], value_ints=[4, 3, 1, 1]),
        helper.make_node("Reshape", ["flat", "to"], ["w"]),
        helper.make_node("Constant", [], ["b"], value_floats=[1.0, 2.0, 3.0, 4.0]),
        helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"),
    ]
    imported = check(make_model(nodes, {"x": [1, 3, 4, 4]}, ["y"], {"shape": ints(12)}))
    assert op_names(imported) == ["relax.nn.conv2d", "relax.add"]


def test_shape_arithmetic_of_exporters_is_folded() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"], name="fc"),
    ]
    weights = {"zero": np.array(0, np.int64), "axes": ints(0), "rest": ints(-1), "w": normal(12, 5)}
    imported = check(make_model(nodes, {"x": [2, 3, 4]}, ["y"], weights))
    assert op_names(imported) == ["relax.reshape", "relax.matmul"]


def test_dropout_disappears_also_with_its_mask_listed() -> None:
    for opset, inputs in ((9, ["c"]), (13, ["c", "ratio"])):
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("Dropout", inputs, ["d", "mask"], name="drop"),
            helper.make_node("Relu", ["d"], ["y"]),
        ]
        weights = {"w": normal(4, 3, 1, 1), "ratio": np.array(0.3, np.float32)}
        imported = check(make_model(nodes, {"x": [1, 3, 4, 4]}, ["y"], weights, opset=opset))
        assert op_names(imported) == ["relax.nn.conv2d", "relax.nn.relu"]


def test_outputs_keep_their_names_and_order_even_if_input_constant_or_repeated() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Neg", ["w"], ["constant"]),
        helper.make_node("Identity", ["a"], ["b"]),
    ]
    imported = check(make_model(nodes, {"x": [2, 3]}, ["b", "constant", "a", "same"], {"w": normal(4)}))
    assert [o.name for o in imported.outputs] == ["b", "constant", "a", "same"]


def test_model_functions_are_inlined() -> None:
    body = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = make_model([helper.make_node("Twice", ["x"], ["y"], domain="local")], {"x": [3]}, ["y"])
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("local", 1))
    check(model)


def test_source_is_a_copy_with_the_shapes_fixed() -> None:
    model = models.small_cnn(batch="N")
    before = model.SerializeToString()
    imported = import_model(model, {"x": (2, 3, 12, 12)})
    assert model.SerializeToString() == before
    assert imported.source is not None
    assert [d.dim_value for d in imported.source.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 12, 12]
    x = {"x": normal(2, 3, 12, 12)}
    np.testing.assert_allclose(
        run(imported, x)[0], ReferenceEvaluator(imported.source).run(None, x)[0], rtol=1e-4, atol=1e-5
    )


# ---- names --------------------------------------------------------------------------------------------------------


def test_layer_names_are_sanitised_unique_and_fall_back_on_the_output() -> None:
    weights = {f"w{i}": normal(3, 3, 1, 1) for i in range(4)}
    names = ["block 1:conv", "block_1/conv.a", "", "block 1?conv"]
    nodes, x = [], "x"
    for i, name in enumerate(names):
        nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"out:{i}"], name=name))
        x = f"out:{i}"
    imported = import_model(make_model(nodes, {"x": [1, 3, 4, 4]}, [x], weights))
    assert layer_names(imported) == ["block_1_conv", "block_1/conv.a", "out_2", "block_1_conv_2"]
    assert imported.outputs[0].name == "out:3"


def test_input_names_are_kept_as_they_are() -> None:
    imported = import_model(make_model([helper.make_node("Relu", ["in/put:0"], ["y"])], {"in/put:0": [2]}, ["y"]))
    assert imported.inputs[0].name == imported.mod["main"].params[0].name == "in/put:0"


@pytest.mark.parametrize("name", ["squeezenet", "resnet50", "inception_v1", "densenet121", "shufflenet"])
def test_published_architectures_import_with_every_layer_named(name: str) -> None:
    model = models.light_model(name)
    imported = import_model(model)
    wanted = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert layer_names(imported) == wanted
    assert len(imported.mod["main"].params) == 1
    unpacked = import_model(models.light_path(name))  # weights as ConstantOfShape nodes
    assert layer_names(unpacked) == wanted and op_names(unpacked) == op_names(imported)


# ---- other kinds of models ----------------------------------------------------------------------------------------


def test_zoo_name_path_and_bytes(tmp_path: Path) -> None:
    assert import_model("squeezenet").name == "squeezenet"
    model = models.small_cnn()
    path = tmp_path / "small.onnx"
    onnx.save(model, path)
    for given in (path, str(path), path.read_bytes()):
        imported = import_model(given)
        assert layer_names(imported) == ["first/conv", "second/conv", "fc"]
    assert import_model(path).name == "small"


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    onnx.save(models.small_cnn(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert layer_names(import_model(path)) == ["first/conv", "second/conv", "fc"]
    with pytest.raises(InputError, match="lies in another file: pass the path"):
        import_model(path.read_bytes())
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match="keeps weights in a file beside it that cannot be read"):
        import_model(path)


def test_relax_module_gets_named_layers_and_its_symbolic_batch_bound() -> None:
    bb = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 4), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            hidden = bb.emit(relax.op.matmul(x, relax.const(normal(4, 3))))
            out = bb.emit_output(bb.emit(relax.op.matmul(hidden, relax.const(normal(3, 2))), name_hint="head"))
        bb.emit_func_output(out)
    with pytest.raises(InputError, match=r"x is \[n,4\]; pass for example --shape x=1,4"):
        import_model(bb.get())
    imported = import_model(bb.get(), {"x": (5, 4)})
    assert layer_names(imported) == ["matmul_0", "head"]
    assert imported.inputs == (TensorSpec("x", (5, 4), "float32"),) and imported.outputs[0].shape == (5, 2)
    with pytest.raises(InputError, match="'y', which is not an input"):
        import_model(bb.get(), {"y": (5, 4)})
    with pytest.raises(InputError, match=r"has the shape \[n,4\], which the shape given, \[5,3\], contradicts"):
        import_model(bb.get(), {"x": (5, 3)})


def test_tensor_expression_and_prim_func() -> None:
    a, b = te.placeholder((4, 6), name="A"), te.placeholder((6, 5), name="B")
    k = te.reduce_axis((0, 6), name="k")
    c = te.compute((4, 5), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    x = {"A": normal(4, 6), "B": normal(6, 5)}
    for given in ([a, b, c], te.create_prim_func([a, b, c])):
        imported = import_model(given)
        assert [s.name for s in imported.inputs] == ["A", "B"]
        np.testing.assert_allclose(run(imported, x)[0], x["A"] @ x["B"], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="needs its placeholders and its results"):
        import_model([a, b])


def test_pt2_without_torch_names_the_extra(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"PK\x03\x04")
    try:
        import torch  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"needs PyTorch.*gemmify\[torch\]"):
            import_model(path)
    else:
        with pytest.raises(InputError, match=r"not a program that torch\.export\.save wrote"):
            import_model(path)


def test_torch_program() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    ).eval()
    x = torch.randn(1, 3, 6, 6)
    imported = import_model(torch.export.export(net, (x,)))
    assert len(layer_names(imported)) == 2 and len(imported.inputs) == 1
    got = run(imported, {imported.inputs[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# ---- shapes -------------------------------------------------------------------------------------------------------


def two_inputs(a: list[int | str], b: list[int | str]) -> onnx.ModelProto:
    return make_model([helper.make_node("Add", ["a", "b"], ["y"])], {"a": a, "b": b}, ["y"])


def test_open_dimensions_must_be_given_and_all_are_listed() -> None:
    with pytest.raises(InputError, match=r"a is \[N,3\]; b is \[N,T\]; pass for example --shape a=1,3 --shape b=1,128"):
        import_model(two_inputs(["N", 3], ["N", "T"]))
    with pytest.raises(InputError, match=r"x is \[batch,3,12,12\]; pass for example --shape x=1,3,12,12"):
        import_model(models.small_cnn(batch="batch"))


def test_a_dimension_named_twice_is_given_once() -> None:
    imported = import_model(two_inputs(["N", 3], ["N", 3]), {"a": (4, 3)})
    assert imported.inputs[1].shape == (4, 3)
    with pytest.raises(InputError, match="the dimension 'N' was given two sizes, 4 and 5"):
        import_model(two_inputs(["N", 3], ["N", 3]), {"a": (4, 3), "b": (5, 3)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": (1, 3)}, r"'y', which is not an input of the model \(its inputs: a, b\)"),
        ({"a": (2,)}, r"input 'a' has 2 dimensions \[2,3\], but the shape given has 1: \[2\]"),
        (
            {"a": (2, 4)},
            r"has the shape \[2,3\], and the shape given, \[2,4\], contradicts it: dimension 1 is fixed at 3",
        ),
        ({"a": (2, 0)}, "must be whole numbers of at least 1"),
        ({"a": (2, 1.5)}, "must be whole numbers of at least 1"),
        ({"a": "23"}, "must be whole numbers of at least 1"),
    ],
)
def test_wrong_shapes_are_refused(shapes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_model(two_inputs([2, 3], [2, 3]), shapes)


def test_fixed_batch_can_be_changed_where_the_model_follows() -> None:
    imported = import_model(models.small_cnn(), {"x": (3, 3, 12, 12)})
    assert imported.outputs[0].shape == (3, 5)
    nodes = [helper.make_node("Reshape", ["x", "to"], ["y"])]
    stuck = make_model(nodes, {"x": [2, 6]}, ["y"], {"to": ints(2, -1)})
    stuck.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6]))
    with pytest.raises(InputError, match="the batch cannot be changed from 2 to 4"):
        import_model(stuck, {"x": (4, 6)})


def test_shapes_that_do_not_fit_together() -> None:
    model = make_model([helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": [2, 3], "b": [4, 5]}, ["y"])
    with pytest.raises(InputError, match="shapes do not fit together"):
        import_model(model)
    negative = single("Conv", [[1, 1, 5, 5]], [normal(1, 1, 3, 3)], pads=[-1, 0, 0, 0])
    with pytest.raises(InputError, match=r"node name: node.*pads must not contain negative"):
        import_model(negative)


# ---- rejections ---------------------------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path: Path) -> None:
    good = models.small_cnn().SerializeToString()
    cases = {
        "empty.onnx": (b"", "is empty"),
        "text.onnx": (b"this is not a model\n" * 20, "is not an ONNX model"),
        "cut.onnx": (good[: len(good) // 2], "is not an ONNX model, or it is truncated"),
        "zip.onnx": (b"PK\x03\x04" + bytes(64), "is a zip archive"),
        "weights.pth": (b"PK\x03\x04", "PyTorch checkpoint"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            import_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a directory"):
        import_model(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        import_model(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match=r"'resnet5' is not a network of the zoo \(did you mean 'resnet50'"):
        import_model("resnet5")
    with pytest.raises(InputError, match="cannot import a int"):
        import_model(3)


def test_every_unsupported_operator_is_named_with_its_node() -> None:
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], name="first", domain="com.acme"),
        helper.make_node("Loop", ["", "", "a"], ["b"], name="again"),
        helper.make_node("NotAnOperator", ["b"], ["y"]),
    ]
    with pytest.raises(UnsupportedError) as caught:
        import_model(make_model(nodes, {"x": [2]}, ["y"]))
    message = str(caught.value)
    assert "Frobnicate (node 'first', domain com.acme)" in message
    assert "Loop (node 'again', domain ai.onnx)" in message
    assert "NotAnOperator (node 'y', domain ai.onnx)" in message


UNSUPPORTED = {
    "training batch norm": (
        single("BatchNormalization", [[1, 2, 3]], [normal(2), normal(2), normal(2), normal(2)], training_mode=1),
        "in training mode",
    ),
    "pool indices": (single("MaxPool", [[1, 2, 4]], outputs=2, kernel_shape=[2]), "extra output 'y1' is used"),
    "resize to broken sizes": (
        single("Resize", [[1, 1, 5, 5]], [None, np.array([1, 1, 1.5, 1.5], np.float32)]),
        "that give no whole sizes",
    ),
    "run-time size": (
        make_model([helper.make_node("NonZero", ["x"], ["y"])], {"x": [4]}, ["y"], out_dtype=TensorProto.INT64),
        "size known only at run time",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_forms_name_the_node(name: str, capfd: pytest.CaptureFixture) -> None:
    model, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError, match=message):
        import_model(model)
    assert capfd.readouterr() == ("", "")


def test_invalid_models() -> None:
    cycle = make_model(
        [helper.make_node("Relu", ["later"], ["y"]), helper.make_node("Relu", ["x"], ["later"])], {"x": [2]}, ["y"]
    )
    with pytest.raises(InputError, match=r"not valid ONNX.*topologically sorted"):
        import_model(cycle)
    with pytest.raises(InputError, match="the model has no outputs"):
        import_model(make_model([], {"x": [2]}, []))
    with pytest.raises(InputError, match="the model has no inputs"):
        import_model(make_model([helper.make_node("Neg", ["w"], ["y"])], {}, ["y"], {"w": normal(2)}))
    old = make_model([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], opset=6)
    with pytest.raises(InputError, match=r"uses opset 6, but 7 to \d+ are required"):
        import_model(old)
    short = models.small_cnn()
    short.graph.initializer[0].raw_data = short.graph.initializer[0].raw_data[:-4]
    with pytest.raises(InputError, match=r"the weight 'w1' of shape \[8, 3, 3, 3\] \(216 elements\) cannot be read"):
        import_model(short)


def test_weights_that_are_not_finite_are_warned_of_by_name() -> None:
    weight = normal(4, 3, 1, 1)
    weight[0, 0] = np.nan
    model = make_model(
        [helper.make_node("Conv", ["x", "bad_weight"], ["y"])], {"x": [1, 3, 2, 2]}, ["y"], {"bad_weight": weight}
    )
    with pytest.warns(GemmifyWarning, match="NaN or infinity.*bad_weight"):
        import_model(model)
