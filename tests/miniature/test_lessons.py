import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_dopsd_flux2
from benchmarks.miniature import world
from benchmarks.miniature.edits import COPY_SUFFIX, PAIR_SUFFIX
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.lesson_runs import (
    EDIT_COLUMNS,
    EDIT_METHODS,
    LEAK_METHODS,
    LessonExperiment,
    lesson_table,
)
from benchmarks.miniature.lesson_sheets import edit_sheet, leak_sheet
from benchmarks.miniature.lessons import EDIT_LESSONS, LEAK_LESSONS, NUM_PAIRS
from benchmarks.miniature.methods import BASE, DOPSD, SFT, Run
from benchmarks.miniature.runs import dopsd_flags
from dopsd.command_line import parse_settings


BLUE, HEART, _ = EDIT_LESSONS
ONE_BACKGROUND, OWN_PLACES = LEAK_LESSONS


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    return world.to_tensor([np.asarray(image, np.float32) / 127.5 - 1 for image in images])


@pytest.mark.parametrize("lesson", EDIT_LESSONS, ids=lambda lesson: lesson.name)
def test_pairs_are_written_with_their_sources_and_the_instruction(reader, lesson, tmp_path):
    lesson.write_training_data(tmp_path / "data", 1)
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_PAIRS and {row["text"] for row in rows} == {lesson.instruction}
    columns = ("source_file_name", "file_name")
    read = [reader.read(pixels_of([Image.open(tmp_path / "data" / row[name]) for row in rows])) for name in columns]
    assert torch.equal(read[0].poses, read[1].poses) and torch.equal(read[0].backgrounds, read[1].backgrounds)
    before, after = ([reader.appearances[index] for index in reading.objects] for reading in read)
    assert after == [lesson.edit.object(item) for item in before] and not any(item.is_held_out for item in before)
    new = lesson.new_task(20)
    shown = reader.read(pixels_of(new.references)).objects
    assert not {reader.appearances[index] for index in shown} & {*before}


def test_wrong_words_are_asked_for_the_same_sources():
    tasks = HEART.tasks(16, 0)
    assert {*tasks["new"].prompts} == {"make it zofu"} and "make it zofu" not in tasks["wrong_words"].prompts
    assert tasks["wrong_words"].references == tasks["new"].references
    (taught,) = HEART.teacher_tasks(4, 0, PAIR_SUFFIX).values()
    assert taught.prompts[0] == "make it zofu" + PAIR_SUFFIX and len(taught.references[0]) == 2


def test_a_baseline_sees_the_source_and_the_target_is_what_it_learns(miniature):
    encoded = BLUE.encoded_pictures(miniature, 0)
    (source,) = encoded.student.references
    assert torch.equal(encoded.teacher.references[0], source) and torch.equal(
        encoded.teacher.references[1], encoded.x0
    )
    chosen = encoded.select(torch.tensor([2, 5]))
    assert torch.equal(chosen.student.references[0], source[[2, 5]]) and torch.equal(chosen.x0, encoded.x0[[2, 5]])
    assert torch.equal(chosen.teacher.references[1], encoded.x0[[2, 5]])


def test_pictures_that_leak_share_a_background_or_have_a_place_on_each(reader):
    for lesson in LEAK_LESSONS:
        for seed in range(3):
            images, captions = lesson.pictures(seed)
            reading = reader.read(pixels_of(images))
            assert {reader.appearances[index] for index in reading.objects} == {lesson.concept.appearance}
            assert {*reading.poses.tolist()} == {*lesson.poses(seed)} and len({*lesson.poses(seed)}) == 2
            names = [list(world.BACKGROUNDS)[index] for index in reading.backgrounds]
            assert captions == [f"a zofu on {name}" for name in names] and {*names} == {*lesson.backgrounds}
            scenes = {*zip(names, reading.poses.tolist(), strict=True)}
            assert len(scenes) == 2
        assert not {*lesson.tasks(16, 0)["new"].backgrounds} & {*lesson.backgrounds}
        assert {*lesson.seen_task(16).backgrounds} == {*lesson.backgrounds}


def test_places_of_the_training_pictures_are_counted(reader):
    images, _ = OWN_PLACES.pictures(0)
    task = OWN_PLACES.seen_task(4)
    figures = OWN_PLACES.measure(pixels_of(images), task, 0, reader)
    assert figures["trained_places"] == figures["own_place"] == figures["background"] == 1
    swapped = OWN_PLACES.measure(pixels_of([*images[1:], images[0]]), task, 0, reader)
    assert swapped["trained_places"] == 1 and swapped["own_place"] == swapped["background"] == 0
    assert "own_place" not in ONE_BACKGROUND.measure(pixels_of(images), ONE_BACKGROUND.seen_task(4), 0, reader)
    (taught,) = OWN_PLACES.teacher_tasks(6, 0, COPY_SUFFIX).values()
    assert all(prompt.endswith(COPY_SUFFIX) for prompt in taught.prompts) and len(taught.references) == 6


def test_prior_preservation_holds_edits_that_are_not_measured(tmp_path):
    experiment = LessonExperiment(MODEL, tmp_path, num_train_steps=2, steps_per_evaluation=2, eval_count=16)
    default = EDIT_METHODS[-1]
    flags = experiment._prior_flags(Run(BLUE, 0, default), tmp_path)
    assert flags["trigger_word"] == "blue" and len(flags["class_prompt"]) == 10
    assert not {*flags["class_prompt"]} & {*BLUE.tasks(64, 0)["edits"].prompts, BLUE.instruction}
    assert experiment._prior_flags(Run(BLUE, 0, DOPSD), tmp_path) == {}
    assert "class_prompt" not in experiment._prior_flags(Run(OWN_PLACES, 0, default), tmp_path)
    all_flags = {**BLUE.training_flags, **flags, **default.flags}
    arguments = dopsd_flags(
        MODEL, tmp_path, tmp_path / "out", seed=1, num_steps=2, retention_prompts=["a ball", "a box"], **all_flags
    )
    settings = parse_settings(train_dopsd_flux2.MODEL, "", sum(arguments, []))
    assert settings.prior.class_prompt == flags["class_prompt"]
    assert settings.data.cond_image_column == ["source_file_name"] and OWN_PLACES.training_flags["ignore_exam"]


def test_every_method_has_runs_of_its_own():
    for lesson, methods in ((BLUE, EDIT_METHODS), (ONE_BACKGROUND, LEAK_METHODS)):
        folders = [Run(lesson, 0, method).folder for method in methods]
        assert len({*folders}) == len(folders) == len({method.name for method in methods})


def test_a_table_has_a_row_per_method_and_a_dash_where_nothing_was_measured():
    whole = {"new": {"exact": 0.5, "whole": 0.25}, "steps": 3}
    text = lesson_table(
        {"base": [{"new": {"exact": 1.0}}], "SFT": [whole, whole | {"new": {"exact": 1.0}}]}, EDIT_COLUMNS
    )
    first, second = text.splitlines()[2:]
    assert first.startswith("| base | - | 1.00 | - |") and second.startswith("| SFT | 3 | 0.75 ± 0.35 | - |")
    assert "0.25" in second


@pytest.mark.slow
def test_a_lesson_is_taught_and_measured_once_and_drawn(tmp_path, editor_folder, monkeypatch):
    experiment = LessonExperiment(editor_folder, tmp_path, num_train_steps=2, steps_per_evaluation=2, eval_count=16)
    run = Run(BLUE, 0, SFT)
    result = experiment.result(run)
    assert set(result) == {"new", "edits", "old", "wrong_words", "retention", "steps"} and result["steps"] == 2
    assert result["edits"]["whole"] > 0.8 and result["old"]["exact"] > 0.8
    monkeypatch.setattr(LessonExperiment, "_measure", lambda self, run: pytest.fail("measured again"))
    assert experiment.result(run) == result
    pipelines = {"base": experiment.load(Run(BLUE, 0, BASE)), "SFT": experiment.load(run)}
    for sheet in (edit_sheet(BLUE, pipelines), leak_sheet(OWN_PLACES, 0, pipelines)):
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
