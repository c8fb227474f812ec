import pytest
import torch

from dreamfusion_fast import camera, guidance
from dreamfusion_fast.config import preset, toybox_camera
from dreamfusion_fast.guidance.protocol import conditions_of
from dreamfusion_fast.toybox import PRIOR, exemplar, pictures, renderer, shapes, world
from dreamfusion_fast.toybox.train_prior import build_tokenizer
from dreamfusion_fast.train import Trainer

NAMES = list(shapes.OBJECTS)


@pytest.mark.parametrize("name", NAMES)
def test_shape(name, rng):
    """Symmetric, inside its ball, not empty, and never steeper than a distance."""
    p = (torch.rand(4000, 3, generator=rng) * 2 - 1) * 0.8
    distance, part = shapes.signed_distance(name, p)
    mirrored, _ = shapes.signed_distance(name, p * torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(distance, mirrored, rtol=1e-4, atol=1e-5)
    inside = shapes.occupancy(name, p)
    assert inside.any()
    far = p[inside][p[inside].norm(dim=-1).topk(min(32, int(inside.sum()))).indices]
    for _ in range(200):  # they climb to the corners, which chance alone would seldom meet
        q = far + 0.02 * torch.randn(far.shape, generator=rng)
        farther = shapes.occupancy(name, q) & (q.norm(dim=-1) > far.norm(dim=-1))
        far = torch.where(farther[:, None], q, far)
    assert far.norm(dim=-1).max() <= shapes.OBJECT_RADIUS
    assert part.max() < len(shapes.OBJECTS[name])
    q = p + 1e-3 * torch.randn(p.shape, generator=rng)
    outside = distance > 0.02
    slope = (shapes.signed_distance(name, q)[0] - distance).abs() / (q - p).norm(dim=-1)
    assert slope[outside].quantile(0.99) < 3.0  # a thin ellipsoid's bound is steeper than 1


@pytest.mark.parametrize("name", ["ball", "mug", "fish"])
def test_tracing_ends_on_the_surface(name):
    cameras = camera.orbit([10.0, 100.0], 25.0, 1.3, 1.0)
    rays_o, rays_d = pictures.pinhole_rays(cameras, 48)
    g = renderer.trace(name, rays_o, rays_d)
    hit = g.part != 255
    assert 0.05 < hit.float().mean() < 0.9
    points = (rays_o + g.depth.float()[..., None] * rays_d)[hit]
    assert shapes.signed_distance(name, points)[0].abs().max() < 5e-3
    facing = (g.normal[hit].float() / 127 * rays_d[hit]).sum(-1)
    assert (facing < 0.15).float().mean() > 0.99


def sphere_traced(name, rays_o, rays_d):
    """Parts and depths by steps along the signed distance, in float64: slow and sure."""
    o, d = rays_o.reshape(-1, 3).double(), rays_d.reshape(-1, 3).double()
    t, part = torch.zeros(len(o)).double(), torch.full((len(o),), 255)
    alive = torch.arange(len(o))
    for _ in range(400):
        distance, nearest = shapes.signed_distance(name, o[alive] + t[alive, None] * d[alive])
        hit = distance < 1e-5
        part[alive[hit]] = nearest[hit]
        t[alive[~hit]] += 0.7 * distance[~hit]  # a thin ellipsoid's bound is too long
        alive = alive[~hit & (t[alive] < 3.0)]
    return part.view(rays_o.shape[:-1]), t.view(rays_o.shape[:-1])


@pytest.mark.parametrize("name", ["car", "mug", "bicycle", "ship", "lighthouse"])
def test_the_ray_caster_sees_what_the_distances_are(name, rng):
    cameras = camera.sample(2, toybox_camera(), rng)
    rays_o, rays_d = pictures.pinhole_rays(cameras, 64)
    g = renderer.trace(name, rays_o, rays_d)
    part, t = sphere_traced(name, rays_o, rays_d)
    both = (part != 255) & (g.part != 255)
    assert (g.part.long() != part).float().mean() < 0.012  # outlines and seams
    off = (g.depth.double() - t)[both].abs()
    assert off.median() < 1.5e-3 and off.quantile(0.97) < 0.02

    def shaded(parts, depth, normal):
        points, grey = rays_o + depth[..., None] * rays_d, torch.full((1, 1, 1, 3), 0.5)
        colours = renderer.palette(name, world.COLOURS["red"]).expand(2, -1, -1)
        ambient = torch.ones(2)
        return renderer.shade(parts, normal, points, colours, grey, cameras.c2w[:, :, 3], ambient)

    ours = shaded(g.part, g.depth.float(), g.normal)
    theirs = shaded(part.to(torch.uint8), t.float(), g.normal)
    assert (ours - theirs).abs().mean() < 0.004


def test_rays_that_miss_keep_the_background():
    cameras = camera.orbit([0.0], 0.0, 1.3, 30.0)  # a telescope past the donut's hole
    rays_o, rays_d = pictures.pinhole_rays(cameras, 4)
    g = renderer.trace("donut", rays_o + torch.tensor([0.0, 0.0, 0.62]), rays_d)
    assert (g.part == 255).all()


def test_one_pair_in_six_is_held_out():
    held = [p for p in world.all_pairs() if world.is_held_out(*p)]
    assert len(held) * 6 == len(world.all_pairs())
    assert {o for _, o in held} == set(NAMES) and {c for c, _ in held} == set(world.COLOURS)


def test_training_never_draws_a_held_out_pair(rng):
    source = pictures.Pictures(4, 0, toybox_camera(), objects=["ball", "cube"])
    for held_out in (False, True):
        batch = source.draw(60, rng, held_out=held_out, clay=0.0)
        images = batch.images
        assert images.shape == (60, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
        pairs = {world.parse(p) for p in batch.prompts}
        assert all(world.is_held_out(*p) == held_out for p in pairs if p[0])


def test_tokenizer_knows_every_word_the_captions_use(rng):
    tokenizer = build_tokenizer()
    source = pictures.Pictures(4, 0, toybox_camera(), objects=["ball", "duck"])
    tokens = tokenizer(source.draw(200, rng).prompts).input_ids
    assert not any(tokenizer.unk_token_id in row for row in tokens)
    assert max(map(len, tokens)) <= tokenizer.model_max_length


def test_a_batchs_cameras_are_those_that_took_its_pictures(rng):
    """The mirrored ones, too: what is traced from them is where the pictures show it."""
    source = pictures.Pictures(6, 0, toybox_camera(), objects=["airplane"])
    batch = source.draw(24, rng, clay=0.0)
    rays_o, rays_d = pictures.pinhole_rays(batch.cameras, 64)
    hit = renderer.trace("airplane", rays_o, rays_d).part != 255
    for image, inside in zip(batch.images, hit):
        flipped = inside.flip(-1)
        apart = inside & ~flipped
        if apart.sum() < 20:
            continue  # as good as symmetric
        behind = image[:, ~inside & ~flipped].median(dim=1).values[:, None]
        ours, mirror = (image[:, m] - behind for m in (apart, flipped & ~inside))
        assert ours.abs().mean() > mirror.abs().mean()


def test_prompts_are_english():
    assert world.prompt("orange", "mug") == "an orange mug"
    assert world.prompt("red", "apple") == "a red apple"
    assert world.caption(world.PLAIN_TEMPLATE, "airplane") == "an airplane"
    assert world.caption(world.TEMPLATES[5], "mug", "orange") == "a photo of an orange mug"
    assert world.clay_prompt("an orange apple") == "a grey clay apple"
    world.check_prompt("an orange mug, front view")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a red unicorn", "`unicorn`"),
        ("a read car", "did you mean `red`"),
        ("a red", "expected one of the toybox's objects"),
        ("a red carr", "did you mean `car`"),
    ],
)
def test_prompts_the_toybox_cannot_mean(text, words):
    with pytest.raises(ValueError, match=words):
        world.check_prompt(text)


def test_exemplar_matches_the_closed_form(rng):
    x = torch.rand(2, 5, 12, generator=rng) * 2 - 1
    z, a = torch.randn(2, 12, generator=rng), torch.tensor([0.3, 0.8])
    for i in range(2):
        logits = [-(z[i] - a[i].sqrt() * p).square().sum() / (2 * (1 - a[i])) for p in x[i]]
        x0 = sum(w * p for w, p in zip(torch.stack(logits).softmax(0), x[i]))
        want = (z[i] - a[i].sqrt() * x0) / (1 - a[i]).sqrt()
        torch.testing.assert_close(exemplar.exact_noise(z, a, x)[i], want, rtol=1e-4, atol=1e-4)


def test_exemplar_recovers_a_single_picture(rng):
    x = torch.rand(1, 1, 12, generator=rng) * 2 - 1
    noise, a = torch.randn(1, 12, generator=rng), torch.tensor([0.4])
    z = a.sqrt() * x[0] + (1 - a).sqrt() * noise
    torch.testing.assert_close(exemplar.exact_noise(z, a, x), noise, rtol=1e-4, atol=1e-4)


def test_exemplar_sees_the_object_from_the_camera(rng):
    guide = exemplar.ExemplarGuidance()
    guide.embed(["a blue cube, front view"])
    background = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3)
    guide.set_cameras(camera.orbit([0.0, 180.0], 0.0, 1.4, 1.0), background, rng)
    pictures = guide.pictures.view(2, 3, 3, 64, 64) / 2 + 0.5
    torch.testing.assert_close(pictures[:, :, :, 0, 0], background[:, None].expand(2, 3, 3))
    middle = pictures[:, 0, :, 32, 32]
    torch.testing.assert_close(middle, torch.tensor([world.COLOURS["blue"]] * 2))


def test_exemplar_without_view_words_looks_from_all_around(rng):
    guide = exemplar.ExemplarGuidance(lights=0)
    guide.embed(["a red car"])
    background, one = torch.rand(1, 3, generator=rng), camera.orbit([0.0], 10.0, 1.4, 1.0)
    guide.set_cameras(one, background, rng)
    around = guide.pictures
    assert around.shape == (1, exemplar.AROUND, 3 * 64 * 64)
    guide.embed(["a red car, front view"])
    for k in (0, 2):
        guide.set_cameras(camera.turned(one, 360.0 * k / exemplar.AROUND), background, rng)
        torch.testing.assert_close(guide.pictures[:, 0], around[:, k])
    assert (around[:, 0] - around[:, 3]).square().mean() > 0.01


def test_exemplar_is_lit_as_the_view_is(rng):
    guide, one = exemplar.ExemplarGuidance(lights=0), camera.orbit([0.0], 0.0, 1.4, 1.0)
    guide.embed(["a blue cube, front view"])
    background, blue = torch.zeros(1, 3), torch.tensor(world.COLOURS["blue"])
    rows = {
        (2.0, 0.0, 0.0, 0.1, 0.9, 1.0, 0.0): blue,  # from the front
        (-2.0, 0.0, 0.0, 0.1, 0.9, 1.0, 0.0): 0.1 * blue,  # from behind
        (2.0, 0.0, 0.0, 0.1, 0.9, 0.0, 0.6): torch.full((3,), 0.6),  # textureless
    }
    for row, want in rows.items():
        guide.set_cameras(one, background, rng, torch.tensor([row]))
        middle = guide.pictures.view(3, 64, 64)[:, 32, 32] / 2 + 0.5
        torch.testing.assert_close(middle, want, rtol=0, atol=0.02)


def test_exemplar_needs_a_colour():
    with pytest.raises(ValueError, match="expected a colour"):
        exemplar.ExemplarGuidance().embed(["a car, front view"])


@pytest.fixture(scope="module")
def prior():
    return guidance.load("toybox")


def test_prior_is_small():
    size = sum(f.stat().st_size for f in PRIOR.rglob("*") if f.is_file())
    assert size <= 12 * 2**20


def test_encode_is_inverted_by_decode(prior, rng):
    image = torch.rand(2, 3, 64, 64, generator=rng)
    torch.testing.assert_close(prior.decode(prior.encode(image)), image, rtol=0, atol=1e-6)


def test_prior_denoises_what_it_was_trained_on_and_listens_to_the_text(prior):
    """On fresh pictures, the noise predicted under the right caption is nearer to the truth than
    zero by far, and than under a caption of another object and colour."""
    generator = torch.Generator().manual_seed(1)
    source = pictures.Pictures(8, 12345, toybox_camera(), objects=["car", "duck", "tree"])
    batch = source.draw(24, generator, clay=0.0)
    z = prior.encode(batch.images)
    t = torch.full((24,), 600)
    a = prior.alphas_cumprod[t][:, None, None, None]
    noise = torch.randn(z.shape, generator=generator)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise

    def error(prompts, cameras, told=True):
        conditions = conditions_of(prior.embed(prompts), cameras, 1, told)
        return (prior.predict_noise(z_t, t, conditions) - noise).square().mean()

    right = error(batch.prompts, batch.cameras)
    assert right < 0.01
    assert error(["a white teapot, overhead view"] * 24, batch.cameras) > 1.3 * right
    assert error(batch.prompts, camera.turned(batch.cameras, 90.0)) > 1.3 * right
    assert error(batch.prompts, batch.cameras, told=False) > right


@pytest.mark.parametrize(
    "text, message",
    [
        ("a red zebra", "does not know `zebra`"),
        ("a red car " + ", a red car" * 5, "at most 16 tokens"),
    ],
)
def test_prior_refuses_what_it_cannot_mean(prior, text, message):
    with pytest.raises(ValueError, match=message):
        prior.embed([text])


def test_exemplar_needs_the_background_that_it_renders(tmp_path):
    config = preset("exemplar", prompt="a red car")
    config.render.background = "solid"
    with pytest.raises(ValueError, match="`background`: expected random for a guidance that must"):
        Trainer(config, tmp_path)


@pytest.mark.parametrize("name", ["no/such-folder-or-model", "/nonexistent"])
def test_missing_guidance_says_so(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"expected toybox, exemplar, .* or the folder"):
        guidance.load(name)
