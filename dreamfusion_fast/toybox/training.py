"""How the embedded networks are trained: one loop, which goes on exactly where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import write_atomically

LOG_EVERY, SAVE_SECONDS = 100, 180  # steps; seconds
# What lies between features and the world is no matrix between features: AdamW's, not Muon's.
FASTER = 3.0  # times the learning rate, of what is to learn faster
ENDS = ("conv_in", "conv_out", "embedding", "embeddings")


@dataclass
class TrainingConfig:
    steps: int = 10_000  # may be another number when a training goes on
    batch: int = 64
    optimizer: str = "muon"  # muon (Jordan et al. 2024), with AdamW for what is no matrix | adamw
    learning_rate: float = 2e-3
    warmup: int = 300  # steps
    decay_share: float = 0.3  # the last part of `steps`, in which the rate falls to zero
    weight_decay: float = 1e-2
    ema: float = 0.9995
    views_per_object: int = 1000
    seed: int = 0
    threads: int = 2
    compile: bool = False


def build_optimizer(
    net: nn.Module, config: TrainingConfig, fast: str = ""
) -> torch.optim.Optimizer:
    """fast: a part of names; parameters of such names are AdamW's and learn FASTER times as fast.
    Raises ValueError for an unknown name, or where pytorch_optimizer is not installed."""
    c = config
    matrices, rest, faster = [], [], []
    for name, p in net.named_parameters():
        inner = p.ndim > 1 and not any(part in ENDS for part in name.split("."))
        is_fast = bool(fast) and fast in name
        (faster if is_fast else matrices if inner else rest).append(p)
    if c.optimizer == "adamw":
        groups = [{"params": matrices + rest, "times": 1.0}, {"params": faster, "times": FASTER}]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=c.learning_rate, weight_decay=c.weight_decay, betas=(0.9, 0.98),
        )  # fmt: skip
    if c.optimizer != "muon":
        raise ValueError(f"argument `--optimizer`: expected muon or adamw, got {c.optimizer!r}")
    try:
        from pytorch_optimizer import Muon
    except ImportError:
        raise ValueError(
            "argument `--optimizer`: expected adamw, as muon is pytorch_optimizer's, which is not "
            "installed: pip install 'dreamfusion-fast[optimizers]'"
        ) from None
    plain = {"use_muon": False, "betas": (0.9, 0.98)}
    groups = [
        {"params": matrices, "use_muon": True, "use_adjusted_lr": True, "times": 1.0},
        {"params": rest, **plain, "times": 1.0},
        {"params": faster, **plain, "times": FASTER},
    ]
    return Muon(
        [g for g in groups if g["params"]],
        lr=c.learning_rate,
        weight_decay=c.weight_decay,
    )


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. One that does not is many times slower in
    it than in float32, one that does is faster."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast():
    """Inside of it networks compute in bfloat16, on a CPU that is faster in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


class Training:
    """A training in a folder: state.pt (all that it needs to go on), config.json, curve.jsonl.

    A step's random numbers come from the seed and the step's number alone: a training that was
    stopped, at any moment, goes on as if it had not been, to the bit where threads and machine are
    the same.

    Args:
        net: what is trained.
        config: all settings.
        folder: where it lies; exists.
        kind: what a state must agree on, by name.
        measures: names of the numbers that a loss comes with.
        fast: see build_optimizer.
    Raises:
        ValueError: an unknown optimizer, or the folder's state is of another kind.
    """

    def __init__(
        self,
        net: nn.Module,
        config: TrainingConfig,
        folder: Path,
        kind: dict,
        measures: list[str],
        fast: str = "",
    ):
        self.net, self.config, self.folder = net, config, folder
        self.kind, self.measures = kind, measures
        self.shadow = [p.detach().clone() for p in net.parameters()]  # the weights' average
        self.optimizer = build_optimizer(net, config, fast)
        self.step, self.seconds = 0, 0.0
        self.recent: list[Tensor] = []  # measures of the steps since the last line of the curve
        if self.state_path.exists():
            self._load(torch.load(self.state_path, weights_only=True))

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def generator(self) -> torch.Generator:
        """The source of all random numbers of the next step."""
        return torch.Generator().manual_seed((self.config.seed + 1) * 1_000_003 + self.step)

    def learning_rate(self) -> float:
        """Of the next step: a short warm-up, a constant, a line to zero."""
        c = self.config
        left = (1.0 - self.step / c.steps) / c.decay_share
        return c.learning_rate * min(1.0, (self.step + 1) / c.warmup, max(left, 0.0))

    def train_step(self, loss_of: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> None:
        """loss_of: draws a batch; returns its loss, and its measures (M,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["times"]
        loss, measures = loss_of(self.generator())
        self.recent.append(measures.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(self.net.parameters()), 1 - decay)
        self.step += 1

    def run(
        self, loss_of: Callable[[torch.Generator], tuple[Tensor, Tensor]], ship: Callable[[], None]
    ) -> None:
        """Train to config.steps, saving on the way and at the end. ship: writes the average as
        users load it."""
        last = saved = time.perf_counter()
        while self.step < self.config.steps:
            self.train_step(loss_of)
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            if self.step % LOG_EVERY == 0:
                self._log()
            if now - saved > SAVE_SECONDS:
                self.save(ship)
                saved = last = time.perf_counter()
        self.save(ship)

    def _log(self) -> None:
        values = torch.stack(self.recent).float().mean(0).tolist()
        self.recent.clear()
        row = {
            "step": self.step,
            "pictures": self.step * self.config.batch,
            "minutes": round(self.seconds / 60, 2),
            "rate": self.learning_rate(),
            **{name: round(value, 5) for name, value in zip(self.measures, values, strict=True)},
        }
        print(json.dumps(row), flush=True)
        with open(self.folder / "curve.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self, ship: Callable[[], None]) -> None:
        """Write the state to go on from, the settings, and what ships."""
        state = {
            **self.kind,
            "net": self.net.state_dict(),
            "shadow": self.shadow,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "losses": self.recent,
            "seconds": self.seconds,
        }
        write_atomically(self.state_path, lambda p: torch.save(state, p))
        text = json.dumps(asdict(self.config), indent=1)
        write_atomically(self.folder / "config.json", lambda p: p.write_text(text))
        ship()

    def _load(self, state: dict) -> None:
        for name, wanted in self.kind.items():
            if state.get(name) != wanted:
                raise ValueError(
                    f"argument `--out`: expected the state of a network of {name} {wanted}, got "
                    f"one of {state.get(name)} in {self.state_path}"
                )
        self.net.load_state_dict(state["net"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"argument `--optimizer`: expected the one of the training in {self.folder}, got "
                f"{self.config.optimizer} ({error})"
            ) from None
        self.shadow = [w.detach() for w in state["shadow"]]
        self.recent = list(state["losses"])
        self.step, self.seconds = state["step"], state["seconds"]


def settings(kind, out: Path, changes: list[str]):
    """The settings, a `kind` of TrainingConfig, of the training in `out`, or the defaults, with
    NAME=VALUE on top. Raises ValueError for an unknown name or a value of another kind."""
    path = out / "config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    known = asdict(kind())
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in known or not equals:
            raise ValueError(
                f"argument `--set`: expected NAME=VALUE of {', '.join(known)}, got {change!r}"
            )
        values[name] = _value(name, text, known[name])
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _value(name: str, text: str, default):
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    like = {float: (int, float), tuple: list}.get(type(default), type(default))
    if not isinstance(value, like) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"argument `--set`: expected {name} like {default!r}, got {text!r}")
    return value


def averaged(shadow: list[Tensor], modules: list[nn.Module]) -> None:
    """Copy an average, in the order of its net's parameters, into other modules of its shape."""
    parameters = [p for module in modules for p in module.parameters()]
    with torch.no_grad():
        for p, w in zip(parameters, shadow, strict=True):
            p.copy_(w)
