"""What is compared, drawn and found out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


Kind = Literal["person", "pet", "object", "style", "edit"]  # of what was taught
# What a prompt asks for: the subject that was taught; something that has nothing to do with it; what is most like it,
# without its word ("a corgi"); another made-up word in its word's place.
Role = Literal["concept", "unrelated", "neighbour", "other_word"]
ROLES: tuple[Role, ...] = ("concept", "unrelated", "neighbour", "other_word")
BASE = "base"


@dataclass(frozen=True)
class Prompt:
    """A prompt that every contender draws.

    Attributes:
        text: what the pipeline reads.
        plain: the same in words that a feature model knows, without a trigger word, by which prompt following is
            measured.
        role: what it asks for.
        image: index into the pictures to edit, for an editor; None to draw from the text alone.
    """

    text: str
    plain: str
    role: Role
    image: int | None = None


@dataclass(frozen=True)
class LoRA:
    """A LoRA as the user names it.

    Attributes:
        name: unique, for tables, plots and folders.
        path: its safetensors file.
        digest: SHA-256 of the file, in hex.
    """

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Contender:
    """The base model with LoRAs at one strength; without LoRAs, the base.

    Attributes:
        loras: none, one, or two together.
        strength: of each of them.
    """

    loras: tuple[LoRA, ...] = ()
    strength: float = 1.0

    @property
    def name(self) -> str:
        """Such as "corgi", "corgi x0.5" or "corgi + style"."""
        names = " + ".join(lora.name for lora in self.loras) or BASE
        return names if self.strength == 1.0 else f"{names} x{self.strength:g}"


# Contender -> prompt -> the files of its pictures, one per seed. Every contender has the roles that it was drawn for.
Drawn = dict[Contender, dict[Prompt, list[Path]]]


@dataclass(frozen=True)
class Figure:
    """A measured quantity.

    Attributes:
        mean: over all pictures.
        over_prompts, over_seeds: standard deviation of the means of prompts, and of seeds; None with a single one.
        count: pictures, or pairs of pictures, that it is the mean of.
    """

    mean: float
    over_prompts: float | None
    over_seeds: float | None
    count: int


@dataclass(frozen=True)
class Column:
    """A quantity in the tables.

    Attributes:
        key: in results.json and the CSV file, such as "likeness/dino".
        label: its heading.
        is_better: which direction is good; None if neither is.
        meaning: one or two sentences: what it is, and when it misleads.
        model: the feature model that it depends on; None for none. A column has figures of one model only.
    """

    key: str
    label: str
    is_better: Literal["higher", "lower", None]
    meaning: str
    model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    Attributes:
        settings: of the comparison, for the page and the JSON file.
        prompts: that were drawn.
        columns: in their order.
        figures: contender's name -> column's key -> figure. A figure that cannot be measured is left out.
        reference: column's key -> the figure of the training pictures among themselves, where there is one.
        notes: sentences for the reader, such as "3 training pictures are few".
    """

    settings: dict
    prompts: list[Prompt]
    columns: list[Column]
    figures: dict[str, dict[str, Figure]]
    reference: dict[str, Figure]
    notes: list[str]
