"""The loop: a prompt becomes a radiance field by score distillation sampling.

Read `Trainer._step` from top to bottom to follow one step. What is random or scheduled is drawn on
the host, from the seed and the step's number alone: a resumed run goes on as if it had never
stopped. The rest (`_advance`: rendering, SDS, backward, Adam) never waits for the device and is one
CUDA graph on a GPU, or two: steps with light and without. What it measures is read every few steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import _cpu, checkpoint, export, guidance, losses, optimizers, sds
from .checks import check
from .config import RunConfig
from .drawing import Draw, Drawing, step_generator
from .field import make_field
from .graph import Captured
from .guidance.timed import Timed
from .ops import has_half
from .ops._backend import settled
from .prompting import Prompts
from .render import NO_LIMIT, Renderer, Rendering

MEASURES = ("sds", "opacity", "mean_opacity", "samples", "views_skipped", "updates_skipped")
REPORT_EVERY = 10  # steps, on a GPU: reading what it measured waits for it
HOPELESS = 10  # steps without a single finite view: the run is given up


class Trainer:
    """One run in one folder.

    Args:
        config: all settings; config.prompt must not be empty, config.steps at least 1.
        folder: where the run lies; created. Holds config.json, checkpoint.safetensors,
            metrics.jsonl, preview.png.
        guide: guidance object; None loads config.guidance.name.
        device: "cpu" or a CUDA device.
        resume: go on from the folder's checkpoint, if it has one. Else config.init may name the
            folder of another run, whose scene is the start.
    Raises:
        ValueError: a setting is wrong, the guidance cannot mean the prompt, or the checkpoint
            cannot be used.
    """

    def __init__(self, config: RunConfig, folder: Path, guide=None, device="cpu", resume=False):
        check(config)
        self.config, self.folder, self.device = config, Path(folder), made_current(device)
        if self.device.type == "cpu":
            _cpu.keep_memory()  # each step asks for what the last one freed
        self.guidance = Timed(guide or load_guidance(config, self.device))
        if config.render.latent:
            self._fit_to_latents()
        else:
            self._check_size()
        of_guide = getattr(self.guidance.guide, "textureless_prompt", None)
        clay = of_guide(config.prompt) if of_guide and config.shading.lit else None
        self.prompts = Prompts(self.guidance, config.prompt, config.guidance, clay)
        if guide is None and hasattr(self.guidance.guide, "release_text"):
            self.guidance.release_text()
        self.schedule = None  # no diffusion
        if hasattr(self.guidance.guide, "alphas_cumprod"):
            self.schedule = sds.Schedule(self.guidance.alphas_cumprod, config.guidance)
        generator = torch.Generator().manual_seed(config.seed)
        field = make_field(config.field, generator)
        self.renderer = Renderer(field, config.render, generator).to(self.device)
        if config.field.half and not has_half(self.renderer.occupancy):
            raise ValueError(
                f"config `half`: expected false, as the kernels on {self.device} have no float16"
            )
        self.loss_scale = optimizers.LossScale(self.device) if config.field.half else None
        self.colour_map = None  # of latents
        if config.render.latent:
            self._set_colour_map()
        self.drawing = Drawing(
            config, self.guidance, self.prompts, self.schedule, self.colour_map, self.device
        )
        self.optimizer = self._build_optimizer()
        self.regularizers = losses.active(config.loss)
        self.keep_samples = "distortion" in self.regularizers  # which weighs each of them
        self.measured = torch.zeros(len(MEASURES), dtype=torch.float64, device=self.device)
        self.bad = torch.zeros(1, dtype=torch.int32, device=self.device)  # views, since the start
        self.draws: list[Draw] = []  # of the current step, where the graph reads them
        # What a guidance renders for the camera lies elsewhere each time: no graph can hold it.
        static = not hasattr(self.guidance.guide, "set_cameras") and self.optimizer.capturable
        where = self.device if static else torch.device("cpu")
        # Steps with light and without share the graphs' memory, which is that of the networks.
        pool = torch.cuda.graph_pool_handle() if where.type == "cuda" and config.graph else None
        self.advance = {
            lit: Captured(partial(self._advance, lit), where, pool, config.graph)
            for lit in (False, True)
        }
        self.report_every = 1 if self.device.type == "cpu" else REPORT_EVERY
        self.step, self.made, self.stopping = 0, 0, False  # made: steps, by this object
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint_path.exists():
            self._load()
        elif config.init:
            self._start_from(Path(config.init))
        self._start_files()

    def _fit_to_latents(self) -> None:
        if not hasattr(self.guidance.guide, "latent_shape"):
            raise ValueError(
                "config `latent`: expected a guidance that has latents, got one without"
            )
        if self.config.render.background != "random":
            raise ValueError(
                f"config `background`: expected random beside latents, got "
                f"{self.config.render.background!r}"
            )
        channels, size = self.guidance.latent_shape
        if channels == 3:
            raise ValueError("config `latent`: expected a guidance whose latents are no colours")
        self.config.field.channels, self.config.render.image_size = channels, size
        self.config.shading.lit = 0.0  # latents are no colours that light could fall on

    def _set_colour_map(self) -> None:
        """Of the background, and its inverse for showing the field."""
        matrix, bias = self.guidance.colour_map()
        self.colour_map = matrix.cpu(), bias.cpu()
        inverse = torch.linalg.pinv(matrix)
        self.renderer.field.to_rgb.copy_(inverse)
        self.renderer.field.rgb_bias.copy_(-inverse @ bias)

    def _check_size(self) -> None:
        size, seen = self.config.render.image_size, self.guidance.image_size
        if getattr(self.guidance.guide, "resizes", False):
            if size < 1:
                raise ValueError(f"config `image_size`: expected at least 1, got {size}")
        elif size != seen:
            raise ValueError(
                f"config `image_size`: expected {seen}, the size that the guidance sees, got {size}"
            )
        if hasattr(self.guidance.guide, "set_cameras"):  # it renders what lies behind, too
            fixed = {"accumulate": (self.config.accumulate, 1),
                     "background": (self.config.render.background, "random")}  # fmt: skip
            for name, (got, wanted) in fixed.items():
                if got != wanted:
                    raise ValueError(
                        f"config `{name}`: expected {wanted} for a guidance that must know the "
                        f"camera, got {got}"
                    )

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self) -> Iterator[dict]:
        """Train to config.steps, or to the end of the step in which `stopping` was set, yielding
        each step's metrics, a few steps at a time on a GPU. Checkpoints on the way, and at the end
        of the last whole step. Raises ValueError if the guidance's numbers are never finite."""
        c, whole = self.config, True
        pending: list[Tensor] = []  # measures of the steps since the last report
        with open(self.folder / "metrics.jsonl", "a") as log:
            try:
                began = time.perf_counter()
                while self.step < c.steps and not self.stopping:
                    whole = False
                    pending.append(self._step())
                    self.step += 1
                    whole = True
                    checkpoint_due = self.step % c.checkpoint_every == 0
                    preview_due = self.step % c.preview_every == 0
                    last = self.step == c.steps or self.stopping
                    report_due = self.step % self.report_every == 0
                    if not (last or checkpoint_due or preview_due or report_due):
                        continue
                    rows = self._report(log, pending, began)
                    self._look_at(rows)
                    if preview_due:
                        export.preview(self.renderer, self.folder / "preview.png")
                    if checkpoint_due:
                        log.flush()
                        self.save()
                    yield from rows
                    began = time.perf_counter()
            finally:
                if whole:  # a step that failed half-way must not be taken for one that was done
                    self._report(log, pending, began)
                    self.save()

    def _step(self) -> Tensor:
        """Make a step. Returns what the device measured, unread."""
        c = self.config
        generator = step_generator(c.seed, self.step)
        if self.step % c.render.occupancy_every == 0:
            self.renderer.update_occupancy(self._seeds(generator, 1))
        draws = [self._draw(generator) for _ in range(c.accumulate)]
        if self.step == 0:
            self.renderer.make_room(draws[0].cameras, draws[0].seeds[:1])
        if self.draws and self.device.type == "cuda":
            for old, new in zip(self.draws, draws, strict=True):
                old.copy_(new)  # where a graph reads them
        else:
            self.draws = draws
        self.advance[any(draw.lit for draw in draws)]()
        self.made += 1
        return self.measured.clone()

    def _draw(self, generator: torch.Generator) -> Draw:
        return self.drawing(self.step, generator)

    def _seeds(self, generator: torch.Generator, n: int) -> Tensor:
        return self.drawing.seeds(generator, n)

    def _advance(self, lit: bool) -> None:
        """Render, distil, step, measure: all on the device, reading self.draws."""
        self.optimizer.zero_grad(set_to_none=True)
        self.renderer.field.set_progress(self.draws[0].progress)
        passes = torch.stack([self._accumulate(draw, lit) for draw in self.draws])
        self.optimizer.set_share(self.draws[0].rate)
        skipped, scale = self.optimizer.skipped_on(self.device), self.loss_scale
        self.optimizer.step(loss_scale=None if scale is None else scale.value)
        if scale is not None:
            scale.update(skipped)
        counts = torch.cat((self.bad, skipped))
        self.measured.copy_(torch.cat((passes[:, :3].mean(0), passes[:, 3].amax(0)[None], counts)))

    def _accumulate(self, draw: Draw, lit: bool) -> Tensor:
        """Add one pass's gradients up. Returns the first four of MEASURES."""
        c = self.config
        latent = c.render.latent
        rendering = self.renderer(
            draw.cameras, draw.seeds[:1], draw.background, latent=latent,
            shading=draw.shading if lit else None,
            keep_samples=self.keep_samples,
        )  # fmt: skip
        z = rendering.image if latent else self.guidance.encode(rendering.image)
        share = 1.0 / (c.views * c.accumulate)
        gradient = self._guide(z, draw, share)
        terms = self._regularize(rendering, draw.losses)
        total = losses.weighted(terms, draw.losses) / c.accumulate
        scale = torch.ones_like(total)
        scaled = gradient
        if self.loss_scale is not None:
            scale = self.loss_scale.value.reshape(total.shape)
            scaled = gradient * scale
        torch.autograd.backward((z, total), (scaled.to(z.dtype), scale))
        spread = gradient.square().mean().sqrt() / share
        measures = spread, terms["opacity"], rendering.opacity.mean(), rendering.count[0]
        return torch.stack([x.detach().double() for x in measures])

    def _guide(self, z: Tensor, draw: Draw, share: float) -> Tensor:
        """The gradient of z, times share: the score's distillation, or a loss's own."""
        if self.schedule is None:
            gradient = share * self.guidance.gradient(z, draw.conditions.text)
            finite = gradient.isfinite().flatten(1).all(1)
            self.bad += (~finite).sum()
            return torch.where(finite[:, None, None, None], gradient, 0.0)
        return sds.gradient(
            self.guidance, z, draw.t, draw.seeds[1:], draw.conditions, self.schedule, self.bad,
            draw.negative_weights, share,
        )  # fmt: skip

    def _regularize(self, rendering: Rendering, weights: Tensor) -> dict[str, Tensor]:
        """The regularizers that have a weight at some step, and the opacity's: it is measured."""
        wanted, terms = self.regularizers, {"opacity": losses.opacity_penalty(rendering.opacity)}
        if "entropy" in wanted:
            terms["entropy"] = losses.entropy(rendering.opacity)
        if "transmittance" in wanted:
            terms["transmittance"] = losses.transmittance(rendering.opacity, weights[-1])
        if "distortion" in wanted:
            _, t, dt, packed, _ = rendering.samples
            of_rays = losses.distortion(rendering.weights, t, dt, packed)
            terms["distortion"] = of_rays.sum() / len(rendering.opacity)
        if rendering.normal is not None and "orientation" in wanted:
            terms["orientation"] = losses.orientation_penalty(rendering.orientation)
        if rendering.normal is not None and "normal_smoothness" in wanted:
            terms["normal_smoothness"] = losses.normal_smoothness(rendering.normal)
        return terms

    def _report(self, log, pending: list[Tensor], began: float) -> list[dict]:
        """Write the metrics of the pending steps, made since `began`. Waits for the device."""
        n = len(pending)
        values = torch.stack(pending).tolist() if n else []
        pending.clear()
        guided = self.guidance.take_seconds(n * self.config.accumulate)
        seconds = time.perf_counter() - began
        rows = []
        for i, measures in enumerate(values):
            row = {"step": self.step - n + i} | dict(zip(MEASURES, measures, strict=True))
            for name in ("samples", "views_skipped", "updates_skipped"):
                row[name] = int(row[name])
            row["samples_lost"] = max(0, row["samples"] - self._capacity())
            row["seconds"] = round(seconds / n, 6)
            row["graphs_failed"] = sum(advance.failed for advance in self.advance.values())
            row["guidance_share"] = None if guided is None else round(guided / seconds, 4)
            rows.append(row)
        log.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def _capacity(self) -> int:
        """Samples that a step can have."""
        in_batches = self.renderer.batched and not self.keep_samples
        return NO_LIMIT if in_batches else self.renderer.capacity

    def _look_at(self, rows: list[dict]) -> None:
        """Draw conclusions from metrics: give up, or make room for more samples."""
        c, row = self.config, rows[-1]
        views = self.made * c.views * c.accumulate
        if row["views_skipped"] == views and self.made >= min(HOPELESS, c.steps):
            raise ValueError(
                f"guidance: expected finite predictions, got none in {self.made} steps: try "
                f"another dtype (bf16, fp32) or another scheduler"
            )
        if self.renderer.fit_capacity(max(row["samples"] for row in rows)):
            for advance in self.advance.values():
                advance.reset()

    def _build_optimizer(self) -> optimizers.FusedAdam | optimizers.Kept:
        o, field = self.config.optimizer, self.renderer.field
        tables = [p for name, p in field.named_parameters() if name == "table"]
        ours = {id(p) for p in tables}
        rest = [p for p in self.renderer.parameters() if id(p) not in ours]
        groups = [{"params": tables, "lr": o.table_rate}, {"params": rest, "lr": o.mlp_rate}]
        groups = [group for group in groups if group["params"]]
        rate = torch.ones(1, device=self.device)
        return optimizers.build(o, groups, field.half_copies(), rate)

    def _start_from(self, folder: Path) -> None:
        """Take another run's scene (the paper's figure 4: a prompt refined step by step)."""
        tensors, config = checkpoint.load(folder / "checkpoint.safetensors")
        if config["field"] != _as_json(self.config.field):
            raise ValueError(
                f"argument `init`: expected the field's settings of the run in {folder}, got others"
            )
        try:
            self.renderer.load_state_dict(within(tensors, "model."))
        except RuntimeError as error:
            raise ValueError(f"argument `init`: expected a scene like this one: {error}") from None
        self.renderer.field.refresh_half()
        self.renderer.capacity = int(tensors["capacity"])

    def _start_files(self) -> None:
        text = json.dumps(self.config.to_dict(), indent=1)
        checkpoint.write_atomically(self.folder / "config.json", lambda p: p.write_text(text))
        _keep_lines(self.folder / "metrics.jsonl", self.step)

    def save(self) -> None:
        """Write the checkpoint: parameters, the optimizer's state, occupancy, step."""
        tensors = {f"model.{k}": v for k, v in self.renderer.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.tensors().items()}
        if self.loss_scale is not None:
            tensors |= {f"loss_scale.{k}": v for k, v in self.loss_scale.tensors().items()}
        tensors["step"] = torch.tensor([self.step])
        tensors["capacity"] = torch.tensor([self.renderer.capacity])
        checkpoint.save(self.checkpoint_path, tensors, self.config.to_dict())

    def _load(self) -> None:
        tensors, config = checkpoint.load(self.checkpoint_path)
        if config["prompt"] != self.config.prompt:
            raise ValueError(
                f"argument `prompt`: expected {config['prompt']!r}, the run's own, got "
                f"{self.config.prompt!r}"
            )
        theirs, ours = config["optimizer"].get("name"), self.config.optimizer.name
        if theirs != ours:
            raise ValueError(f"config `optimizer.name`: expected {theirs}, the run's, got {ours}")
        self.renderer.load_state_dict(within(tensors, "model."))
        self.renderer.field.refresh_half()
        self.optimizer.load(within(tensors, "optimizer."))
        if self.loss_scale is not None:
            self.loss_scale.load(within(tensors, "loss_scale."))
        self.step = int(tensors["step"])
        self.renderer.capacity = int(tensors["capacity"])


def load_guidance(config: RunConfig, device: torch.device):
    """The guidance that a run's config names."""
    g = config.guidance
    return guidance.load(
        g.name, device, g.dtype, g.size, g.compile, g.low_memory, g.tiny_vae, g.model
    )


def made_current(device) -> torch.device:
    """The device with its number, made the current one: graphs and their timers go there."""
    device = settled(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _keep_lines(path: Path, n: int) -> None:
    """Cut a JSON lines file to its first n lines: what a resumed run has not done yet goes."""
    if path.exists():
        kept = "".join(path.read_text().splitlines(keepends=True)[:n])
        checkpoint.write_atomically(path, lambda p: p.write_text(kept))


def load_renderer(folder: Path, device="cpu") -> Renderer:
    """The renderer of a run, from its checkpoint. Raises ValueError where there is none."""
    tensors, stored = checkpoint.load(Path(folder) / "checkpoint.safetensors")
    config, device = RunConfig.from_dict(stored), made_current(device)
    generator = torch.Generator().manual_seed(config.seed)
    field = make_field(config.field, generator)
    renderer = Renderer(field, config.render, generator).to(device)
    renderer.load_state_dict(within(tensors, "model."))
    renderer.field.refresh_half()
    renderer.capacity = int(tensors["capacity"])
    return renderer


def _as_json(stage) -> dict:
    return json.loads(json.dumps(vars(stage)))


def within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
