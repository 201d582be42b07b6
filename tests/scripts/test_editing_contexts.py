"""Editing pairs: what student and teacher see is what the stock pipeline makes of `image=`; the cache."""

import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image, ImageOps

from data_helpers import warnings_in
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.prefetch import InputReader, MicroBatch
from dopsd.resuming import COND_IMAGES, check_resumable
from dopsd.rollout import rollout, seeded_noise
from editing_pairs import opened, read_rows, write_pairs, write_rows
from models import ONE_MODEL, SLOW, SUFFIX, with_models
from short_runs import context_tensors, one_process, same_tensors


MODEL_WITH_VLM = with_models("flux2-vlm")


@ONE_MODEL
@pytest.mark.parametrize(
    ("size", "cond_sizes"),
    [
        ((64, 64), [(64, 96)]),
        ((64, 64), [(128, 128), (70, 110)]),  # the first has the result's shape
        pytest.param((64, 96), [(1050, 1010), (64, 64)], marks=SLOW),  # above a megapixel
    ],
)
def test_student_and_teacher_draw_what_the_stock_pipeline_draws(
    prepare, model, make_picture, tmp_path, size, cond_sizes
):
    flags = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,96"}
    run = prepare(**write_pairs(tmp_path / "pairs", make_picture, (size, cond_sizes)), **flags)
    run.encode_without_cache()
    (sample,) = run.data.shown(1)
    student, teacher = run.contexts.load([sample])
    stock, pipeline = model.pipeline(), run.pipeline
    pipeline.transformer = stock.transformer
    noise, schedule = seeded_noise(pipeline.latent_shape(*size), [3]), pipeline.schedule(*size, 4)
    velocities = [partial(pipeline.predict_velocity, context=context) for context in (student, teacher)]
    with torch.no_grad():
        *_, last = rollout(*velocities, noise, schedule)

    sources = [opened(tmp_path / f"pairs/0-{index}.png") for index in range(len(cond_sizes))]
    if cond_sizes[0] == (128, 128):
        sources[0] = ImageOps.fit(sources[0], (64, 64), Image.Resampling.LANCZOS)
    drawn = {"prompt": "edit 0", "image": sources, "height": size[0], "width": size[1], "latents": noise}
    expected = model.sample(stock, **drawn)
    assert torch.equal(pipeline.image_latents(last.next_latents), expected)
    images = [*sources, opened(tmp_path / "pairs/0.png")]
    expected = model.sample(stock, **drawn | {"prompt": "edit 0" + SUFFIX, "image": images})
    assert torch.equal(pipeline.sample(teacher, noise, 4), expected)


@ONE_MODEL
def test_batches_hold_results_and_sources_of_one_size(prepare, make_picture, tmp_path, caplog):
    sizes = [(64, 64), (64, 96), (64, 64), (96, 64), (64, 64), (64, 96)]
    pairs = [((64, 64), [size, (128, 64)]) for size in sizes] + [((64, 64), [(64, 64)])]
    run = prepare(**write_pairs(tmp_path / "pairs", make_picture, *pairs), train_batch_size=2, random_flip=True)
    run.encode_without_cache()
    batches = [run.data.order.batch(place) for place in range(run.data.order.num_batches)]
    assert sorted(map(len, batches)) == [1, 1, 1, 2, 2]
    for batch in batches:
        contexts = run.contexts.load(batch)
        counts = {len(run.data.cond_crops(sample)) for sample in batch}
        for context, more in zip(contexts, (0, 1), strict=True):
            assert {len(context.references)} == {count + more for count in counts}
            assert {len(reference) for reference in context.references} == {len(batch)}
        for index, sample in enumerate(batch):  # each sample has its own pictures
            alone = run.contexts.student([run.data.caption(sample)], [run.data.cond_crops(sample)])
            parts = [tensor[index : index + 1] for tensor in context_tensors(contexts[0])]
            assert same_tensors(context_tensors(alone), parts)
    (warning,) = [line for line in warnings_in(caplog) if "pairs" in line]
    assert warning.startswith(
        "[RANK 0] 1.png: the picture to edit is 64x96 pixels and has another shape than the result, 64x64 "
    )
    assert "so it is in 3 of 7 pairs. From such pairs the model may learn to zoom" in warning


# Teachers


@MODEL_WITH_VLM
def test_the_tower_sees_sources_and_result_in_order(prepare, model, make_picture, tmp_path):
    flags = write_pairs(tmp_path / "pairs", make_picture, ((64, 64), [(64, 96), (64, 64)]), prompt="x")
    run = prepare(**flags, max_sequence_length=100).encode_without_cache()
    student, teacher = run.contexts.load(run.data.shown(1))
    pipeline = model.script.MODEL.pipeline_class.from_pretrained(model.path)
    pictures = [opened(tmp_path / f"pairs/{name}.png") for name in ("0-0", "0-1", "0")]
    seen = [pictures, pictures[::-1]]
    options = {"vision_encoder": model.vision_encoder(pipeline), "max_sequence_length": 100}
    expected, reversed_order = (pipeline.encode_vlm_teacher(["x 0" + SUFFIX], [one], **options) for one in seen)
    assert torch.equal(teacher.prompt_embeds, expected.prompt_embeds)
    assert not torch.equal(teacher.prompt_embeds, reversed_order.prompt_embeds)
    references = [pipeline.encode_reference(picture) for picture in pictures[:2]]
    assert same_tensors(list(teacher.references), references) and same_tensors(list(student.references), references)


@MODEL_WITH_VLM
def test_too_many_pictures_for_the_tower_are_one_line(prepare, make_picture, tmp_path):
    flags = write_pairs(tmp_path / "pairs", make_picture, ((64, 64), [(64, 64)]), ((64, 64), [(64, 64)] * 8))
    with pytest.raises(InputError) as caught:
        prepare(**flags).resolve_prompts()
    assert str(caught.value).startswith("1.png, the teacher's prompt: 'edit 1 like this' is ")
    assert " tokens long with 9 pictures and the chat template; the limit is 80 " in str(caught.value)
    assert str(caught.value).endswith(
        "shorten the caption or --teacher_prompt_suffix, or lower --vlm_min_pixels and --vlm_max_pixels"
    )


@ONE_MODEL
@pytest.mark.parametrize("has_results", [True, False])
def test_a_teacher_that_reads_more_sees_what_the_student_edits(prepare, make_picture, tmp_path, has_results):
    flags = write_pairs(tmp_path / "pairs", make_picture, ((96, 64), [(96, 64)]), prompt="x")
    (row,) = read_rows(tmp_path / "pairs")
    if not has_results:
        (tmp_path / "pairs" / row.pop("file_name")).unlink()
    write_rows(tmp_path / "pairs", [row | {"long": "in detail"}])
    flags |= {"teacher_context": "caption", "teacher_caption_column": "long"}
    flags |= {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;96,64"}
    run = prepare(**flags).encode_without_cache()
    (sample,) = run.data.shown(1)
    assert run.data.bucket(sample) == (96, 64)
    student, teacher = run.contexts.load([sample])
    assert same_tensors(list(student.references), list(teacher.references)) and len(student.references) == 1
    alone = run.contexts.student(["in detail" + SUFFIX])
    assert torch.equal(teacher.prompt_embeds, alone.prompt_embeds)
    assert not torch.equal(student.prompt_embeds, alone.prompt_embeds)


@ONE_MODEL
def test_defaults_of_the_teacher_are_those_of_pairs(model):
    base = ["--pretrained_model_name_or_path", "a/model"]
    pairs = [*base, "--cond_image_column", "source"]
    for context in ("edit", "vlm"):
        plain, editing = (
            parse_settings(model.script.MODEL, "", [*flags, "--teacher_context", context]).teacher
            for flags in (base, pairs)
        )
        assert "the result of this edit" in editing.teacher_prompt_suffix
        assert "the result of this edit" not in plain.teacher_prompt_suffix
    assert (editing.vlm_min_pixels, editing.vlm_max_pixels) == (384 * 384, 384 * 384)
    assert (plain.vlm_min_pixels, plain.vlm_max_pixels) == (512 * 512, 512 * 512)
    given = parse_settings(model.script.MODEL, "", [*pairs, "--teacher_prompt_suffix", "!"]).teacher
    assert given.teacher_prompt_suffix == "!"


# The cache


@ONE_MODEL
def test_the_cache_holds_each_source_once_and_another_one_anew(prepare, make_picture, tmp_path):
    flags = write_pairs(tmp_path / "pairs", make_picture, *[((64, 64), [(64, 96), (64, 64)])] * 2)
    rows = read_rows(tmp_path / "pairs")
    rows[1]["source"][0] = rows[0]["source"][0]
    (tmp_path / "pairs/1-0.png").unlink()
    write_rows(tmp_path / "pairs", rows)

    def added(**more) -> int:
        run, before = prepare(**flags, **more), {*(tmp_path / "cache").rglob("*.safetensors")}
        run.fill_cache(tmp_path / "cache", one_process())
        cold = prepare(**flags, **more).encode_without_cache()
        assert same_tensors(run.all_contexts(), cold.all_contexts())
        return len({*(tmp_path / "cache").rglob("*.safetensors")} - before)

    assert added() == 4 + 3 + 2  # prompts, pictures to edit, results
    assert added() == 0
    make_picture(17, 64, 64).save(tmp_path / "pairs/1-1.png")
    assert added() == 1
    rows[0]["source"].reverse()
    write_rows(tmp_path / "pairs", rows)
    assert added() == 0
    assert added(random_flip=True) == 3 + 2


# Instructions that are held


@ONE_MODEL
def test_instructions_are_held_on_the_pictures_to_edit(prepare, make_picture, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house\na tree\na car\n")
    flags = write_pairs(tmp_path / "pairs", make_picture, *[((64, 64), [(64, 96)])] * 3)
    flags |= {"with_prior_preservation": True, "prior_prompts": prompts, "class_prompt": ["make it red", "erase it"]}
    run = prepare(**flags, train_batch_size=2).encode_without_cache()
    prior = run.prior
    assert prior.instructions == ("make it red", "erase it") and prior.unrelated == ("a house", "a tree")
    assert prior.trained == ["a house", "a tree", "make it red", "erase it"]
    reader = InputReader(run.pipeline, run.contexts, prior, seed=0, device=torch.device("cpu"))
    batch, seen = run.data.order.batch(0), set()
    sources = run.contexts.student(["x"] * len(batch), [run.data.cond_crops(sample) for sample in batch]).references
    for place in range(10):
        held = reader.read(MicroBatch(place, batch, 1.0, has_prior=True))[1].student
        drawn = prior.draw(0, place, len(batch), have_one_kind=True)
        assert torch.equal(held.prompt_embeds, run.contexts.student(drawn).prompt_embeds)
        kinds = {prior.is_unrelated(prompt) for prompt in drawn}
        assert len(kinds) == 1
        assert same_tensors(list(held.references), [] if kinds.pop() else list(sources))
        seen |= {*drawn}
    assert seen == {*prior.trained}
    without_pairs = prepare(with_prior_preservation=True, class_prompt="erase it", prior_prompts=prompts).prior
    assert without_pairs.instructions == () and without_pairs.unrelated == ("erase it", "a house", "a tree")


@ONE_MODEL
def test_another_kind_of_the_same_prompts_is_another_prior(prepare, make_picture, tmp_path):
    listed, fewer = tmp_path / "listed.txt", tmp_path / "fewer.txt"
    listed.write_text("a house\nerase it\na car\n")
    fewer.write_text("a house\na car\n")
    flags = write_pairs(tmp_path / "pairs", make_picture, ((64, 64), [(64, 64)])) | {"with_prior_preservation": True}
    text = prepare(**flags, prior_prompts=listed, class_prompt="paint it")
    instruction = prepare(**flags, prior_prompts=fewer, class_prompt=["erase it", "paint it"])
    assert text.prior.trained == instruction.prior.trained
    contracts = [run.resume_contract()["prior preservation"] for run in (text, instruction)]
    assert contracts[0] != contracts[1]


# Resuming


@ONE_MODEL
def test_other_sources_are_named(prepare, make_picture, tmp_path):
    folder, checkpoint = tmp_path / "pairs", tmp_path / "checkpoint-2"
    flags = write_pairs(folder, make_picture, *[((64, 64), [(64, 96)])] * 2)
    checkpoint.mkdir()
    contract = prepare(**flags).resume_contract()

    def refusal(saved=contract, **changed) -> str:
        (checkpoint / "state.json").write_text(json.dumps({"step": 2, "settings": saved}))
        with pytest.raises(InputError) as caught:
            check_resumable(checkpoint, prepare(**flags | changed).resume_contract(), max_train_steps=2)
        return str(caught.value).removeprefix("--resume_from_checkpoint checkpoint-2: ")

    rows, first = read_rows(folder), shutil.copy(folder / "1-0.png", tmp_path / "first.png")
    make_picture(9, 96, 64).save(folder / "1-0.png")
    named = "1.png has other pictures to edit than before (pictures affected: 1); undo that, or start in another"
    assert refusal().startswith(named)
    shutil.copy(first, folder / "1-0.png")
    for sources in (["1-0.png", "0-0.png"], ["0-0.png", "1-0.png"]):
        write_rows(folder, [rows[0], rows[1] | {"source": sources}])
        assert refusal().startswith(named)
    write_rows(folder, rows)
    check_resumable(checkpoint, prepare(**flags).resume_contract(), max_train_steps=2)
    plain = {name: value for name, value in contract.items() if name != COND_IMAGES}
    assert refusal(plain).startswith("it had no pictures to edit (--cond_image_column); pass the same")
