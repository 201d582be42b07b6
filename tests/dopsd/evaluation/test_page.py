"""The page of a comparison: its text and pictures, and the page in a browser."""

import numpy as np
import pytest
import torch
from PIL import Image

from browser import CHROMIUM, browsing, check_page
from dopsd.errors import OutputError
from dopsd.evaluation import page
from dopsd.evaluation.features import open_feature_models
from dopsd.evaluation.measures import measure
from dopsd.evaluation.page import write_page
from html_pages import NASTY, Reader


SETTINGS = {
    "pretrained_model_name_or_path": "/secret/klein",
    "lora": ["/secret/a.safetensors", "name=/secret/b.safetensors"],
    "instance_data_dir": "/secret/photos",
    "cache_dir": "/secret/cache",
    "clip_model": "/secret/clip",
    "validation_image": None,
    "judge": False,
    "seed": 7,
    "num_seeds": 2,
    "num_inference_steps": 4,
}


@pytest.fixture
def write(feature_models, make_comparison, make_picture, tmp_path):
    """Measures and writes the page: returns its reader."""
    models = open_feature_models(str(feature_models["clip"]), str(feature_models["dino"]))
    training = [make_picture(number) for number in range(100, 110)]

    def make(to_edit=(), **options) -> Reader:
        prompts, drawn = make_comparison(**options)
        comparison = measure(
            prompts, drawn, training, models, device=torch.device("cpu"), settings=SETTINGS, to_edit=to_edit
        )
        path = write_page(tmp_path, comparison, drawn, training, to_edit)
        assert path == tmp_path / "comparison.html"
        return Reader(path.read_text(encoding="utf-8"))

    return make


def shown(reader: Reader) -> list[str]:
    return [value for tag, name, value in reader.attributes if (tag, name) == ("img", "alt")]


def test_the_page_shows_pictures_figures_and_what_they_mean(write, tmp_path):
    reader = write()
    assert shown(reader) == [
        "Training pictures (and 2 others)",
        "likeness against retention of every LoRA",
        *("Prompts for the subject, seed 7", "Prompts for the subject, seed 8"),
        *("Strengths: same", "Strengths: other"),
        "Unrelated prompts, seed 7",
        "Neighbours: the class without the trigger word, seed 7",
        "Other made-up words in the trigger word's place, seed 7",
    ]
    text = reader.text.replace("\u00a0", " ")
    assert "LoRAs and the base model" in text and "base model klein · 5 prompts · 2 seeds each · 4 steps" in text
    for heading in ("likeness (DINO) ↑", "copies ↓", "sharpness", "retention (DINO) ↑", "same + other"):
        assert heading in text
    assert text.count("Mean cosine of the drawings with the training pictures.") == 1  # once for CLIP and DINO
    assert "training pictures among themselves" in text and "other x1.5" in text
    assert "in plain words: a dog in snow" in text
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        *("training.png", "likeness_retention.png", "concept-seed7.png", "concept-seed8.png", "unrelated-seed7.png"),
        *("neighbour-seed7.png", "other_word-seed7.png", "strengths-0.png", "strengths-1.png"),
    }


def test_a_sheet_has_the_first_of_many_prompts_and_leaves_no_file_open(write, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "MAX_SHOWN_PROMPTS", 1)
    seen = []

    def contact_sheet(title, columns, rows, **options):
        seen.extend(cell.image for _, cells in rows for cell in cells if cell.image)
        assert len(rows) == 1 or title.startswith("Strengths")
        return page_contact_sheet(title, columns, rows, **options)

    page_contact_sheet = page.contact_sheet
    monkeypatch.setattr(page, "contact_sheet", contact_sheet)
    reader = write()
    assert "Prompts for the subject, the first 1 of 2, seed 7" in shown(reader)
    assert "Unrelated prompts, seed 7" in shown(reader) and "in plain words: a dog in snow" in reader.text
    assert len(seen) > 20 and all(getattr(image, "fp", None) is None for image in seen)


def test_the_spread_of_the_training_pictures_is_over_pictures(write):
    text = write().text
    of_training = text[text.index("training pictures among themselves") :].split("likeness", 1)[0]
    assert " pictures" in of_training.removeprefix("training pictures") and " prompts" not in of_training


def test_folders_of_this_machine_and_what_is_off_are_not_on_the_page(write):
    text = write().text
    assert "secret" not in text and "cache_dir" not in text and "--judge" not in text
    assert '--lora["a.safetensors", "name=b.safetensors"]' in text and "--instance_data_dirphotos" in text


def test_texts_from_users_are_only_text(write):
    reader = write(names=(NASTY, "$other_$"))
    assert not {"script", "b"} & {*reader.tags} and reader.text.count(NASTY) >= 3
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert all(value.startswith("data:") for _, name, value in reader.attributes if name in ("src", "href"))


def test_an_editors_sheets_begin_with_the_picture_to_edit(write, make_picture, tmp_path):
    write()
    without = Image.open(tmp_path / "sheets/neighbour-seed7.png").size
    red = Image.new("RGB", (64, 64), "red")
    reader = write(image=0, to_edit=[red])
    assert "likeness to the edited picture (DINO)" in reader.text
    sheet = Image.open(tmp_path / "sheets/neighbour-seed7.png")
    assert sheet.width > without[0]
    left = np.asarray(sheet)[:, : sheet.width // 4]
    assert (left == (255, 0, 0)).all(-1).sum() > 60 * 60


def test_what_has_no_room_is_named(write, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "MAX_PICTURE_BYTES", 0)
    reader = write()
    assert (
        shown(reader) == []
        and "too large: sheets/training.png, sheets/likeness_retention.png, sheets/c" in reader.text
    )
    assert (tmp_path / "sheets/unrelated-seed7.png").exists()


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(write, tmp_path):
    (tmp_path / "comparison.html").mkdir()
    with pytest.raises(OutputError, match="comparison.html could not be written .*remove what is in its place"):
        write()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser(write, tmp_path):
    write(names=("x" * 60, NASTY))
    with browsing() as tab:
        check_page(tab, tmp_path / "comparison.html", num_images=9)
        assert tab.evaluate("document.title") == f"{tmp_path.name}: LoRAs compared"
        visible = "[...document.images].filter(image => image.offsetParent).map(image => image.alt)"
        assert "Prompts for the subject, seed 7" in tab.evaluate(visible)
        tab.evaluate("document.querySelector('label[for=concept-1]').click()")
        chosen = tab.evaluate(visible)
        assert "Prompts for the subject, seed 8" in chosen
        assert "Prompts for the subject, seed 7" not in chosen
