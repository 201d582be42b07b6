"""The quick start's picture: what the model draws before and after training, and how far it is from its teacher."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


CELL, GAP, MARGIN, PANEL = 192, 20, 32, 270  # pixels
COLUMNS = (
    ("before", "base: caption"),
    ("teacher", "base: caption + suffix + picture"),
    ("after D-OPSD", "base + LoRA: caption"),
    ("the picture", "only the teacher sees it"),
)
CAPTION_HEIGHT, HEADER_TOP, ROWS_TOP, CURVE_HEIGHT = 28, 136, 190, 120
BEFORE, AFTER, INK, FAINT = "#b8bec8", "#1b7f5c", "#1d2433", "#6a7285"

INTRODUCTION = (
    "The model is tiny and its weights are random: nobody can recognise a ball here, before or after. What can be",
    "seen: a row's pictures start from one noise, and training moved the model's own picture to its teacher's. What",
    "cannot: whether a real FLUX.2-klein learns a subject, or keeps its quality and its other skills.",
)


@dataclass(frozen=True)
class Row:
    """One caption. `distance` is ||after - teacher|| / ||before - teacher||, of the final latents."""

    caption: str
    before: Image.Image
    teacher: Image.Image
    after: Image.Image
    picture: Image.Image
    distance: float


def sheet_size(num_rows: int) -> tuple[int, int]:
    """(width, height) in pixels."""
    width = 2 * MARGIN + len(COLUMNS) * (CELL + GAP) + PANEL
    return width, ROWS_TOP + num_rows * (CELL + CAPTION_HEIGHT + GAP) + CURVE_HEIGHT + 2 * MARGIN


def draw_sheet(rows: list[Row], losses: list[float]) -> Image.Image:
    sheet = Image.new("RGB", sheet_size(len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, 24), f"D-OPSD on a random-weights FLUX.2-klein, {len(losses)} steps", size=26)
    for line, text in enumerate(INTRODUCTION):
        write(draw, (MARGIN, 62 + 20 * line), text, size=15, colour=FAINT)

    panel_left = MARGIN + len(COLUMNS) * (CELL + GAP)
    for column, (title, subtitle) in enumerate(COLUMNS):
        write(draw, (MARGIN + column * (CELL + GAP), HEADER_TOP), title, size=18)
        write(draw, (MARGIN + column * (CELL + GAP), HEADER_TOP + 24), subtitle, size=13, colour=FAINT)
    write(draw, (panel_left, HEADER_TOP), "distance to the teacher", size=18)
    write(draw, (panel_left, HEADER_TOP + 24), "of the final latents; before = 1", size=13, colour=FAINT)

    top = ROWS_TOP
    for row in rows:
        write(draw, (MARGIN, top + 4), f'"{row.caption}"', size=15)
        for column, image in enumerate((row.before, row.teacher, row.after, row.picture)):
            cell = image.resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (MARGIN + column * (CELL + GAP), top + CAPTION_HEIGHT))
        draw_bars(draw, panel_left, top + CAPTION_HEIGHT + CELL // 2 - 40, row.distance)
        top += CAPTION_HEIGHT + CELL + GAP

    write(draw, (panel_left, top + 8), "mean of the rows", size=15)
    draw_bars(draw, panel_left, top + 36, mean_distance(rows))
    draw_curve(draw, (MARGIN, top + 8, panel_left - 2 * GAP, top + CURVE_HEIGHT), losses)
    return sheet


def mean_distance(rows: list[Row]) -> float:
    return sum(row.distance for row in rows) / len(rows)


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, *, size: int, colour: str = INK) -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size))


def draw_bars(draw: ImageDraw.ImageDraw, left: int, top: int, distance: float) -> None:
    """Two horizontal bars on one scale: 1 before, `distance` after."""
    for line, (label, length, colour) in enumerate((("before", 1.0, BEFORE), ("after", distance, AFTER))):
        y = top + 38 * line
        write(draw, (left, y + 5), label, size=14, colour=FAINT)
        right = left + 56 + round(150 * min(length, 1.2))
        draw.rectangle((left + 56, y, right, y + 26), fill=colour)
        write(draw, (right + 8, y + 4), f"{length:.2f}", size=16)


def draw_curve(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], losses: list[float]) -> None:
    """The loss of every step, from 0 to the largest."""
    left, top, right, bottom = box
    write(
        draw, (left, top), f"training loss: {losses[0]:.2g} at step 1, {losses[-1]:.2g} at step {len(losses)}", size=15
    )
    top += 28
    draw.line((left, bottom, right, bottom), fill=FAINT)
    across = (right - left) / max(len(losses) - 1, 1)
    points = [(left + step * across, bottom - (bottom - top) * loss / max(losses)) for step, loss in enumerate(losses)]
    draw.line(points, fill=AFTER, width=2)
