"""The teacher's exam in whole runs, from the command line."""

import json

import pytest
from transformers import BertConfig, BertModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from command_line import succeed
from dopsd.history import read_history
from models import ONE_MODEL, SLOW, with_models
from reading_sheets import place


DRAWN = {"validation_steps": 1, "num_validation_images": 1, "retention_prompts": ["a", "b"]}
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**TINY, image_size=32, patch_size=8)).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessorPil(**crop).save_pretrained(folder)
    return folder


@ONE_MODEL
def test_a_resumed_run_measures_its_student_by_the_exam_before_the_first_step(train, tmp_path):
    run = tmp_path / "run"

    def examined() -> list[int]:
        return [line["step"] for line in read_history(run) if "student/sharpness" in line]

    log = succeed(train(**DRAWN, max_train_steps=1, checkpointing_steps=1)).log
    assert log.count("The teacher's exam:") == 1 and "\nVerdict: no better than the base (" in log
    before = (run / "exam.json").read_text()
    assert len(json.loads(before)["rows"]) == 3 and examined() == [1]
    flags = DRAWN | {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    log = succeed(train(**flags, max_train_steps=2)).log
    assert "The teacher's exam:" not in log and "The student's exam: " in log
    assert (run / "exam.json").read_text() == before and examined() == [1, 2]
    (run / "exam.json").write_text(before[:99])
    log = succeed(train(**flags, max_train_steps=3)).log
    assert "exam.json: is damaged (" in log and ", so the student's progress is not measured" in log
    assert examined() == [1, 2] and (run / "lessons-3.png").exists()


@ONE_MODEL
def test_a_preview_alone_compares_by_the_exam_model_and_never_fails(train, dino, tmp_path):
    log = succeed(train(**DRAWN, preview_only=True, ignore_exam=None, exam_model=dino)).log
    assert "in place  anywhere  features  sharpness" in log and "Verdict: " in log
    exam = json.loads((tmp_path / "run/exam.json").read_text())
    assert exam["exam_model"] == str(dino) and [*exam["average"]["leads"]] == ["in_place", "anywhere", "features"]


@with_models("flux2-vlm")
def test_a_loaded_tower_compares_too(train, tmp_path):
    assert "in place  anywhere  tower  " in succeed(train(**DRAWN, preview_only=True, no_context_cache=True)).log


@ONE_MODEL
@pytest.mark.parametrize("kind", ["missing", "of texts", "damaged"])
def test_an_exam_model_that_cannot_be_used_is_one_line_before_anything_is_loaded(train, dino, tmp_path, kind):
    folder = tmp_path / "model"
    if kind == "of texts":
        BertModel(BertConfig(**TINY, vocab_size=9)).save_pretrained(folder)
    elif kind == "damaged":
        folder.mkdir()
        for path in dino.iterdir():
            (folder / path.name).write_bytes(path.read_bytes()[:100])
    result = train(**DRAWN, exam_model=folder)
    assert f"error: --exam_model {folder}: " in result.error
    assert result.error.endswith("pass for example facebook/dinov2-small") and "Encoding" not in result.log


@ONE_MODEL
@SLOW
def test_an_exam_that_fails_costs_only_itself(train, dino, tmp_path):
    (tmp_path / "run/exam.json").mkdir(parents=True)
    log = succeed(train(**DRAWN, ignore_exam=None)).log
    assert "The exam failed (" in log and "exam.json could not be written" in log and "Traceback" not in log
    assert (tmp_path / "run/preview.png").exists() and (tmp_path / "run/validation-1.png").exists()


@ONE_MODEL
@SLOW
def test_with_init_lora_the_teacher_is_compared_with_the_student_before_training(train, model, tmp_path):
    succeed(train("first", max_train_steps=1, learning_rate=1e-2))
    flags = DRAWN | {"init_lora": tmp_path / "first", "checkpointing_steps": 1, "validation_prompt": ["a ball"]}
    log = succeed(train(**flags, max_train_steps=1)).log
    assert "\nstudent before " in log and "the student before training" in log
    base = model.draw(model.pipeline(), "a ball", 1)
    stock = model.pipeline()
    stock.load_lora_weights(tmp_path / "first")
    before = model.draw(stock, "a ball", 1)
    for sheet in ("preview.png", "lessons-1.png"):
        assert place(tmp_path / "run" / sheet, before) and not place(tmp_path / "run" / sheet, base)
    succeed(train(**flags, max_train_steps=2, resume_from_checkpoint="latest"))
    sheet = tmp_path / "run/lessons-2.png"
    assert place(sheet, base) and not place(sheet, before)
    assert json.loads((tmp_path / "run/exam.json").read_text())["from_lora"] is True


REFUSES = """
import runpy, sys
sys.path.insert(0, {root!r})
from dopsd.exam import examiner
examiner.stop_line = lambda exam, teacher: f"{{teacher}}: is no better"
runpy.run_path({script!r}, run_name="__main__")
"""


@ONE_MODEL
@SLOW
def test_both_processes_stop_if_the_teacher_is_no_better(torchrun, model, arguments, tmp_path):
    script = tmp_path / "refuses.py"
    names = {"root": str(model.script_path.parent), "script": str(model.script_path)}
    script.write_text(REFUSES.format(**names))
    process, log = torchrun(arguments("two", **DRAWN, ignore_exam=None), script)
    assert process.wait(timeout=120) != 0
    text = log.read_text()
    assert text.count("error: --teacher_context edit: is no better") == 2 and "Steps:" not in text
    report = (tmp_path / "two/report.html").read_text()
    assert (tmp_path / "two/preview.png").exists() and "stopped at step 0" in report
    assert "--teacher_context edit: is no better" in report
