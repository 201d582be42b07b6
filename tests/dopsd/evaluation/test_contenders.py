"""Which LoRAs are compared, whether they fit the base model, and that they are drawn as stock diffusers draws them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dopsd.errors import InputError
from dopsd.evaluation import drawing
from dopsd.evaluation.comparison import Contender, LoRA, Prompt
from dopsd.evaluation.contenders import all_contenders, check_loras, default_name, find_loras
from dopsd.evaluation.drawing import all_jobs, draw_missing, drawn_pictures
from dopsd.evaluation.pictures import Edited, PictureStore
from dopsd.evaluation.settings import EvaluationSettings
from dopsd.pretrained import transformer_skeleton
from lora_files import FILES, KLEIN, Z_IMAGE, a_and_b, adapter_metadata, pair
from models import ONE_MODEL, ZIMAGE, both_models
from pipelines.deployment import find_deployment
from tiny_klein import make_tiny_klein
from tiny_zimage import make_tiny_zimage


CPU = torch.device("cpu")


@pytest.fixture
def deployment(model):
    return find_deployment(model.path)


@pytest.fixture
def check(model, deployment):
    """Checks the LoRAs of these files or folders."""

    def run(*places) -> list[LoRA]:
        loras, _ = find_loras(EvaluationSettings(lora=[str(place) for place in places]))
        check_loras(loras, deployment, transformer_skeleton(deployment.transformer_class, model.path), "--lora")
        return loras

    return run


def is_z_image(model) -> bool:
    return "zimage" in model.script.__name__


def save_stock(path: Path, model, seed: int = 0) -> Path:
    """A LoRA as diffusers saves it."""
    shapes = Z_IMAGE if is_z_image(model) else KLEIN
    weights = {name: weight.roll(seed) for name, weight in a_and_b(shapes, "transformer.").items()}
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, adapter_metadata(shapes, "transformer."))
    return path


# Deployment


def test_a_distilled_checkpoint_is_drawn_as_it_is_deployed(klein_path, zimage_path, tmp_path):
    klein, z_image = find_deployment(klein_path), find_deployment(zimage_path)
    assert (klein.num_inference_steps, klein.guidance_scale, klein.needs_negative) == (4, 1.0, False)
    assert (z_image.num_inference_steps, z_image.guidance_scale, z_image.needs_negative) == (8, 0.0, False)
    assert klein.can_edit and not z_image.can_edit


def test_another_checkpoint_has_its_pipelines_defaults(tmp_path):
    klein = find_deployment(make_tiny_klein(tmp_path / "klein", is_distilled=False))
    z_image = find_deployment(make_tiny_zimage(tmp_path / "zimage", shift=6.0))
    assert (klein.num_inference_steps, klein.guidance_scale, klein.needs_negative) == (50, 4.0, True)
    assert (z_image.num_inference_steps, z_image.guidance_scale, z_image.needs_negative) == (50, 5.0, True)


def test_another_model_is_one_line(klein_path, tmp_path):
    for content in ("", "{}", '{"_class_name": "StableDiffusionPipeline"}'):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(InputError, match="^--pretrained_model_name_or_path ") as caught:
            find_deployment(tmp_path)
        assert "\n" not in str(caught.value)


# Names


def test_names_come_from_files_and_folders_and_differ(model, tmp_path):
    first = save_stock(tmp_path / "dog" / "pytorch_lora_weights.safetensors", model)
    second = save_stock(tmp_path / "dog" / "other.v2.safetensors", model, 1)
    given = [str(first.parent), str(first), f"mine={second}", str(second), f"base={first}"]
    loras, together = find_loras(EvaluationSettings(lora=given, together_with=f"style={second}"))
    assert [lora.name for lora in loras] == ["dog", "dog-2", "mine", "other.v2", "base-2"]
    assert loras[0].digest == loras[1].digest != loras[2].digest
    assert together == loras[2]  # the same file is the same LoRA


def test_a_path_with_an_equals_sign_is_no_name(model, tmp_path):
    path = save_stock(tmp_path / "a=b.safetensors", model)
    (lora,), _ = find_loras(EvaluationSettings(lora=[str(path)]))
    assert lora.path == path and lora.name == "a=b"
    assert default_name("someone/style-lora") == "style-lora"


def test_a_lora_is_not_drawn_together_with_itself(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(PLAIN, path)
    with pytest.raises(InputError, match=r"--together_with x=.*mine\.safetensors: is the LoRA of --lora itself"):
        find_loras(EvaluationSettings(lora=[str(path)], together_with=f"x={path}"))


def test_every_lora_is_drawn_at_every_strength_and_together():
    dog, cat, style = (LoRA(name, Path(name), name) for name in ("dog", "cat", "style"))
    roles = all_contenders([dog, cat], style, [0.5, 1.0])
    names = [contender.name for contender in roles]
    assert names == ["base", "dog", "cat", "style", "dog x0.5", "cat x0.5", "dog + style", "cat + style"]
    assert [len(found) for found in roles.values()] == [4, 4, 4, 2, 2, 2, 2, 2]
    assert "dog + dog" not in [one.name for one in all_contenders([dog, cat], dog, [1.0])]


# Whether they fit


@both_models(quick="flux2")
def test_files_of_all_programs_are_accepted(model, check, tmp_path):
    files = FILES["zimage" if is_z_image(model) else "flux2"]
    paths = [tmp_path / f"{program}.safetensors" for program in files]
    for path, make in zip(paths, files.values(), strict=True):
        save_file(make(), path)
    assert [lora.path for lora in check(*paths)] == paths


MODULE = "transformer.transformer_blocks.0.attn.to_q"
A, B = pair(32, 32, 0)
PLAIN = {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}
REFUSED = {
    "nothing": ({}, "it is not a LoRA that diffusers can read"),
    "a model": ({"transformer_blocks.0.attn.to_q.weight": A}, "it holds 1 tensors such as transformer_blocks"),
    "LoHa": ({f"{MODULE}.hada_w1_a": A, f"{MODULE}.hada_w1_b": B}, "it is not a LoRA that diffusers can read"),
    "not finite": ({f"{MODULE}.lora_A.weight": A * torch.nan, f"{MODULE}.lora_B.weight": B}, "is not finite"),
    "Z-Image's": (a_and_b(Z_IMAGE, "transformer."), "which this transformer does not have.; give a LoRA of"),
    "another size": (
        {f"{MODULE}.lora_A.weight": torch.ones(4, 48), f"{MODULE}.lora_B.weight": torch.ones(48, 4)},
        "it belongs to another model .*size mismatch",
    ),
    "another model's": (
        {f"lora_unet_down_blocks_0_attn.{name}.weight": A for name in ("lora_down", "lora_up")},
        "it changes nothing in the transformer",
    ),
}


@ONE_MODEL
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(check, tmp_path, case):
    weights, problem = REFUSED[case]
    path = tmp_path / "lora.safetensors"
    save_file({name: weight.clone() for name, weight in weights.items()}, path)
    with pytest.raises(InputError, match=f"^--lora {path}: .*{problem}") as caught:
        check(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@ONE_MODEL
def test_missing_and_damaged_files_are_one_line(check, tmp_path):
    damaged, folder = tmp_path / "damaged.safetensors", tmp_path / "folder"
    damaged.write_bytes(b"\xff" * 100)
    folder.mkdir()
    for place, problem in (
        (tmp_path / "none.safetensors", "there is no such file or folder"),
        (damaged, "its file is damaged"),
        (folder, "there is no .safetensors file"),
    ):
        with pytest.raises(InputError, match=f"^--lora {place}: .*{problem}"):
            check(place)
    for name in ("a", "b"):
        save_file(PLAIN, folder / f"{name}.safetensors")
    with pytest.raises(InputError, match="it holds 2 LoRAs"):
        check(folder)
    save_file(PLAIN, folder / "pytorch_lora_weights.safetensors")
    assert check(folder)[0].path.name == "pytorch_lora_weights.safetensors"


@ONE_MODEL
@pytest.mark.parametrize(
    "added, said",
    [
        ({"lora_unet_double_blocks_0_img_attn_proj.dora_scale": B}, "leaves out the magnitudes of this DoRA"),
        ({"text_encoder.layers.0.q.lora_A.weight": A}, "leaves out what it changes beside the transformer"),
        ({}, None),
    ],
)
def test_what_stock_diffusers_leaves_out_is_said(check, tmp_path, added, said, caplog):
    plain = PLAIN
    if "dora_scale" in "".join(added):
        layer = "lora_unet_double_blocks_0_img_attn_proj"
        plain = {f"{layer}.{name}.weight": weight for name, weight in (("lora_down", A), ("lora_up", B))}
    path = tmp_path / "mine.safetensors"
    save_file({name: weight.clone() for name, weight in (plain | added).items()}, path)
    check(path)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(said) and all(f"mine: stock diffusers {said}" in message for message in messages)


# Drawing


@pytest.fixture
def draw(model, deployment, tmp_path):
    """Draws prompts with contenders: -> Drawn."""

    def run(contenders, prompts, edited=(), folder="pictures", **changed):
        settings = EvaluationSettings(
            pretrained_model_name_or_path=str(model.path),
            num_inference_steps=deployment.num_inference_steps,
            mixed_precision="no",
            max_sequence_length=80,
            **{"num_seeds": 2} | changed,
        )
        store = PictureStore(tmp_path / folder, {}, (64, 64), edited)
        jobs = all_jobs(contenders, prompts, settings)
        num_drawn = draw_missing(jobs, store, deployment, settings, CPU)
        return drawn_pictures(jobs, store, contenders), num_drawn

    return run


def assert_same(path: Path, image) -> None:
    with Image.open(path) as saved:
        assert abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1


BALL, BOAT = (Prompt(text, text, "concept") for text in ("a ball", "a boat on the sea"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # the stock pipeline with two LoRAs
@both_models(quick="zimage")
def test_every_contender_draws_what_stock_diffusers_draws(model, draw, check, tmp_path):
    loras = check(save_stock(tmp_path / "one.safetensors", model), save_stock(tmp_path / "two.safetensors", model, 1))
    one, two = loras
    contenders = [Contender(), Contender((one,)), Contender((one,), 0.5), Contender((two,)), Contender((one, two))]
    drawn, num_drawn = draw(dict.fromkeys(contenders, ("concept",)), [BALL, BOAT])
    assert num_drawn == 20 and list(drawn) == contenders
    pictures = set()
    for contender in contenders:
        stock = model.pipeline()
        for lora in contender.loras:
            stock.load_lora_weights(str(lora.path), adapter_name=lora.name)
        if contender.loras:
            stock.set_adapters([lora.name for lora in contender.loras], [contender.strength] * len(contender.loras))
        for prompt in (BALL, BOAT):
            for seed, path in enumerate(drawn[contender][prompt]):
                assert_same(path, model.draw(stock, prompt.text, seed))
                pictures.add(path.read_bytes())
    assert len(pictures) == 20


@ONE_MODEL
def test_an_editor_draws_from_the_pictures_to_edit(model, draw, make_picture):
    images = (make_picture(0, 96, 64), make_picture(3, 64, 64))
    edited = [Edited(images, (64, 96), "both"), Edited(images[1:], (64, 64), "one")]
    prompts = [Prompt("make it red", "make it red", "concept", image) for image in (0, 1)]
    drawn, _ = draw({Contender(): ("concept",)}, prompts, edited)
    for prompt, own in zip(prompts, edited, strict=True):
        size = {"height": own.size[0], "width": own.size[1]}
        for seed, path in enumerate(drawn[Contender()][prompt]):
            assert_same(path, model.draw(model.pipeline(), prompt.text, seed, image=list(own.images), **size))


@ZIMAGE
def test_an_undistilled_checkpoint_is_drawn_with_its_guidance(model, tmp_path):
    path = make_tiny_zimage(tmp_path / "undistilled", shift=6.0)
    deployment = find_deployment(path)
    settings = EvaluationSettings(
        pretrained_model_name_or_path=str(path), num_inference_steps=2, mixed_precision="no", num_seeds=1
    )
    store = PictureStore(tmp_path / "pictures", {}, (64, 64))
    jobs = all_jobs({Contender(): ("concept",)}, [BALL], settings)
    draw_missing(jobs, store, deployment, settings, CPU)
    stock = model.stock.from_pretrained(path)
    assert_same(store.path(jobs[0]), model.draw(stock, BALL.text, 0, num_inference_steps=2, guidance_scale=5.0))


@ONE_MODEL
def test_the_batch_size_changes_nothing_and_only_what_is_missing_is_drawn(draw, monkeypatch):
    contenders = {Contender(): ("concept",)}
    whole, _ = draw(contenders, [BALL, BOAT], batch_size=4)
    single, _ = draw(contenders, [BALL, BOAT], batch_size=1, folder="single")
    for paths in zip(*(found[Contender()][BALL] for found in (whole, single)), strict=True):
        assert_same(paths[0], Image.open(paths[1]))
    gone = whole[Contender()][BOAT][1]
    gone.unlink()
    assert draw(contenders, [BALL, BOAT])[1] == 1 and gone.exists()
    monkeypatch.setattr(drawing, "load_pipeline", None)  # is not called
    assert draw(contenders, [BALL, BOAT])[1] == 0


@ONE_MODEL
def test_a_batch_that_does_not_fit_is_halved(draw, monkeypatch):
    tried = []
    draw_batch = drawing.Painter.draw_batch

    def limited(self, jobs):
        tried.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(self, jobs)

    monkeypatch.setattr(drawing.Painter, "draw_batch", limited)
    assert draw({Contender(): ("concept",)}, [BALL], num_seeds=7, batch_size=7)[1] == 7
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert all(first >= second for first, second in pairwise(tried))


@ONE_MODEL
def test_one_picture_that_does_not_fit_ends_the_drawing(draw, monkeypatch):
    def limited(self, jobs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drawing.Painter, "draw_batch", limited)
    with pytest.raises(torch.OutOfMemoryError):
        draw({Contender(): ("concept",)}, [BALL])


@ONE_MODEL
def test_the_pipeline_is_freed(draw, monkeypatch):
    kept = []
    loaded = drawing.load_pipeline
    monkeypatch.setattr(
        drawing, "load_pipeline", lambda *args, **options: kept.append(loaded(*args, **options)) or kept[-1]
    )
    draw({Contender(): ("concept",)}, [BALL])
    assert kept[-1].transformer is None and kept[-1].vae is None
