"""The store of drawings, and the pictures that are read."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dopsd.errors import InputError
from dopsd.evaluation import pictures
from dopsd.evaluation.comparison import Contender, LoRA, Prompt
from dopsd.evaluation.pictures import Edited, Job, PictureStore, read_edited, read_training_pictures, slug
from dopsd.evaluation.prompts import make_prompts
from dopsd.evaluation.settings import EvaluationSettings
from pipelines.published import KLEIN_SIZES


BASIS = {"model": "m", "num_inference_steps": 4}
DOG = LoRA("dog", Path("dog.safetensors"), "11")
PROMPT = Prompt("a sks: dog?", "a dog", "concept")
JOB = Job(Contender((DOG,)), PROMPT, 3)


@pytest.fixture
def store(tmp_path):
    return PictureStore(tmp_path / "pictures", BASIS, (64, 96))


def test_a_picture_is_found_by_what_it_depends_on_and_not_by_the_loras_name(store, make_picture, tmp_path):
    assert not store.has(JOB)
    store.save(JOB, make_picture(0, 96, 64))
    assert store.has(JOB) and store.path(JOB).parent.name == "dog" and "a-sks-dog-seed3" in store.path(JOB).name
    again = PictureStore(tmp_path / "pictures", BASIS, (64, 96))
    renamed = replace(JOB, contender=Contender((replace(DOG, name="corgi", path=Path("x")),)))
    assert again.has(renamed) and again.path(renamed) == store.path(JOB)


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, seed=4),
        replace(JOB, prompt=replace(PROMPT, text="a dog")),
        replace(JOB, contender=Contender((DOG,), 0.5)),
        replace(JOB, contender=Contender()),
        replace(JOB, contender=Contender((replace(DOG, digest="22"),))),
        replace(JOB, contender=Contender((DOG, replace(DOG, digest="22")))),
    ],
)
def test_other_pictures_have_other_keys(store, other):
    assert store.key(other) != store.key(JOB)


def test_the_key_covers_checkpoint_size_and_pictures_to_edit(tmp_path):
    folder = tmp_path / "pictures"
    key = PictureStore(folder, BASIS, (64, 96)).key(JOB)
    assert PictureStore(folder, BASIS, (64, 64)).key(JOB) != key
    assert PictureStore(folder, BASIS | {"num_inference_steps": 8}, (64, 96)).key(JOB) != key
    edit = replace(JOB, prompt=replace(PROMPT, image=0))
    keys = {PictureStore(folder, BASIS, (64, 96), [Edited((), (64, 96), digest)]).key(edit) for digest in "ab"}
    assert len(keys | {key}) == 3


def test_neither_role_nor_plain_words_matter_to_a_picture(store):
    assert store.key(replace(JOB, prompt=replace(PROMPT, role="unrelated", plain="x"))) == store.key(JOB)
    assert store.key(Job(Contender(strength=0.5), PROMPT, 0)) == store.key(Job(Contender(), PROMPT, 0))


@pytest.mark.parametrize("num_bytes", [0, 20, 300])
def test_a_damaged_picture_is_drawn_again(store, make_picture, num_bytes):
    store.save(JOB, make_picture(0, 96, 64))
    path = store.path(JOB)
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert not store.has(JOB)
    content = bytearray(num_bytes)
    path.write_bytes(content)
    assert not store.has(JOB)


def test_a_changed_byte_is_noticed_and_so_is_another_size(store, make_picture):
    store.save(JOB, make_picture(0, 96, 64))
    path = store.path(JOB)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not store.has(JOB)
    make_picture(0, 64, 96).save(path)
    assert not store.has(JOB)


def test_an_interrupted_save_leaves_nothing(store, make_picture, monkeypatch):
    def fail(self, path, **options):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        store.save(JOB, make_picture(0, 96, 64))
    assert list(store.path(JOB).parent.iterdir()) == []


def test_names_of_files_are_plain():
    assert slug("../A [V] dog: <b>") == "a-v-dog-b" and slug("狗") == "picture" and slug("x" * 99) == "x" * 40


# What is read


def test_training_pictures_need_no_captions(photos, tmp_path):
    read = read_training_pictures(EvaluationSettings(instance_data_dir=str(photos)))
    assert [image.size for image in read.images] == [(64, 64), (128, 72), (70, 110)]
    assert read.captions == [] and len(set(read.digests)) == 3


def test_the_prompt_that_all_pictures_were_trained_with_is_a_caption(photos):
    prompt = "a photo of sks dog"
    read = read_training_pictures(EvaluationSettings(instance_data_dir=str(photos), instance_prompt=prompt))
    assert read.captions == [prompt]
    drawn = make_prompts(evaluation_settings(), [prompt, "sks dog in the snow"], read.captions)
    assert [one.text for one in drawn if one.role == "concept"] == ["sks dog in the snow"]


def evaluation_settings() -> EvaluationSettings:
    return EvaluationSettings(kind="pet", trigger_word="sks", class_word="dog")


def test_captions_are_read_and_pictures_to_edit_are_no_training_pictures(make_picture, tmp_path):
    for number in range(4):
        make_picture(number).save(tmp_path / f"{number}.png")
    rows = [
        f'{{"file_name": "{n}.png", "from_file_name": "{n + 2}.png", "text": "edit {n}", "id": {n}}}' for n in range(2)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    settings = EvaluationSettings(instance_data_dir=str(tmp_path), cond_image_column=["from"])
    read = read_training_pictures(settings)
    assert len(read.images) == 2 and read.captions == ["edit 0", "edit 1"]


def test_many_pictures_are_thinned_evenly_and_large_ones_shrunk(make_picture, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURES", 3)
    monkeypatch.setattr(pictures, "MAX_SIDE", 32)
    for number in range(7):
        make_picture(number).save(tmp_path / f"{number}.png")
    read = read_training_pictures(EvaluationSettings(instance_data_dir=str(tmp_path)))
    whole = [pictures.decode(pictures.Picture("x", (), tmp_path / f"{number}.png")).digest for number in (0, 2, 4)]
    assert read.digests == whole and {image.size for image in read.images} == {(32, 32)}


def test_a_single_picture_is_too_few(make_picture, tmp_path):
    make_picture(0).save(tmp_path / "0.png")
    with pytest.raises(InputError, match=f"^--instance_data_dir {tmp_path}: holds only 1 training picture"):
        read_training_pictures(EvaluationSettings(instance_data_dir=str(tmp_path)))


def test_a_result_has_the_shape_of_the_picture_to_edit(make_picture, tmp_path):
    for number, size in enumerate([(128, 64), (70, 90)]):
        make_picture(number, *size).save(tmp_path / f"{number}.png")
    both = f"{tmp_path / '0.png'},{tmp_path / '1.png'}"
    settings = EvaluationSettings(validation_image=[both, str(tmp_path / "1.png")], height=64, width=64)
    first, second = read_edited(settings, KLEIN_SIZES)
    assert first.size == (64, 80) or first.size[0] * first.size[1] <= 64 * 96
    assert len(first.images) == 2 and first.images[0].size == first.size[::-1]
    assert len(second.images) == 1 and first.digest != second.digest
