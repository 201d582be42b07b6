"""The miniature's world: 64x64 pictures of one object on a plain background, and their captions. Knows no model.

An object has a shape, a texture and one or two colours ("a striped red and blue diamond on sand"). Fine grain lies
over everything: one brightness offset per 2x2 pixels, which no caption tells and the last sampling step must create.

A simplification to know of: objects move on the grid of the models' tokens (8 pixels), neither turn nor scale, and
textures repeat every token. To draw a referenced object elsewhere is therefore to copy tokens by an offset.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


SIDE = 64  # pixels
TOKEN = 8  # pixels: the grid on which objects move
OBJECT = 40  # pixels: side of the square that holds an object
# (row, column) of the object's upper left corner, in tokens. Neighbours are a diagonal apart: nearer places are told
# apart so late in sampling that a small model lays two of them over each other.
POSES = tuple((row, column) for row, column in product(range(4), range(4)) if (row + column) % 2 == 0)
GRAIN_STD = 0.08  # of the brightness offsets; pixels run from -1 to 1
OUTLINE = 2  # pixels
SUPERSAMPLING = 4  # sub-pixels a pixel and side, for smooth edges

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
# No training caption names these and no reference shows the shape: a new object and a new texture for the experiment.
# (About one in a hundred of the nameless objects' random textures comes out slanted.)
HELD_OUT_SHAPE, HELD_OUT_TEXTURE = "heart", "slanted"
# One in so many of the other combinations is held out as well.
HELD_OUT_SHARE = 8

# What a prompt may end with where a reference shows the object.
REFERENCE_SUFFIX = " like the picture"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Appearance:
    """What a caption tells of an object: all but its place and its background.

    Attributes:
        colours: one for "plain"; two, in the order of `COLOURS`, for every other texture.
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
        return zlib.crc32(self.words.encode()) % HELD_OUT_SHARE == 0


def all_appearances() -> list[Appearance]:
    """Every object that words can describe."""
    pairs = list(combinations(COLOURS, 2))
    return [
        Appearance(shape, texture, colours)
        for shape, texture in product(SHAPES, TEXTURES)
        for colours in ([(name,) for name in COLOURS] if texture == "plain" else pairs)
    ]


def caption(words: str, background: str) -> str:
    """The prompt for an object called `words`."""
    return f"a {words} on {background}"


def nonsense_word(random: np.random.Generator) -> str:
    """A word without meaning, such as "dazu" or "mip"."""
    letters = [random.choice(list(CONSONANTS)), random.choice(list(VOWELS)), random.choice(list(CONSONANTS))]
    if random.random() < 0.5:
        letters.append(random.choice(list(VOWELS)))
    return "".join(letters)


@cache
def sprite(appearance: Appearance) -> np.ndarray:
    """The object alone: (40, 40, 4), float32, colours -1 to 1 and coverage 0 to 1. Read only."""
    colours = [COLOURS[name] for name in appearance.colours]
    return _paint(_shape_mask(appearance.shape), _texture_mask(appearance.texture), colours[0], colours[-1])


def random_sprite(random: np.random.Generator) -> np.ndarray:
    """An object without a name: random outline, pattern and colours; (40, 40, 4) as `sprite` gives it."""
    palette = list(COLOURS.values())
    if random.random() < 0.5:
        first, second = (palette[index] for index in random.choice(len(palette), 2, replace=False))
    else:
        first, second = (tuple(color) for color in random.integers(30, 240, (2, 3)))
    return _paint(_random_mask(random), _random_texture(random), first, second)


def draw(
    sprite: np.ndarray, pose: tuple[int, int], background: str, random: np.random.Generator | None = None
) -> np.ndarray:
    """A picture: (64, 64, 3), float32, -1 to 1. With `random` it has grain, without it none."""
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = unit(BACKGROUNDS[background])
    top, left = pose[0] * TOKEN, pose[1] * TOKEN
    place = pixels[top : top + OBJECT, left : left + OBJECT]
    place += sprite[..., 3:] * (sprite[..., :3] - place)
    if random is not None:
        pixels += grain(random)
    return pixels


def grain(random: np.random.Generator) -> np.ndarray:
    """(64, 64, 1): one brightness offset per 2x2 pixels."""
    cells = random.normal(0.0, GRAIN_STD, (SIDE // 2, SIDE // 2)).astype(np.float32)
    return cells.repeat(2, 0).repeat(2, 1)[..., None]


def unit(color: tuple[int, int, int]) -> np.ndarray:
    """(3,), 0..255 to -1..1."""
    return np.asarray(color, np.float32) / 127.5 - 1


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8((pixels.clip(-1, 1) + 1) * 127.5 + 0.5))


def _paint(
    mask: Image.Image, texture: np.ndarray, first: tuple[int, int, int], second: tuple[int, int, int]
) -> np.ndarray:
    """Sprite of a mask (160x160 sub-pixels), a texture (same size, True: second colour) and two colours."""
    inner = np.asarray(mask.filter(ImageFilter.MinFilter(2 * OUTLINE * SUPERSAMPLING + 1))) > 0
    outer = np.asarray(mask) > 0
    color = np.where(texture[..., None], unit(second), unit(first))
    color = np.where(inner[..., None], color, unit(OUTLINE_COLOUR)) * outer[..., None]
    layers = np.concatenate([color, outer[..., None]], -1)
    layers = layers.reshape(OBJECT, SUPERSAMPLING, OBJECT, SUPERSAMPLING, 4).mean((1, 3), dtype=np.float32)
    layers[..., :3] /= np.maximum(layers[..., 3:], 1e-6)
    return layers


def _polygon(points: np.ndarray) -> Image.Image:
    """A filled polygon of points (N, 2) as (x, y), -1 to 1 across the object's square."""
    size = OBJECT * SUPERSAMPLING
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in (points + 1) / 2 * (size - 1)], fill=255)
    return mask


def _circle(radius: float, *, count: int = 90, phase: float = 0.0) -> np.ndarray:
    angle = np.arange(count) / count * 2 * np.pi + phase
    return radius * np.stack([np.sin(angle), -np.cos(angle)], -1)


def _shape_mask(shape: str) -> Image.Image:
    edge = 0.94  # an object stays clear of its square's border
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
    angle = np.arange(120) / 120 * 2 * np.pi  # heart
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return _polygon(np.stack([x / 16, -(y + 2.5) / 14.5], -1) * edge)


def _texture_mask(texture: str) -> np.ndarray:
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
    return (x + y) % TOKEN >= half  # slanted


def _random_mask(random: np.random.Generator) -> Image.Image:
    """A blob or a polygon, one in five with a hole."""
    if random.random() < 0.5:
        points = _circle(1.0)
        angle = np.arange(len(points)) / len(points) * 2 * np.pi
        radius = sum(
            random.normal(0, 0.3 / order) * np.sin(order * angle + random.uniform(0, 2 * np.pi))
            for order in range(1, 6)
        )
        points = points * np.exp(radius)[:, None]
    else:
        count = random.integers(3, 10)
        angle = np.sort(np.arange(count) + random.uniform(0, 0.7, count)) / count * 2 * np.pi
        points = np.stack([np.sin(angle), np.cos(angle)], -1) * random.uniform(0.4, 1, (count, 1))
    low, high = points.min(0), points.max(0)
    extent = random.uniform(0.75, 0.94, 2)
    points = ((points - low) / (high - low) * 2 - 1) * extent
    mask = _polygon(points)
    if random.random() < 0.2:
        hole = _circle(random.uniform(0.2, 0.45)) + random.uniform(-0.3, 0.3, 2)
        mask.paste(0, mask=_polygon(hole))
    return mask


def _random_texture(random: np.random.Generator) -> np.ndarray:
    """Plain, or waves above a threshold that repeat every token, or every second."""
    size = OBJECT * SUPERSAMPLING
    if random.random() < 0.15:
        return np.zeros((size, size), bool)
    y, x = np.mgrid[:size, :size] / SUPERSAMPLING
    period = TOKEN * random.integers(1, 3)
    waves = np.zeros((size, size))
    for _ in range(random.integers(1, 4)):
        column, row = random.integers(-2, 3, 2)
        waves += random.normal() * np.cos((column * x + row * y) / period * 2 * np.pi + random.uniform(0, 2 * np.pi))
    return waves > np.quantile(waves, random.uniform(0.3, 0.7))
