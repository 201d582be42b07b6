"""comparison.html: one page with the pictures, the figures and what they mean. It loads nothing and runs nothing.

The sheets are also files in a folder beside the page, where they are not compressed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from ..inlining import Picture, Tab, figure, inlined, radio_tabs
from ..markup import Markup, document, element, folded, from_user, section, table
from ..model_card import PACKAGES, formatted, public_name
from ..output import naming_file, replacing
from ..sheets import SCREEN_PIXELS, Cell, contact_sheet, default_cell_pixels, fit, save_png
from .columns import COPIES, DETAIL, FOLLOWING, GROUPS, LIKENESS, MASKED, RETENTION, SHARPNESS, quantity_of
from .comparison import BASE, ROLES, Column, Comparison, Contender, Drawn, Figure, Prompt, Role
from .plot import PLOT_FILE, plot_likeness
from .results import ARROWS, CSV_FILE, REFERENCE, RESULTS_FILE, shown


PAGE_FILE, SHEETS_DIR = "comparison.html", "sheets"
MAX_PICTURE_BYTES = 24_000_000  # on the page, before base64
MAX_TRAINING_PICTURES, MAX_SHOWN_SEEDS, MAX_STRENGTH_PROMPTS = 8, 4, 4
MAX_SHOWN_PROMPTS = 40  # on a sheet, which could not be scrolled through, nor be a JPEG, with many more
TRAINING_CELL, SMALLEST_CELL = 160, 128  # pixels
SPACED_CELL = 1.1  # a cell with the gap to the next one, and a part of the margins
ROLE_TITLES: dict[Role, str] = {
    "concept": "Prompts for the subject",
    "unrelated": "Unrelated prompts",
    "neighbour": "Neighbours: the class without the trigger word",
    "other_word": "Other made-up words in the trigger word's place",
}
AT_STRENGTHS = (LIKENESS, f"{LIKENESS}_{MASKED}", COPIES, FOLLOWING, SHARPNESS, DETAIL, RETENTION)
HIDDEN = {"cache_dir", "output_dir"}
PATHS = {"instance_data_dir", "prompts", "validation_image", "lora", "together_with"}
PAGE_STYLE = """
td small, th small { display: block; color: var(--faint); font-weight: normal; }
dl { max-width: 60rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
.figures :is(td, th):first-child { text-align: left; }
.figures :is(th, td:first-child) { white-space: normal; vertical-align: bottom; max-width: 12rem; min-width: 6rem; }
.figures td:first-child { vertical-align: top; min-width: 7rem; }
"""


@dataclass(frozen=True)
class Sheet:
    """A sheet of drawings.

    Attributes:
        name: of its file, without the ending.
        label: on its tab.
        alt: what it shows.
    """

    name: str
    label: str
    alt: str
    image: Image.Image


def write_page(
    folder: Path,
    comparison: Comparison,
    drawn: Drawn,
    training: Sequence[Image.Image],
    to_edit: Sequence[Image.Image] = (),
) -> Path:
    """Writes the sheets, the plot and comparison.html.

    Args:
        training, to_edit: as they were measured.

    Raises:
        OutputError: a file cannot be written.
    """
    page = Page(folder, comparison, drawn, training, to_edit)
    path = folder / PAGE_FILE
    text = page.text()
    with naming_file(path), replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


class Page:
    """See `write_page`."""

    def __init__(
        self,
        folder: Path,
        comparison: Comparison,
        drawn: Drawn,
        training: Sequence[Image.Image],
        to_edit: Sequence[Image.Image],
    ):
        self.folder, self.comparison, self.drawn = folder, comparison, drawn
        self.training, self.to_edit = training, to_edit
        self.room = MAX_PICTURE_BYTES
        self.left_out: list[str] = []

    def text(self) -> str:
        parts = [
            self.header(),
            section("Likeness against retention", *self.plot()),
            *self.role_sections(["concept"], MAX_SHOWN_SEEDS),
            *figure_sections(self.comparison, self.full_strength()),
            self.strengths(),
            *self.role_sections(ROLES[1:], 1),
            self.prompts(),
            self.settings(),
            section("Versions", table([(name, version(name)) for name in PACKAGES])),
        ]
        if self.left_out:
            note = f"Not on this page, which would be too large: {', '.join(self.left_out)}."
            parts.append(element("p", note, class_="faint"))
        return document(f"{self.folder.resolve().name}: LoRAs compared", *parts, style=PAGE_STYLE)

    # Parts

    def header(self) -> Markup:
        settings = self.comparison.settings
        base_model = public_name(str(settings.get("pretrained_model_name_or_path", "the base model")))
        steps = settings.get("num_inference_steps")
        facts = [f"base model {base_model}", f"{len(self.comparison.prompts)} prompts"]
        facts += [f"{settings['num_seeds']} seeds each"] if "num_seeds" in settings else []
        facts += [f"{steps} steps"] if steps else []
        is_one = len(self.full_strength()) == 2
        return element(
            "header",
            from_user("h1", self.folder.resolve().name),
            element("p", f"{'A LoRA' if is_one else 'LoRAs'} and the base model, on the same prompts and noise."),
            element("p", " · ".join(facts)),
            *(from_user("p", note) for note in self.comparison.notes),
            *self.training_sheet(),
            element(
                "p",
                f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. All figures are in {RESULTS_FILE} and "
                f"{CSV_FILE} beside this page, all pictures in full size in the folders beside it.",
                class_="faint",
            ),
        )

    def full_strength(self) -> list[str]:
        """The names of the contenders at strength 1, the base first."""
        return [contender.name for contender in self.contenders()]

    def contenders(self) -> list[Contender]:
        return [contender for contender in self.drawn if contender.strength == 1]

    def training_sheet(self) -> Iterator[Markup]:
        if not self.training:
            return
        some = [Cell(image) for image in self.training[:MAX_TRAINING_PICTURES]]
        rest = len(self.training) - len(some)
        title = "Training pictures" + (f" (and {rest} others)" if rest else "")
        image = contact_sheet(title, [""] * len(some), [("", some)], cell_pixels=TRAINING_CELL)
        if (picture := self.saved(Sheet("training", "", title, image))) is not None:
            yield figure(picture, title)

    def plot(self) -> Iterator[Markup]:
        path = self.folder / SHEETS_DIR / PLOT_FILE
        with naming_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_drawn = plot_likeness(self.comparison, list(self.drawn), path)
        if not is_drawn:
            yield element("p", "Nothing to plot: it needs prompts for the subject and unrelated ones.")
        elif (picture := self.inlined(path)) is not None:
            yield element(
                "p",
                "A good LoRA is at the upper right: it draws the subject and leaves everything else as it was. The "
                "base is at the top by definition. The dashed line is how alike the training pictures are: a LoRA "
                "that reaches it draws the subject, and being further to the right is no merit. Bars are the spread "
                "over seeds; a line joins the strengths of a LoRA.",
            )
            yield figure(picture, "likeness against retention of every LoRA")

    def strengths(self) -> Markup | None:
        names = {contender.name: contender for contender in self.drawn if len(contender.loras) == 1}
        if all(contender.strength == 1 for contender in names.values()):
            return None
        columns = [column for column in self.comparison.columns if quantity_of(column) in AT_STRENGTHS]
        place = {lora: number for number, lora in enumerate(dict.fromkeys(one.loras for one in names.values()))}
        order = sorted(names, key=lambda name: (place[names[name].loras], names[name].strength))
        return section(
            "Strengths",
            element(
                "p",
                "A LoRA that needs less or more than 1 was trained too long or too short, or for another scale. At a "
                "strength that is too high, retention drops first.",
            ),
            figure_table(self.comparison, columns, [BASE, *order]),
            *self.tabs("strengths", self.strength_sheets()),
        )

    def prompts(self) -> Markup:
        parts = []
        for role in ROLES:
            found = [prompt for prompt in self.comparison.prompts if prompt.role == role]
            if found:
                parts.append(element("h3", ROLE_TITLES[role]))
                parts.append(element("ol", *(from_user("li", described(prompt)) for prompt in found)))
        return section("Prompts", folded("All prompts", *parts))

    def settings(self) -> Markup:
        rows = [
            (f"--{name}", formatted(public(name, value)))
            for name, value in self.comparison.settings.items()
            if name not in HIDDEN and value not in (None, False, [])
        ]
        return section("Settings", folded("All settings", table(rows, class_="settings")))

    def role_sections(self, roles: Sequence[Role], max_seeds: int) -> Iterator[Markup]:
        for role in roles:
            if any(prompt.role == role for prompt in self.comparison.prompts):
                yield section(ROLE_TITLES[role], *self.tabs(role, self.role_sheets(role, max_seeds)))

    # Sheets

    def role_sheets(self, role: Role, max_seeds: int) -> Iterator[Sheet]:
        """A sheet per seed: a row per prompt, a column per contender at full strength, the base first."""
        contenders = [
            contender
            for contender in self.contenders()
            if any(prompt.role == role for prompt in self.drawn[contender])
        ]
        prompts = [prompt for prompt in self.comparison.prompts if prompt.role == role]
        some = prompts[:MAX_SHOWN_PROMPTS]
        part = f", the first {len(some)} of {len(prompts)}" if len(some) < len(prompts) else ""
        num_seeds = min(max_seeds, *(len(self.drawn[Contender()][prompt]) for prompt in some))
        for number in range(num_seeds):
            seed = self.comparison.settings.get("seed", 0) + number
            title = f"{ROLE_TITLES[role]}{part}, seed {seed}"
            yield self.sheet(f"{role}-seed{seed}", f"seed {seed}", title, contenders, some, number)

    def strength_sheets(self) -> Iterator[Sheet]:
        """A sheet per LoRA: a column per strength, the base first."""
        prompts = [prompt for prompt in self.comparison.prompts if prompt.role == "concept"][:MAX_STRENGTH_PROMPTS]
        loras = dict.fromkeys(contender.loras for contender in self.drawn if len(contender.loras) == 1)
        for number, lora in enumerate(loras):
            contenders = sorted(
                (contender for contender in self.drawn if contender.loras == lora), key=lambda one: one.strength
            )
            if prompts and len(contenders) > 1:
                name = lora[0].name
                yield self.sheet(
                    f"strengths-{number}", name, f"Strengths: {name}", [Contender(), *contenders], prompts
                )

    def sheet(
        self, name: str, label: str, title: str, contenders: list[Contender], prompts: list[Prompt], seed: int = 0
    ) -> Sheet:
        """A row per prompt; for an editor, the picture to edit comes first.

        Args:
            name, label: see `Sheet`.
            seed: index of the picture of each prompt.
        """
        is_editing = all(prompt.image is not None for prompt in prompts)
        columns = [*(["to edit"] if is_editing else []), *(contender.name for contender in contenders)]
        side = fitting_cells(len(columns))
        rows = []
        for prompt in prompts:
            cells = [Cell(self.to_edit[prompt.image])] if is_editing else []
            for contender in contenders:
                files = self.drawn[contender].get(prompt)
                cells.append(Cell(cell_sized(files[seed], side) if files else None))
            rows.append((prompt.text, cells))
        return Sheet(name, label, title, contact_sheet(title, columns, rows, cell_pixels=side))

    def tabs(self, name: str, sheets: Iterator[Sheet]) -> list[Markup]:
        found = [(sheet, self.saved(sheet)) for sheet in sheets]
        tabs = [Tab(str(n), sheet.label, sheet.alt, picture) for n, (sheet, picture) in enumerate(found) if picture]
        return [figure(tabs[0].picture, tabs[0].alt) if len(tabs) == 1 else radio_tabs(name, tabs)] if tabs else []

    def saved(self, sheet: Sheet) -> Picture | None:
        """Writes the sheet and reads it for the page."""
        path = self.folder / SHEETS_DIR / f"{sheet.name}.png"
        with naming_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(sheet.image, path)
        return self.inlined(path)

    def inlined(self, path: Path) -> Picture | None:
        """The picture in that file; None if there is no room for it, which the page says."""
        picture = inlined(path)
        if picture is not None and picture.num_bytes > self.room:
            self.left_out.append(f"{SHEETS_DIR}/{path.name}")
            return None
        self.room -= 0 if picture is None else picture.num_bytes
        return picture


def cell_sized(path: Path, side: int) -> Image.Image:
    """The picture in the size of a cell: a sheet of many needs neither open files nor much memory."""
    with Image.open(path) as image:
        return fit(image, side)


def fitting_cells(num_columns: int) -> int:
    """Side of the cells, in pixels, so that as many columns as possible are beside each other."""
    fitting = int(SCREEN_PIXELS / (num_columns * SPACED_CELL))
    return max(SMALLEST_CELL, min(default_cell_pixels(num_columns), fitting))


# Tables


def figure_sections(comparison: Comparison, names: Sequence[str]) -> Iterator[Markup]:
    """The tables of all figures, each with what its columns mean.

    Args:
        names: of the contenders.
    """
    for number, (title, quantities) in enumerate(GROUPS.items()):
        columns = [column for column in comparison.columns if quantity_of(column) in quantities]
        if not columns:
            continue
        note = (
            "↑ higher is better, ↓ lower is. Below a mean is its spread: the standard deviation of the means of "
            "single prompts, and of single seeds. A difference between two LoRAs that is smaller than the spread over "
            "seeds may be chance."
        )
        yield section(
            title,
            element("p", note, class_="faint") if number == 0 else None,
            figure_table(comparison, columns, names),
            meanings(columns),
        )


def figure_table(comparison: Comparison, columns: Sequence[Column], names: Sequence[str]) -> Markup:
    header = element(
        "tr",
        element("th", "", scope="col"),
        *(
            element(
                "th",
                column.label + ARROWS[column.is_better].replace(" ", "\u00a0"),
                element("small", column.model) if column.model else None,
                scope="col",
            )
            for column in columns
        ),
    )
    rows = [
        element(
            "tr",
            from_user("td", name),
            *(figure_cell(column, comparison.figures[name].get(column.key)) for column in columns),
        )
        for name in names
    ]
    if any(column.key in comparison.reference for column in columns):
        cells = (figure_cell(column, comparison.reference.get(column.key), "pictures") for column in columns)
        rows.append(element("tr", element("td", f"{REFERENCE} among themselves", class_="faint"), *cells))
    return element("div", element("table", header, *rows, class_="numbers figures"), class_="wide")


def figure_cell(column: Column, measured: Figure | None, unit: str = "prompts") -> Markup:
    """The mean with its spreads.

    Args:
        unit: what `Figure.over_prompts` is the spread over.
    """
    if measured is None:
        return element("td")
    spreads = [
        f"±{shown(column, Figure(value, None, None, 0)).removeprefix('+')} {over}"
        for value, over in ((measured.over_prompts, unit), (measured.over_seeds, "seeds"))
        if value is not None
    ]
    return element("td", shown(column, measured), *(element("small", text) for text in spreads))


def meanings(columns: Sequence[Column]) -> Markup:
    """What the columns mean, once for those that differ by the feature model only."""
    by_meaning = {column.meaning: re.sub(r" \([A-Z]+\)$", "", column.label) for column in columns}
    parts = []
    for meaning, label in by_meaning.items():
        parts += [element("dt", label), element("dd", meaning)]
    return element("dl", *parts)


# Text


def described(prompt: Prompt) -> str:
    plain = "" if prompt.plain == prompt.text else f" (in plain words: {prompt.plain})"
    return prompt.text + plain


def public(name: str, value: Any) -> Any:
    """A setting's value without the folders of this machine."""
    if isinstance(value, (list, tuple)):
        return [public(name, one) for one in value]
    if name in PATHS:
        given, _, path = str(value).rpartition("=")
        return f"{given}={public_name(path)}" if given else public_name(str(value))
    return public_name(value) if isinstance(value, str) and name.endswith(("_model", "_or_path")) else value
