"""The contact sheets of whole runs, compared with pictures that the stock pipeline draws, and retention."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from command_line import LORA_FILE, same_weights, succeed
from dopsd.data.requests import Request
from dopsd.drawing import Drawing, DrawingFailed, DrawingStopped, Subject
from dopsd.gallery import Gallery, evenly_spaced, story_subjects
from dopsd.history import read_history
from dopsd.lessons import Sheet
from dopsd.settings import RETENTION_PROMPTS, ValidationSettings
from dopsd.sheets import CELLS_OF_FIVE, SCREEN_PIXELS
from models import EVERY_CONTEXT, ONE_MODEL, SLOW, both_models, every_context
from reading_sheets import are_in_a_column, are_in_a_row, place
from short_runs import one_process


def bare_gallery(**attributes) -> Gallery:
    """A gallery with these attributes only, besides those of a run whose processes draw by themselves."""
    gallery = object.__new__(Gallery)
    vars(gallery).update({"calls_match": False, "is_out_of_step": False} | attributes)
    return gallery


def subject(prompt: str, seed: int) -> Subject:
    return Subject(Request(prompt, (), (64, 64)), seed)


DRAWN = {
    "validation_steps": 2,
    "num_validation_images": 2,
    "max_train_steps": 4,
    "validation_prompt": ["a ball", "a box"],
}


# Sheets


@EVERY_CONTEXT
@SLOW
def test_the_sheets_show_what_the_stock_pipeline_draws(train, model, photos, tmp_path):
    succeed(train(**DRAWN, center_crop=True, checkpointing_steps=2))
    run = tmp_path / "run"
    stock = model.pipeline()
    retained = RETENTION_PROMPTS[:2]
    asked = [("a ball", 0), ("a ball", 1), ("a box", 0), ("a box", 1)]
    base = {pair: model.draw(stock, *pair) for pair in [*asked, (retained[0], 0), (retained[1], 1)]}
    with Image.open(photos / "1.png") as opened:
        picture = ImageOps.fit(opened.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    teacher = model.draw(stock, seed=1, **model.as_teacher(picture))
    assert are_in_a_row(run / "preview.png", base["a ball", 1], teacher, picture)

    drawn_at = {}
    for step in (2, 4):
        stock = model.pipeline()
        stock.load_lora_weights(run / f"checkpoint-{step}")
        student = {pair: model.draw(stock, *pair) for pair in base}
        assert all(student[pair] != base[pair] for pair in base)
        validation, retention = run / f"validation-{step}.png", run / f"retention-{step}.png"
        for seed in (0, 1):
            drawn = [images[prompt, seed] for prompt in ("a ball", "a box") for images in (base, student)]
            assert are_in_a_column(validation, *drawn)
            assert are_in_a_column(retention, base[retained[seed], seed], student[retained[seed], seed])
        for images in (base, student):
            assert are_in_a_row(validation, images["a ball", 0], images["a ball", 1])
            assert are_in_a_row(retention, images[retained[0], 0], images[retained[1], 1])
        drawn_at[step] = student
    for pair in (("a ball", 0), ("a box", 0), (retained[1], 1)):
        assert are_in_a_row(run / "story.png", base[pair], drawn_at[2][pair], drawn_at[4][pair])
    assert place(run / "story.png", picture)
    assert (run / "curves.png").stat().st_size > 10_000


@every_context(quick="flux2")
def test_the_rollout_sheet_shows_the_students_x0_above_the_teachers(train, model, photos, tmp_path):
    flags = {"validation_steps": 3, "max_train_steps": 3, "checkpointing_steps": 3, "num_validation_images": 1}
    succeed(train(**flags, center_crop=True, ema_decay=0))  # the teacher's weights are the student's
    pipeline = model.script.MODEL.pipeline_class.from_pretrained(model.path)
    pipeline.load_lora_weights(tmp_path / "run")
    with Image.open(photos / "0.png") as opened:
        picture = opened.convert("RGB")
    student = pipeline.encode_student(["a ball"], max_sequence_length=80)
    teacher = model.teacher_context(picture)
    schedule = pipeline.schedule(64, 64, 4)
    latents = torch.randn(1, *pipeline.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    columns = []
    with torch.no_grad():
        for index, timestep in enumerate(schedule.timesteps):
            sigma = schedule.sigmas[index]
            velocities = [pipeline.predict_velocity(latents, timestep, context) for context in (student, teacher)]
            x0 = [pipeline.decode(pipeline.image_latents(latents - sigma * velocity))[0] for velocity in velocities]
            columns.append(x0)
            latents = latents + (schedule.sigmas[index + 1] - sigma) * velocities[0]
    sheet = tmp_path / "run/rollout-3.png"
    assert all(are_in_a_column(sheet, *column) for column in columns)
    assert are_in_a_row(sheet, *[student_x0 for student_x0, _ in columns])


@ONE_MODEL
@SLOW
def test_the_story_of_many_validations_spans_the_run(train, model, tmp_path):
    flags = {"validation_steps": 1, "max_train_steps": 6, "num_validation_images": 1, "checkpointing_steps": 1}
    succeed(train(**flags, final_validation_prompt="a box"))
    images = []
    for step in (1, 6):
        stock = model.pipeline()
        stock.load_lora_weights(tmp_path / f"run/checkpoint-{step}")
        images.append(model.draw(stock, "a ball", 0))
    assert are_in_a_row(tmp_path / "run/story.png", *images, cell_pixels=CELLS_OF_FIVE)
    last = model.draw(stock, "a box", 0)
    assert place(tmp_path / "run/validation-6.png", last)
    heights = [Image.open(tmp_path / f"run/validation-{step}.png").height for step in (1, 5, 6)]
    assert heights[0] == heights[1] < heights[2]  # the final prompt comes at the end only


@ONE_MODEL
def test_without_validation_prompts_the_first_captions_are_drawn(train, tmp_path, model):
    succeed(train(validation_steps=2, num_validation_images=1))
    assert place(tmp_path / "run/validation-2.png", model.draw(model.pipeline(), "a ball", 0))


@ONE_MODEL
@SLOW
def test_images_have_the_validation_size(train, tmp_path, model):
    succeed(train(validation_steps=2, num_validation_images=1, validation_height=64, validation_width=96))
    drawn = model.draw(model.pipeline(), "a ball", 0, height=64, width=96)
    assert drawn.size == (96, 64) and place(tmp_path / "run/validation-2.png", drawn)


@pytest.mark.parametrize(
    ("num_validation", "num_retention", "shown", "retained"),
    [
        (2, 4, [0, 1], [0, 1, 2, 3]),
        (1, 40, [0], [0, 10, 20, 29, 39]),
        (20, 40, [0, 10, 19], [0, 20, 39]),
        (20, 2, [0, 6, 13, 19], [0, 1]),
        (20, 0, [0, 4, 8, 11, 15, 19], []),
    ],
)
def test_a_story_of_many_prompts_shows_some_of_each_kind(num_validation, num_retention, shown, retained):
    asked, kept = [f"v {n}" for n in range(num_validation)], [f"r {n}" for n in range(num_retention)]
    assert story_subjects(asked, kept) == ([f"v {n}" for n in shown], [f"r {n}" for n in retained])


def test_a_long_story_fits_a_screens_width_and_its_last_column_stands_out():
    prompts, retained, steps = [f"v {n}" for n in range(9)], [f"r {n}" for n in range(40)], range(250, 3001, 250)
    subjects = [subject(prompt, 0) for prompt in prompts]
    subjects += [subject(prompt, seed) for seed, prompt in enumerate(retained)]
    picture = Image.new("RGB", (1024, 1024))
    gallery = bare_gallery()
    gallery.settings = ValidationSettings(
        validation_prompt=prompts, retention_prompts=retained, validation_height=64, validation_width=64
    )
    gallery.data = SimpleNamespace(editing_requests=[], is_editing=False)
    gallery.story = {(step, subject): picture for step in steps for subject in subjects}
    gallery.base_drawings = {subject: Drawing(None, picture) for subject in subjects}
    gallery.folder, gallery.last_step, gallery.shown = Path("corgi"), 3000, []
    sheets = gallery.story_sheets()
    columns = ["base", *(f"after step {step}" for step in (250, 1250, 2000, 3000))]
    assert [sheet.columns for sheet in sheets] == [columns, columns]
    assert [sheet.accent_columns for sheet in sheets] == [[4], [4]]
    assert sum(len(sheet.rows) for sheet in sheets) == 6
    images = [sheet.draw() for sheet in sheets]
    assert {image.width for image in images} <= {*range(SCREEN_PIXELS + 1)}
    assert sum(image.height for image in images) < 2500


# Lessons


def lessons_gallery(*, from_lora: bool, cond_images: int = 0) -> tuple[Gallery, list[Sheet]]:
    """A gallery that draws one lesson, whose drawings are named by who drew them, and the sheets that it writes."""
    sheets: list[Sheet] = []
    drawn = {f"{who}_drawing": lambda *_, who=who: Drawing(None, who) for who in ("base", "student", "teacher")}
    picture = SimpleNamespace(teacher_caption=None)
    answers = {"caption": "a ball", "picture": picture, "crop": 0, "teacher_crop": 0, "request": None, "pixels": "own"}
    data = {name: lambda *_, value=value: value for name, value in answers.items()}
    data["cond_crops"] = lambda _: ["source"] * cond_images
    gallery = bare_gallery(from_lora=from_lora, lessons=[], lessons_step=0, shown=[0], **drawn)
    gallery.data, gallery.teacher_context = SimpleNamespace(**data), SimpleNamespace(description="it sees")
    gallery.share = lambda jobs, _: {key: job() for key, job in jobs.items()}
    gallery.examiner = SimpleNamespace(examine_student=lambda *_: None, standing="", student={})
    gallery.write = lambda name, step, sheet: sheets.append(sheet)
    return gallery, sheets


@pytest.mark.parametrize(
    ("from_lora", "step", "headings", "base", "began"),
    [
        (False, 0, ["base", "teacher: it sees"], "base", "began as the base and"),
        (True, 0, ["student before", "teacher: it sees"], "student", "began as the LoRA of --init_lora and"),
        (False, 5, ["base", "teacher now: it sees"], "base", "began as the base and"),
        (True, 5, ["base", "teacher now: it sees"], "base", "began as the LoRA of --init_lora and"),
    ],
)
def test_lessons_say_what_the_student_began_as_and_which_teacher_they_show(from_lora, step, headings, base, began):
    gallery, sheets = lessons_gallery(from_lora=from_lora)
    gallery.draw_lessons(step)
    gallery.write_lessons(7, [Drawing(None, "now")])
    (sheet,) = sheets
    assert sheet.columns == [*headings, "student", "the picture"] and began in sheet.note
    assert sheet.rows == [("a ball", [base, "teacher", "now", "own"])]


def test_what_an_editor_should_draw_is_called_the_result():
    gallery, sheets = lessons_gallery(from_lora=False, cond_images=1)
    gallery.draw_lessons(0)
    gallery.write_lessons(7, [])
    assert sheets[0].columns == ["to edit", "base", "teacher: it sees", "the result"]


def test_an_exam_of_an_earlier_run_does_not_remain(tmp_path):
    """Not even in a run that draws nothing."""
    removed = []
    gallery = bare_gallery(accelerator=one_process(), settings=ValidationSettings(validation_steps=0))
    gallery.examiner = SimpleNamespace(start=lambda: removed.append(True))
    gallery.draw_before_training(3)
    assert not removed
    gallery.draw_before_training(0)
    assert removed


# Retention


@SLOW
def test_retention_is_the_relative_distance_of_stock_latents(train, model, tmp_path):
    prompts = ["a red ball", "a blue box", "a green tree"]
    succeed(train(**DRAWN | {"retention_prompts": prompts}))
    history = read_history(tmp_path / "run")
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in history if "retention" in line] == [2, 4]

    stock = model.pipeline()
    pairs = list(enumerate(prompts))
    base = [model.sample(stock, prompt, seed) for seed, prompt in pairs]
    stock.load_lora_weights(tmp_path / "run")
    student = [model.sample(stock, prompt, seed) for seed, prompt in pairs]
    moved = sum((s - b).norm() for s, b in zip(student, base, strict=True)) / 3
    apart = ((base[0] - base[1]).norm() + (base[0] - base[2]).norm() + (base[1] - base[2]).norm()) / 3
    assert history[-1]["retention"] == pytest.approx((moved / apart).item(), rel=1e-4)
    assert history[-1]["retention"] > 0.01


@ONE_MODEL
def test_a_run_whose_retention_prompts_do_not_fit_measures_no_retention(train, tmp_path):
    flags = {"max_sequence_length": 40, "teacher_prompt_suffix": "", "validation_steps": 2, "num_validation_images": 1}
    log = succeed(train(**flags, trigger_word=["ball=box"])).log
    assert "so retention is not measured" in log and " failed (" not in log
    assert {path.name for path in tmp_path.glob("run/*.png")} == {
        *("preview.png", "validation-2.png", "lessons-2.png", "rollout-2.png", "story.png", "curves.png")
    }
    assert not [key for line in read_history(tmp_path / "run") for key in line if "retention" in key]


@pytest.mark.parametrize("extra", [{}, {"held_out": "a cat"}, {"held_out": "a cat", "wrong_word": "a kebidu"}])
def test_the_retention_sheet_says_which_prompts_its_figure_leaves_out(extra):
    gallery, sheets = bare_gallery(), []
    gallery.settings = ValidationSettings(retention_prompts=["a", "b"])
    gallery.extra_prompts, gallery.story = extra, {}
    gallery.write = lambda name, step, sheet: sheets.append(sheet)
    picture = Image.new("RGB", (64, 64))
    bases = [Drawing(torch.full((1, 1), float(number)), picture) for number in range(2 + len(extra))]
    figures = gallery.write_retention(3, {subject(f"p{n}", n): (base, base) for n, base in enumerate(bases)})
    assert figures == {"retention": 0} | {f"retention/{name}": 0 for name in extra}
    (sheet,) = sheets
    assert sheet.accent_rows == [1] and [label for label, _ in sheet.rows] == ["base", "student"]
    assert sheet.columns[2:] == [f"{name.replace('_', ' ')}: {prompt}" for name, prompt in extra.items()]
    ends = ["", " The last prompt is not part of this figure.", " The last 2 prompts are not part of this figure."]
    assert sheet.note.endswith(f"another prompt's picture is.{ends[len(extra)]}")


def test_evenly_spaced_items():
    assert evenly_spaced([1, 2, 3], 4) == [1, 2, 3]
    assert evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly_spaced([1, 2, 3, 4, 5], 2) == [1, 5]


@both_models(quick="zimage")
def test_drawing_changes_no_weight(train, tmp_path):
    flags = {"max_train_steps": 4, "lora_dropout": 0.3, "random_flip": True, "checkpointing_steps": 4}
    succeed(train("without", **flags))
    succeed(train("with", **flags, validation_steps=1, num_validation_images=1, retention_prompts=["a", "b"]))
    for folder in ("", "checkpoint-4"):
        assert same_weights(tmp_path / "without" / folder, tmp_path / "with" / folder)
    first, second = (load_file(tmp_path / name / "checkpoint-4/adapters.safetensors") for name in ("without", "with"))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


@ONE_MODEL
def test_preview_only_stops_before_the_first_step(train, tmp_path):
    log = succeed(train(validation_steps=1, preview_only=True)).log
    assert "Steps:" not in log
    assert (tmp_path / "run/preview.png").exists()
    assert not (tmp_path / "run" / LORA_FILE).exists()


@ONE_MODEL
@SLOW
def test_drawings_that_fail_lose_no_weights(train, tmp_path):
    for sheet in ("preview.png", "validation-1.png", "story.png"):
        (tmp_path / "run" / sheet).mkdir(parents=True)  # a folder, which a picture cannot replace
    log = succeed(train(**DRAWN | {"validation_steps": 1, "max_train_steps": 2})).log
    for message in (
        r"The preview failed \(.*preview.png could not be written .*\); the run continues",
        r"Validation at step 1 failed \(.*validation-1.png could not be written .*\); the run continues",
        r"The story failed \(.*story.png could not be written .*\); the weights are saved",
    ):
        assert re.search(message, log), log
    assert "Traceback" not in log
    assert (tmp_path / "run/validation-2.png").is_file()
    succeed(train("undisturbed", max_train_steps=2))
    assert same_weights(tmp_path / "run", tmp_path / "undisturbed")


@ONE_MODEL
def test_a_failed_preview_ends_a_preview_only_run(train, tmp_path):
    (tmp_path / "run/preview.png").mkdir(parents=True)
    error = train(validation_steps=1, preview_only=True).error
    assert "preview.png could not be written" in error


# Sharing among processes


NO_STOP = SimpleNamespace(is_set=False)


def share(jobs, process: int, others: list, stop=NO_STOP):
    """`Gallery.share` on one of two processes; the other's report is given."""
    accelerator = one_process(process_index=process, num_processes=2)
    gallery = bare_gallery(accelerator=accelerator, stop=stop)
    reports = []

    def gather(own):
        reports.extend(own)
        return others + own if process else own + others

    with patch("dopsd.drawing.gather_object", gather):
        return Gallery.share(gallery, jobs, "Drawing"), reports


def test_each_process_draws_its_share_and_gets_everything():
    drawn = []
    jobs = {name: lambda name=name: drawn.append(name) or name.upper() for name in "abcde"}
    results, reports = share(jobs, process=0, others=[({"b": "B", "d": "D"}, False, None)])
    assert drawn == ["a", "c", "e"] and reports == [({"a": "A", "c": "C", "e": "E"}, False, None)]
    assert list(results.items()) == [(name, name.upper()) for name in "abcde"]
    drawn.clear()
    share(jobs, process=1, others=[({"a": "A", "c": "C", "e": "E"}, False, None)])
    assert drawn == ["b", "d"]


def test_processes_that_share_weights_draw_everything_together():
    asked = []
    stop = SimpleNamespace(is_set_on_any=lambda accelerator: asked.append(accelerator) or len(asked) > 3)
    gallery = bare_gallery(accelerator=one_process(num_processes=2, process_index=1), stop=stop, calls_match=True)
    jobs = {name: name.upper for name in "abc"}
    assert gallery.share(jobs, "Drawing") == {"a": "A", "b": "B", "c": "C"}
    assert len(asked) == 3
    with pytest.raises(DrawingStopped):
        gallery.share(jobs, "Drawing")


def test_a_failed_drawing_ends_the_run_only_if_others_wait_for_this_process():
    stop = SimpleNamespace(is_set_on_any=lambda accelerator: False)
    gallery = bare_gallery(accelerator=one_process(num_processes=2), stop=stop, calls_match=True)
    with pytest.raises(ZeroDivisionError), gallery.guarded("Validation"):
        gallery.share({"a": lambda: 1 / 0}, "Drawing")
    gallery.is_out_of_step = False
    with gallery.guarded("Validation"):
        gallery.share({"a": lambda: "A"}, "Drawing")
        raise OSError("the sheet cannot be written")


def test_an_error_on_one_process_is_an_error_on_all():
    jobs = {"a": lambda: "A", "b": lambda: 1 / 0}
    with pytest.raises(DrawingFailed, match="division by zero"):
        share(jobs, process=0, others=[({}, False, "division by zero")])
    with pytest.raises(ZeroDivisionError):
        share(jobs, process=1, others=[({"a": "A"}, False, None)])


def test_a_stop_request_to_one_process_ends_the_drawing_on_all():
    jobs = {"a": lambda: "A", "b": lambda: "B"}
    with pytest.raises(DrawingStopped):
        share(jobs, process=0, others=[({}, True, "")])
    with pytest.raises(DrawingStopped):
        share(jobs, process=1, others=[({"a": "A"}, False, None)], stop=SimpleNamespace(is_set=True))


def test_base_drawings_stay_the_same_on_all_processes_if_a_drawing_fails():
    gallery = bare_gallery()
    gallery.base_drawings = {}
    gallery.base_drawing = lambda prompt, seed: f"base {prompt}"
    gallery.student_drawing = lambda prompt, seed: 1 / 0 if prompt == "b" else f"student {prompt}"
    gallery.accelerator, gallery.stop = one_process(), NO_STOP
    with pytest.raises(ZeroDivisionError):
        gallery.compare([("a", 0), ("b", 0)], "Drawing")
    assert gallery.base_drawings == {}  # another process has drawn other ones
    assert gallery.compare([("a", 0)], "Drawing") == {("a", 0): ("base a", "student a")}
    assert gallery.base_drawings == {("a", 0): "base a"}


def test_the_peak_of_memory_is_reset_after_drawing(monkeypatch):
    resets = []
    monkeypatch.setattr("dopsd.gallery.reset_peak_memory", lambda: resets.append(1))
    gallery = bare_gallery()
    gallery.settings, gallery.folder = ValidationSettings(validation_steps=0), Path("none")
    gallery.accelerator = one_process(is_main_process=False)
    gallery.draw_before_training(first_step=0)
    assert len(resets) == 1
    monkeypatch.setattr(Gallery, "draw_validation", lambda self, step: None)
    gallery.validate(1)
    assert len(resets) == 2
