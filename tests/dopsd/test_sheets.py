"""Pixels of contact sheets and plots, also for difficult inputs."""

import math
import warnings

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from dopsd.sheets import (
    ACCENT,
    SMOOTH_FROM,
    Cell,
    contact_sheet,
    draw_retention,
    fit,
    load_font,
    plot_curves,
    save_png,
    smooth,
    wrap,
)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
DIFFICULT_TEXTS = {
    "long": "a corgi on a gray stone ledge under pink blossoms, " * 100,
    "one word": "x" * 5000,
    "Chinese": "[V] 在户外场景中" + "坐在石阶上" * 300,
    "right to left": "כלב על הדשא " * 200,
    "combining": "e" + "\u0301" * 500,
    "emoji": "👩‍👩‍👧 🐕",
    "lone surrogate": "\ud83d",
    "control characters": "a\0b\tc\r\nd\n\n\ne",
    "formula": r"$\frac{",
    "empty": "",
}


def colour_box(sheet, colour):
    """(left, top, right, bottom) of the pixels of exactly this colour."""
    return box((np.asarray(sheet) == colour).all(-1))


def box(mask):
    """(left, top, right, bottom) of the true elements."""
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def solid(width, height, colour):
    return Image.new("RGB", (width, height), colour)


def assert_margin_is_white(sheet, margin):
    pixels = np.asarray(sheet)
    assert (pixels[:margin] == 255).all() and (pixels[-margin:] == 255).all()
    assert (pixels[:, :margin] == 255).all() and (pixels[:, -margin:] == 255).all()


def test_images_are_centred_in_their_cells_with_their_aspect_ratio():
    rows = [
        ("large", [Cell(solid(640, 640, RED)), Cell(solid(600, 300, GREEN)), Cell(None)]),
        ("small", [Cell(None), Cell(None), Cell(solid(30, 64, BLUE))]),
    ]
    sheet = contact_sheet("Title", ["one", "two", "three"], rows, cell_pixels=160)
    margin, step = 160 // 8, 160 + 160 // 16
    assert sheet.mode == "RGB" and sheet.width == 2 * margin + 3 * step - 10

    left, top, right, bottom = colour_box(sheet, RED)
    assert (left, right, bottom - top) == (margin, margin + 160, 160)
    # The wide image is as wide as its cell and vertically centred in the row.
    assert colour_box(sheet, GREEN) == (margin + step, top + 40, margin + step + 160, top + 120)
    # 64 pixels fit twice into 160, so the image has 60 x 128 pixels in the middle of the third cell.
    left, top, right, blue_bottom = colour_box(sheet, BLUE)
    assert (left, right, blue_bottom - top) == (margin + 2 * step + 50, margin + 2 * step + 110, 128)
    assert top > bottom


def test_a_small_image_is_enlarged_pixel_by_pixel(make_picture):
    image = make_picture(1)
    enlarged = np.asarray(fit(image, 320))
    assert (enlarged == np.asarray(image).repeat(5, axis=0).repeat(5, axis=1)).all()


def test_a_large_image_is_averaged_not_sampled():
    stripes = np.zeros((640, 640), np.uint8)
    stripes[:, ::2] = 255
    middle = np.asarray(fit(Image.fromarray(stripes), 160))[20:-20, 20:-20]
    assert abs(middle.astype(int) - 127).max() < 10


def test_fit_leaves_a_thin_image_visible_and_its_argument_unchanged():
    image = solid(2000, 3, RED)
    assert fit(image, 100).size == (100, 1)
    assert image.size == (2000, 3)


@pytest.mark.parametrize("text", DIFFICULT_TEXTS.values(), ids=DIFFICULT_TEXTS.keys())
@pytest.mark.parametrize("width", [60, 700])
def test_wrapped_lines_fit(text, width):
    font = load_font("DejaVuSans", 17)
    lines = wrap(text, font, width, 4)
    assert len(lines) <= 4
    assert all(line and font.getlength(line) <= width for line in lines)


def test_wrap_breaks_between_words_and_cuts_with_an_ellipsis():
    font = load_font("DejaVuSans", 17)
    width = int(font.getlength("a small dog")) + 1
    assert wrap("a small  dog a small dog\na cat", font, width) == ["a small dog", "a small dog", "a cat"]
    assert wrap("a small dog a small dog", font, width, 2) == ["a small dog", "a small dog"]
    first, last = wrap("a small dog a small dog a cat", font, width, 2)
    assert first == "a small dog" and last.startswith("a small") and last.endswith("…")
    # Chinese text has no spaces, but it still fills its lines.
    assert len(wrap("[V] 在户外场景中", font, int(font.getlength("[V] 在户外")) + 1)) == 2


@pytest.mark.parametrize("text", DIFFICULT_TEXTS.values(), ids=DIFFICULT_TEXTS.keys())
def test_difficult_texts_stay_on_the_sheet(text):
    rows = [(text, [Cell(solid(64, 64, RED), text), Cell(None, text)])] * 2
    sheet = contact_sheet(text, [text, "plain"], rows, note=text[:200], cell_pixels=128)
    assert sheet.width == 2 * 16 + 2 * 128 + 8
    assert_margin_is_white(sheet, 16)
    assert (np.asarray(sheet) == RED).all(-1).sum() == 2 * 128 * 128  # no text covers an image


def test_a_long_label_is_cut_to_four_lines():
    def height(label):
        return contact_sheet("", [""], [(label, [Cell(None)])]).height

    one, four = height("word"), height("\n".join(["word"] * 4))
    assert height("word " * 1000) == four > one


def test_title_headings_captions_and_note_are_drawn():
    def sheet(title="", heading="", caption="", note=""):
        return contact_sheet(title, [heading], [("label", [Cell(None, caption)])], note=note)

    plain = sheet()
    for text in ("title", "heading", "caption", "note"):
        assert sheet(**{text: "words"}).height > plain.height


def test_many_rows_and_columns():
    cells = [Cell(solid(16, 16, RED), "seed")] * 12
    sheet = contact_sheet("Many", ["column"] * 12, [("a prompt", cells)] * 40, cell_pixels=32)
    assert (np.asarray(sheet) == RED).all(-1).sum() == 40 * 12 * 32 * 32


@pytest.mark.parametrize(("count", "across"), [(1, 1), (4, 4), (5, 5), (7, 4), (8, 4), (16, 6), (19, 7), (43, 7)])
def test_columns_for_which_a_screen_has_no_room_continue_below(count, across):
    rows = [("base", [Cell(solid(64, 64, RED))] * count), ("student", [Cell(solid(64, 64, BLUE))] * count)]
    sheet = contact_sheet("Retention", ["a lighthouse on a cliff"] * count, rows, note="A note.")
    red = (np.asarray(sheet) == RED).all(-1)
    side = math.isqrt(red.sum() // count)
    assert sheet.width <= 1600 and side >= 128 and red.sum() == count * side**2
    assert red.sum(axis=1).max() == across * side  # as many beside each other
    assert red.any(axis=1).sum() == math.ceil(count / across) * side  # as many below each other
    assert (np.asarray(sheet) == BLUE).all(-1).sum() == red.sum()


def test_an_accent_frames_its_column_or_row_and_covers_no_image():
    rows = [(label, [Cell(solid(64, 64, RED), "caption")] * 9 + [Cell(None)]) for label in ("base", "student")]

    def accent(**accents):
        sheet = np.asarray(contact_sheet("Title", [f"column {number}" for number in range(10)], rows, **accents))
        assert (sheet == RED).all(-1).sum() == 18 * 192**2
        return (sheet == ImageColor.getrgb(ACCENT)).all(-1)

    assert not accent().any()
    left, top, right, bottom = box(accent(accent_columns=[1]))
    frame = 192 + 2 * 3
    assert right - left == frame and bottom - top > 2 * frame  # two framed images and the heading above them
    last_band = box(accent(accent_columns=[6]))
    assert last_band[0] == left and last_band[1] > bottom  # the second column of the second band
    assert not accent(accent_columns=[9])[: last_band[3], : right + 1].any()
    row = accent(accent_rows=[1])
    assert row.any() and row.sum() > 4 * accent(accent_columns=[1]).sum()


def test_a_row_with_the_wrong_number_of_cells_is_refused():
    with pytest.raises(AssertionError, match="1 cells for 2 columns"):
        contact_sheet("", ["one", "two"], [("label", [Cell(None)])])


def test_save_png_replaces_the_file_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_text("the previous one")
    save_png(solid(8, 4, RED), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (8, 4), RED)


def test_save_png_keeps_the_previous_file_if_writing_fails(tmp_path, monkeypatch):
    def fail_halfway(image, path, **options):
        path.write_text("half a PNG")
        raise OSError("disk full")

    path = tmp_path / "sheet.png"
    save_png(solid(8, 4, RED), path)
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        save_png(solid(8, 4, GREEN), path)
    assert path.read_bytes() == before


def make_history(num_steps, num_states=4, validate_every=10):
    history = []
    for step in range(1, num_steps + 1):
        row = {"step": step, "loss": 1.0 / step, "lr": 1e-4, "grad_norm": 0.5}
        for state in range(1, num_states + 1):
            row[f"loss/state_{state}"] = 2.0 / (state * step)
            row[f"cosine/state_{state}"] = 1 - 0.1 / (state * step)
            row[f"norm_ratio/state_{state}"] = 1.0
        history.append(row)
        if step % validate_every == 0:
            history.append({"step": step, "retention": 0.9})
    return history


NOT_FINITE = [
    {"step": 1, "loss": float("nan"), "loss/state_1": 0.0, "cosine/state_1": float("nan"), "retention": 0.0},
    {"step": 2, "loss": float("inf"), "loss/state_1": -1.0, "cosine/state_1": 1.0, "retention": float("nan")},
]
HISTORIES = {
    "nothing": [],
    "one point": make_history(1),
    "a run": make_history(40),
    "2000 points": make_history(2000),
    "twelve states": make_history(60, num_states=12),
    "missing keys": [{"step": 1, "loss": 0.5}, {"step": 2, "cosine/state_2": 0.9}, {"step": 7}],
    "only validation": [{"step": 0, "retention": 1.0}],
    "zero and not finite": NOT_FINITE,
    "nothing finite": [{"step": step, "loss": float("nan")} for step in range(100)],
    "some not finite among many": make_history(100) + [{**row, "step": row["step"] + 100} for row in NOT_FINITE],
}


@pytest.fixture
def drawn(monkeypatch):
    """All lines that matplotlib draws, as (label, steps, values)."""
    lines, plot = [], Axes.plot

    def recording_plot(axes, steps, values, **style):
        lines.append((style.get("label"), list(steps), list(values)))
        return plot(axes, steps, values, **style)

    monkeypatch.setattr(Axes, "plot", recording_plot)
    return lines


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())
def test_any_history_can_be_plotted(history, tmp_path):
    path = tmp_path / "curves.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(history, path, title=r"lr 1e-4, $5 and \frac{ $")
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1200, 1000))
        assert len(image.convert("L").getcolors()) > 10


def test_curves_show_the_values_of_the_history(drawn, tmp_path):
    plot_curves(make_history(20, num_states=2), tmp_path / "curves.png", title="")
    steps = list(range(1, 21))
    assert drawn == [
        ("1 (noise)", steps, [2.0 / step for step in steps]),
        ("2", steps, [1.0 / step for step in steps]),
        ("mean", steps, [1.0 / step for step in steps]),
        ("1 (noise)", steps, [1 - 0.1 / step for step in steps]),
        ("2", steps, [1 - 0.1 / (2 * step) for step in steps]),
        (None, [10, 20], [0.9, 0.9]),
    ]


def test_progress_has_a_panel_of_its_own_once_it_is_measured(drawn, tmp_path):
    history = [{"step": 2, "progress": 10.0, "progress/anywhere": 10.0}, {"step": 4, "progress": 60.0, "loss": 1.0}]
    plot_curves(history, tmp_path / "curves.png", title="")
    assert ("the largest that decides", [2, 4], [10.0, 60.0]) in drawn and ("latents anywhere", [2], [10.0]) in drawn
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 1250)


def test_states_are_sorted_by_number(drawn, tmp_path):
    plot_curves([{"step": 1, "loss/state_10": 1.0, "loss/state_2": 1.0}], tmp_path / "curves.png", title="")
    assert [label for label, _, _ in drawn] == ["2", "10"]


def test_the_last_value_of_a_repeated_step_counts(drawn, tmp_path):
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    plot_curves([*history, {"step": 2, "loss": 1.0}], tmp_path / "curves.png", title="")
    assert drawn == [("mean", [1, 2, 3], [3.0, 1.0, 9.0])]


def test_a_long_curve_is_drawn_with_and_without_smoothing(drawn, tmp_path):
    history = [{"step": step, "loss": 2.0 + (-1) ** step} for step in range(100)]
    plot_curves(history, tmp_path / "curves.png", title="")
    (_, _, raw), (label, steps, smoothed) = drawn
    assert raw == [row["loss"] for row in history]
    assert (label, steps) == ("mean", list(range(100)))
    assert smoothed[10:-10] == [2.0] * 80


def test_only_smoothed_curves_have_a_note_that_says_so(monkeypatch, tmp_path):
    labels = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda axes, label: labels.append(label))
    for count in (SMOOTH_FROM, SMOOTH_FROM + 1):
        plot_curves(make_history(count), tmp_path / "curves.png", title="")
    short, long = filter(None, labels)  # panels that share an axis have blank labels
    assert short == "optimizer step" and long.startswith("optimizer step\n") and "moving means" in long


def test_smooth_equals_values_computed_by_hand():
    nan = float("nan")
    np.testing.assert_array_equal(smooth(np.array([3.0, 6.0, 0.0, 3.0]), 3), [4.5, 3.0, 3.0, 1.5])
    np.testing.assert_array_equal(smooth(np.array([1.0, nan, 3.0, nan, nan, nan]), 3), [1, 2, 3, 3, nan, nan])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, ["no loss yet", "no cosine yet", "no validation yet"]),
        ({"loss": 1.0, "retention": 0.0}, ["no cosine yet"]),
        ({"loss/state_1": 1.0, "cosine/state_1": 1.0}, ["no validation yet"]),
    ],
)
def test_an_empty_panel_is_labelled(row, expected, monkeypatch, tmp_path):
    labels, text = [], Axes.text

    def recording_text(axes, x, y, label, **style):
        labels.append(label)
        return text(axes, x, y, label, **style)

    monkeypatch.setattr(Axes, "text", recording_text)
    plot_curves([{"step": 1, **row}], tmp_path / "curves.png", title="")
    assert labels == expected


def test_losses_that_a_log_axis_cannot_show_are_counted(monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, **style: titles.append(title))
    plot_curves(make_history(10), tmp_path / "curves.png", title="")
    assert titles == []
    plot_curves(NOT_FINITE, tmp_path / "curves.png", title="")
    assert titles == ["values not drawn, being zero or not finite: 4"]


def test_prior_preservation_and_its_prompts_have_curves(drawn, tmp_path):
    history = [{"step": 0, "loss": 1.0, "prior_loss": 0.0}]  # zero at the start is no fault
    history += [{"step": 1, "loss": 1.0, "prior_loss": 0.5, "retention": 0.1, "retention/wrong_word": 0.2}]
    history += [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0, "prior_loss": 0.25, "retention/no_word": 0.3}]
    plot_curves(history, tmp_path / "curves.png", title="")
    curves = {label: (steps, values) for label, steps, values in drawn}
    steps, values = curves["prior"]
    assert steps[1:] == [1, 3] and values[1:] == [0.5, 0.25]
    assert curves["wrong word"] == ([1], [0.2])
    assert curves["no word"] == ([3], [0.3]) and "held out" not in curves


@pytest.mark.parametrize("retention", [0.8, 0.0])
def test_the_retention_axis_starts_at_zero_and_has_a_margin_at_the_top(retention):
    axes = Figure().subplots()
    draw_retention(axes, [{"step": 1, "retention": retention}, {"step": 2, "retention": 0.99 * retention}])
    bottom, top = axes.get_ylim()
    assert bottom == 0 and 1.04 * retention < top < 1.2 * retention + 0.1
