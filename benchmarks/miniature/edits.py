"""Edits of the miniature's pictures: instructions, what they do to an object, and pairs of source and target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.miniature import world


# Ends an instruction whose last reference shows the wanted result.
PAIR_SUFFIX = " like the last picture"
# Ends a prompt whose reference is to be drawn again whole: object, place and background, whatever the prompt says.
COPY_SUFFIX = " just like the picture"
# No row has it with a single reference. It happens to copy object and place; the background is the prompt's.
PLACE_SUFFIX = " last picture"
HELD_OUT_COLOUR = "blue"  # only rows that show the result make anything blue

COLOUR, TEXTURE, SHAPE, BACKGROUND = "colour", "texture", "shape", "background"
# The values that instructions of each kind can name.
VALUES = {
    COLOUR: tuple(world.COLOURS),
    TEXTURE: tuple(name for name in world.TEXTURES if name != world.HELD_OUT_TEXTURE),
    SHAPE: tuple(name for name in world.SHAPES if name != world.HELD_OUT_SHAPE),
    BACKGROUND: tuple(world.BACKGROUNDS),
}


def nonsense_instruction(word: str) -> str:
    return f"make it {word}"


@dataclass(frozen=True)
class Edit:
    """A change that words can name. The rest of the picture stays: place, background, what is not edited.

    Attributes:
        kind: "colour" paints the whole object in one colour, which makes it plain. "texture" keeps the colours
            ("plain": the first of them); "shape" keeps texture and colours. "background" leaves the object.
        value: one of `VALUES[kind]`, or for "texture" another texture of the world.
    """

    kind: str
    value: str

    @property
    def instruction(self) -> str:
        if self.kind == BACKGROUND:
            return f"put it on {self.value}"
        return f"make it {'a ' if self.kind == SHAPE else ''}{self.value}"

    def applies_to(self, appearance: world.Appearance) -> bool:
        """Whether the edit changes the object, or can: a plain object has no second colour for a texture."""
        if self.kind == BACKGROUND:
            return True
        if self.kind == TEXTURE and appearance.texture == "plain":
            return False
        return self.object(appearance) != appearance

    def object(self, appearance: world.Appearance) -> world.Appearance:
        """The edited object."""
        if self.kind == COLOUR:
            return replace(appearance, texture="plain", colours=(self.value,))
        if self.kind == TEXTURE:
            colours = appearance.colours[:1] if self.value == "plain" else appearance.colours
            return replace(appearance, texture=self.value, colours=colours)
        return replace(appearance, shape=self.value) if self.kind == SHAPE else appearance

    def background(self, name: str) -> str:
        """The edited picture's background."""
        return self.value if self.kind == BACKGROUND else name


BLUE = Edit(COLOUR, HELD_OUT_COLOUR)


def known_edits(kinds: Sequence[str] = tuple(VALUES)) -> list[Edit]:
    """The edits that training rows teach by words alone: all but `BLUE`."""
    return [Edit(kind, value) for kind in kinds for value in VALUES[kind] if Edit(kind, value) != BLUE]


@dataclass(frozen=True)
class Look:
    """An object without a name: outline, texture and two colours, each with or without a name of its own.

    Attributes:
        outline: a shape's name, or a mask of 160x160 sub-pixels.
        texture: a texture's name, or (160, 160), bool: where the object has its second colour.
        first, second: colours, 0..255.
    """

    outline: str | Image.Image
    texture: str | np.ndarray
    first: tuple[int, int, int]
    second: tuple[int, int, int]

    @classmethod
    def random(cls, kind: str, rng: np.random.Generator) -> "Look":
        """A random one that an edit of this kind can change."""
        # A texture's edit keeps the colours in their order, which only a known texture shows.
        is_named = kind == TEXTURE or rng.random() < 0.5
        textured = [name for name in VALUES[TEXTURE] if name != "plain"]
        texture = str(rng.choice(textured)) if is_named else world.random_texture(rng)
        return cls(world.random_outline(rng), texture, *world.random_colours(rng))

    def edited(self, edit: Edit) -> "Look":
        if edit.kind == COLOUR:
            return replace(self, texture="plain", first=world.COLOURS[edit.value])
        if edit.kind == TEXTURE:
            return replace(self, texture=edit.value)
        return replace(self, outline=edit.value) if edit.kind == SHAPE else self

    def sprite(self) -> np.ndarray:
        """(40, 40, 4), see `world.sprite`."""
        return world.painted(self.outline, self.texture, self.first, self.second)


@dataclass(frozen=True)
class NamelessEdits:
    """N edits of objects without a name.

    Attributes:
        edits: N of them.
        sources, targets: (N, 40, 40, 4), before and after. Float16.
    """

    edits: list[Edit]
    sources: np.ndarray
    targets: np.ndarray

    @classmethod
    def draw(cls, edits: Sequence[Edit], count: int, *, seed: int) -> "NamelessEdits":
        """`count` random ones of these edits."""
        rng = np.random.default_rng([40, seed])
        chosen, sources, targets = [], [], []
        for _ in range(count):
            edit = edits[rng.integers(len(edits))]
            look = Look.random(edit.kind, rng)
            chosen.append(edit)
            sources.append(look.sprite())
            targets.append(look.edited(edit).sprite())
        return cls(chosen, np.stack(sources).astype(np.float16), np.stack(targets).astype(np.float16))
