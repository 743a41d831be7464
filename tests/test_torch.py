"""torch.export programs, in memory and as .pt2 files, against PyTorch in float64. Skipped where PyTorch is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmify
from gemmify import cli
from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend import import_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
nn = torch.nn


class Net(nn.Module):  # type: ignore[misc, name-defined]
    """Batch norm before and behind a ReLU, a residual sum, both pools, groups, dropout, a fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, groups=8, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(x))
        x = nn.functional.max_pool2d(torch.relu(x + y), 3, 2, ceil_mode=True)
        x = nn.functional.relu6(self.grouped(x))
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(nn.functional.dropout(x, 0.5, self.training))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for norm in (net.first_norm, net.second_norm):
        for values in (norm.running_var, norm.weight.data):
            values.uniform_(0.5, 1.5)
        for values in (norm.running_mean, norm.bias.data):
            values.uniform_(-0.2, 0.2)
    return net.eval()


def picture(batch: int) -> Any:
    return torch.randn(batch, 3, 17, 17, generator=torch.Generator().manual_seed(batch))


def reference(module: Any, *inputs: Any) -> list[np.ndarray]:
    """The module's outputs in float64, by PyTorch itself; `module` comes back as it was."""
    try:
        result = module.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    finally:
        module.float()
    results = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    return [t.detach().numpy() for t in results]


def assert_agrees(model: gemmify.Model, module: Any, *inputs: Any) -> None:
    for got, want in zip(model.run([x.numpy() for x in inputs]), reference(module, *inputs), strict=True):
        assert got.shape == want.shape and got.dtype == np.float32
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1)


@pytest.fixture(scope="module")
def program(net: Net) -> Any:
    return torch.export.export(net, (picture(2),))


@pytest.fixture(scope="module")
def open_batch(net: Net) -> Any:
    return torch.export.export(net, (picture(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


@pytest.mark.parametrize("lowering", ["auto", "im2row", "winograd-4", "direct"])
def test_a_program_in_memory(program: Any, net: Net, lowering: str) -> None:
    model = gemmify.compile(program, lowering=lowering)
    assert_agrees(model, net, picture(2))
    assert [layer["op"] for layer in model.layers] == ["conv2d", "conv2d", "conv2d", "dense"]
    assert [layer["epilogue"][0] for layer in model.layers] == ["bias"] * 4
    assert model.inputs[0].name == "x"


def test_an_open_batch_takes_the_shape_given(open_batch: Any, net: Net) -> None:
    with pytest.raises(InputError, match=r"leaves input shapes open.*--shape x=1,3,17,17"):
        gemmify.compile(open_batch)
    assert_agrees(gemmify.compile(open_batch, shapes={"x": (3, 3, 17, 17)}), net, picture(3))
    with pytest.raises(InputError, match="contradicts"):
        gemmify.compile(open_batch, shapes={"x": (3, 3, 17, 18)})


def test_a_file_through_the_command_line(program: Any, open_batch: Any, net: Net, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "net.pt2")
    torch.export.save(open_batch, tmp_path / "open.pt2")
    assert_agrees(gemmify.compile(tmp_path / "net.pt2"), net, picture(2))
    library = tmp_path / "open.so"
    words = ["compile", str(tmp_path / "open.pt2"), "--shape", "x=3,3,17,17", "-o", str(library)]
    assert cli.main(words) == 0
    assert_agrees(gemmify.load(library), net, picture(3))
    assert cli.main(["verify", str(tmp_path / "open.pt2"), str(library)]) == 0
    assert cli.main(["verify", str(tmp_path / "net.pt2")]) == 0


def test_verify_sees_another_network(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(program, tmp_path / "net.pt2")
    torch.manual_seed(5)
    torch.export.save(torch.export.export(Net().eval(), (picture(2),)), tmp_path / "other.pt2")
    gemmify.compile(tmp_path / "net.pt2").export(tmp_path / "net.so")
    assert cli.main(["verify", str(tmp_path / "other.pt2"), str(tmp_path / "net.so")]) == 1
    assert "does not agree with torch float64" in capsys.readouterr().err


SMALL = (2, 4, 11, 13)
OPERATORS = {
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), SMALL),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 6, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), SMALL),
    "max_ceil": (nn.MaxPool2d(2, 3, padding=1, ceil_mode=True), SMALL),
    "average": (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), SMALL),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 5)), SMALL),
    "lrn": (nn.LocalResponseNorm(3, alpha=0.5), SMALL),
    "group_norm": (nn.GroupNorm(2, 4), SMALL),
    "hardswish": (nn.Hardswish(), SMALL),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), SMALL),
    "linear": (nn.Linear(13, 7), SMALL),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    torch.manual_seed(1)
    module, shape = OPERATORS[name]
    x = torch.randn(shape)
    assert_agrees(gemmify.compile(torch.export.export(module, (x,))), module, x)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Dropout(0.5).train(), InputError, r"aten.dropout.*training mode.*model.eval\(\)"),
        (nn.BatchNorm2d(4).train(), InputError, r"aten.batch_norm.*statistics from the batch: call model.eval\(\)"),
        (nn.AvgPool2d(2, 2, divisor_override=3), UnsupportedError, "avg_pool2d.*divisor_override"),
        (nn.AdaptiveMaxPool2d((1, 1)), UnsupportedError, "cannot be imported.*adaptive_max_pool2d"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(module: Any, error: type[Exception], message: str) -> None:
    exported = torch.export.export(module, (torch.randn(SMALL),))
    with pytest.raises(error, match=message):
        import_model(exported)


def test_a_program_that_keeps_state_is_refused() -> None:
    exported = torch.export.export(nn.BatchNorm2d(4).train(), (torch.randn(SMALL),)).run_decompositions()
    with pytest.raises(InputError, match=r"changes running_mean.*keeps no state"):
        import_model(exported)


def test_statistics_of_the_batch_are_kept_where_there_are_no_others() -> None:
    module, x = nn.BatchNorm2d(4, track_running_stats=False).eval(), torch.randn(SMALL)
    assert_agrees(gemmify.compile(torch.export.export(module, (x,))), module, x)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match=r"not a program that torch\.export\.save wrote"):
        import_model(tmp_path / "bad.pt2")
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="checkpoint"):
        import_model(tmp_path / "weights.pt")
