"""The loop as a whole, on a tiny field with guidance that needs no network."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from dreamfusion_fast import camera, checkpoint
from dreamfusion_fast.config import FieldConfig, RenderConfig, RunConfig
from dreamfusion_fast.optimizers import rate_share
from dreamfusion_fast.train import Trainer, load_renderer


class Orange:
    """Guidance towards pictures of one colour: the exact score of that single picture."""

    image_size = 16
    alphas_cumprod = torch.linspace(0.9999, 0.0001, 1000)
    colour = torch.tensor([1.0, 0.0, -1.0])

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1)

    def encode(self, image):
        return image * 2 - 1

    def predict(self, z_t, t, conditions):
        x = self.colour[None, :, None, None].expand_as(z_t)
        a = self.alphas_cumprod[t][:, None, None, None]
        return (z_t - a.sqrt() * x) / (1 - a).sqrt()


def tiny(**settings) -> RunConfig:
    config = RunConfig(
        prompt="orange",
        steps=12,
        views=2,
        checkpoint_every=4,
        preview_every=5,
        field=FieldConfig(n_levels=3, finest_resolution=24, log2_table_size=10),
        render=RenderConfig(image_size=16, step=0.06, occupancy_resolution=16, occupancy_every=3),
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def finish(config, folder, resume=False):
    trainer = Trainer(config, folder, Orange(), resume=resume)
    metrics = list(trainer.run())
    return trainer, metrics


def test_loss_pulls_the_picture_to_the_prior(tmp_path):
    trainer, _ = finish(tiny(steps=200), tmp_path / "run")
    with torch.no_grad():
        picture = trainer.renderer(camera.orbit([30.0], 20.0, 1.25, 1.0), 0, jitter=False)
    r, g, b = picture.image[0, :, 6:10, 6:10].mean(dim=(1, 2))
    assert picture.opacity[0, 6:10, 6:10].mean() > 0.8
    assert r > 0.75 and 0.25 < g < 0.75 and b < 0.25


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        finish(tiny(), tmp_path / name)
    finish(tiny(seed=1), tmp_path / "c")
    a, b, c = ((tmp_path / n / "checkpoint.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_interrupted_and_resumed_is_as_uninterrupted(tmp_path, stop):
    finish(tiny(), tmp_path / "whole")
    run = Trainer(tiny(), tmp_path / "parts", Orange()).run()
    for _ in range(stop):
        next(run)
    with pytest.raises(KeyboardInterrupt):
        run.throw(KeyboardInterrupt)
    finish(tiny(), tmp_path / "parts", resume=True)
    _assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _assert_same_run(one, other):
    files = [(f / "checkpoint.safetensors").read_bytes() for f in (one, other)]
    assert files[0] == files[1]
    logs = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (one, other)
    ]
    for rows in logs:
        for row in rows:
            del row["seconds"], row["guidance_share"]
    assert logs[0] == logs[1] and [r["step"] for r in logs[0]] == list(range(len(logs[0])))


# Imports once and starts twice: a process forked before anything has used a thread.
SCRIPT = """
import os, sys; sys.path.insert(0, {tests!r})
from test_train import Orange, Trainer, tiny
for _ in range(2):
    if os.fork() == 0:
        print("process", os.getpid(), flush=True)
        for m in Trainer(tiny(steps=120), {folder!r}, Orange(), resume=True).run():
            print("step", m["step"], flush=True)
        os._exit(0)
    os.wait()
"""


def test_kill_at_any_moment_leaves_a_run_that_resumes(tmp_path):
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "parts"))
    command = [sys.executable, "-c", script]
    running, killed = None, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        for line in parent.stdout:
            word, number = line.split()
            if word == "process":
                running = int(number)
            elif running and int(number) > 20 * (1 + killed):
                time.sleep(0.05)
                with contextlib.suppress(ProcessLookupError):  # this process slept for too long
                    os.kill(running, signal.SIGKILL)
                running, killed = None, killed + 1
    assert parent.returncode == 0 and killed == 2
    trainer, _ = finish(tiny(steps=120), tmp_path / "parts", resume=True)
    assert trainer.step == 120
    finish(tiny(steps=120), tmp_path / "whole")
    _assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_environment_background_learns(tmp_path):
    config = tiny(steps=300)
    config.render.background = "environment"
    trainer, _metrics = finish(config, tmp_path / "run")
    with torch.no_grad():
        corner = trainer.renderer(camera.orbit([200.0], 30.0, 1.4, 0.8), 0).image[0, :, 0, 0]
    assert corner[0] > 0.6 and corner[2] < 0.4


@pytest.mark.parametrize("name", ["entropy", "distortion"])
def test_a_regularizer_falls_where_it_weighs(tmp_path, name):
    """In the same views of two runs, with it and without."""
    values = []
    for weight in (0.0, 50.0):
        config = tiny(steps=60)
        config.change(f"loss.{name}", weight)
        trainer, _ = finish(config, tmp_path / str(weight))
        trainer.regularizers = {name}
        with torch.no_grad():
            cameras = camera.orbit([0.0, 90.0], 20.0, 1.25, 1.0)
            rendering = trainer.renderer(cameras, 0, keep_samples=True)
            values.append(float(trainer._regularize(rendering, torch.ones(7))[name]))
    assert values[1] < 0.7 * values[0], values


@pytest.mark.parametrize("settings", [{}, {"shading.lit": 1.0}, {"loss.distortion": 1.0}])
def test_batches_make_the_same_step(tmp_path, settings):
    """But for roundings; and nothing is lost, whatever the capacity."""
    fields = []
    for name, rows in (("whole", 1 << 20), ("batches", 700)):
        config = tiny(steps=2)
        for setting, value in {
            **settings,
            "render.rows": rows,
            "shading.ambient_until": 0.0,
        }.items():
            config.change(setting, value)
        trainer, metrics = finish(config, tmp_path / name)
        assert trainer.renderer.batched == (name == "batches")
        assert metrics[0]["samples"] > 1400 and metrics[0]["samples_lost"] == 0
        fields.append(trainer.renderer.field.weights.detach())
    torch.testing.assert_close(fields[1], fields[0], rtol=1e-4, atol=1e-6)


def test_metrics_tell_where_time_goes(tmp_path):
    _, metrics = finish(tiny(steps=3), tmp_path / "run")
    assert all(0 <= m["guidance_share"] <= 1 and m["seconds"] > 0 for m in metrics)
    assert all(m["samples"] > 0 and m["samples_lost"] == 0 for m in metrics)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": " "}, "`prompt`: expected a text, got an empty one"),
        ({"steps": 0}, "`steps`: expected at least 1, got 0"),
        ({"steps": -3}, "`steps`: expected at least 1, got -3"),
        ({"views": 0}, "`views`: expected at least 1"),
        ({"accumulate": 0}, "`accumulate`: expected at least 1"),
        ({"render": RenderConfig(occupancy_every=0)}, "`occupancy_every`: expected at least 1"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(**settings), tmp_path / "run", Orange())
    assert not (tmp_path / "run").exists()


def test_image_size_must_be_the_guidance_s(tmp_path):
    config = tiny()
    config.render.image_size = 32
    with pytest.raises(ValueError, match=r"`image_size`: expected 16, .* got 32"):
        Trainer(config, tmp_path / "run", Orange())


def test_checkpoints_that_cannot_be_used(tmp_path):
    finish(tiny(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="expected 'orange', the run's own, got 'blue'"):
        Trainer(tiny(prompt="blue"), tmp_path, Orange(), resume=True)
    for content in (whole[:100], whole[:-1], whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="got a truncated or foreign file"):
            load_renderer(tmp_path)
    tensors = {"x": torch.zeros(1)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="safetensors file of something else"):
        checkpoint.load(path)
    save_file(tensors, path, {checkpoint.FORMAT: json.dumps({"version": 99, "config": {}})})
    with pytest.raises(ValueError, match=r"expected .* of version 2, got version 99"):
        checkpoint.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="got no file"):
        checkpoint.load(path)


def test_config_round_trip_and_unknown_keys():
    config = tiny()
    stored = json.loads(json.dumps(config.to_dict()))
    assert RunConfig.from_dict(stored) == config
    with pytest.raises(ValueError, match="config `field`: unknown widht"):
        RunConfig.from_dict({"field": {"widht": 3}})


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("steps", 7, 7),
        ("guidance.scale", 7, 7.0),
        ("guidance.t_range", [0.1, 0.5], (0.1, 0.5)),
        ("guidance.size", 512, 512),
        ("render.background", "solid", "solid"),
        ("guidance.low_memory", True, True),
        ("loss.opacity", 0.1, (0.1, 0.1, 1.0)),
        ("loss.entropy", [0, 0.5, 0.25], (0.0, 0.5, 0.25)),
        ("optimizer.betas", [0.9, 0.8, 0.99], (0.9, 0.8, 0.99)),
        ("shading.light_distance", [1, 2], (1.0, 2.0)),
    ],
)
def test_change_a_setting(name, value, kept):
    config = tiny()
    config.change(name, value)
    owner, _, last = name.rpartition(".")
    assert getattr(getattr(config, owner) if owner else config, last) == kept


@pytest.mark.parametrize(
    "name, value",
    [("step", 7), ("guidance", {}), ("a.b.c", 1), ("steps", 1.5), ("steps", True),
     ("guidance.size", "abc"), ("loss.opacity", "abc"),
     ("loss.opacity", [1, 2]), ("loss.opacity", ["a", 1, 1]), ("loss.opacity", True),
     ("optimizer.betas", 0.9),
     ("guidance.t_range", [0.1]), ("guidance.low_memory", 1), ("camera.scale", 1.0)],
)  # fmt: skip
def test_settings_that_cannot_be_changed(name, value):
    with pytest.raises(ValueError, match="config"):
        tiny().change(name, value)


def test_rates_warm_up_and_decay():
    config = tiny(steps=1000)
    shares = [rate_share(k, config) for k in range(1000)]
    assert shares[0] == pytest.approx(1 / config.optimizer.warmup, rel=0.01)
    assert max(shares) <= 1 and shares[-1] == pytest.approx(config.optimizer.final_share, abs=0.01)


def test_light_begins_after_the_ambient_steps(tmp_path):
    config = tiny(steps=20)
    config.shading.ambient_until, config.shading.lit = 0.5, 1.0
    trainer = Trainer(config, tmp_path, Orange())
    lit = []
    for trainer.step in range(20):
        draw = trainer._draw(torch.Generator().manual_seed(trainer.step))
        lit.append(draw.lit)
    assert lit == [False] * 10 + [True] * 10


@pytest.mark.parametrize("normals", ["analytic", "finite"])
def test_light_shapes_the_scene(tmp_path, normals):
    """Lit views of a grey field towards orange: the loss reaches the density by its normals."""
    config = tiny(steps=6)
    config.shading.ambient_until, config.shading.lit = 0.0, 1.0
    config.shading.textureless = 1.0
    config.render.normals = normals
    trainer, metrics = finish(config, tmp_path / "run")
    draw = trainer._draw(torch.Generator().manual_seed(0))
    rendering = trainer.renderer(
        draw.cameras, draw.seeds[:1], draw.background, shading=draw.shading
    )
    assert rendering.normal.norm(dim=1).max() > 0.3 and (rendering.orientation >= 0).all()
    trainer.optimizer.zero_grad()
    rendering.normal.square().sum().backward()
    assert trainer.renderer.field.table.grad.abs().max() > 0
    assert all(m["updates_skipped"] == 0 for m in metrics)


def test_the_paper_s_field_trains_and_resumes(tmp_path):
    def config():
        c = tiny(steps=6)
        c.field = FieldConfig(name="paper", width=16, blocks=2, n_frequencies=4)
        return c

    whole, metrics = finish(config(), tmp_path / "whole")
    assert metrics[-1]["updates_skipped"] == 0 and load_renderer(tmp_path / "whole") is not None
    part = Trainer(config(), tmp_path / "part", Orange())
    for row in part.run():
        part.stopping = row["step"] == 2
    again, _ = finish(config(), tmp_path / "part", resume=True)
    for a, b in zip(whole.renderer.parameters(), again.renderer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_starts_from_another_s_scene(tmp_path):
    first, _ = finish(tiny(), tmp_path / "first")
    second = Trainer(tiny(init=str(tmp_path / "first"), prompt="lemon"), tmp_path / "b", Orange())
    for a, b in zip(first.renderer.parameters(), second.renderer.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.renderer.occupancy, second.renderer.occupancy) and second.step == 0
    other = tiny(init=str(tmp_path / "first"))
    other.field.hidden = 16
    with pytest.raises(ValueError, match="`init`: expected the field's settings of the run in"):
        Trainer(other, tmp_path / "c", Orange())
    with pytest.raises(ValueError, match="nowhere"):
        Trainer(tiny(init=str(tmp_path / "nowhere")), tmp_path / "d", Orange())
