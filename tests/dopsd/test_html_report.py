"""The report of a run: its text and pictures, and the page in a browser."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train_dopsd_flux2
from browser import CHROMIUM, browsing, check_page
from command_line import LORA_FILE, same_weights, succeed
from dopsd import html_report
from dopsd.command_line import parse_settings
from dopsd.data.requests import Request
from dopsd.errors import OutputError
from dopsd.evaluation.comparison import Column, Comparison, Figure, Prompt
from dopsd.exam.alignment import Alignment
from dopsd.exam.figures import Figures, Row
from dopsd.exam.results import Exam
from dopsd.html_report import RunReport, duration, own_settings
from html_pages import NASTY, Reader
from models import ONE_MODEL, SLOW
from short_runs import as_arguments


MODEL = train_dopsd_flux2.MODEL


def make_settings(folder: Path, **flags):
    given = {"pretrained_model_name_or_path": "a/b", "instance_data_dir": "photos", "max_train_steps": 8, "seed": 0}
    settings = parse_settings(MODEL, "", as_arguments(given | {"output_dir": folder} | flags))
    prompts = settings.validation.validation_prompt or ["a ball", "a box"]
    return settings.replace(validation_prompt=prompts, mixed_precision="no")


def make_report(folder: Path, num_pictures: int = 4, **flags) -> RunReport:
    data = SimpleNamespace(
        digests=["0"] * num_pictures + [""], pictures=[None] * (num_pictures + 1), editing_requests=[]
    )
    return RunReport(make_settings(folder, **flags), MODEL, data)


def noise(seed: int, side: int = 320) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def add_steps(folder: Path, *steps: int, validated: bool = True) -> None:
    """What a run leaves at these steps. The sheets are larger than what is inlined as it is."""
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in steps:
            rows = [{"step": step, "loss": 1.0, "seconds_per_step": 2.0}]
            if validated:
                rows.append({"step": step, "retention": step / 100, "retention/held_out": 0.5})
                for kind in ("validation", "rollout", "retention"):
                    noise(step).save(folder / f"{kind}-{step}.png")
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def shown_sheets(folder: Path) -> list[str]:
    return [value for tag, name, value in read(folder).attributes if (tag, name) == ("img", "alt")]


# Text


@pytest.mark.parametrize(
    "state, step, expected",
    [
        ("in progress", 4, "in progress step 4 of 8 · 2 s per step · about 8 s left at that pace"),
        ("stopped", 4, "stopped at step 4 step 4 of 8 · 2 s per step"),
        ("finished", 8, "finished step 8 of 8 · 2 s per step"),
    ],
)
def test_the_page_says_what_is_trained_and_how_far_it_is(tmp_path, state, step, expected):
    add_steps(tmp_path, 2, step)
    make_report(tmp_path, trigger_word="sks").write_page(step, state)
    text = read(tmp_path).text
    assert expected in text and f"{tmp_path.name}: step {step} of 8, {state}" in text
    assert "A LoRA of rank 64 for FLUX.2-klein (a/b), trained by on-policy self-distillation (D-OPSD) on 4 pic" in text


def test_the_page_of_a_whole_model_speaks_of_no_lora(tmp_path):
    (tmp_path / "transformer").mkdir()
    report = make_report(tmp_path, train_mode="full", trainable_modules="to_q")
    assert own_settings(report.settings, MODEL) == {
        *("pretrained_model_name_or_path", "instance_data_dir", "output_dir", "max_train_steps", "seed"),
        *("mixed_precision", "validation_prompt", "train_mode", "trainable_modules"),
    }
    alone, whole = "The model is transformer, beside this page.", "The model is the folder of this page."
    for state, loader, note in (("in progress", "", "There is no model yet."), ("finished", "AutoModel", alone)):
        report.write_page(8, state)
        text = read(tmp_path).text
        assert "The modules to_q of the transformer of FLUX.2-klein (a/b), trained by on-policy" in text
        assert note in text and loader in text and "LoRA" not in text and "--rank" not in text
    (tmp_path / "model_index.json").touch()
    report.write_page(8, "finished")
    assert whole in read(tmp_path).text and "AutoModel" not in read(tmp_path).text
    (tmp_path / "checkpoint-4").mkdir()
    report.write_page(4, "stopped")
    text = read(tmp_path).text
    assert "The newest model is that of checkpoint-4." in text
    assert f'"path/to/{tmp_path.name}/checkpoint-4", subfolder="transformer"' in text


def test_the_page_shows_what_the_evaluation_has_found(tmp_path):
    report = make_report(tmp_path)
    report.write_page(8, "finished")
    assert "Evaluation" not in read(tmp_path).text
    column = Column("likeness/dino", "likeness (DINO)", "higher", "How alike they are.", "some-model")
    figures = {name: {column.key: Figure(mean, None, None, 4)} for name, mean in (("base", 0.25), (NASTY, 0.75))}
    report.comparison = Comparison({}, [Prompt("a", "a", "concept")], [column], figures, {}, ["They are few."])
    report.write_page(8, "finished")
    page = read(tmp_path)
    assert ("a", "href", "evaluation/comparison.html") in page.attributes and "script" not in page.tags
    assert "0.250" in page.text and "0.750" in page.text and NASTY.split("<")[1] in page.text
    assert "likeness (DINO)" in page.text and "How alike they are." in page.text and "They are few." in page.text


@pytest.mark.parametrize("num_pictures, expected", [(1, "on 1 picture."), (7, "on 7 pictures."), (0, "on 1 caption.")])
def test_the_page_counts_pictures_or_captions(tmp_path, num_pictures, expected):
    make_report(tmp_path, num_pictures).write_page(0, "in progress")
    assert expected in read(tmp_path).text


def test_the_page_shows_the_teachers_exam_and_the_students_progress(tmp_path):
    add_steps(tmp_path, 2, 4)
    report = make_report(tmp_path)
    report.write_page(4, "in progress")
    assert "exam" not in read(tmp_path).text and "Progress" not in read(tmp_path).text
    figures = Figures({"in_place": 1.0, "anywhere": 1.0}, 1.0, Alignment(1.0, 0.0, 0.0, 0.9), None)
    taught = replace(figures, distances={"in_place": 0.8, "anywhere": 0.4})
    report.exam = Exam((Row("<b>a dog</b>", figures, taught, 1.0, 0.7),))
    rows = [{"step": 2, "progress": 25, "progress/anywhere": 25, "student/sharpness": 0.5}]
    rows.append({"step": 4, "progress": 50, "progress/anywhere": 50, "student/sharpness": 0.75, "student/zoom": 1.2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    noise(0).save(tmp_path / "lessons-4.png")
    report.write_page(4, "in progress")
    text = read(tmp_path).text
    assert "teaches the subject (60 % closer to the pictures than the base by latents anywhere); go ahead" in text
    assert "in placeanywheresharpnesszoomshiftbackground1 <b>a dog</b>+20 %+60 %100 %x1.00+0 %, +0 %-average" in text
    assert "stepprogresslatents anywheresharpness over the base'szoom450 %50 %0.75x1.20225 %25 %0.50" in text
    assert "lessons after step 4" in shown_sheets(tmp_path)


def test_a_sheet_whose_figures_were_cut_when_the_run_was_resumed_is_left_out(tmp_path):
    add_steps(tmp_path, 2, 3, 5)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(row for row in rows if '"step": 3' not in row))
    make_report(tmp_path).write_page(5, "in progress")
    assert [name for name in shown_sheets(tmp_path) if "retention" in name] == [
        "retention after step 5",
        "retention after step 2",
    ]


def test_a_run_that_its_exam_has_stopped_says_why(tmp_path):
    report = make_report(tmp_path)
    report.write_page(0, "in progress")
    assert "The first sheet follows step" in read(tmp_path).text
    report.refusal = "--teacher_context edit: the teacher is no better"
    report.write_page(0, "stopped")
    text = read(tmp_path).text
    assert "stopped at step 0" in text and "--teacher_context edit: the teacher is no better" in text
    assert "The first sheet follows" not in text and "The run ended before its first sheet." in text


def test_durations():
    times = (0.4, 99, 101, 5900, 7501, 360_000)
    assert [*map(duration, times)] == ["0 s", "99 s", "2 min", "98 min", "2 h 5 min", "100 h 0 min"]


def test_texts_from_users_are_only_text(tmp_path):
    folder = tmp_path / '<b>run & "co"'
    add_steps(folder, 2)
    flags = {"instance_prompt": NASTY, "validation_prompt": [NASTY, "a"], "retention_prompts": [NASTY, "b", "c"]}
    make_report(folder, **flags, teacher_prompt_suffix=NASTY).write_page(2, "finished")
    page = read(folder)
    assert not {"script", "b"} & {*page.tags} and not any(name.startswith("on") for _, name, _ in page.attributes)
    assert all(value.startswith("data:") for _, name, value in page.attributes if name in ("src", "href"))
    assert folder.name in page.text and page.text.count(NASTY) >= 3


def test_paths_and_tokens_are_not_on_the_page(tmp_path):
    folder, model = tmp_path / "secret" / "run", tmp_path / "secret" / "klein"
    folder.mkdir(parents=True)
    flags = {"pretrained_model_name_or_path": model, "hub_token": "hf_token", "cache_dir": "secret"}
    make_report(folder, **flags).write_page(0, "in progress")
    text = (folder / "report.html").read_text()
    assert "FLUX.2-klein (klein)" in text and "secret" not in text and "hf_" not in text


def test_settings_with_their_defaults_are_folded(tmp_path):
    flags = {"rank": 16, "resolution": 512, "teacher_prompt_suffix": "x", "with_prior_preservation": "false"}
    own = own_settings(make_settings(tmp_path, **flags), MODEL)
    assert own >= {"rank", "resolution", "teacher_prompt_suffix", "with_prior_preservation", "seed", "max_train_steps"}
    # Not given, though their values are not what the parser has: they follow from others.
    assert not own & {"lora_alpha", "validation_height", "validation_width", "context_cache_dir"}
    assert not own & {"learning_rate", "retention_prompts", "text_encoder_out_layers", "ema_decay"}
    assert "teacher_prompt_suffix" not in own_settings(make_settings(tmp_path), MODEL)
    assert {"lora_alpha", "validation_height"} <= own_settings(
        make_settings(tmp_path, lora_alpha=7, validation_height=512), MODEL
    )
    make_report(tmp_path, **flags).write_page(0, "in progress")
    text = read(tmp_path).text
    assert text.index("--rank16") < text.index("Those that have their defaults") < text.index("--lora_alpha32")


def test_the_example_loads_the_newest_lora(tmp_path):
    report = make_report(tmp_path)

    def check(state: str, folder: str, note: str) -> None:
        report.write_page(8, state)
        text = read(tmp_path).text
        assert note in text and f'pipe.load_lora_weights("path/to/{tmp_path.name}{folder}")' in text

    check("in progress", "", "There is no LoRA yet.")
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
    check("stopped", "/checkpoint-10", "The newest LoRA is that of checkpoint-10.")
    (tmp_path / LORA_FILE).touch()
    check("in progress", "/checkpoint-10", "The newest LoRA is that of checkpoint-10.")  # goes on from a finished run
    check("finished", "", f"The LoRA is {LORA_FILE}, beside this page.")


def test_the_example_of_an_editor_edits_as_it_is_validated(tmp_path):
    report = make_report(tmp_path, cond_image_column="source", validation_steps=0)
    report.write_page(8, "in progress")
    assert 'prompt="a ball",\n    image=load_image("to_edit.png"),' in read(tmp_path).text
    report.editing_requests = [Request("paint it", ("a picture", "another"), (64, 64))]
    report.write_page(8, "in progress")
    images = '[load_image("to_edit_1.png"), load_image("to_edit_2.png")]'
    assert f'prompt="paint it",\n    image={images},' in read(tmp_path).text


# Pictures


def test_validations_are_shown_newest_first_with_their_figures(tmp_path):
    add_steps(tmp_path, 2, 10)
    add_steps(tmp_path, 12, validated=False)
    noise(0).save(tmp_path / "validation-14.png")  # of an earlier attempt, which went further
    make_report(tmp_path).write_page(12, "in progress")
    assert shown_sheets(tmp_path) == [
        *("validation after step 10", "validation after step 2", "rollout"),
        *("retention after step 10", "retention after step 2"),
    ]
    page = read(tmp_path)
    assert "stepunrelatedheld out100.1000.50020.0200.500" in page.text
    checked = [attribute for attribute in page.attributes if attribute[1] == "checked"]
    assert len(checked) == 2 and "step 2: 0.020" in page.text


def test_without_retention_prompts_the_files_say_which_validations_there_are(tmp_path):
    add_steps(tmp_path, 2, 4, 6, validated=False)
    for step in (2, 4, 8):  # the last one is that of a longer run, resumed from step 6
        noise(step).save(tmp_path / f"validation-{step}.png")
    make_report(tmp_path).write_page(6, "in progress")
    assert shown_sheets(tmp_path) == ["validation after step 4", "validation after step 2"]
    assert "Retention" not in read(tmp_path).text


@pytest.mark.parametrize(
    "flags, step, expected",
    [
        ({"validation_steps": 0}, 8, "Nothing is drawn with --validation_steps 0."),
        ({"validation_steps": 3}, 0, "The first sheet follows step 3."),
        ({"validation_steps": 3}, 4, "The first sheet follows step 6."),
        ({"validation_steps": 50}, 0, "The first sheet follows step 8."),
    ],
)
def test_a_page_without_validations_says_when_there_will_be_one(tmp_path, flags, step, expected):
    if step:
        add_steps(tmp_path, step, validated=False)
    report = make_report(tmp_path, **flags)
    report.write_curves()
    report.write_page(step, "in progress")
    assert expected in read(tmp_path).text
    assert shown_sheets(tmp_path) == ["loss, cosine and retention over steps"] * (step > 0)


def test_large_sheets_become_smaller_and_small_ones_stay(tmp_path):
    noise(0).save(tmp_path / "large.png")
    Image.new("RGB", (320, 320)).save(tmp_path / "small.png")
    large, small = html_report.inlined(tmp_path / "large.png"), html_report.inlined(tmp_path / "small.png")
    assert large.url.startswith("data:image/jpeg") and large.num_bytes < (tmp_path / "large.png").stat().st_size / 2
    assert small.url.startswith("data:image/png") and small.num_bytes == (tmp_path / "small.png").stat().st_size
    assert large.size == small.size == (320, 320)


def test_what_has_no_room_is_named(tmp_path, monkeypatch):
    add_steps(tmp_path, 2, 4, 6, 8)
    one = html_report.inlined(tmp_path / "validation-2.png").num_bytes
    monkeypatch.setattr(html_report, "MAX_PICTURE_BYTES", 6 * one)  # a rollout and two pairs
    make_report(tmp_path).write_page(8, "finished")
    assert len(shown_sheets(tmp_path)) == 5
    assert "too large: validation-4.png, validation-2.png." in read(tmp_path).text
    monkeypatch.setattr(html_report, "MAX_PICTURE_BYTES", 0)
    make_report(tmp_path).write_page(8, "finished")
    assert len(shown_sheets(tmp_path)) == 3  # the newest validation is always shown


def test_a_damaged_or_missing_sheet_is_left_out(tmp_path):
    add_steps(tmp_path, 2, 4)
    (tmp_path / "preview.png").write_text("x")
    (tmp_path / "validation-4.png").write_bytes((tmp_path / "validation-4.png").read_bytes()[:5000])
    (tmp_path / "rollout-4.png").unlink()
    make_report(tmp_path).write_page(4, "finished")
    assert shown_sheets(tmp_path) == ["validation after step 2", "retention after step 4", "retention after step 2"]


def test_a_sheet_is_encoded_once_unless_it_is_written_again(tmp_path, monkeypatch):
    add_steps(tmp_path, 2, 4)
    report, encoded = make_report(tmp_path), []
    inlined = html_report.inlined
    monkeypatch.setattr(html_report, "inlined", lambda path: encoded.append(path.name) or inlined(path))
    report.write_page(4, "in progress")
    assert len(encoded) == len({*encoded}) == 5
    noise(7).save(tmp_path / "validation-4.png")
    report.write_page(4, "finished")
    assert encoded[5:] == ["validation-4.png"]


def test_a_report_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="report.html could not be written .*remove what is in its place"):
        make_report(tmp_path).write_page(0, "in progress")


# In a browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    add_steps(tmp_path, 2, 4)
    Image.new("RGB", (1440, 900), "red").save(tmp_path / "validation-4.png")
    noise(0).save(tmp_path / "preview.png")
    report = make_report(tmp_path, instance_prompt=NASTY, validation_prompt=[NASTY, "x" * 300], num_pictures=12)
    report.write_curves()
    report.write_page(4, "finished")
    with browsing() as page:
        check_page(page, tmp_path / "report.html", num_images=7)
        assert page.evaluate("document.title") == f"{tmp_path.name}: step 4 of 8, finished"
        # Choosing a step shows its sheet, and no other.
        visible = "[...document.images].filter(image => image.offsetParent).map(image => image.alt)"
        assert "validation after step 4" in page.evaluate(visible)
        page.evaluate("document.querySelector('label[for=validation-2]').click()")
        chosen = page.evaluate(visible)
        assert "validation after step 2" in chosen and "validation after step 4" not in chosen


# Whole runs


DRAWN = {"validation_steps": 2, "num_validation_images": 1, "retention_prompts": ["a", "b"], "checkpointing_steps": 2}


@ONE_MODEL
def test_a_resumed_run_keeps_its_earlier_validations(train, tmp_path):
    succeed(train(**DRAWN, max_train_steps=2))
    assert shown_sheets(tmp_path / "run")[0] == "validation after step 2"
    log = succeed(train(**DRAWN, max_train_steps=4, resume_from_checkpoint="latest")).log
    assert log.count("report.html") == 3  # when it starts, after the validation, and at the end
    assert shown_sheets(tmp_path / "run") == [
        *("validation after step 4", "validation after step 2", "rollout"),
        "what the base model and the teacher draw before training",
        *("lessons after step 4", "lessons after step 2"),
        "loss, cosine and retention over steps",
        *("retention after step 4", "retention after step 2"),
    ]
    text = read(tmp_path / "run").text
    assert "finished step 4 of 4" in text and "on 3 pictures" in text


@ONE_MODEL
def test_a_run_that_only_draws_the_preview_has_a_report(train, tmp_path):
    succeed(train(**DRAWN, preview_only=True))
    assert shown_sheets(tmp_path / "run") == ["what the base model and the teacher draw before training"]
    assert "preview only step 0 of 2" in read(tmp_path / "run").text
    assert not (tmp_path / "run/curves.png").exists()


@ONE_MODEL
def test_a_run_that_draws_nothing_has_a_report_at_its_end(train, tmp_path):
    assert succeed(train()).log.count("report.html") == 1
    assert shown_sheets(tmp_path / "run") == ["loss, cosine and retention over steps"]


@ONE_MODEL
@SLOW
def test_a_report_that_fails_does_not_change_the_run(train, tmp_path):
    for name in ("report.html", "curves.png"):
        (tmp_path / "run" / name).mkdir(parents=True)
    log = succeed(train(**DRAWN)).log
    for what in ("plot of the curves", "report"):
        assert re.search(rf"The {what} failed \(.*could not be written .*\); the run continues", log), log
    assert "Traceback" not in log
    succeed(train("undisturbed"))
    assert same_weights(tmp_path / "run", tmp_path / "undisturbed")
