import gc
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

from dopsd.contexts import Contexts, Encoding, summarize
from dopsd.data.buckets import Crop, Example, crop_image
from dopsd.data.images import read_image
from dopsd.data.order import Sample, SampleOrder
from dopsd.data.pictures import Picture, PictureFile
from dopsd.data.training_data import TrainingData
from dopsd.errors import InputError
from models import EVERY_CONTEXT, ONE_MODEL, SLOW
from short_runs import context_tensors, one_process, same_tensors
from tiny_vlm import make_tiny_vlm


# Encoders on the accelerator


@EVERY_CONTEXT
def test_encoders_are_on_the_accelerator_one_after_the_other_and_then_freed(model, prepare, tmp_path, monkeypatch):
    run = prepare(random_flip=True, center_crop=True)
    moves = []
    original = torch.nn.Module.to

    def record(module, *where, **kwargs):
        moves.append((type(module).__name__, *map(str, where)))
        return original(module, *where, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", record)
    accelerator = one_process("cpu:0")  # the same device as "cpu", told apart by its name
    run.contexts.device = accelerator.device
    run.fill_cache(tmp_path / "cache", accelerator)
    text_encoder, vae = model.script.MODEL.text_encoder_class.__name__, type(run.pipeline.vae).__name__
    moved = [move for move in moves if move[0] in (text_encoder, vae) and move[1:] in [("cpu:0",), ("cpu",)]]
    vae_moves = [(vae, "cpu:0"), (vae, "cpu")] if "vlm_model_name_or_path" not in model.flags else []
    assert moved == [(text_encoder, "cpu:0"), *vae_moves]
    assert run.pipeline.text_encoder is None
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) in (Qwen3VLVisionModel, Qwen3VLTextModel)]

    moves.clear()
    again = prepare(random_flip=True, center_crop=True)
    again.contexts.load_text_encoder = None
    again.fill_cache(tmp_path / "cache", accelerator)
    assert not [move for move in moves if "cpu:0" in move]


@EVERY_CONTEXT
def test_cached_contexts_are_what_the_pipeline_encodes(model, prepare, tmp_path):
    run = prepare(random_flip=True, center_crop=True)
    run.fill_cache(tmp_path / "cache", one_process())
    student, teacher = run.contexts.load([Sample(example=1, epoch=0, caption=0, flip=True)])
    pipeline = model.script.MODEL.pipeline_class.from_pretrained(model.path)
    picture = ImageOps.mirror(crop_image(read_image(run.data.pictures[1]), run.data.examples[1].framing, flip=False))
    expected = pipeline.encode_student(["a ball"], max_sequence_length=80)
    assert same_tensors(context_tensors(student), context_tensors(expected))
    assert same_tensors(context_tensors(teacher), context_tensors(model.teacher_context(picture)))


# What the cache holds


def other_vlm(model, folder, photos):
    text_config = AutoConfig.from_pretrained(model.path, subfolder="text_encoder")
    return {"vlm_model_name_or_path": make_tiny_vlm(folder / "vlm", text_config=text_config, seed=2)}


def other_text_encoder(model, folder, photos):
    changed, other = shutil.copytree(model.path, folder / "model"), model.make(folder / "other", seed=1)
    shutil.copytree(other / "text_encoder", changed / "text_encoder", dirs_exist_ok=True)
    return {"pretrained_model_name_or_path": changed}


def other_picture(model, folder, photos):
    pictures = shutil.copytree(photos, folder / "pictures")
    Image.new("RGB", (64, 64), "red").save(pictures / "0.png")
    return {"instance_data_dir": pictures}


# Name -> (changed flags or a function that makes them, models, "missing/needed" for each encoder, whether encodings
# of the same pictures and prompts change). Without a VLM, the student's and the teacher's prompts are two.
CHANGES = {
    "resolution": ({"resolution": 96}, ["flux2"], "0/2 3/3", True),
    "resolution, vlm": ({"resolution": 96}, ["flux2-vlm", "zimage"], "0/1 3/3", True),
    "precision": ({"mixed_precision": "bf16"}, ["flux2"], "2/2 3/3", True),
    "precision, vlm": ({"mixed_precision": "bf16"}, ["flux2-vlm", "zimage"], "1/1 3/3", True),
    "length": ({"max_sequence_length": 90}, ["flux2"], "2/2 0/3", True),
    "length, vlm": ({"max_sequence_length": 90}, ["flux2-vlm"], "1/1 3/3", True),
    "length without padding": ({"max_sequence_length": 90}, ["zimage"], "1/1 3/3", False),
    "layers": ({"text_encoder_out_layers": [8, 18, 27]}, ["flux2"], "2/2 0/3", True),
    "layers, vlm": ({"text_encoder_out_layers": [8, 18, 27]}, ["flux2-vlm"], "1/1 3/3", True),
    "text encoder": (other_text_encoder, ["flux2"], "2/2 3/3", True),
    "text encoder, vlm": (other_text_encoder, ["flux2-vlm", "zimage"], "1/1 3/3", True),
    "picture": (other_picture, ["flux2"], "0/2 1/3", True),
    "picture, vlm": (other_picture, ["flux2-vlm", "zimage"], "0/1 1/3", True),
    "flip": ({"random_flip": True}, ["flux2"], "0/2 3/6", True),
    "flip, vlm": ({"random_flip": True}, ["flux2-vlm", "zimage"], "0/1 3/6", True),
    "crop": ({"center_crop": True}, ["flux2"], "0/2 2/3", True),
    "crop, vlm": ({"center_crop": True}, ["flux2-vlm", "zimage"], "0/1 2/3", True),
    "suffix": ({"teacher_prompt_suffix": " so"}, ["flux2"], "1/2 0/3", True),
    "suffix, vlm": ({"teacher_prompt_suffix": " so"}, ["flux2-vlm", "zimage"], "0/1 3/3", True),
    "tower": (other_vlm, ["flux2-vlm", "zimage"], "0/1 3/3", True),
    "rope": ({"vlm_rope": "text_encoder"}, ["flux2-vlm", "zimage"], "0/1 3/3", True),
    "pixels": ({"vlm_min_pixels": 9216, "vlm_max_pixels": 9216}, ["flux2-vlm", "zimage"], "0/1 3/3", True),
    # The lower limit alone does not change these pictures.
    "min pixels": ({"vlm_min_pixels": 1024}, ["flux2-vlm", "zimage"], "0/1 3/3", False),
}


def count_missing(caplog) -> str:
    """ "missing/needed" for each encoder, from the log."""
    (line,) = [record.getMessage() for record in caplog.records if "Encoding " in record.getMessage()]
    return " ".join("/".join(counts) for counts in re.findall(r"(\d+) of (\d+) [a-z]", line))


CASES = [
    pytest.param(model, change, marks=[SLOW] if model == "flux2-vlm" else [])
    for change, (_, models, *_) in CHANGES.items()
    for model in models
]


@pytest.fixture(scope="session")
def plain_runs():
    """Model's flags -> cache folder and contexts of a run without changed flags."""
    return {}


@pytest.mark.parametrize(("model", "change"), CASES, indirect=["model"])
def test_a_cache_of_another_run_holds_no_wrong_encoding(
    model, prepare, photos, tmp_path, tmp_path_factory, plain_runs, caplog, change
):
    caplog.set_level("INFO")
    changed, _, missing, differs = CHANGES[change]
    if callable(changed):
        changed = changed(model, tmp_path, photos)
    if (kind := str(model.flags)) not in plain_runs:
        run, folder = prepare(), tmp_path_factory.mktemp("cache")
        run.fill_cache(folder, one_process())
        plain_runs[kind] = folder, run.all_contexts()
    folder, plain = plain_runs[kind]
    shutil.copytree(folder, tmp_path / "cache")
    caplog.clear()
    warm = prepare(**changed)
    warm.fill_cache(tmp_path / "cache", one_process())
    assert count_missing(caplog) == missing
    cold = prepare(**changed).encode_without_cache()
    assert same_tensors(warm.all_contexts(), cold.all_contexts())
    assert same_tensors(warm.all_contexts(), plain) != differs


@ONE_MODEL
def test_damaged_entries_are_encoded_again(prepare, tmp_path, caplog):
    caplog.set_level("INFO")
    run = prepare()
    run.fill_cache(tmp_path / "cache", one_process())
    before = run.all_contexts()
    half, flipped, gone = sorted((tmp_path / "cache").glob("*/*.safetensors"))[:3]
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    gone.unlink()
    caplog.clear()
    again = prepare()
    again.fill_cache(tmp_path / "cache", one_process())
    numbers = [counts.split("/") for counts in count_missing(caplog).split()]
    assert sum(int(missing) for missing, _ in numbers) == 3 and sum(int(needed) for _, needed in numbers) == 5
    assert same_tensors(again.all_contexts(), before)


def test_summary_counts_the_missing_encodings_of_each_kind():
    prompts, pictures = SimpleNamespace(noun="prompts"), SimpleNamespace(noun="pictures")
    needed = [Encoding(prompts, "a"), Encoding(prompts, "b"), Encoding(pictures)]
    assert summarize(needed[:1], needed) == "1 of 2 prompts and 0 of 1 pictures"


class NotFinite:
    """An encoder without finite results."""

    reads_prompt = True
    sees_picture = False

    def encode(self, prompt, pictures):
        return torch.tensor([1.0, float("inf")])


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float16, "use --mixed_precision bf16 or no"), (torch.bfloat16, "check the checkpoint's weights")],
)
def test_an_encoding_that_is_not_finite_is_refused(dtype, advice):
    data = SimpleNamespace(pixels=lambda crop: None)
    pipeline = SimpleNamespace(vae=SimpleNamespace(dtype=dtype))
    contexts = Contexts(pipeline, None, data, teacher_prompt_suffix="", load_text_encoder=None, device=None)
    with pytest.raises(InputError, match=f"^'a ball': its encoding is not finite; {advice}$"):
        contexts.encode(Encoding(NotFinite(), "a ball"))
    with pytest.raises(InputError, match=f"^7.png: its encoding is not finite; {advice}$"):
        contexts.encode(Encoding(NotFinite(), "a ball", (Crop(PictureFile("7.png", None), "", None),)))


def test_the_teachers_prompt_is_the_caption_with_the_suffix():
    pictures = [Picture("0.png", ("a ball", "a disc"), None), Picture("1.png", ("a box",), None, "a large box")]
    examples = [Example(number, 0, (64, 64), (0.5, 0.5)) for number in (0, 1)]
    order = SampleOrder(pictures, examples, batch_size=1, random_flip=True, seed=0)
    data = TrainingData(pictures, ["0", "1"], examples, order)
    reader = SimpleNamespace(reads_prompt=True, sees_picture=False)
    watcher = SimpleNamespace(reads_prompt=False, sees_picture=True)
    conditioning = SimpleNamespace(teacher=(reader, watcher))
    contexts = Contexts(None, conditioning, data, teacher_prompt_suffix="!", load_text_encoder=None, device=None)
    needed = [encoding for _, encoding in contexts.all_teacher_encodings()]
    assert [encoding.prompt for encoding in needed if encoding.encoder is reader] == [
        "a ball!",
        "a disc!",
        "a ball!",
        "a disc!",
        "a large box!",
        "a large box!",
    ]
    crops = {crop for encoding in needed if encoding.encoder is watcher for crop in encoding.pictures}
    assert {(crop.digest, crop.flip) for crop in crops} == {(name, flip) for name in "01" for flip in (False, True)}
