import pytest
import torch
from torch import nn

from tinyllava_fast.train import compile as compiling
from tinyllava_fast.train import timings
from tinyllava_fast.train.compile import CompiledForward, repays


class Net(nn.Module):
    """A stand-in with one input that LMM.forward has too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.factor = 2

    def forward(self, pixel_values):
        return (self.layer(pixel_values) * self.factor).sum()


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch.compiler.reset()


def test_one_graph_a_shape_and_names_untouched(caplog):
    net = Net()
    expected = net(torch.ones(4, 3))
    names = list(net.state_dict())
    compiled = CompiledForward(net, backend="eager")
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        for rows in (4, 4, 2, 4, 2):
            net(pixel_values=torch.ones(rows, 3))
    torch.testing.assert_close(net(pixel_values=torch.ones(4, 3)), expected)
    assert (compiled.graphs, compiled.recompiles) == (2, 0) and compiled.seconds > 0
    assert list(net.state_dict()) == names
    compiled.close()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and messages[0].startswith("compiled forward graph 1 (4 images)")


def test_a_recompile_is_an_error_line_with_the_reason(caplog):
    net = Net()
    compiled = CompiledForward(net, backend="eager")
    net(pixel_values=torch.ones(4, 3))
    net.factor = 3
    net(pixel_values=torch.ones(4, 3))
    assert compiled.recompiles == 1
    (error,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "recompiled a known shape" in error and "factor" in error


def test_a_graph_break_is_an_error():
    class Breaks(Net):
        def forward(self, pixel_values):
            if pixel_values.sum().item() > 0:
                return self.layer(pixel_values).sum()
            return pixel_values.sum()

    net = Breaks()
    CompiledForward(net, backend="eager")
    with pytest.raises(Exception, match=r"(?i)data-dependent|item"):
        net(pixel_values=torch.ones(4, 3))


def test_auto_compiles_when_the_steps_repay_it(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "gemm_flops_per_s", lambda dtype: 1e12)
    for name, value in (("EAGER_RATE", 0.25), ("SAVED_SHARE", 0.25), ("SECONDS_PER_LAYER", 2.0)):
        monkeypatch.setattr(compiling, name, value)
    step = {"flops": 0.25e12, "layers": 10, "dtype": torch.float32}  # one second
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        assert repays(80, **step) and not repays(79, **step)
    said = "auto: compiling; it would save 20 s of 80 steps (1 s each, compiled 0.75 s) and cost about 20 s (all estim"
    assert said in caplog.text


def test_auto_goes_by_what_was_measured(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("TLF_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "gemm_flops_per_s", lambda dtype: 1e12)
    kind = timings.kind_of_step(torch.device("cpu"), "float32", layers=10, tokens=64, flops=1e12)
    assert timings.read(kind) == {}
    timings.write(kind, [9.0, 9.0, 2.0, 2.0], None)
    assert timings.read(kind) == {}  # two steps are no measurement
    timings.write(kind, [9.0, 9.0, 2.0, 2.5, 2.0], None)
    timings.write(kind, [9.0, 9.0, 1.5, 1.5, 1.7], 12.0)
    timings.write("another", [1.0] * 9, None)
    assert timings.read(kind) == {"eager_s": 2.0, "compiled_s": 1.5, "compile_s": 12.0}
    step = {"flops": 1e12, "layers": 10, "dtype": torch.float32, "measured": timings.read(kind)}
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        assert repays(24, **step) and not repays(23, **step)
    assert "measured: eager_s, compiled_s, compile_s" in caplog.text
    slower = {**step, "measured": {"eager_s": 1.0, "compiled_s": 1.1}}
    assert not repays(10**6, **slower)
    (tmp_path / "compile.json").write_text("{damaged")
    assert timings.read(kind) == {}
