"""What `--init_lora` accepts: files of other programs, at the strength that the stock pipeline gives them."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.init_lora import read_init_lora
from dopsd.lora_roles import StudentTeacherLoRA, adapter_options
from dopsd.pretrained import load_skeleton, load_transformer, open_pipeline
from lora_files import FILES, KLEIN, RANK, Z_IMAGE, a_and_b, adapter_metadata, pair
from models import ONE_MODEL, ZIMAGE
from short_runs import as_arguments


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def settings(model):
    def make(**flags):
        flags = {"pretrained_model_name_or_path": model.path, "report_to": "none", "rank": RANK, **flags}
        return parse_settings(model.script.MODEL, "", as_arguments(flags))

    return make


@pytest.fixture
def read(model, settings):
    """Reads a LoRA as a run with these flags does."""

    def call(name_or_path, cache_dir=None, **flags):
        chosen = settings(**flags)
        skeleton = load_skeleton(model.script.MODEL, chosen.model)
        options = adapter_options(chosen.lora, skeleton)
        return read_init_lora(model.script.MODEL, str(name_or_path), skeleton, options, cache_dir)

    return call


def name_of(model):
    return "zimage" if "zimage" in model.script.__name__ else "flux2"


def students_latents(model, settings, loaded, **flags):
    """Final latents of a student that starts from what `read_init_lora` returned."""
    chosen, kind = settings(**flags), model.script.MODEL
    pipeline, folder, _ = open_pipeline(kind, chosen.model, torch.float32)
    pipeline.text_encoder = model.pipeline().text_encoder
    pipeline.transformer = load_transformer(kind, chosen.model, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = adapter_options(chosen.lora, pipeline.transformer)
    roles = StudentTeacherLoRA(pipeline.transformer, **options)
    roles.load_lora(*loaded, origin="x")
    return model.sample(pipeline)


def check_strength(model, settings, read, path, program):
    shapes = Z_IMAGE if name_of(model) == "zimage" else KLEIN
    weights = FILES[name_of(model)][program]()
    save_file(weights, path, adapter_metadata(shapes, "transformer.") if program == "stock" else None)
    stock = model.pipeline()
    base = model.sample(stock)
    stock.load_lora_weights(path)
    expected = model.sample(stock)
    assert (expected - base).abs().max() > 0.01
    found = students_latents(model, settings, read(path, lora_alpha=8), lora_alpha=8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("program", ["stock", "ai-toolkit", "kohya"])
def test_files_of_other_programs_start_at_the_strength_of_the_stock_pipeline(model, settings, read, tmp_path, program):
    check_strength(model, settings, read, tmp_path / "lora.safetensors", program)


@ONE_MODEL
@pytest.mark.parametrize("program", ["PEFT", "fused"])
def test_peft_and_fused_files_start_at_the_strength_of_the_stock_pipeline(model, settings, read, tmp_path, program):
    check_strength(model, settings, read, tmp_path / "lora.safetensors", program)


@ZIMAGE
def test_a_peft_file_is_read_even_if_the_stock_pipeline_does_not_know_its_prefix(read, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(a_and_b(Z_IMAGE, "base_model.model."), path)
    weights, _ = read(path)
    assert weights.keys() == a_and_b(Z_IMAGE, "transformer.").keys()


@ONE_MODEL
def test_a_file_saved_from_the_transformer_has_no_prefix_and_keeps_its_strength(read, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(a_and_b(KLEIN, ""), path, adapter_metadata(KLEIN, ""))
    weights, metadata = read(path)
    assert weights.keys() == a_and_b(KLEIN, "transformer.").keys()
    assert metadata["transformer.lora_alpha"] == 2 * RANK


# What cannot be the start

MODULE = "transformer.transformer_blocks.0.attn.to_q"
A, B = pair(32, 32, 0)
PLAIN = {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}
EMPTY = torch.zeros(())

REFUSED = {
    "LoKr": ({f"{MODULE}.lokr_w1": A, f"{MODULE}.lokr_w2": B}, "it is a LoKr, from which a LoRA cannot start; give a"),
    "lycoris LoKr": ({"lycoris_double_blocks_0_img_attn_qkv.lokr_w1": A}, "it is a LoKr"),
    "LoHa": ({f"{MODULE}.hada_w1_a": A, f"{MODULE}.hada_w1_b": B}, "it is a LoHa"),
    "DoRA": (PLAIN | {f"{MODULE}.lora_magnitude_vector": B[:, 0]}, "it is a DoRA"),
    "kohya's DoRA": ({"lora_unet_x.lora_down.weight": A, "lora_unet_x.dora_scale": B}, "it is a DoRA"),
    "OFT": ({f"{MODULE}.oft_blocks": A}, "it is an OFT"),
    "nothing": ({}, "it holds no tensors"),
    "a checkpoint's": ({f"student.{MODULE}.lora_A.weight": A}, "it is a checkpoint's file; resume with"),
    "a model": ({"transformer_blocks.0.attn.to_q.weight": A}, "it is not a LoRA: it holds 1 tensors such as"),
    "not finite": ({f"{MODULE}.lora_A.weight": A * torch.nan, f"{MODULE}.lora_B.weight": B}, "is not finite"),
    "another model's": (
        {
            "transformer.layers.0.attention.to_q.lora_A.weight": A,
            "transformer.layers.0.attention.to_q.lora_B.weight": B,
        },
        "it changes layers.0.attention.to_q, which is no linear module of this transformer; give a plain LoRA of this",
    ),
    "SDXL's": (
        {f"lora_unet_down_blocks_0_attn.{name}.weight": A for name in ("lora_down", "lora_up")},
        "it changes nothing in the transformer",
    ),
    "FLUX.1's": (
        {
            f"lora_unet_double_blocks_0_img_{layer}.{name}.weight": weight
            for layer in ("mod_lin", "attn_proj")
            for name, weight in (("lora_down", A), ("lora_up", B))
        },
        "it belongs to another model, .*unknown lora_unet_double_blocks_0_img_mod_lin",
    ),
    "ai-toolkit's other": (
        {f"diffusion_model.blocks.0.cross_attn.q.{name}.weight": A for name in ("lora_A", "lora_B")},
        "it belongs to another model, or diffusers cannot read its format",
    ),
    "another size": (
        {f"{MODULE}.lora_A.weight": torch.ones(4, 48), f"{MODULE}.lora_B.weight": torch.ones(48, 4)},
        "its lora_A of transformer_blocks.0.attn.to_q has 48 channels, but the module has 32",
    ),
    "the text encoder's": (
        PLAIN | {"text_encoder.layers.0.q.lora_A.weight": A, "text_encoder.layers.0.q.lora_B.weight": B},
        "it also changes the text encoder, which is not trained",
    ),
    "biases": (PLAIN | {f"{MODULE}.lora_B.bias": B[:, 0]}, "lora_B.bias, which is no part of a plain LoRA"),
    "half": (
        {f"{MODULE}.lora_A.weight": A},
        "it holds only one of the two matrices of transformer_blocks.0.attn.to_q",
    ),
    "two ranks": (
        PLAIN
        | {
            f"transformer.transformer_blocks.1.attn.to_q.{name}.weight": torch.ones(32, 32)
            for name in ("lora_A", "lora_B")
        },
        "its modules have 2 different ranks, from 4 to 32; training has one",
    ),
}


@ONE_MODEL
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_of_this_model_is_said(read, tmp_path, case):
    weights, expected = REFUSED[case]
    path = tmp_path / "lora.safetensors"
    save_file({name: weight.clone() for name, weight in weights.items()}, path)
    with pytest.raises(InputError, match=f"^--init_lora {path}: .*{expected}") as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "--lora_layers" not in str(caught.value)


@ONE_MODEL
def test_a_lora_that_other_flags_fit_names_them(read, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(PLAIN, path)
    with pytest.raises(InputError, match="pass the LoRA's rank as --rank"):
        read(path, rank=8)
    with pytest.raises(InputError, match="choose --lora_layers that include"):
        read(path, lora_layers="to_k")
    assert read(path)[0].keys() == PLAIN.keys()


@ONE_MODEL
@pytest.mark.parametrize("alpha", ["x", None, [1], {}])
def test_damaged_metadata_are_one_line(read, tmp_path, capfd, alpha):
    path = tmp_path / "lora.safetensors"
    save_file(PLAIN, path, adapter_metadata([MODULE.removeprefix("transformer.")], "transformer.", alpha))
    with pytest.raises(InputError, match=f"^--init_lora {path}: "):
        read(path)
    assert capfd.readouterr().err == ""


# Which file


@ONE_MODEL
def test_a_folder_with_two_loras_names_them(read, tmp_path):
    save_file(PLAIN, tmp_path / "one.safetensors")
    assert read(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"x")
    assert read(tmp_path)
    save_file(PLAIN, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"it holds 2 LoRAs \(one.safetensors, two.safetensors\); name one of the"):
        read(tmp_path)


@ONE_MODEL
def test_a_runs_checkpoint_is_its_lora(read, tmp_path):
    save_file(PLAIN, tmp_path / "pytorch_lora_weights.safetensors")
    save_file(PLAIN, tmp_path / "adapters.safetensors")
    assert read(tmp_path)


@ONE_MODEL
def test_pickled_loras_are_refused(read, tmp_path):
    for name in ("pytorch_lora_weights.bin", "lora.pt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        torch.save(PLAIN, folder / name)
        for path in (folder, folder / name):
            with pytest.raises(
                InputError, match=f"^--init_lora {path}: .* pickled file, .*; convert it to safetensors$"
            ):
                read(path)


@ONE_MODEL
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (10**15).to_bytes(8, "little"), (40).to_bytes(8, "little")])
def test_a_damaged_lora_is_one_line(read, tmp_path, content):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^--init_lora {path}: no LoRA is found there") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@ONE_MODEL
def test_a_hub_id_is_read_from_the_given_cache(read, tmp_path):
    entry = tmp_path / "cache" / "models--someone--lora"
    snapshot = entry / "snapshots" / COMMIT
    for folder in (entry / "refs", snapshot):
        folder.mkdir(parents=True)
    (entry / "refs/main").write_text(COMMIT)
    save_file(PLAIN, snapshot / "lora.safetensors")
    weights, _ = read("someone/lora", cache_dir=str(tmp_path / "cache"))
    assert weights.keys() == PLAIN.keys()
    with pytest.raises(InputError, match="^--init_lora someone/lora: no LoRA is found there"):
        read("someone/lora", cache_dir=str(tmp_path / "other"))
    shutil.copy(snapshot / "lora.safetensors", snapshot / "another.safetensors")
    with pytest.raises(InputError, match=r"^--init_lora someone/lora: it holds 2 LoRAs \(another.safe"):
        read("someone/lora", cache_dir=str(tmp_path / "cache"))


@ONE_MODEL
def test_the_usual_name_is_taken_from_a_hub_repository_with_several_files(read, tmp_path, monkeypatch):
    asked = []

    def download(repository, name, cache_dir):
        asked.append((repository, name, cache_dir))
        save_file(PLAIN, tmp_path / name)
        return str(tmp_path / name)

    names = ["a.safetensors", "pytorch_lora_weights.safetensors", "checkpoint-1/pytorch_lora_weights.safetensors"]
    monkeypatch.setattr("dopsd.init_lora.HfApi.list_repo_files", lambda self, name: names)
    monkeypatch.setattr("dopsd.init_lora.hf_hub_download", download)
    assert read("someone/lora", cache_dir="somewhere")
    assert asked == [("someone/lora", "pytorch_lora_weights.safetensors", "somewhere")]
