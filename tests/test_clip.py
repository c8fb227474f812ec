"""Dream Fields: guidance by a CLIP's similarity, with no diffusion."""

import pytest
import torch

from dreamfusion_fast import guidance
from dreamfusion_fast.config import FieldConfig, RenderConfig, preset
from dreamfusion_fast.train import Trainer


@pytest.fixture(scope="module")
def clip():
    return guidance.load("clip")


def test_gradient_is_that_of_the_similarity(clip, rng):
    picture, embedding = torch.rand(2, 3, 64, 64, generator=rng), clip.embed(["a red car"] * 2)
    gradient = clip.gradient(picture, embedding)
    step = 1e-2 * torch.randn(picture.shape, generator=rng)
    ends = [(picture + s * step).clamp(0, 1) for s in (1, -1)]
    high, low = (-(clip.scorer.embed_images(x) * embedding).sum() for x in ends)
    torch.testing.assert_close(
        (gradient * (ends[0] - ends[1])).sum(), high - low, rtol=0.1, atol=1e-3
    )


def test_a_run_comes_to_look_like_the_prompt(clip, tmp_path):
    config = preset("clip", prompt="a red car", steps=130)
    config.field = FieldConfig(n_levels=4, finest_resolution=32, log2_table_size=12)
    config.render = RenderConfig(step=0.05, occupancy_resolution=16)
    trainer = Trainer(config, tmp_path, clip)
    assert trainer.schedule is None
    embedding = clip.embed([config.prompt])
    likeness = []
    for _ in range(2):
        draw = trainer._draw(torch.Generator().manual_seed(0))
        trainer.renderer.make_room(draw.cameras, draw.seeds[:1])
        with torch.no_grad():
            image = trainer.renderer(draw.cameras, draw.seeds[:1], draw.background).image
            likeness.append(float((clip.scorer.embed_images(image) * embedding).sum(1).mean()))
        rows = list(trainer.run())
    assert likeness[1] > likeness[0] + 0.2 and rows == []
    assert trainer.measured[4] == 0  # views skipped


def test_not_finite_views_are_left_out(clip, tmp_path):
    trainer = Trainer(preset("clip", prompt="a red car", steps=2), tmp_path, clip)
    draw = trainer._draw(torch.Generator().manual_seed(0))
    z = torch.rand(4, 3, 64, 64)
    z[1, 0, 0, 0] = torch.nan
    gradient = trainer._guide(z, draw, 1.0)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()
    assert trainer.bad.item() == 1
