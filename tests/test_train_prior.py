"""The prior's training: it goes on where it stopped, and refuses what it cannot go on from."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dreamfusion_fast.guidance import load_pipeline
from dreamfusion_fast.toybox import train_prior, training
from dreamfusion_fast.toybox.train_prior import PriorConfig, Trainer
from dreamfusion_fast.toybox.training import settings

TOKENS = "token_embedding.weight"
SMALL = dict(steps=6, batch=4, views_per_object=1, channels=(16, 16, 32), threads=1, warmup=2)


def finish(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(PriorConfig(**SMALL | changes), folder)
    trainer.run()
    return trainer


@pytest.fixture(autouse=True)
def few_objects(monkeypatch):
    """Three objects' views are traced in a moment."""
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    draw = train_prior.Pictures
    monkeypatch.setattr(
        train_prior, "Pictures", lambda *args: draw(*args, objects=["ball", "cube", "car"])
    )


def rows(folder):
    lines = (folder / "curve.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "minutes"} for x in lines]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path, optimizer):
    whole = finish(tmp_path / "whole", optimizer=optimizer)
    (tmp_path / "parts").mkdir()
    parts = Trainer(PriorConfig(**SMALL, optimizer=optimizer), tmp_path / "parts")
    pictures = train_prior.Pictures(1, 0, train_prior.toybox_camera())
    for _ in range(3):
        parts.training.train_step(lambda g: parts.loss(pictures.draw(4, g), g))
    parts.training.save(parts.ship)
    again = finish(tmp_path / "parts", optimizer=optimizer)
    assert again.training.step == whole.training.step == 6
    for a, b in zip(again.training.shadow, whole.training.shadow, strict=True):
        assert torch.equal(a, b)
    assert rows(tmp_path / "parts")[-1] == rows(tmp_path / "whole")[-1]
    files = [tmp_path / f / "pipeline/unet/diffusion_pytorch_model.safetensors"
             for f in ("parts", "whole")]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from dreamfusion_fast.toybox import train_prior as t, training
training.SAVE_SECONDS, draw = 0.0, t.Pictures
t.Pictures = lambda *args: draw(*args, objects=["ball"])
small = {small!r} | dict(steps=1000)
t.Trainer(t.PriorConfig(**small), Path({folder!r})).run()
"""


def test_kill_leaves_a_state_that_loads(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    script = SCRIPT.format(small=SMALL, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Trainer(PriorConfig(**SMALL | {"steps": 1000}), folder).training.step >= 1


def test_the_state_of_another_network_is_refused(tmp_path):
    finish(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"`--out`: expected the state .* channels \[16, 32, 32\]"):
        Trainer(PriorConfig(**SMALL | {"channels": (16, 32, 32)}), tmp_path)
    with pytest.raises(ValueError, match="`--optimizer`: expected the one of the training in"):
        Trainer(PriorConfig(**SMALL, optimizer="adamw"), tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(state | {"words": 57}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="expected the state of a network of words"):
        Trainer(PriorConfig(**SMALL), tmp_path)


def test_going_on_from_a_shipped_average(tmp_path):
    first = finish(tmp_path / "first", steps=2)
    second = Trainer(
        PriorConfig(**SMALL, start=str(tmp_path / "first/pipeline")), tmp_path / "second"
    )
    for a, b in zip(first.training.shadow, second.training.shadow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # it was stored in float16
    other = PriorConfig(
        **SMALL | {"channels": (16, 32, 32)}, start=str(tmp_path / "first/pipeline")
    )
    with pytest.raises(ValueError, match="`--start`: expected a pipeline of this network"):
        Trainer(other, tmp_path / "third")


def test_going_on_from_a_prior_of_fewer_words_and_no_camera(tmp_path, monkeypatch):
    """Words are known by themselves, not by their numbers; what is new begins untrained."""
    first = finish(tmp_path / "first", steps=2)
    pipeline = load_pipeline(str(tmp_path / "first/pipeline"))
    blind = copy.deepcopy(pipeline.unet)
    config = {**blind.config, "class_embed_type": None}
    blind = type(blind).from_config({k: v for k, v in config.items() if not k.startswith("_")})
    blind.load_state_dict(pipeline.unet.state_dict(), strict=False)
    pipeline.unet = blind
    pipeline.save_pretrained(tmp_path / "blind")
    monkeypatch.setattr(
        train_prior.world, "VOCABULARY", ("zeppelin", *train_prior.world.VOCABULARY)
    )
    config = PriorConfig(**SMALL, start=str(tmp_path / "blind"))
    (tmp_path / "second").mkdir()
    second = Trainer(config, tmp_path / "second")
    rows = next(p for n, p in second.text.named_parameters() if n.endswith(TOKENS))
    stored = load_pipeline(str(tmp_path / "first/pipeline")).text_encoder.state_dict()
    stored = next(v for k, v in stored.items() if k.endswith(TOKENS))
    words = [t.tokenizer.get_vocab() for t in (first, second)]
    for word in ("car", "red", "[EOS]"):
        assert torch.equal(rows[words[1][word]], stored[words[0][word]])
    assert words[0]["car"] != words[1]["car"]
    assert second.unet.class_embedding.linear_2.weight.any()


def test_settings_are_kept_and_changed(tmp_path):
    finish(tmp_path, steps=1)
    assert settings(PriorConfig, tmp_path, []) == PriorConfig(**SMALL | {"steps": 1})
    changed = settings(PriorConfig, tmp_path, ["steps=9", "optimizer=muon", "compile=true"])
    assert (changed.steps, changed.compile, changed.batch) == (9, True, 4)
    for text in ("stps=9", "steps"):
        with pytest.raises(ValueError, match="`--set`: expected NAME=VALUE of steps, batch"):
            settings(PriorConfig, tmp_path, [text])
    with pytest.raises(ValueError, match="`--set`: expected steps like 10000, got 'many'"):
        settings(PriorConfig, tmp_path, ["steps=many"])
    with pytest.raises(ValueError, match="`--optimizer`: expected muon or adamw, got 'sgd'"):
        Trainer(PriorConfig(**SMALL, optimizer="sgd"), tmp_path / "new")
