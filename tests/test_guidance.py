"""Guidance by diffusers pipelines: every family, small, by the path that real models take."""

import copy
import json
import math

import pipelines
import pytest
import torch
from test_train import Orange, tiny

from dreamfusion_fast import camera, export, guidance, preflight, sds
from dreamfusion_fast.config import GuidanceConfig, RunConfig, preset
from dreamfusion_fast.guidance.protocol import conditions_of
from dreamfusion_fast.prompting import Prompts, interpolated, negatives
from dreamfusion_fast.train import Trainer, load_renderer

PROMPT = "a red car"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {family: pipelines.save(family, folder) for family in pipelines.FAMILIES}


@pytest.fixture(params=pipelines.FAMILIES)
def family(request):
    return request.param


def test_a_run_of_every_family(folders, family, tmp_path):
    config = tiny(prompt=PROMPT, steps=20)
    config.guidance.name, config.render.image_size = str(folders[family]), 8
    trainer = Trainer(config, tmp_path / "run")
    before = [p.detach().clone() for p in trainer.renderer.parameters()]
    rows = list(trainer.run())
    assert len(rows) == 20 and all(math.isfinite(r["sds"]) and r["sds"] > 0 for r in rows)
    assert rows[-1]["views_skipped"] == 0 and rows[-1]["updates_skipped"] == 0
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.renderer.parameters()))
    with pytest.raises(RuntimeError, match="the text encoders were released"):
        trainer.guidance.embed([PROMPT])


def test_gradient_is_equation_3_in_float64(folders, family, seed):
    """With respect to the picture, through the encoder; everything repeated in float64, the
    networks too: what they round in float32 is multiplied by the guidance scale."""
    guide = guidance.load(str(folders[family]))
    exact = copy.deepcopy(guide)
    for part in (exact.unet, exact.vae):
        if part is not None:
            part.double()
    config = GuidanceConfig(scale=20.0)
    schedule, n = sds.Schedule(guide.alphas_cumprod, config), 2
    embedding = guide.embed([f"{PROMPT}, front view", f"{PROMPT}, back view", "", ""])
    image = torch.rand(n, 3, 8, 8, requires_grad=True)
    t, where, bad = torch.tensor([100, 700]), torch.tensor([seed]), torch.zeros(1).int()
    z = guide.encode(image)
    conditions = guidance.Conditions(embedding)
    z.backward(sds.gradient(guide, z, t, where, conditions, schedule, bad))

    x = image.detach().double().requires_grad_()
    if guide.vae is None:
        z64 = 2 * x - 1
    else:
        side = (guide.image_size,) * 2
        x_large = torch.nn.functional.interpolate(x, side, mode="bilinear", antialias=True)
        latents = exact.vae.encode(2 * x_large - 1).latent_dist.mode()
        z64 = latents * exact.vae.config.scaling_factor
    noise = sds.normals(where, n, z64[0].numel()).view_as(z64).double()
    a = guide.alphas_cumprod[t].double()[:, None, None, None]
    z_t = a.sqrt() * z64.detach() + (1 - a).sqrt() * noise
    out = exact.predict(
        z_t.repeat(2, 1, 1, 1), t.repeat(2), guidance.Conditions(embedding.double())
    )
    cond, uncond = out[:, : z_t.shape[1]].chunk(2)
    hat = 21 * cond - 20 * uncond
    if guide.prediction_type == "v_prediction":
        hat = a.sqrt() * hat + (1 - a).sqrt() * z_t
    z64.backward((1 - a) * (hat - noise))
    error = (image.grad.double() - x.grad).abs().max() / x.grad.abs().max()
    assert error < 20 * 2.5e-6


def test_latent_guidance_takes_any_picture_and_sizes_that_halve(folders):
    guide = guidance.load(str(folders["sd"]), size=24)
    assert guide.image_size == 24 and guide.resizes
    for side in (8, 24, 40):
        assert guide.encode(torch.rand(1, 3, side, side)).shape == (1, 4, 12, 12)
    picture = torch.rand(1, 3, 24, 24)
    assert guide.decode(guide.encode(picture)).shape == picture.shape
    with pytest.raises(ValueError, match=r"`size`: expected a multiple of 4 pixels, .* got 26"):
        guidance.load(str(folders["sd"]), size=26)
    with pytest.raises(ValueError, match=r"`size`: expected 8, the only one .* got 16"):
        guidance.load(str(folders["if"]), size=16)


def test_a_tiny_vae_takes_the_place_of_the_pipelines(folders, tmp_path):
    pipelines.tiny_vae().save_pretrained(tmp_path / "tiny")
    guide = guidance.load(str(folders["sd"]), tiny_vae=str(tmp_path / "tiny"))
    picture = torch.rand(1, 3, 16, 16, requires_grad=True)
    z = guide.encode(picture)
    z.sum().backward()
    assert z.shape == (1, 4, 8, 8) and picture.grad.any()
    assert guide.decode(z.detach()).shape == picture.shape
    with pytest.raises(ValueError, match=r"expected the folder or hub name of an AutoencoderTiny"):
        guidance.load(str(folders["sd"]), tiny_vae=str(tmp_path))
    with pytest.raises(ValueError, match="`tiny_vae`: expected a latent pipeline"):
        guidance.load(str(folders["if"]), tiny_vae=str(tmp_path / "tiny"))


def test_low_memory_changes_nothing_that_matters(folders):
    picture = torch.rand(2, 3, 16, 16)
    plain, low = (guidance.load(str(folders["sd"]), low_memory=x) for x in (False, True))
    torch.testing.assert_close(plain.encode(picture), low.encode(picture), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.embed([PROMPT]), low.embed([PROMPT]))


def test_sdxl_has_zeros_for_the_empty_prompt_and_a_pooled_row(folders):
    guide = guidance.load(str(folders["sdxl"]))
    empty, text = guide.embed(["", PROMPT])
    assert not empty.any() and text.any()
    tokens, pooled = guide.text.split(text[None])
    assert tokens.shape == (1, 77, 40) and pooled.shape == (1, 12)
    assert torch.equal(text[-1, 12:], torch.zeros(28))


def test_half_on_a_cpu_is_refused_once_and_bf16_taken(folders):
    with pytest.warns(UserWarning, match="a CPU has no fast fp16: fp32 is used"):
        assert guidance.load(str(folders["if"]), dtype="fp16").dtype == torch.float32
    guide = guidance.load(str(folders["if"]), dtype="bf16")
    z_t = torch.randn(1, 3, 8, 8).bfloat16()
    assert (
        guide.predict(z_t, torch.tensor([5]), guidance.Conditions(guide.embed([""]))).dtype
        == torch.bfloat16
    )


def break_file(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_what_is_no_text_to_image_pipeline_is_refused(tmp_path):
    def load(family, prepare, message):
        folder = pipelines.save(family, tmp_path / message[:9].replace(" ", "-"))
        prepare(folder)
        with pytest.raises(ValueError, match=message):
            guidance.load(str(folder))

    def flow(folder):
        name = "scheduler/scheduler_config.json"
        break_file(folder, name, lambda c: {**c, "prediction_type": "sample"})

    def lose(name):
        return lambda folder: [p.unlink() for p in (folder / name).glob("*.safetensors")]

    load("sd", flow, "scheduler that predicts epsilon or v_prediction, got sample")
    load("sd", lose("unet"), "half downloaded|complete and accessible")
    load("if", lose("text_encoder"), "complete and accessible")
    pipeline = pipelines.build("sd", tmp_path)
    pipeline.unet = pipelines.unet(9, 4)
    with pytest.raises(ValueError, match=r"VAE's 4 channels, got 9 .an inpainting"):
        guidance.DiffusersGuidance(pipeline)
    pipeline.unet = None
    with pytest.raises(ValueError, match="got StableDiffusionPipeline without unet"):
        guidance.DiffusersGuidance(pipeline)


def test_no_network_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"guidance `sd2-community/.*: expected toybox, exemplar"):
        guidance.load("sd21")


@pytest.mark.parametrize("family", ["sd", "sd-v", "sdxl"])
def test_a_run_on_latents(folders, family, tmp_path):
    """The VAE, or the unshuffling, is outside of the loop; pictures and mesh are in colours."""
    config = tiny(prompt=PROMPT, steps=5)
    config.guidance.name, config.render.latent = str(folders[family]), True
    trainer = Trainer(config, tmp_path / "run")
    channels, size = trainer.guidance.latent_shape
    assert (config.field.channels, config.render.image_size) == (channels, size)
    trainer.guidance.guide.encode = None
    assert len(list(trainer.run())) == 5
    again = load_renderer(tmp_path / "run")
    image = export.render_views(again, camera.orbit([30.0], 20.0, 1.4, 1.0), 24)
    assert image.shape == (1, 3, 24, 24) and 0 <= image.min() < image.max() <= 1


def test_colours_go_to_latents_and_back(folders):
    guide = guidance.load("toybox")
    matrix, bias = guide.colour_map()
    colour = torch.tensor([0.2, 0.5, 0.9])
    picture = colour[None, :, None, None].expand(1, 3, 64, 64)
    z = guide.encode(picture)[0].mean((1, 2))
    torch.testing.assert_close(matrix @ colour + bias, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.pinv(matrix) @ (z - bias), colour, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"background": "solid"}, {}])
def test_latents_that_cannot_be_rendered(change, folders, tmp_path):
    config = tiny(prompt=PROMPT)
    config.render.latent = True
    config.guidance.name = str(folders["sd" if change else "if"])
    for name, value in change.items():
        setattr(config.render, name, value)
    with pytest.raises(ValueError, match=r"config `(background|latent)`: expected"):
        Trainer(config, tmp_path / "run")
    with pytest.raises(ValueError, match="config `latent`: expected a guidance that has latents"):
        Trainer(config, tmp_path / "run", Orange())


def test_preflight_counts_what_lives(folders, family, tmp_path):
    """Of activations: more views, more conditions and larger pictures need more, in proportion."""
    guide = guidance.load(str(folders[family]))
    one, two = (preflight.prediction_bytes(guide, n, 2) for n in (8, 16))
    assert one > 16 * 8 * 8 * 8 * 4  # the first layer's 8 channels, twice 8 pictures
    assert 1.9 < two / one <= 2.0
    assert preflight.prediction_bytes(guide, 16, 1) == one
    if guide.vae is not None:
        large = guidance.load(str(folders[family]), size=64)
        ratio = preflight.encoding_bytes(large, 2) / preflight.encoding_bytes(guide, 2)
        assert 12 < ratio <= 16
    config = tiny(prompt=PROMPT)
    config.guidance.name, config.render.image_size = str(folders[family]), 8
    trainer = Trainer(config, tmp_path)
    line, fits = preflight.report(config, trainer)
    assert fits and "U-Net" in line and "free" in line


def test_preflight_says_what_does_not_fit(folders, tmp_path, monkeypatch):
    config = tiny(prompt=PROMPT)
    config.guidance.name, config.render.image_size = str(folders["sd"]), 8
    trainer = Trainer(config, tmp_path)
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    line, fits = preflight.report(config, trainer)
    assert not fits and "will probably not fit; try --low-memory" in line


class Broken:
    """Guidance whose predictions are NaN, always or for one view now and then."""

    image_size, alphas_cumprod = 16, torch.linspace(0.9999, 0.0001, 1000)

    def __init__(self, always: bool):
        self.always, self.calls = always, 0

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1)

    def encode(self, image):
        return image * 2 - 1

    def predict(self, z_t, t, conditions):
        self.calls += 1
        out = torch.zeros_like(z_t)
        out[: None if self.always else int(self.calls % 3 == 0)] = math.nan
        return out


def test_nan_from_the_first_step_stops_the_run_with_advice(tmp_path):
    with pytest.raises(ValueError, match=r"none in 10 steps: try another dtype \(bf16, fp32\)"):
        list(Trainer(tiny(steps=30), tmp_path, Broken(True)).run())


def test_nan_now_and_then_skips_the_view_and_counts(tmp_path):
    rows = list(Trainer(tiny(steps=12), tmp_path, Broken(False)).run())
    assert [r["views_skipped"] for r in rows] == [k // 3 for k in range(1, 13)]
    assert rows[-1]["updates_skipped"] == 0


# ---- prompting ----------------------------------------------------------------------------------
class Words:
    """Embeds a text as one number, its length."""

    def embed(self, prompts):
        return torch.tensor([[float(len(p))] for p in prompts])


AROUND = [0.0, 45.0, 90.0, 135.0, 180.0, 270.0]


def test_the_nearest_views_text(seed):
    prompts = Prompts(Words(), "x", GuidanceConfig(scale=5.0, negative="bad"))
    embedding, weights = prompts(camera.orbit([0.0, 90.0, 180.0, 300.0], 10.0, 1.4, 1.0))
    lengths = {v: len(f"x, {v} view") for v in camera.VIEWS}
    want = [lengths[v] for v in ("front", "side", "back", "side")]
    assert weights is None and embedding[:, 0].tolist() == [*want, *[3.0] * 4]
    overhead, _ = prompts(camera.orbit([0.0], 70.0, 1.4, 1.0))
    assert overhead[0, 0] == lengths["overhead"]


def test_interpolated_text():
    share = interpolated(camera.orbit(AROUND, 10.0, 1.4, 1.0))
    want = [
        [1, 0, 0, 0],
        [0.5, 0.5, 0, 0],
        [0, 1, 0, 0],
        [0, 0.5, 0.5, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
    ]
    torch.testing.assert_close(share, torch.tensor(want).float(), atol=1e-3, rtol=0)
    assert interpolated(camera.orbit([40.0], 70.0, 1.4, 1.0)).tolist() == [[0, 0, 0, 1]]


def test_negatives_are_the_neighbours_and_fade_as_they_near():
    which, weights = negatives(camera.orbit([0.0, 45.0, 120.0], 10.0, 1.4, 1.0), 2.0)
    assert which.tolist() == [[0, 1], [0, 1], [1, 2]]
    want = torch.tensor([[0.0, -2.0], [-1.0, -1.0], [-2 / 3, -4 / 3]])
    torch.testing.assert_close(weights, want, atol=1e-3, rtol=0)
    assert not negatives(camera.orbit([45.0], 80.0, 1.4, 1.0), 2.0)[1].any()
    prompts = Prompts(Words(), "x", GuidanceConfig(scale=5.0, perp_neg=1.0))
    embedding, weights = prompts(camera.orbit(AROUND, 10.0, 1.4, 1.0))
    assert embedding.shape == (24, 1) and weights.shape == (6, 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"view_text": "both"}, "`view_text`: expected nearest, interpolate, none, got 'both'"),
        ({"scale": 0.0, "perp_neg": 1.0}, "`scale`: expected more than 0"),
        ({"scale": 0.0, "negative": "bad"}, "`scale`: expected more than 0"),
    ],
)
def test_bad_prompt_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Prompts(Words(), "x", GuidanceConfig(**settings))


def test_presets_of_large_models_keep_given_steps():
    assert preset("sd21").steps == 10_000 and preset("sd21", steps=7).steps == 7
    config = preset("sdxl", prompt="x")
    assert config.guidance.scale == 100.0 and config.render.image_size == 64
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- the camera ---------------------------------------------------------------------------------
CAMERAS = camera.orbit([0.0, 120.0], 20.0, 1.4, 1.0)


@pytest.fixture(scope="module")
def sighted(tmp_path_factory):
    """A pixel-space guidance that takes the camera, loaded from a folder."""
    folder = tmp_path_factory.mktemp("sighted")
    pipeline = pipelines.build("if", folder)
    pipeline.unet = pipelines.unet(
        3, 6, class_embed_type="projection", projection_class_embeddings_input_dim=camera.N_NUMBERS
    )
    pipeline.save_pretrained(folder / "pipeline")
    return guidance.load(str(folder / "pipeline"))


def predict(guide, told=True, cameras=CAMERAS, **more):
    n = len(cameras.focal)
    generator = torch.Generator().manual_seed(0)
    z_t, t = torch.randn(n, 3, 8, 8, generator=generator), torch.full((n,), 500)
    conditions = conditions_of(guide.embed([PROMPT] * n), cameras, 1, told, **more)
    return guide.predict(z_t, t, conditions)


def test_the_camera_reaches_a_network_that_takes_it(sighted):
    assert sighted.takes_camera and not sighted.unconditional_camera
    here, turned = predict(sighted), predict(sighted, cameras=camera.turned(CAMERAS, 40.0))
    blind = predict(sighted, told=False)
    assert (here - turned).abs().max() > 1e-4 and (here - blind).abs().max() > 1e-4
    other = camera.turned(CAMERAS, 90.0)
    torch.testing.assert_close(blind, predict(sighted, told=False, cameras=other))


def test_who_is_told_the_camera():
    """The views and negatives are; the unconditional half is where the guidance says so."""
    text = torch.zeros(8, 1)
    told = {u: conditions_of(text, CAMERAS, 4, True, u).told.tolist() for u in (False, True)}
    assert told == {False: [1, 1, 0, 0, 1, 1, 1, 1], True: [1] * 8}
    assert not conditions_of(text, CAMERAS, 4, False, True).told[:2].any()
    assert torch.equal(conditions_of(text, CAMERAS, 4).cameras.c2w[6:], CAMERAS.c2w)


def test_cameras_that_do_not_fit_are_refused(sighted, folders):
    blind, z_t, t = guidance.load(str(folders["if"])), torch.randn(2, 3, 8, 8), torch.ones(2).long()
    text = sighted.embed([PROMPT] * 2)
    with pytest.raises(ValueError, match="expected no cameras, as the network takes none, got 2"):
        blind.predict(z_t, t, conditions_of(text, CAMERAS, 1))
    with pytest.raises(ValueError, match="expected cameras, which the network takes"):
        sighted.predict(z_t, t, guidance.Conditions(text))
    with pytest.raises(ValueError, match="expected 2 cameras, one a row of z_t, got 4"):
        sighted.predict(z_t, t, guidance.Conditions(text, CAMERAS.repeat(2)))
    with pytest.raises(ValueError, match=r"expected 2 cameras, .* `told` of shape \(3,\)"):
        sighted.predict(z_t, t, guidance.Conditions(text, CAMERAS, torch.ones(3)))


def test_a_network_with_other_classes_is_refused(tmp_path):
    pipeline = pipelines.build("if", tmp_path)
    pipeline.unet = pipelines.unet(3, 6, num_class_embeds=7)
    with pytest.raises(ValueError, match=r"expected a U-Net without classes.* got type None of 7"):
        guidance.DiffusersGuidance(pipeline)


@pytest.mark.parametrize("setting, told", [(None, 1), (True, 1), (False, 0)])
def test_a_run_tells_the_camera_unless_words_alone_are_asked_for(sighted, setting, told, tmp_path):
    config = tiny(prompt=PROMPT, steps=3)
    config.guidance.name, config.render.image_size = "none", 8
    config.guidance.camera = setting
    trainer = Trainer(config, tmp_path, sighted)
    rows = list(trainer.run())
    assert rows[-1]["views_skipped"] == 0
    conditions = trainer.draws[0].conditions
    assert conditions.told.tolist() == [told] * config.views + [0] * config.views
    assert torch.equal(conditions.cameras.c2w[: config.views], trainer.draws[0].cameras.c2w)


def test_a_prior_without_camera_under_settings_that_need_it(folders, tmp_path):
    config = tiny(prompt=PROMPT)
    config.guidance.name, config.render.image_size = str(folders["if"]), 8
    config.guidance.camera = True
    with pytest.raises(ValueError, match=r"`guidance\.camera`: expected false, as the guidance's"):
        Trainer(config, tmp_path)


def test_a_draw_takes_anothers_conditions_in_its_place(sighted, tmp_path):
    """A CUDA graph reads them where they lay when it was captured."""
    config = tiny(prompt=PROMPT)
    config.guidance.name, config.render.image_size = "none", 8
    trainer = Trainer(config, tmp_path, sighted)
    one, two = (trainer._draw(torch.Generator().manual_seed(k)) for k in (1, 2))
    before = [x.data_ptr() for x in one.conditions.tensors()]
    assert not torch.equal(one.conditions.cameras.c2w, two.conditions.cameras.c2w)
    one.copy_(two)
    assert before == [x.data_ptr() for x in one.conditions.tensors()]
    for a, b in zip(one.conditions.tensors(), two.conditions.tensors(), strict=True):
        assert torch.equal(a, b)


def test_setting_the_camera():
    config = RunConfig()
    for value in (True, False):
        config.change("guidance.camera", value)
        assert config.guidance.camera is value
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"`guidance.camera`: expected a value like"):
        config.change("guidance.camera", 3)
