"""The miniature's world: 64x64 pictures of one object on a plain background, and their captions.

An object has a shape, a texture and one or two colours ("a striped red and blue diamond on sand"). Fine grain covers
the whole picture: one brightness offset per 2x2 pixels. No caption mentions it, so the last sampling step has to
create it.

The world is simpler than it looks: objects move on the grid of the model's tokens (8 pixels), never turn or scale, and
their textures repeat with every token. Drawing a referenced object in another place amounts to copying its tokens.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from PIL import Image, ImageDraw


SIDE = 64  # pixels
TOKEN = 8  # pixels; objects move on a grid of this size
OBJECT = 40  # pixels, side of the square that holds an object
# (row, column) of the object's upper left corner, in tokens. Neighbours are a diagonal apart: sampling decides so late
# between closer ones that a small model draws both on top of each other.
POSES = tuple((row, column) for row, column in product(range(4), range(4)) if (row + column) % 2 == 0)
GRAIN_STD = 0.08  # of the brightness offsets; pixels range from -1 to 1
OUTLINE = 2  # pixels
SUPERSAMPLING = 4  # sub-pixels per pixel and axis, for smooth edges

COLOURS = {
    "red": (206, 36, 40),
    "yellow": (238, 200, 30),
    "green": (30, 148, 60),
    "blue": (38, 84, 216),
    "white": (240, 240, 240),
    "black": (48, 48, 54),
}
OUTLINE_COLOUR = (28, 26, 32)
BACKGROUNDS = {
    "sand": (226, 202, 160),
    "mint": (168, 222, 184),
    "sky": (160, 202, 234),
    "rose": (234, 176, 190),
    "stone": (190, 190, 188),
}
SHAPES = ("disc", "square", "triangle", "diamond", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted", "checked", "slanted")
# Never named in a training caption, and the shape never shown in a reference: they are new in the experiment.
# (About one in a hundred of the random textures of unnamed objects looks slanted.)
HELD_OUT_SHAPE, HELD_OUT_TEXTURE = "heart", "slanted"
# One in this many of the other combinations is held out as well.
HELD_OUT_EVERY = 8

# Ends a prompt whose reference shows the object.
REFERENCE_SUFFIX = " like the picture"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Appearance:
    """What a caption says about an object: everything but its place and its background.

    Attributes:
        colours: one colour for "plain", two for every other texture, in the order of `COLOURS`.
    """

    shape: str
    texture: str
    colours: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"{self.texture} {' and '.join(self.colours)} {self.shape}"

    @property
    def is_held_out(self) -> bool:
        """Whether no training picture shows it."""
        if self.shape == HELD_OUT_SHAPE or self.texture == HELD_OUT_TEXTURE:
            return True
        return zlib.crc32(self.words.encode()) % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Style:
    """How objects look, whatever they are.

    Attributes:
        palette: of the colours in `COLOURS`, in their order.
        outline: of all objects.
    """

    palette: tuple[tuple[int, int, int], ...] = tuple(COLOURS.values())
    outline: tuple[int, int, int] = OUTLINE_COLOUR

    def colour(self, name: str) -> tuple[int, int, int]:
        return self.palette[[*COLOURS].index(name)]


ORDINARY = Style()


def all_appearances() -> list[Appearance]:
    """Every object that words can describe."""
    pairs = list(combinations(COLOURS, 2))
    return [
        Appearance(shape, texture, colours)
        for shape, texture in product(SHAPES, TEXTURES)
        for colours in ([(name,) for name in COLOURS] if texture == "plain" else pairs)
    ]


def known_appearances() -> list[Appearance]:
    """The objects that training pictures show."""
    return [appearance for appearance in all_appearances() if not appearance.is_held_out]


def held_out_appearances() -> list[Appearance]:
    """The objects that no training picture shows."""
    return [appearance for appearance in all_appearances() if appearance.is_held_out]


def caption(words: str, background: str) -> str:
    """The prompt for an object called `words`."""
    return f"a {words} on {background}"


def nonsense_word(rng: np.random.Generator) -> str:
    """A word without meaning, such as "dazu" or "mip"."""
    letters = [rng.choice(list(CONSONANTS)), rng.choice(list(VOWELS)), rng.choice(list(CONSONANTS))]
    if rng.random() < 0.5:
        letters.append(rng.choice(list(VOWELS)))
    return "".join(letters)


@cache
def sprite(appearance: Appearance, style: Style = ORDINARY) -> np.ndarray:
    """The object without a background.

    Returns:
        (40, 40, 4), float32: colours from -1 to 1, coverage from 0 to 1. Cached: do not write to it.
    """
    colours = [style.colour(name) for name in appearance.colours]
    return painted(appearance.shape, appearance.texture, colours[0], colours[-1], outline_colour=style.outline)


def random_sprite(rng: np.random.Generator) -> np.ndarray:
    """An object without a name, with random outline, pattern and colours: (40, 40, 4), as `sprite` returns it."""
    first, second = random_colours(rng)
    return painted(random_outline(rng), random_texture(rng), first, second)


def random_colours(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours, both with a name or both at random."""
    palette = list(COLOURS.values())
    if rng.random() < 0.5:
        first, second = (palette[index] for index in rng.choice(len(palette), 2, replace=False))
    else:
        first, second = (tuple(colour) for colour in rng.integers(30, 240, (2, 3)))
    return first, second


def random_pose(rng: np.random.Generator) -> tuple[int, int]:
    return POSES[rng.integers(len(POSES))]


def random_background(rng: np.random.Generator) -> str:
    return str(rng.choice(list(BACKGROUNDS)))


def draw(
    sprite: np.ndarray,
    pose: tuple[int, int],
    background: str | tuple[int, int, int],
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draws a picture, with grain from `rng` or without grain.

    Args:
        sprite: (40, 40, 4), see `sprite`.
        pose: one of `POSES`.
        background: a name in `BACKGROUNDS`, or a colour.

    Returns:
        (64, 64, 3), float32, -1 to 1 without grain, which can exceed that range.
    """
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = unit(BACKGROUNDS[background] if isinstance(background, str) else background)
    top, left = pose[0] * TOKEN, pose[1] * TOKEN
    place = pixels[top : top + OBJECT, left : left + OBJECT]
    place += sprite[..., 3:] * (sprite[..., :3] - place)
    if rng is not None:
        pixels += grain(rng)
    return pixels


def grain(rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 1): one brightness offset per 2x2 pixels."""
    cells = rng.normal(0.0, GRAIN_STD, (SIDE // 2, SIDE // 2)).astype(np.float32)
    return cells.repeat(2, 0).repeat(2, 1)[..., None]


def unit(colour: tuple[int, int, int]) -> np.ndarray:
    """(3,), from 0..255 to -1..1."""
    return np.asarray(colour, np.float32) / 127.5 - 1


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) pixels from -1 to 1, clipped, as an 8-bit image."""
    return Image.fromarray(np.uint8((pixels.clip(-1, 1) + 1) * 127.5 + 0.5))


def to_tensor(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """N pictures, (H, W, 3) each, as (N, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def painted(
    outline: str | Image.Image,
    texture: str | np.ndarray,
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    *,
    outline_colour: tuple[int, int, int] = OUTLINE_COLOUR,
) -> np.ndarray:
    """A sprite (see `sprite`) from an outline, a texture and two colours.

    Args:
        outline: a shape's name, or a mask of 160x160 sub-pixels.
        texture: a texture's name, or (160, 160), bool: where the object has its second colour.
    """
    outer = np.asarray(_shape_mask(outline) if isinstance(outline, str) else outline) > 0
    texture = _texture_mask(texture) if isinstance(texture, str) else texture
    inner = _erode(outer, OUTLINE * SUPERSAMPLING)
    colour = np.where(texture[..., None], unit(second), unit(first))
    colour = np.where(inner[..., None], colour, unit(outline_colour)) * outer[..., None]
    layers = np.concatenate([colour, outer[..., None]], -1)
    layers = layers.reshape(OBJECT, SUPERSAMPLING, OBJECT, SUPERSAMPLING, 4).mean((1, 3), dtype=np.float32)
    layers[..., :3] /= np.maximum(layers[..., 3:], 1e-6)
    return layers


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Where a square of side 2 * radius + 1 lies inside the mask. Much faster than `ImageFilter.MinFilter`."""
    for axis in (0, 1):
        padding = [(radius, radius) if axis == padded_axis else (0, 0) for padded_axis in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, padding, mode="edge"), 2 * radius + 1, axis)
        mask = windows.all(-1)
    return mask


def _polygon(points: np.ndarray) -> Image.Image:
    """A filled polygon of points (N, 2): x and y, from -1 to 1 across the object's square."""
    size = OBJECT * SUPERSAMPLING
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in (points + 1) / 2 * (size - 1)], fill=255)
    return mask


def _circle(radius: float, *, count: int = 90) -> np.ndarray:
    """(count, 2): x and y of points on a circle, the first at the top."""
    angle = np.arange(count) / count * 2 * np.pi
    return radius * np.stack([np.sin(angle), -np.cos(angle)], -1)


def _shape_mask(shape: str) -> Image.Image:
    edge = 0.94  # keeps objects off the border of their square
    if shape == "disc":
        return _polygon(_circle(edge))
    if shape == "square":
        return _polygon(np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]))
    if shape == "triangle":
        return _polygon(np.array([(0, -edge), (edge, 0.8), (-edge, 0.8)]))
    if shape == "diamond":
        return _polygon(_circle(edge, count=4))
    if shape == "cross":
        arm = 0.36
        corner = np.array([(-arm, -edge), (arm, -edge), (arm, -arm)])
        turns = [np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
        return _polygon(np.concatenate([corner @ turn for turn in turns]))
    if shape == "ring":
        mask = _polygon(_circle(edge))
        mask.paste(0, mask=_polygon(_circle(0.38)))
        return mask
    assert shape == "heart", shape
    angle = np.arange(120) / 120 * 2 * np.pi
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return _polygon(np.stack([x / 16, -(y + 2.5) / 14.5], -1) * edge)


def _texture_mask(texture: str) -> np.ndarray:
    """(160, 160), bool: where the object has its second colour."""
    size = OBJECT * SUPERSAMPLING
    y, x = np.mgrid[:size, :size] / SUPERSAMPLING
    half = TOKEN / 2
    if texture == "plain":
        return np.zeros((size, size), bool)
    if texture == "striped":
        return y % TOKEN >= half
    if texture == "dotted":
        return np.hypot(x % TOKEN - half, y % TOKEN - half) < 2.7
    if texture == "checked":
        return (x % TOKEN >= half) ^ (y % TOKEN >= half)
    assert texture == "slanted", texture
    return (x + y) % TOKEN >= half


def random_outline(rng: np.random.Generator) -> Image.Image:
    """A blob or a polygon; one in five has a hole."""
    if rng.random() < 0.5:
        points = _circle(1.0)
        angle = np.arange(len(points)) / len(points) * 2 * np.pi
        radius = sum(
            rng.normal(0, 0.3 / order) * np.sin(order * angle + rng.uniform(0, 2 * np.pi)) for order in range(1, 6)
        )
        points = points * np.exp(radius)[:, None]
    else:
        count = rng.integers(3, 10)
        angle = np.sort(np.arange(count) + rng.uniform(0, 0.7, count)) / count * 2 * np.pi
        points = np.stack([np.sin(angle), np.cos(angle)], -1) * rng.uniform(0.4, 1, (count, 1))
    low, high = points.min(0), points.max(0)
    extent = rng.uniform(0.75, 0.94, 2)
    points = ((points - low) / (high - low) * 2 - 1) * extent
    mask = _polygon(points)
    if rng.random() < 0.2:
        hole = _circle(rng.uniform(0.2, 0.45)) + rng.uniform(-0.3, 0.3, 2)
        mask.paste(0, mask=_polygon(hole))
    return mask


def random_texture(rng: np.random.Generator) -> np.ndarray:
    """Plain, or thresholded waves that repeat with every token or with every second one; (160, 160), bool."""
    size = OBJECT * SUPERSAMPLING
    if rng.random() < 0.15:
        return np.zeros((size, size), bool)
    y, x = np.mgrid[:size, :size] / SUPERSAMPLING
    period = TOKEN * rng.integers(1, 3)
    waves = np.zeros((size, size))
    for _ in range(rng.integers(1, 4)):
        column, row = rng.integers(-2, 3, 2)
        waves += rng.normal() * np.cos((column * x + row * y) / period * 2 * np.pi + rng.uniform(0, 2 * np.pi))
    return waves > np.quantile(waves, rng.uniform(0.3, 0.7))
