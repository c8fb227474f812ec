"""The toybox's language: its colours, prompts, held-out pairs, and the check of a user's words."""

from __future__ import annotations

import difflib
import re

from .shapes import OBJECTS, RGB

COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.08, 0.08),
    "orange": (0.98, 0.48, 0.05),
    "yellow": (0.98, 0.88, 0.10),
    "lime": (0.55, 0.92, 0.15),
    "green": (0.05, 0.45, 0.12),
    "teal": (0.05, 0.66, 0.66),
    "blue": (0.10, 0.22, 0.85),
    "purple": (0.45, 0.12, 0.66),
    "pink": (0.98, 0.52, 0.74),
    "brown": (0.40, 0.22, 0.10),
    "white": (0.94, 0.94, 0.94),
    "black": (0.09, 0.09, 0.10),
}
CLAY: RGB = (0.62, 0.62, 0.62)  # textureless renderings: "a grey clay car"
VIEWS = ("front", "side", "back", "overhead")
TEMPLATES = (  # filled in by `caption`, which makes "a orange" an "an orange"
    "a {colour} {object}",
    "{colour} {object}",
    "the {colour} {object}",
    "a small {colour} {object}",
    "a toy {object} that is {colour}",
    "a photo of a {colour} {object}",
    "a {colour} toy {object}",
)
CLAY_TEMPLATE = "a grey clay {object}"
PLAIN_TEMPLATE = "a {object}"

_EXTRA_WORDS = (
    "a",
    "an",
    "the",
    "small",
    "toy",
    "that",
    "is",
    "photo",
    "of",
    "grey",
    "clay",
    "view",
    ",",
)
VOCABULARY: tuple[str, ...] = (*_EXTRA_WORDS, *VIEWS, *COLOURS, *OBJECTS)


def caption(template: str, name: str, colour: str = "") -> str:
    """A template filled in, with the article that English wants: "a red car", "an orange mug"."""
    text = template.format(colour=colour, object=name)
    return re.sub(r"\ba(?= [aeiou])", "an", text)


def prompt(colour: str, name: str) -> str:
    """The canonical prompt of a pair, e.g. "a red car"."""
    return caption(TEMPLATES[0], name, colour)


def clay_prompt(text: str) -> str:
    """The textureless picture of what `text` names, e.g. "a grey clay car"."""
    return caption(CLAY_TEMPLATE, parse(text)[1])


def with_view(text: str, view: str) -> str:
    """The paper's view-dependent prompt, e.g. "a red car, front view" (section 3.2)."""
    return f"{text}, {view} view"


def all_pairs() -> list[tuple[str, str]]:
    return [(c, o) for o in OBJECTS for c in COLOURS]


def is_held_out(colour: str, name: str) -> bool:
    """One pair in six is never shown to the prior: two colours of each object."""
    return (5 * list(OBJECTS).index(name) + list(COLOURS).index(colour)) % 6 == 0


def parse(text: str) -> tuple[str | None, str | None]:
    """The colour and the object that a prompt names (None where it names none)."""
    words = re.findall(r"[a-z]+", text.lower())
    colour = next((w for w in words if w in COLOURS), None)
    name = next((w for w in words if w in OBJECTS), None)
    return colour, name


def check_prompt(text: str) -> None:
    """Raise ValueError when the toybox cannot mean `text`: unknown words, or no object.

    The prior would otherwise draw something for an unknown token, silently.
    """
    words = re.findall(r"[^\s,]+", text.lower())
    unknown = [w for w in words if w not in VOCABULARY]
    if unknown:
        near = {w: difflib.get_close_matches(w, VOCABULARY, n=1, cutoff=0.6) for w in unknown}
        hints = ", ".join(
            f"`{w}`" + (f" (did you mean `{m[0]}`?)" if m else "") for w, m in near.items()
        )
        raise ValueError(
            f"argument `prompt`: the toybox does not know {hints}; it knows the "
            f"objects {', '.join(OBJECTS)} and the colours {', '.join(COLOURS)}"
        )
    if parse(text)[1] is None:
        raise ValueError(
            f"argument `prompt`: expected one of the toybox's objects "
            f"({', '.join(OBJECTS)}), got {text!r}"
        )
