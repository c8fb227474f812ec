"""Every default of a run, one dataclass a stage. Values marked (paper) are arXiv 2209.14988's.

The defaults are the toybox's, sized for minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# A weight's course: at step 0, at the end, and the share of the run (0 to 1] at which the end is
# reached, linearly. A single number given to RunConfig.change is a constant weight.
Schedule = tuple[float, float, float]


@dataclass
class CameraConfig:
    elevation: tuple[float, float] = (-10.0, 90.0)  # degrees (paper)
    azimuth: tuple[float, float] = (0.0, 360.0)  # degrees (paper)
    distance: tuple[float, float] = (1.0, 1.5)  # scene units (paper)
    position_jitter: float = 0.1  # half width of a uniform box, scene units (paper)
    look_at_std: float = 0.2  # scene units (paper)
    up_std: float = 0.02  # (paper)
    focal: tuple[float, float] = (0.7, 1.35)  # image widths (paper)


def toybox_camera() -> CameraConfig:
    """The cameras of the embedded prior's pictures. Under the paper's ranges an object's size in
    the picture varies threefold with no word of the prompt to tell it: a large model knows what
    fills a picture, a small one answers with the mean of all sizes, which is fog."""
    return CameraConfig(
        distance=(1.35, 1.45), position_jitter=0.05, look_at_std=0.03, focal=(0.95, 1.05)
    )


@dataclass
class FieldConfig:
    name: str = "hash"  # hash: grid and small MLP | paper: encoded positions and residual blocks
    radius: float = 0.75  # bounding sphere, scene units; 1.4 (paper): here all cameras stay outside
    # Of "hash":
    n_levels: int = 8
    base_resolution: int = 8
    finest_resolution: int = 128
    log2_table_size: int = 16
    features: int = 2
    interpolation: str = "smoothstep"
    coarse_levels: int = 32  # that are there from the start; fewer than n_levels: progressive
    levels_until: float = 0.5  # share of the run at which the last one is there
    hidden: int = 32
    hidden_layers: int = 1
    activation: str = "relu"
    # Of "paper":
    n_frequencies: int = 8  # of the positions' encoding, 2^0 to 2^7 (paper)
    width: int = 128  # of the residual blocks (paper)
    blocks: int = 5  # (paper)
    spread: tuple[float, float] = (5e-2, 2e-3)  # of a sample, scene units (paper: lambda_Sigma)
    spread_share: float = 1 / 3  # of the run, in which it falls linearly (paper: 5k of 15k steps)
    # Of both:
    blob: str = "gaussian"  # gaussian (paper) | magic3d: a cone (Lin et al. 2023)
    blob_density: float = 5.0  # gaussian: added to the density's logarithm (paper: lambda_tau)
    blob_std: float = 0.2  # gaussian: scene units (paper: sigma_tau)
    cone_density: float = 10.0  # magic3d: the same at the centre
    cone_radius: float = 0.5  # magic3d: where it falls through 0, scene units
    channels: int = 3  # of colour; others hold latents of a guidance, see RenderConfig.latent
    half: bool = False  # float16 tables and MLP beside float32 masters; GPUs only
    density_bias: float = -2.0  # likewise: an untrained scene is a blob in thin fog


@dataclass
class RenderConfig:
    image_size: int = 64  # pixels (paper)
    step: float = 0.025  # length of a bin along a ray, scene units
    early_stop: float = 1e-3  # transmittance below which a ray ends
    rows: int = 1 << 20  # samples of a step from which on it is made in batches, of about as many
    normals: str = "analytic"  # analytic (paper) | finite: from differences of log density
    epsilon: float = 0.005  # half the width of those differences, scene units
    latent: bool = False  # render the guidance's latents, not colours: no VAE in the loop
    background: str = "random"  # random | solid | learned (one colour) | environment (paper)
    backdrop: tuple[float, float, float] = (0.5, 0.5, 0.5)  # colour of "solid", and of exports
    environment_frequencies: int = 3  # of the direction's encoding, for "environment"
    occupancy_resolution: int = 48
    occupancy_every: int = 16  # steps
    occupancy_decay: float = 0.8
    occupancy_threshold: float = 0.1  # density, 1 / scene unit


@dataclass
class GuidanceConfig:
    name: str = "toybox"  # toybox | exemplar | clip | a folder or hub name of a diffusers pipeline
    dtype: str = "auto"  # fp32 | fp16 | bf16 | auto: fp16 on CUDA
    size: int | None = None  # side of what a latent model sees, pixels; None: its own
    compile: bool = False  # the U-Net, by torch.compile
    low_memory: bool = False  # slower, for small GPUs
    model: str | None = None  # folder or hub name of the CLIP of "clip"; None: the toybox's scorer
    tiny_vae: str | None = None  # folder or hub name of an AutoencoderTiny, e.g. madebyollin/taesd
    scale: float = 10.0  # omega of (1 + omega) eps_cond - omega eps_uncond; 100 (paper)
    negative: str = ""  # text in the place of the empty one
    camera: bool | None = None  # told to the network; true: it must take one; None: if it does
    view_text: str = "nearest"  # front, side, back: the nearest's (paper) | interpolate | none
    perp_neg: float = 0.0  # how strongly the neighbouring sides' texts are avoided; 0: not
    t_range: tuple[float, float] = (0.02, 0.98)  # share of the schedule (paper)
    t_high_end: float = 0.98  # upper end at the last step: t_range's falls to it, never rises
    t_anneal: str = "linear"  # how it falls over the run: linear | sqrt | step (half-way)
    t_draw: str = "uniform"  # uniform (paper) | importance: t as likely as w(t) is large
    weighting: str = "sigma2"  # w(t): sigma2 (paper) | uniform
    rescale: float = 0.0  # 0 to 1: brings the guided prediction's spread back to the plain one's
    clip: float = 0.0  # largest number of the gradient; 0: any


@dataclass
class ShadingConfig:
    ambient_until: float = 1 / 15  # share of the run without light, only ambient (paper)
    lit: float = 0.75  # share of views that are lit from then on (paper)
    textureless: float = 0.5  # share of lit views whose albedo is white (paper)
    ambient: float = 0.1  # l_a of lit views (paper)
    diffuse: float = 0.9  # l_rho of lit views (paper)
    white: float = 1.0  # albedo of textureless views (paper)
    light_distance: tuple[float, float] = (0.8, 1.5)  # from the origin, scene units (paper)


@dataclass
class LossConfig:
    opacity: Schedule = (1e-3, 1e-3, 1.0)  # 1e-3 to 5e-3 (paper)
    orientation: Schedule = (1e-4, 1e-2, 1 / 3)  # (paper)
    entropy: Schedule = (0.0, 0.0, 1.0)
    distortion: Schedule = (0.0, 0.0, 1.0)
    normal_smoothness: Schedule = (0.0, 0.0, 1.0)
    transmittance: Schedule = (0.0, 0.0, 1.0)  # 0.5 (Dream Fields)
    transmittance_target: Schedule = (0.4, 0.88, 0.05)  # share of a picture (Dream Fields)


@dataclass
class OptimizerConfig:
    name: str = "adam"  # adam | adan | shampoo (paper: its distributed form)
    table_rate: float = 1e-2
    mlp_rate: float = 2e-3  # at the end of the warm-up; 1e-4 (paper)
    warmup: int = 50  # steps; 3,000 of 15,000 (paper)
    final_share: float = 0.1  # of the rate, at the end of the cosine; 0.01 (paper)
    betas: tuple[float, ...] = ()  # empty: what suits the name, see optimizers.BETAS
    eps: float = 1e-15


@dataclass
class RunConfig:
    prompt: str = ""
    steps: int = 500  # 15,000 (paper)
    views: int = 4  # pictures at a time (paper)
    accumulate: int = 1  # times that many a step
    seed: int = 0
    init: str = ""  # folder of a run whose scene is the start
    checkpoint_every: int = 100  # steps
    preview_every: int = 50  # steps
    graph: bool = True  # on a GPU: a step is replayed as one CUDA graph
    camera: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    shading: ShadingConfig = dataclasses.field(default_factory=ShadingConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def change(self, name: str, value) -> None:
        """Set the setting called `name`, e.g. "guidance.scale" or "views". Raises ValueError for an
        unknown one, and for a value of another kind than the one it has."""
        *path, last = name.split(".")
        stage = getattr(self, path[0], None) if len(path) == 1 else self if not path else None
        if not dataclasses.is_dataclass(stage) or last not in (
            f.name for f in dataclasses.fields(stage)
        ):
            raise ValueError(f"config: expected a setting's name, e.g. guidance.scale, got {name}")
        old = getattr(stage, last)
        annotation = {f.name: f.type for f in dataclasses.fields(stage)}[last]
        fitted = _fitted(value, old, annotation)
        if fitted is None or dataclasses.is_dataclass(old):
            raise ValueError(f"config `{name}`: expected a value like {old!r}, got {value!r}")
        setattr(stage, last, fitted)

    @classmethod
    def from_dict(cls, values: dict) -> RunConfig:
        """The inverse of to_dict, from JSON. Raises ValueError on a key it does not know."""
        stages = {
            "camera": CameraConfig,
            "field": FieldConfig,
            "render": RenderConfig,
            "guidance": GuidanceConfig,
            "shading": ShadingConfig,
            "loss": LossConfig,
            "optimizer": OptimizerConfig,
        }
        known = {name: _known(kind, values.get(name, {}), name) for name, kind in stages.items()}
        rest = {k: v for k, v in values.items() if k not in stages}
        return _known(cls, {**rest, **known}, "run")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fitted(value, old, annotation: str):
    """The value as a setting keeps it that is `old` now; None if it is of another kind."""
    if annotation == "Schedule" and _is_number(value):
        value = [value, value, 1.0]
    if isinstance(old, tuple):
        numbers = isinstance(value, (list, tuple)) and all(map(_is_number, value))
        fits = numbers and ("..." in annotation or len(value) == len(old))
        return tuple(map(float, value)) if fits else None
    kind = type(old)
    if old is None:  # what else it may be stands in its annotation, "int | None"
        kinds = {"int": int, "float": float, "str": str, "bool": bool}
        kind = kinds[annotation.split(" ")[0]]
    if kind is float:
        return float(value) if _is_number(value) else None
    return value if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) else None


def _known(kind, values: dict, name: str):
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"config `{name}`: unknown {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _for_large_model(config: RunConfig, keep_steps: bool) -> None:
    """The paper's cameras and guidance, and a field that holds more than a toy."""
    config.field = FieldConfig(
        n_levels=16, base_resolution=16, finest_resolution=2048, log2_table_size=19, hidden=64
    )
    config.render = RenderConfig(step=0.0125, occupancy_resolution=96)
    config.guidance.scale = 100.0
    config.optimizer.warmup = 500
    config.checkpoint_every, config.preview_every = 500, 250
    if not keep_steps:
        config.steps = 10_000


def preset(guidance: str, **settings) -> RunConfig:
    """The defaults that suit a guidance, with `settings` of RunConfig on top."""
    config = RunConfig(guidance=GuidanceConfig(name=guidance), **settings)
    if guidance not in ("toybox", "exemplar", "clip"):
        _for_large_model(config, "steps" in settings)
    if guidance == "toybox":
        config.camera = toybox_camera()
        # The network knows the camera: little is left for guidance to amplify, and t's upper end
        # may fall, since shape is decided early and its own guesses blur what is fine.
        config.guidance.camera, config.guidance.scale = True, 5.0
        config.guidance.weighting, config.guidance.t_high_end = "uniform", 0.3
        # Guidance makes parts fatter than they are; the paper's weight hardly holds against it.
        config.loss.opacity = (0.15, 0.01, 1.0)
        config.shading.white = 0.62  # of world.CLAY: what its training showed as textureless
        config.shading.lit = 0.5  # a few hundred steps need more albedo to find their colours
        config.steps = settings.get("steps", 300)
    if guidance == "clip":  # Dream Fields knows neither light nor words for views
        config.camera = toybox_camera()
        config.guidance.scale, config.guidance.view_text = 0.0, "none"
        config.shading.lit = 0.0
        config.loss.opacity, config.loss.transmittance = (0.0, 0.0, 1.0), (0.5, 0.5, 1.0)
        config.steps = settings.get("steps", 300)
    if guidance == "exemplar":  # exact scores: nothing to amplify
        config.guidance.scale = 0.0
        config.steps = settings.get("steps", 400)
    return config
