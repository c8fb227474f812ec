"""What a CUDA graph must be able to hold: `Trainer._advance` never asks the device for a number."""

import contextlib
import gc
import resource
import sys
import types

import pytest
import torch
from test_train import Orange, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from dreamfusion_fast import graph
from dreamfusion_fast.config import LossConfig
from dreamfusion_fast.train import Trainer

# What waits for the device, or makes a size of what lies there.
SYNCS = (
    "_local_scalar_dense item nonzero nonzero_numpy is_nonzero equal masked_select unique unique2"
    " _unique2 unique_consecutive unique_dim bincount histc allclose argwhere"
    " repeat_interleave.Tensor index.Tensor_bool lift_fresh"  # the last: a number of the host's
).split()


class NoSync(TorchDispatchMode):
    """Counts, and refuses, every call that would wait."""

    def __init__(self):
        super().__init__()
        self.calls, self.patch = 0, pytest.MonkeyPatch()

    def __enter__(self):
        def refuse(tensor, *args):
            raise RuntimeError("leaving torch waits for the device")

        for name in ("tolist", "numpy", "cpu"):  # on a CPU torch dispatches none of these
            self.patch.setattr(torch.Tensor, name, refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        name, overload = function._schema.name.split("::")[1], function._overloadname
        if name in SYNCS or f"{name}.{overload}" in SYNCS:
            raise RuntimeError(f"{function} waits for the device")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise RuntimeError(f"{function} by a mask waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: int(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.tolist(),
        lambda x: torch.repeat_interleave(x[None].long()),
        lambda x: torch.ones(2)[: x.long()],
    ],
)
def test_the_guard_catches(wait):
    with pytest.raises(RuntimeError, match="waits for the device"), NoSync():
        wait(torch.tensor(1.0))


@pytest.mark.parametrize(
    "background, settings",
    [
        ("random", {"perp_neg": 1.0, "rescale": 0.5}),
        ("environment", {"scale": 0.0}),
        ("solid", {}),
        ("learned", {}),
    ],
)
@pytest.mark.parametrize("rows", [1 << 20, 1000])
def test_a_step_never_waits(tmp_path, monkeypatch, background, settings, rows):
    monkeypatch.setattr(
        sys.modules["dreamfusion_fast.ops.render"], "trimmed", lambda samples: samples
    )  # as on a GPU
    config = tiny(steps=10, accumulate=2)
    config.render.background = background
    for name, value in settings.items():
        setattr(config.guidance, name, value)
    config.field.coarse_levels = 2
    config.render.rows, some = rows, (0.0, 0.1, 1.0)
    config.loss = LossConfig(entropy=some, normal_smoothness=some)
    if rows > 1000:
        config.loss.distortion = some  # never in batches
    trainer = Trainer(config, tmp_path, Orange())
    trainer._step()
    guards = {}
    for lit, captured in trainer.advance.items():
        guards[lit] = NoSync()
        captured.function = guarded(captured.function, guards[lit])
    config.shading.lit = 0.0
    for trainer.step in (1, 2):
        trainer._step()
    config.shading.lit = 1.0
    for trainer.step in (3, 4):
        trainer._step()
    assert guards[True].calls > 100 + guards[False].calls > 1000


def guarded(function, guard):
    def call():
        with guard:
            function()

    return call


def test_the_embedded_prior_never_waits(tmp_path):
    from dreamfusion_fast.config import preset

    trainer = Trainer(preset("toybox", prompt="a red car", steps=3), tmp_path)
    trainer._step()
    with NoSync() as guard:
        trainer._advance(True)
    assert guard.calls > 500


def test_memory_stays(tmp_path):
    """Over five hundred steps, after the first hundred."""
    trainer = Trainer(tiny(steps=600), tmp_path, Orange())
    trainer.save = lambda: None
    for row in trainer.run():
        if row["step"] == 100:
            gc.collect()
            tensors = count_tensors()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert count_tensors() <= tensors + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 10_000  # KiB


def count_tensors() -> int:
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def test_draws_are_copied_in_place(tmp_path):
    """What a graph has captured is the places, and the next step's numbers must lie there."""
    trainer = Trainer(tiny(), tmp_path, Orange())
    generator = torch.Generator().manual_seed(0)
    one, two = (trainer._draw(generator) for _ in range(2))
    places = [x.data_ptr() for x in (one.cameras.c2w, one.background, one.seeds, one.t)]
    assert not torch.equal(one.cameras.c2w, two.cameras.c2w)
    one.copy_(two)
    assert places == [x.data_ptr() for x in (one.cameras.c2w, one.background, one.seeds, one.t)]
    for name, value in vars(two).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(one, name), value)
    assert torch.equal(one.cameras.c2w, two.cameras.c2w)
    assert torch.equal(one.cameras.focal, two.cameras.focal)


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    """Two passes of two views: the gradient is the mean of four."""
    trainer = Trainer(tiny(views=2, accumulate=2), tmp_path, Orange())
    generator = torch.Generator().manual_seed(0)
    draws = [trainer._draw(generator) for _ in range(2)]
    trainer.renderer.make_room(draws[0].cameras, draws[0].seeds[:1])
    gradients = []
    for parts in (draws, draws[:1], draws[1:]):
        trainer.optimizer.zero_grad()
        for draw in parts:
            trainer._accumulate(draw, True)
        gradients.append([p.grad.clone() for p in trainer.renderer.field.parameters()])
    for both, a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(both, a + b)


class FakeCuda:
    """torch.cuda's graphs for who has no GPU: a capture runs nothing, and may fail."""

    def __init__(self, monkeypatch, error=None):
        self.error, self.log = error, []
        for name in ("CUDAGraph", "graph", "Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.log.append(("capture", pool))
        if self.error:
            raise RuntimeError(self.error)
        yield

    def Stream(self, device):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, side):
        return contextlib.nullcontext()


def called(captured, calls, times):
    for _ in range(times):
        captured()
    return len(calls)


def test_a_graph_is_captured_once_and_replayed(monkeypatch):
    fake, calls = FakeCuda(monkeypatch), []
    captured = graph.Captured(lambda: calls.append(1), torch.device("cuda:0"), (3, 4))
    assert called(captured, calls, 6) == graph.Captured.WARM_UP + 1  # the last one is captured
    assert fake.log == [("capture", (3, 4)), "replay", "replay", "replay"]
    captured.reset()
    assert called(captured, calls, 4) == 2 * (graph.Captured.WARM_UP + 1)


def test_a_capture_that_fails_is_said_once_and_the_function_called_as_it_is(monkeypatch):
    fake, calls = FakeCuda(monkeypatch, "operation not permitted\nwhen capturing"), []
    captured = graph.Captured(lambda: calls.append(1), torch.device("cuda:0"))
    with pytest.warns(UserWarning, match="goes on without, slower: operation not permitted$") as w:
        assert called(captured, calls, 8) == 8
    assert len(w) == 1 and captured.failed and fake.log == [("capture", None)]
    captured.reset()
    assert called(captured, calls, 8) == 16 and len(fake.log) == 1


def test_graphs_can_be_switched_off(monkeypatch):
    fake, calls = FakeCuda(monkeypatch), []
    captured = graph.Captured(lambda: calls.append(1), torch.device("cuda:0"), enabled=False)
    assert called(captured, calls, 8) == 8 and not fake.log and not captured.failed


def test_captured_calls_on_the_cpu_and_warms_up_elsewhere():
    calls = []
    captured = graph.Captured(lambda: calls.append(1), torch.device("cpu"))
    for _ in range(5):
        captured()
    assert len(calls) == 5 and captured.graph is None
