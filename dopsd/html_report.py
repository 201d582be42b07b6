"""report.html: one page that shows a run, while it is in progress and when it has ended.

It is made of what is in the output folder, the sheets and metrics.jsonl, so the page of a resumed run shows what came
before. It loads nothing and runs nothing, and its Content-Security-Policy says so.

Pictures are inlined. All together have at most `MAX_PICTURE_BYTES`, plus a third for base64. The oldest validations,
if there is no room for them, are only named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

from accelerate.logging import get_logger

from .command_line import build_parser, resolve
from .data.training_data import TrainingData
from .errors import InputError
from .evaluation.after_training import EVALUATION_DIR
from .evaluation.comparison import Comparison
from .evaluation.page import PAGE_FILE, meanings
from .evaluation.results import headings as figure_headings
from .evaluation.results import main_columns
from .evaluation.results import table_rows as figure_rows
from .exam.figures import MEASURES
from .exam.results import Exam
from .exam.student import PROGRESS, SHARPNESS, ZOOM
from .exam.table import NOTE, headings, table_rows
from .exam.verdict import findings
from .history import read_history
from .inlining import Picture, Tab, figure, inlined, radio_tabs
from .markup import Markup, document, element, folded, from_user, prompt_list, section, table
from .model import Model
from .model_card import PACKAGES, CardImage, formatted, noun, public_name, shown_settings, usage
from .output import (
    LORA_FILE,
    MODEL_INDEX,
    TRANSFORMER_DIR,
    list_checkpoints,
    naming_file,
    numbered_sheets,
    replacing,
)
from .settings import Settings
from .sheets import RETENTION_CURVES, plot_curves


logger = get_logger(__name__)

REPORT_FILE, CURVES_FILE = "report.html", "curves.png"
MAX_PICTURE_BYTES = 22_000_000  # about twenty validations of two prompts
# Key in the history -> label, format.
STUDENT_FIGURES = {
    PROGRESS: ("progress", "{:.0f} %"),
    **{f"{PROGRESS}/{name}": (label, "{:.0f} %") for name, label in MEASURES.items()},
    SHARPNESS: ("sharpness over the base's", "{:.2f}"),
    ZOOM: ("zoom", "x{:.2f}"),
}
PACE_STEPS = 100  # the time per step is the median of this many

State = Literal["in progress", "finished", "stopped", "preview only"]


# Pictures


class SheetReader:
    """Reads the sheets in a folder. Each is encoded once, since that takes most of the time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, tuple[int, Picture | None]] = {}  # name -> when it was written, and the sheet

    def __call__(self, name: str) -> Picture | None:
        path = self.folder / name
        try:
            written = path.stat().st_mtime_ns
        except OSError:
            return None
        if name not in self.known or self.known[name][0] != written:
            self.known[name] = written, inlined(path)
        return self.known[name][1]


@dataclass(frozen=True)
class Sheets:
    """The sheets of a page, newest first.

    Attributes:
        validations, lessons, retentions: (step, sheet).
        left_out: steps of older validations, for which the page has no room.
    """

    preview: Picture | None
    curves: Picture | None
    rollout: Picture | None
    validations: list[tuple[int, Picture]]
    lessons: list[tuple[int, Picture]]
    retentions: list[tuple[int, Picture]]
    left_out: list[int]


def choose_sheets(read: Callable[[str], Picture | None], steps: list[int]) -> Sheets:
    """Those that fit on a page.

    Args:
        read: the sheet of that name; None if there is none.
        steps: after which the run was validated, newest first.
    """
    single = [read("preview.png"), read(CURVES_FILE), read(f"rollout-{steps[0]}.png") if steps else None]
    room = MAX_PICTURE_BYTES - sum(picture.num_bytes for picture in single if picture)
    chosen = {"validation": [], "lessons": [], "retention": []}
    left_out = []
    for position, step in enumerate(steps):
        found = {kind: picture for kind in chosen if (picture := read(f"{kind}-{step}.png"))}
        room -= sum(picture.num_bytes for picture in found.values())
        if room < 0 and position > 0:
            left_out = steps[position:]
            break
        for kind, picture in found.items():
            chosen[kind].append((step, picture))
    return Sheets(*single, *chosen.values(), left_out)


def tabs(name: str, sheets: list[tuple[int, Picture]], describe: Callable[[int], str]) -> Markup:
    """One sheet at a time, the newest first."""
    return radio_tabs(
        name, [Tab(str(step), describe(step), f"{name} after step {step}", picture) for step, picture in sheets]
    )


# The page


def duration(seconds: float) -> str:
    """A time of two units at most, such as "2 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def own_settings(settings: Settings, model: Model) -> set[str]:
    """The flags whose values are not their defaults, and those whose default the run has chosen, such as --seed."""
    parser, values = build_parser(model, ""), settings.flat()

    def is_default(name: str) -> bool:
        default = parser.get_default(name)
        if values[name] == default:
            return True
        try:
            return resolve(settings.replace(**{name: default}), model).flat()[name] == values[name]
        except InputError:  # the run needs another value than the default
            return False

    return {name for name in values if not is_default(name)}


class RunReport:
    """Writes a run's curves.png and report.html.

    Args:
        settings: resolved.
        data: what it is trained on.
    """

    def __init__(self, settings: Settings, model: Model, data: TrainingData):
        self.settings, self.model = settings, model
        self.folder = Path(settings.training.output_dir)
        self.read_sheet = SheetReader(self.folder)
        self.exam: Exam | None = None  # set when it has been taken
        self.refusal: str | None = None  # why the exam has stopped the run
        self.comparison: Comparison | None = None  # set when --evaluate has succeeded
        self.num_pictures, self.num_captions = sum(map(bool, data.digests)), len(data.pictures)
        self.editing_requests = data.editing_requests

    def write_curves(self) -> None:
        """Plots what is logged so far, if there is anything. Raises `OutputError` if curves.png cannot be written."""
        history, path = read_history(self.folder), self.folder / CURVES_FILE
        if not history:
            return
        with naming_file(path):
            plot_curves(history, path, title=self.folder.name)

    def write_page(self, step: int, state: State) -> None:
        """Raises `OutputError` if report.html cannot be written."""
        page, path = self.page(read_history(self.folder), step, state), self.folder / REPORT_FILE
        with naming_file(path), replacing(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        logger.info(f"Wrote {path}")

    def page(self, history: list[dict], step: int, state: State) -> str:
        """The HTML.

        Args:
            history: the rows of metrics.jsonl, as a resumed run keeps them: without what came after its checkpoint.
        """
        retention = {row["step"]: row for row in history if "retention" in row}
        # An attempt that went further before the run was resumed may have left later sheets.
        steps = [n for n in numbered_sheets(self.folder, "validation") if n <= step]
        sheets = choose_sheets(self.read_sheet, steps[::-1])
        title = f"{self.folder.resolve().name}: step {step} of {self.settings.training.max_train_steps}, {state}"
        return document(
            title,
            self.header(history, step, state),
            self.validation(sheets, step, state),
            self.preview(sheets),
            self.teachers_exam(),
            self.progress(sheets, history),
            section("Curves", figure(sheets.curves, "loss, cosine and retention over steps")) if history else None,
            self.retention(sheets, retention),
            self.evaluation(),
            self.shown_settings(),
            self.usage(state),
            section("Versions", table([(name, version(name)) for name in PACKAGES])),
        )

    def header(self, history: list[dict], step: int, state: State) -> Markup:
        """What is trained, on what, and how far it is."""
        last_step = self.settings.training.max_train_steps
        times = [row["seconds_per_step"] for row in history if "seconds_per_step" in row]
        facts = [f"step {step} of {last_step}"]
        if times:
            pace = median(times[-PACE_STEPS:])
            facts.append(f"{pace:.3g} s per step")
            if step < last_step:
                facts.append(f"about {duration(pace * (last_step - step))} left at that pace, without validation")
        base_model = f"{self.model.name} ({public_name(self.settings.model.pretrained_model_name_or_path)})"
        trained = f"A LoRA of rank {self.settings.lora.rank} for {base_model}"
        if self.settings.full.is_full:
            modules = self.settings.full.trainable_modules
            trained = f"{f'The modules {modules}' if modules else 'All weights'} of the transformer of {base_model}"
        count, noun = (self.num_pictures, "picture") if self.num_pictures else (self.num_captions, "caption")
        material = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
        label = f"stopped at step {step}" if state == "stopped" else state
        written = f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
        written += ", and again after each validation." if state == "in progress" else "."
        return element(
            "header",
            from_user("h1", self.folder.resolve().name),
            element(
                "p",
                f"{trained}, trained by on-policy self-distillation (D-OPSD) on {material}.",
            ),
            element("p", element("span", label, class_="state"), " " + " · ".join(facts)),
            from_user("p", self.refusal) if self.refusal else None,
            element("p", written, class_="faint"),
        )

    def validation(self, sheets: Sheets, step: int, state: State) -> Markup:
        validation, last_step = self.settings.validation, self.settings.training.max_train_steps
        if not sheets.validations:
            every = validation.validation_steps
            if every == 0:
                note = "Nothing is drawn with --validation_steps 0."
            elif state in ("stopped", "preview only"):
                note = "The run ended before its first sheet."
            else:
                note = f"The first sheet follows step {min(step - step % every + every, last_step)}."
            return section("Validation", element("p", note))
        older = ", ".join(f"validation-{step}.png" for step in sheets.left_out)
        return section(
            "Validation",
            element(
                "p",
                "The newest sheet comes first. Choose a step, or go through them with the arrow keys. Sheets may be "
                "compressed here; the files beside this page, such as "
                f"validation-{sheets.validations[0][0]}.png, are not.",
            ),
            tabs("validation", sheets.validations, lambda step: f"step {step}"),
            element("p", f"Not on this page, which would be too large: {older}.", class_="faint") if older else None,
            prompt_list([*validation.validation_prompt, *filter(None, [validation.final_validation_prompt])]),
            folded("What student and teacher predict while sampling", figure(sheets.rollout, "rollout"))
            if sheets.rollout
            else None,
        )

    def preview(self, sheets: Sheets) -> Markup | None:
        if sheets.preview is None:
            return None
        shown = "training pictures and captions" if self.num_pictures else "captions"
        note = (
            f"This page shows {shown}. ",
            element("code", "--push_to_hub"),
            " does not upload it, but it uploads preview.png and story.png, which show them too.",
        )
        return section(
            "Preview",
            figure(sheets.preview, "what the base model and the teacher draw before training"),
            element("p", *note, class_="faint"),
        )

    def teachers_exam(self) -> Markup | None:
        if self.exam is None:
            return None
        return section(
            "The teacher's exam",
            element("ul", *(from_user("li", str(finding)) for finding in findings(self.exam))),
            table(table_rows(self.exam), headings(self.exam), class_="numbers"),
            element("p", NOTE, class_="faint"),
        )

    def progress(self, sheets: Sheets, history: list[dict]) -> Markup | None:
        """What the student has learned of what was to be learned: its figures over steps, and the sheets."""
        rows = {row["step"]: row for row in history if SHARPNESS in row}
        if not rows and not sheets.lessons:
            return None
        columns = {key: shown for key, shown in STUDENT_FIGURES.items() if any(key in row for row in rows.values())}
        figures = [
            [str(step), *(form.format(row[key]) if key in row else "" for key, (_, form) in columns.items())]
            for step, row in sorted(rows.items(), reverse=True)
        ]
        note = (
            "Percentages of the teacher's lead over the base: 0 % is the base, 100 % the teacher. With --init_lora, "
            "the student before training stands for the base."
        )
        headings = ["step", *(label for label, _ in columns.values())]
        measured = [element("p", note), table(figures, headings, class_="numbers")]
        return section(
            "Progress", *(measured if rows else []), tabs("lessons", sheets.lessons, lambda step: f"step {step}")
        )

    def retention(self, sheets: Sheets, rows: dict[int, dict]) -> Markup | None:
        """The figures over steps, and the sheets.

        Args:
            rows: step -> row of metrics.jsonl.
        """
        if not rows:
            return None
        # A resumed run keeps the sheets after its checkpoint, but not their figures.
        shown = [(step, sheet) for step, sheet in sheets.retentions if step in rows]
        curves = [(key, label) for key, label, _ in RETENTION_CURVES if any(key in row for row in rows.values())]
        figures = [
            [str(step), *(f"{row[key]:.3f}" if key in row else "" for key, _ in curves)]
            for step, row in sorted(rows.items(), reverse=True)
        ]
        return section(
            "Retention",
            element("p", "How far prompts that should look as before have moved: 0 is drawn as before."),
            table(figures, ["step", *(label for _, label in curves)], class_="numbers"),
            tabs("retention", shown, lambda step: f"step {step}: {rows[step]['retention']:.3f}"),
            prompt_list(self.settings.validation.retention_prompts),
        )

    def shown_settings(self) -> Markup:
        own, shown = own_settings(self.settings, self.model), shown_settings(self.settings.flat())
        first, rest = (
            table(
                [(f"--{name}", formatted(value)) for name, value in shown.items() if (name in own) == is_own],
                class_="settings",
            )
            for is_own in (True, False)
        )
        note = "Not shown: folders, tokens, what is published, and what is off."
        return section(
            "Settings", first, folded("Those that have their defaults", rest), element("p", note, class_="faint")
        )

    def evaluation(self) -> Markup | None:
        """What `--evaluate` has found."""
        if self.comparison is None:
            return None
        columns, page = main_columns(self.comparison), f"{EVALUATION_DIR}/{PAGE_FILE}"
        # A line per figure, as on the terminal: there are more figures than contenders.
        first, *rows = zip(figure_headings(columns), *figure_rows(self.comparison, columns), strict=True)
        return section(
            "Evaluation",
            element(
                "p",
                "The LoRA beside the base, on prompts that are no captions. Pictures, all figures and their spread: ",
                element("a", page, href=page),
                ".",
            ),
            table(rows, first, class_="numbers"),
            *(from_user("p", note) for note in self.comparison.notes),
            folded("What the figures mean", meanings(columns)),
        )

    def usage(self, state: State) -> Markup:
        """The model card's example, with the newest weights in the output folder."""
        folder, checkpoints = self.folder.resolve().name, list_checkpoints(self.folder)
        settings = self.settings.flat()
        what = noun(settings)
        name = TRANSFORMER_DIR if self.settings.full.is_full else LORA_FILE
        is_whole = self.settings.full.is_full and (self.folder / MODEL_INDEX).is_file()
        if state == "finished" and (self.folder / name).exists():
            note = "The model is the folder of this page." if is_whole else f"The {what} is {name}, beside this page."
        elif checkpoints:
            is_whole = False
            folder, note = f"{folder}/{checkpoints[-1].name}", f"The newest {what} is that of {checkpoints[-1].name}."
        else:
            note = f"There is no {what} yet."
        settings["save_transformer_only"] = not is_whole
        asked = [CardImage(request.prompt, "", len(request.cond_images)) for request in self.editing_requests]
        asked = asked or [CardImage(prompt, "") for prompt in settings["validation_prompt"] or []]
        *_, example = usage(
            self.model.card,
            f"path/to/{folder}",
            settings["pretrained_model_name_or_path"],
            settings["instance_prompt"],
            asked,
            settings,
        )
        code = "\n".join(example.splitlines()[1:-1])  # without Markdown's fence
        return section(f"Use the {what}", element("p", note), element("pre", element("code", code)))
