"""The scorer: the shipped CLIP ranks true pictures, and says what is wrong with bad input."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.toybox import train_scorer, world
from dreamfusion_fast.toybox.scorer import FOLDER, Scorer
from dreamfusion_fast.toybox.scorer_card import orbit_pictures
from dreamfusion_fast.toybox.train_prior import build_tokenizer
from dreamfusion_fast.toybox.train_scorer import ScorerConfig, build_model, export, spoil

PROMPTS = [world.prompt(c, o) for c, o in world.all_pairs()]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture(scope="module")
def views() -> tuple[torch.Tensor, torch.Tensor]:
    """One view of every pair, as evaluation renders them."""
    return orbit_pictures(1, seed=7)


def test_shipped_folder_is_small_and_plain():
    names = {p.name for p in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 3 * 2**20


def test_ranks_clean_renders(scorer, views):
    images, pair = views
    right = scorer.similarities(images, PROMPTS).argmax(1) == pair
    assert right.float().mean() > 0.9


def test_ranks_renders_at_other_sizes(scorer, views):
    images, pair = views[0][::17], views[1][::17]
    large = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear")
    got = scorer.similarities(large, PROMPTS)
    assert (got.argmax(1) == pair).float().mean() > 0.8
    torch.testing.assert_close(got, scorer.similarities(images, PROMPTS), atol=0.15, rtol=0)


def test_similarities_are_cosines_row_by_row(scorer, views):
    images = views[0][:70]  # more than one chunk
    got = scorer.similarities(images, PROMPTS[:5])
    assert got.shape == (70, 5) and (got.abs() <= 1 + 1e-5).all() and not got.requires_grad
    alone = scorer.similarities(images[69:], PROMPTS[4:5])
    torch.testing.assert_close(alone[0, 0], got[69, 4], atol=1e-5, rtol=0)


def test_r_precision_is_the_share_of_right_images(scorer, views):
    images = views[0][:12]
    first = scorer.similarities(images, PROMPTS).argmax(1)
    index = int(first[0])
    want = float((first == index).float().mean())
    assert scorer.r_precision(images, PROMPTS, index) == pytest.approx(want)
    wrong = (index + 100) % len(PROMPTS)
    assert scorer.r_precision(images[:1], PROMPTS, wrong) == 0.0


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.zeros(3, 64, 64), PROMPTS, "`images`: expected shape"),
        (torch.zeros(1, 3, 64, 32), PROMPTS, "`images`: expected shape"),
        (torch.zeros(0, 3, 64, 64), PROMPTS, "`images`: expected shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), PROMPTS, "`images`: expected floating point"),
        (torch.full((1, 3, 8, 8), 2.0), PROMPTS, r"`images`: expected values in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), PROMPTS, r"`images`: expected values"),
        (torch.zeros(1, 3, 8, 8), [], "`prompts`: expected a list"),
        (torch.zeros(1, 3, 8, 8), "a red car", "`prompts`: expected a list"),
        (torch.zeros(1, 3, 8, 8), ["a red zeppelin"], "words that the scorer knows.*zeppelin"),
    ],
)
def test_bad_input(scorer, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        scorer.similarities(images, prompts)


def test_bad_index(scorer):
    with pytest.raises(ValueError, match="`index`: expected 0 to 323, got 324"):
        scorer.r_precision(torch.zeros(1, 3, 8, 8), PROMPTS, 324)


def test_spoil_keeps_shape_and_range(rng):
    images = torch.rand(6, 3, 64, 64, generator=rng)
    got = spoil(images, rng)
    assert got.shape == images.shape and got.min() >= 0 and got.max() <= 1
    assert (got - images).abs().flatten(1).mean(1).gt(1e-3).all()


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    pictures = train_scorer.Pictures
    monkeypatch.setattr(
        train_scorer, "Pictures", lambda *args: pictures(*args, objects=["ball", "car"])
    )
    small = dict(batch=4, views_per_object=8, width=32, layers=1, threads=1, warmup=1)
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in stops:
            config = ScorerConfig(**small, steps=steps, decay_share=1e-9)
            trainer = train_scorer.Trainer(config, tmp_path / name)
            trainer.run()
        assert trainer.training.step == 4
    files = [tmp_path / name / "scorer/model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_export_writes_what_the_scorer_loads(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = ScorerConfig(width=64, layers=2)
    model = build_model(len(tokenizer), config.width, config.layers)
    export([p.detach() for p in model.parameters()], tokenizer, tmp_path, config)
    loaded = Scorer(tmp_path)
    for p, q in zip(model.parameters(), loaded.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-6)
