"""tiny-cuda-nn's encodings without parameters, compositions, and the way from configs to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ...ops import frequency_encode, reference, spherical_harmonics
from .config import Settings
from .grid import TYPE_OF, Grid
from .part import InputPart, next_multiple
from .pcg32 import Pcg32


class Identity(InputPart):
    """scale x + offset."""

    def __init__(self, n_input_dims: int, settings: Settings):
        self.scale = settings.number("scale", 1.0)
        self.offset = settings.number("offset", 0.0)
        super().__init__(n_input_dims, n_input_dims)

    def encode(self, x, params, dtype):
        return (x * self.scale + self.offset).to(dtype)

    def hyperparams(self) -> dict:
        return {"otype": "Identity", "scale": self.scale, "offset": self.offset}


class Empty(InputPart):
    """Nothing but padding."""

    def __init__(self, n_input_dims: int, settings: Settings):
        super().__init__(n_input_dims, 0)

    def encode(self, x, params, dtype):
        return x[:, :0].to(dtype)

    def hyperparams(self) -> dict:
        return {"otype": "Empty"}


class Frequency(InputPart):
    """sin(2^k π x), cos(2^k π x) of each dimension, k = 0..n_frequencies - 1, dimension by
    dimension. Our op gives sines before cosines and frequency by frequency: columns are reordered.
    """

    def __init__(self, n_input_dims: int, settings: Settings):
        self.n_frequencies = settings.integer("n_frequencies", 12, 1, 64)
        super().__init__(n_input_dims, 2 * n_input_dims * self.n_frequencies)

    def encode(self, x, params, dtype):
        function = frequency_encode if self.n_frequencies <= 24 else reference.frequency_encode
        found = function(x * math.pi, self.n_frequencies)
        found = found.view(len(x), 2, self.n_frequencies, self.n_input_dims)
        return found.permute(0, 3, 2, 1).reshape(len(x), self.width).to(dtype)

    def hyperparams(self) -> dict:
        return {"otype": "Frequency", "n_frequencies": self.n_frequencies}


class TriangleWave(InputPart):
    """4 |v - ⌊v⌋ - 1/2| - 1 with v = 2^(k-1) x + k / 4, k = 0..n_frequencies - 1, dimension by
    dimension."""

    def __init__(self, n_input_dims: int, settings: Settings):
        self.n_frequencies = settings.integer("n_frequencies", 12, 1, 64)
        super().__init__(n_input_dims, n_input_dims * self.n_frequencies)

    def encode(self, x, params, dtype):
        k = torch.arange(self.n_frequencies, dtype=x.dtype, device=x.device)
        v = x[..., None] * torch.exp2(k - 1) + k / 4
        f = v - v.detach().floor()
        return torch.where(f < 0.5, 1 - 4 * f, 4 * f - 3).flatten(1).to(dtype)

    def hyperparams(self) -> dict:
        return {"otype": "TriangleWave", "n_frequencies": self.n_frequencies}


class OneBlob(InputPart):
    """The share of a blob around x in each of n bins of [0, 1], which goes round at its ends.

    The blob is the quartic kernel 15/16 (1 - u²)², u = n (position - x).
    """

    def __init__(self, n_input_dims: int, settings: Settings):
        self.n_bins = settings.integer("n_bins", 16)
        if self.n_bins & (self.n_bins - 1):
            raise ValueError(
                f"config `{settings.name}.n_bins`: expected a power of 2, got {self.n_bins}"
            )
        super().__init__(n_input_dims, n_input_dims * self.n_bins)

    def encode(self, x, params, dtype):
        edges = torch.arange(self.n_bins + 1, dtype=x.dtype, device=x.device) / self.n_bins
        distance = edges - x[..., None]
        below = sum(self._below(distance + turn) for turn in (0, -1, 1))
        return below.diff(dim=-1).flatten(1).to(dtype)

    def _below(self, distance):
        """The blob's integral up to `distance` from its centre."""
        u = (distance * self.n_bins).clamp(-1, 1)
        return 0.5 + 15 / 16 * u * (1 - 2 / 3 * u**2 + u**4 / 5)

    def hyperparams(self) -> dict:
        return {"otype": "OneBlob", "n_bins": self.n_bins}


class SphericalHarmonics(InputPart):
    """Of the direction 2 x - 1. Its padding comes first, as in tiny-cuda-nn without JIT fusion."""

    filler_first = True

    def __init__(self, n_input_dims: int, settings: Settings):
        if n_input_dims != 3:
            raise ValueError(
                f"config `{settings.name}`: SphericalHarmonics encodes 3 dimensions, "
                f"got {n_input_dims}"
            )
        self.degree = settings.integer("degree", 4, 1, 8)
        super().__init__(3, self.degree**2)

    def encode(self, x, params, dtype):
        return spherical_harmonics(2 * x - 1, self.degree).to(dtype)

    def hyperparams(self) -> dict:
        return {"otype": "SphericalHarmonics", "degree": self.degree}


class Composite(InputPart):
    """Nested encodings of parts of the input, side by side, added or multiplied."""

    def __init__(self, n_input_dims: int, settings: Settings):
        self.reduction = settings.choice(
            "reduction", "Concatenation", ("Concatenation", "Sum", "Product")
        )
        spans = _spans(n_input_dims, settings)
        self.begins = [begin for begin, _, _, _ in spans]
        self.parts = [create_encoding(dims, *nested) for _, dims, *nested in spans]
        for part in self.parts:
            part.align(1)
        self.alignment = math.lcm(*(part.alignment for part in self.parts))
        if self.reduction == "Concatenation":
            so_far = 0
            for part, following in zip(self.parts, self.parts[1:]):
                end = next_multiple(so_far + part.padded, following.alignment)
                part.pad_to(end - so_far)
                so_far = end
            width = sum(part.padded for part in self.parts)
        else:
            for part in self.parts:
                part.align(self.alignment)
            width = self.parts[0].padded
            widths = [part.padded for part in self.parts]
            if any(w != width for w in widths):
                raise ValueError(
                    f"config `{settings.name}.nested`: expected encodings of one width to reduce, "
                    f"got {widths}"
                )
        super().__init__(n_input_dims, width, sum(part.n_params for part in self.parts))

    def pad_to(self, width):
        if self.reduction == "Concatenation":
            last = self.parts[-1]
            last.pad_to(width - (self.padded - last.padded))
        else:
            for part in self.parts:
                part.pad_to(width)
        self.padded = self.width = width  # parts pad themselves

    def initialise(self, generator: Pcg32) -> list[np.ndarray]:
        return [piece for part in self.parts for piece in part.initialise(generator)]

    def encode(self, x, params, dtype):
        concatenate = self.reduction == "Concatenation"
        found, start = [], 0
        for part, begin in zip(self.parts, self.begins):
            columns = x[:, begin : begin + part.n_input_dims].contiguous()
            mine = params[start : start + part.n_params]
            found.append(part(columns, mine, dtype if concatenate else x.dtype))
            start += part.n_params
        if concatenate:
            return torch.cat(found, -1)
        stack = torch.stack(found)
        return (stack.sum(0) if self.reduction == "Sum" else stack.prod(0)).to(dtype)

    def hyperparams(self) -> dict:
        nested = [part.hyperparams() for part in self.parts]
        return {"otype": "Composite", "reduction": self.reduction, "nested": nested}


def _spans(n_input_dims: int, settings: Settings) -> list[tuple[int, int, dict, str]]:
    """(first dimension, number of dimensions, config, its name) of each nested encoding that has
    any. One may leave its number out and gets what is left, unless dims_to_encode_begin is used."""
    nested = [
        (dict(Settings(config, name).config), name)
        for i, config in enumerate(settings.sequence("nested"))
        for name in [f"{settings.name}.nested[{i}]"]
    ]
    placed = any("dims_to_encode_begin" in config for config, _ in nested)
    numbers = [Settings(config, name).integer("n_dims_to_encode", 0, 0) for config, name in nested]
    if not placed and sum(numbers) > n_input_dims:
        raise ValueError(
            f"config `{settings.name}.nested`: expected n_dims_to_encode of {n_input_dims} in sum "
            f"at most, got {sum(numbers)}"
        )
    spans, offset, left = [], 0, None if placed else n_input_dims - sum(numbers)
    for (config, name), number in zip(nested, numbers):
        if "n_dims_to_encode" not in config:
            if left is None:
                raise ValueError(
                    f"config `{name}.n_dims_to_encode`: expected a number, as "
                    + ("dims_to_encode_begin is used" if placed else "another one is left out")
                )
            number, left = left, None
        elif "dims_to_encode_begin" in config:
            offset = Settings(config, name).integer("dims_to_encode_begin", 0, 0)
        if offset + number > n_input_dims:
            raise ValueError(
                f"config `{name}`: expected dimensions below {n_input_dims}, got "
                f"{offset} to {offset + number - 1}"
            )
        if number > 0:
            rest = {k: v for k, v in config.items() if k != "dims_to_encode_begin"}
            spans.append((offset, number, rest | {"n_dims_to_encode": number}, name))
        offset += number
    if not spans:
        raise ValueError(f"config `{settings.name}.nested`: expected a dimension to encode, got 0")
    return spans


KINDS = {
    "Identity": Identity,
    "Empty": Empty,
    "Frequency": Frequency,
    "TriangleWave": TriangleWave,
    "OneBlob": OneBlob,
    "SphericalHarmonics": SphericalHarmonics,
    "Composite": Composite,
}
NRC = ("OneBlobFrequency", "NRC")  # Müller et al. 2021


def create_encoding(n_input_dims: int, config: Mapping, name: str = "encoding_config") -> InputPart:
    """The encoding that a config describes, not padded.

    Raises:
        TypeError, ValueError: a value's type or range is wrong; see Settings.
    """
    settings = Settings(config, name)
    otype = settings.choice("otype", "OneBlob", (*KINDS, *TYPE_OF, *NRC))
    if settings.has("n_dims_to_encode"):
        settings.only("n_dims_to_encode", n_input_dims, "n_input_dims")
    if otype in NRC:
        part = _create_nrc(n_input_dims, settings)
    elif otype in TYPE_OF:
        part = Grid(n_input_dims, settings, otype)
    else:
        part = KINDS[otype](n_input_dims, settings)
    settings.close()
    return part


def _create_nrc(n_input_dims: int, settings: Settings) -> InputPart:
    frequencies = settings.integer("n_frequencies", 12, 1, 64)
    bins = settings.integer("n_bins", 4)
    nested = [
        {"otype": "TriangleWave", "n_dims_to_encode": 3, "n_frequencies": frequencies},
        {"otype": "OneBlob", "n_dims_to_encode": 5, "n_bins": bins},
        {"otype": "Identity"},
    ]
    return create_encoding(n_input_dims, {"otype": "Composite", "nested": nested}, settings.name)
