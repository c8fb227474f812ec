"""The loop: a prompt becomes a radiance field by score distillation sampling.

Read `Trainer._step` from top to bottom to follow one step: cameras, rendering, SDS, backward,
Adam. Every random number of step k comes from the seed and k alone, so a resumed run goes on as
if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import camera, checkpoint, export, guidance, sds
from .config import RunConfig
from .field import Field
from .ops.adam import Adam
from .render import Renderer, Rendering


def folder_state(folder: Path) -> str:
    """ "new" (absent or empty), "run" (holds a run) or "foreign" (something else)."""
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        return "foreign"
    names = {p.name for p in folder.iterdir()}
    return "new" if not names else "run" if "config.json" in names else "foreign"


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF)


class Trainer:
    """One run in one folder.

    Args:
        config: all settings; config.prompt must not be empty, config.steps at least 1.
        folder: where the run lies; created. Holds config.json, checkpoint.safetensors,
            metrics.jsonl, preview.png.
        guide: guidance object; None loads config.guidance.name.
        device: "cpu" or a CUDA device.
        resume: go on from the folder's checkpoint, if it has one.
    Raises:
        ValueError: a setting is wrong, the guidance cannot mean the prompt, or the checkpoint
            cannot be used.
    """

    def __init__(self, config: RunConfig, folder: Path, guide=None, device="cpu", resume=False):
        check(config)
        self.config, self.folder, self.device = config, Path(folder), torch.device(device)
        self.guidance = _Timed(guide or guidance.load(config.guidance.name, self.device))
        if self.guidance.image_size != config.render.image_size:
            raise ValueError(
                f"config `image_size`: expected {self.guidance.image_size}, the size "
                f"that the guidance sees, got {config.render.image_size}"
            )
        self.views = self.guidance.embed([f"{config.prompt}, {view} view" for view in camera.VIEWS])
        self.unconditional = self.guidance.embed([""]) if config.guidance.scale else None
        generator = torch.Generator().manual_seed(config.seed)
        field = Field(config.field, generator)
        self.renderer = Renderer(field, config.render, generator).to(self.device)
        self.optimizer = self._build_optimizer()
        self.step, self.stopping = 0, False
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint_path.exists():
            self._load()
        self._start_files()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self) -> Iterator[dict]:
        """Train to config.steps, or to the end of the step in which `stopping` was set, yielding
        each step's metrics. Checkpoints on the way, and at the end of the last whole step."""
        whole = True
        try:
            with open(self.folder / "metrics.jsonl", "a") as log:
                while self.step < self.config.steps and not self.stopping:
                    whole = False
                    metrics = self._step()
                    log.write(json.dumps(metrics) + "\n")
                    self.step += 1
                    whole = True
                    if self.step % self.config.preview_every == 0:
                        export.preview(self.renderer, self.folder / "preview.png")
                    if self.step % self.config.checkpoint_every == 0:
                        log.flush()
                        self.save()
                    yield metrics
        finally:
            if whole:  # a step that failed half-way must not be taken for one that was done
                self.save()

    def _step(self) -> dict:
        c, began = self.config, time.perf_counter()
        generator = step_generator(c.seed, self.step)
        if self.step % c.render.occupancy_every == 0:
            self.renderer.update_occupancy(self._seed(generator))

        cameras = camera.sample(c.views, c.camera, generator)
        background = self._background(generator)
        rendering = self.renderer(cameras.to(self.device), self._seed(generator), background)

        self.guidance.seconds = 0.0
        self.guidance.set_cameras(cameras, background, generator)
        cond = self.views[cameras.view_index().to(self.views.device)]
        uncond = None
        if self.unconditional is not None:
            uncond = self.unconditional.expand_as(cond)
        sds_loss = sds.loss(
            self.guidance, rendering.image, cond, uncond, c.guidance, generator, self.step / c.steps
        )
        opacity_loss = opacity_penalty(rendering.opacity)
        loss = sds_loss + c.loss.opacity * opacity_loss

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rate = rate_share(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["base_rate"]
        self.optimizer.step()
        return self._metrics(began, rendering, sds_loss, opacity_loss)

    def _background(self, generator: torch.Generator) -> Tensor | None:
        """Random colours tell the model what is transparent; None leaves it to the renderer."""
        if self.config.render.background != "random":
            return None
        return torch.rand(self.config.views, 3, generator=generator).to(self.device)

    def _seed(self, generator: torch.Generator) -> int:
        return int(torch.randint(2**62, (), generator=generator))

    def _metrics(
        self, began: float, rendering: Rendering, sds_loss: Tensor, opacity_loss: Tensor
    ) -> dict:
        seconds = time.perf_counter() - began
        wanted = int(rendering.count)
        return {
            "step": self.step,
            "sds": float(sds_loss.detach()),
            "opacity": float(opacity_loss.detach()),
            "mean_opacity": float(rendering.opacity.detach().mean()),
            "samples": wanted,
            "samples_lost": max(0, wanted - rendering.capacity),
            "updates_skipped": self.optimizer.skipped(),
            "seconds": round(seconds, 6),
            "guidance_share": round(self.guidance.seconds / seconds, 4),
        }

    def _build_optimizer(self) -> Adam:
        o, field = self.config.optimizer, self.renderer.field
        small = [field.weights]
        if self.renderer.environment is not None:
            small += list(self.renderer.environment.parameters())
        groups = [
            {"params": [field.table], "base_rate": o.table_rate},
            {"params": small, "base_rate": o.mlp_rate},
        ]
        return Adam(groups, lr=o.mlp_rate, betas=o.betas, eps=o.eps)

    def _start_files(self) -> None:
        text = json.dumps(self.config.to_dict(), indent=1)
        checkpoint.write_atomically(self.folder / "config.json", lambda p: p.write_text(text))
        _keep_lines(self.folder / "metrics.jsonl", self.step)

    def save(self) -> None:
        """Write the checkpoint: parameters, Adam's moments, occupancy, step."""
        tensors = {f"model.{k}": v for k, v in self.renderer.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
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
        self.renderer.load_state_dict(model_tensors(tensors))
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = int(tensors["step"])
        self.renderer.capacity = int(tensors["capacity"])


def check(config: RunConfig) -> None:
    """Raise ValueError for settings that cannot run."""
    if not config.prompt.strip():
        raise ValueError("argument `prompt`: expected a text, got an empty one")
    for name in ("steps", "views", "checkpoint_every", "preview_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"argument `{name}`: expected at least 1, got {getattr(config, name)}")
    backgrounds = ("random", "grey", "environment")
    if config.render.background not in backgrounds:
        raise ValueError(
            f"argument `background`: expected one of {', '.join(backgrounds)}, got "
            f"{config.render.background!r}"
        )


def rate_share(step: int, config: RunConfig) -> float:
    """Linear warm-up, then a cosine from 1 to optimizer.final_share."""
    o = config.optimizer
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
    return min(1.0, (step + 1) / o.warmup) * (o.final_share + (1.0 - o.final_share) * cosine)


def opacity_penalty(opacity: Tensor) -> Tensor:
    """Sum over the pixels of sqrt(opacity² + 0.01), averaged over views (A.2)."""
    return (opacity.square() + 0.01).sqrt().sum() / len(opacity)


def _keep_lines(path: Path, n: int) -> None:
    """Cut a JSON lines file to its first n lines: what a resumed run has not done yet goes."""
    if path.exists():
        kept = "".join(path.read_text().splitlines(keepends=True)[:n])
        checkpoint.write_atomically(path, lambda p: p.write_text(kept))


class _Timed:
    """Forwards to a guidance object and adds up the seconds spent in it."""

    def __init__(self, guide):
        self.guide, self.seconds = guide, 0.0

    def __getattr__(self, name: str):
        return getattr(self.guide, name)

    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        return self._timed(self.guide.predict_noise, z_t, t, embedding)

    def set_cameras(self, *view) -> None:
        """Tell a guidance that depends on the exact camera (it has this method) what comes."""
        if hasattr(self.guide, "set_cameras"):
            self._timed(self.guide.set_cameras, *view)

    def _timed(self, call, *args):
        self._wait()
        began = time.perf_counter()
        result = call(*args)
        self._wait()
        self.seconds += time.perf_counter() - began
        return result

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def load_renderer(folder: Path, device="cpu") -> Renderer:
    """The renderer of a run, from its checkpoint. Raises ValueError where there is none."""
    tensors, stored = checkpoint.load(Path(folder) / "checkpoint.safetensors")
    config = RunConfig.from_dict(stored)
    generator = torch.Generator().manual_seed(config.seed)
    renderer = Renderer(Field(config.field, generator), config.render, generator).to(device)
    renderer.load_state_dict(model_tensors(tensors))
    renderer.capacity = int(tensors["capacity"])
    return renderer


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The renderer's state dict among a checkpoint's tensors."""
    return {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
