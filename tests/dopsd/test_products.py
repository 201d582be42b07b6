"""What a run of whole models leaves: the transformer, the pipeline around it, a LoRA of the change."""

import errno
import hashlib
import itertools
import os
import shutil
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file

import train_dopsd_flux2
from dopsd.errors import InputError
from dopsd.output import extracted_lora, tidy_output_dir
from dopsd.products import PipelineFolder
from dopsd.publish import publish, published_files
from models import SLOW, both_models
from short_runs import default_settings


MODEL = train_dopsd_flux2.MODEL
PARTS = {"scheduler", "text_encoder", "tokenizer", "vae"}


def make_product(source: Path, dtype: torch.dtype = torch.float32, model=MODEL, **flags) -> PipelineFolder:
    settings = default_settings(train_mode="full", pretrained_model_name_or_path=str(source), **flags)
    return PipelineFolder(model, settings, source, dtype)


def student(source: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """All weights, changed in every place."""
    torch.manual_seed(seed)
    weights = load_file(source / "transformer/diffusion_pytorch_model.safetensors")
    return {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(folder: Path, **options) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def holds(pipeline, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())


# The pipeline


def test_the_folder_is_a_pipeline_with_the_students_transformer(klein_path, tmp_path):
    before, weights = digests(klein_path), student(klein_path)
    product = make_product(klein_path)
    product.finish(weights, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PARTS | {"transformer", "model_index.json"}
    pipeline = load(tmp_path)
    assert holds(pipeline, weights)
    same = {name for name, digest in digests(tmp_path).items() if before[name] == digest}
    assert same == {name for name in before if not name.startswith("transformer/diff")}
    assert product.loading_line(tmp_path).endswith(f'Flux2KleinPipeline.from_pretrained("{tmp_path}")')
    # Weights take no room. Other files may be edited without a change of the source, and so may the whole folder.
    assert (tmp_path / "vae/diffusion_pytorch_model.safetensors").samefile(
        klein_path / "vae/diffusion_pytorch_model.safetensors"
    )
    for path in tmp_path.rglob("*"):
        assert not path.is_symlink()
        if path.is_file() and path.suffix != ".safetensors":
            assert path.stat().st_nlink == 1
    with torch.no_grad():
        next(pipeline.vae.parameters()).fill_(0)
    pipeline.save_pretrained(tmp_path)
    assert digests(klein_path) == before


def test_large_transformers_are_in_shards(klein_path, tmp_path, monkeypatch):
    small = partialmethod(Flux2Transformer2DModel.save_pretrained, max_shard_size="30KB")
    monkeypatch.setattr(Flux2Transformer2DModel, "save_pretrained", small)
    weights = student(klein_path)
    make_product(klein_path).finish(weights, tmp_path / "first")
    shards = [path.name for path in (tmp_path / "first/transformer").glob("*.safetensors")]
    assert len(shards) > 1 and "transformer/diffusion_pytorch_model.safetensors.index.json" in published_files(
        tmp_path / "first"
    )
    assert holds(load(tmp_path / "first"), weights)
    # They can be trained further, and fewer of them replaced.
    monkeypatch.undo()
    again = {name: weight + 1e-2 for name, weight in weights.items()}
    make_product(tmp_path / "first", extract_lora=2).finish(again, tmp_path / "second")
    assert holds(load(tmp_path / "second"), again)
    assert extracted_lora(tmp_path / "second").rank == 2
    make_product(klein_path).finish(weights, tmp_path / "first")
    assert len(list((tmp_path / "first/transformer").iterdir())) == 2
    assert holds(load(tmp_path / "first"), weights)


def test_variants_keep_their_names(klein_path, tmp_path):
    source = tmp_path / "source"
    load(klein_path).save_pretrained(source, variant="half")
    load(klein_path).vae.save_pretrained(source / "vae")
    weights = student(klein_path)
    product = make_product(source, variant="half", extract_lora=1)
    product.finish(weights, tmp_path / "run")
    assert holds(load(tmp_path / "run", variant="half"), weights)
    assert product.loading_line(tmp_path / "run").endswith(', variant="half")')
    assert extracted_lora(tmp_path / "run").rank == 1


def test_without_links_files_are_copied(klein_path, tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    make_product(klein_path).finish(student(klein_path), tmp_path)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert not (tmp_path / vae).samefile(klein_path / vae)
    assert (tmp_path / vae).read_bytes() == (klein_path / vae).read_bytes()
    assert load(tmp_path)


def test_pickled_weights_and_hidden_files_are_left_out_and_folders_are_not(klein_path, tmp_path):
    source = tmp_path / "source"
    load(klein_path).save_pretrained(source)
    (source / "tokenizer/more/.hidden").mkdir(parents=True)
    for name in ("vae/model.bin", "vae/.lock", "tokenizer/more/template.jinja"):
        (source / name).touch()
    make_product(source).finish(student(klein_path), tmp_path / "run")
    names = set(digests(tmp_path / "run"))
    assert "tokenizer/more/template.jinja" in names and not names & {"vae/model.bin", "vae/.lock"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_alone_in_the_precision_of_the_model_or_in_float32(klein_path, tmp_path, dtype):
    weights = student(klein_path)
    product = make_product(klein_path, dtype, save_transformer_only=True, extract_lora=2)
    product.finish(weights, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"transformer", "pytorch_lora_weights.safetensors"}
    loaded = Flux2Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer", dtype="auto")
    assert all(torch.equal(weights[name].to(dtype), tensor) for name, tensor in loaded.state_dict().items())
    assert product.loading_line(tmp_path).endswith(f'AutoModel.from_pretrained("{tmp_path}", subfolder="transformer")')
    make_product(klein_path, dtype, upcast_before_saving=True).finish(weights, tmp_path)
    assert holds(load(tmp_path), weights)


def test_parts_that_cannot_be_put_beside_the_transformer_lose_nothing_else(klein_path, tmp_path, caplog):
    (tmp_path / "vae").touch()
    product = make_product(klein_path, extract_lora=2)
    product.finish(student(klein_path), tmp_path)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    message = record.getMessage()
    assert f"--output_dir {tmp_path}: the transformer is saved, but not the pipeline's other parts (" in message
    assert f"model_index.json from {klein_path}" in message and "\n" not in message
    assert not (tmp_path / "model_index.json").exists() and extracted_lora(tmp_path)
    assert product.loading_line(tmp_path).startswith("The transformer is ")


# Kills


def finish_until(source: str, folder: str, place: int) -> None:
    """Replaces the folder's model. The process ends before it changes a name in the folder for the `place`-th time."""
    changes, count = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in changes and any(folder in str(path) for path in arguments):
            count += 1
            if count == place:
                os._exit(9)

    os.fsync = lambda descriptor: None  # takes most of the time
    sys.addaudithook(hook)
    make_product(Path(source)).finish(student(Path(source), 2), Path(folder))


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=SLOW)])
def test_a_kill_at_any_moment_leaves_the_old_model_or_the_new_one_or_none(klein_path, tmp_path, forkserver, stride):
    models = []  # the new one, the old one
    for seed in (2, 1):
        folder = tmp_path / f"model-{seed}"
        make_product(klein_path).finish(student(klein_path, seed), folder)
        models.append(digests(folder))
    found = []
    for number in itertools.count(1, stride):
        place = shutil.copytree(folder, tmp_path / str(number))
        process = forkserver.start(finish_until, str(klein_path), str(place), number)
        process.join(timeout=60)
        assert process.exitcode in (0, 9)
        found.append(None)
        if (place / "model_index.json").exists():
            visible = {name: digest for name, digest in digests(place).items() if not name.startswith(".")}
            found[-1] = models.index(visible)
        tidy_output_dir(place, 0)
        transformer = {name: digest for name, digest in digests(place).items() if name.startswith("transformer")}
        assert any(transformer.items() <= model.items() for model in models) and transformer
        assert not list(place.glob(".transformer*"))
        if process.exitcode == 0:
            break
    assert number > 20
    assert [*dict.fromkeys(found)] == [1, None, 0]  # the old one, none, the new one


def test_an_earlier_model_is_left_as_it_is_if_there_is_no_room_for_the_new_one(klein_path, tmp_path, monkeypatch):
    product = make_product(klein_path, extract_lora=2)
    product.finish(student(klein_path, 1), tmp_path)
    before = digests(tmp_path)

    def fail(transformer, folder, **options):
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Flux2Transformer2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        product.finish(student(klein_path, 2), tmp_path)
    assert digests(tmp_path) == before and not (tmp_path / ".transformer.tmp").exists()


def test_what_follows_from_earlier_weights_does_not_outlive_them(klein_path, tmp_path):
    make_product(klein_path, extract_lora=2).finish(student(klein_path, 1), tmp_path)
    assert extracted_lora(tmp_path)
    make_product(klein_path, save_transformer_only=True).finish(student(klein_path, 2), tmp_path)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert not (tmp_path / "model_index.json").exists()


# The LoRA of the change


def change_of_low_rank(source: Path, rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = load_file(source / "transformer/diffusion_pytorch_model.safetensors")
    for weight in weights.values():
        if weight.ndim == 2 and min(weight.shape) > 1:
            out, inner = weight.shape
            weight += 0.3 * torch.randn(out, rank) @ torch.randn(rank, inner) / inner**0.5
    return weights


@both_models(quick="flux2")
def test_the_base_with_the_extracted_lora_draws_what_the_whole_model_draws(model, tmp_path, caplog):
    caplog.set_level("INFO")
    weights = change_of_low_rank(model.path, 2)
    product = make_product(model.path, model=model.script.MODEL, extract_lora=2)
    product.finish(weights, tmp_path)
    assert extracted_lora(tmp_path).share == pytest.approx(1, abs=1e-5)
    assert "holds 100.0% of the change; it is" in caplog.text
    whole, base = model.stock.from_pretrained(tmp_path), model.pipeline()
    whole.set_progress_bar_config(disable=True)
    expected, before = model.sample(whole), model.sample(base)
    base.load_lora_weights(tmp_path)
    assert (model.sample(base) - expected).norm() < 1e-3 * (before - expected).norm()
    drawn = [np.asarray(model.draw(pipeline, "a ball", 0)).astype(int) for pipeline in (whole, base)]
    assert abs(drawn[0] - drawn[1]).max() <= 1


def test_the_change_is_that_of_the_weights_before_they_are_rounded(klein_path, tmp_path):
    """In bfloat16, the saved weights are those before."""
    base = load_file(klein_path / "transformer/diffusion_pytorch_model.safetensors")
    rounded = {name: weight.bfloat16().float() for name, weight in base.items()}
    change = {name: torch.zeros_like(weight) for name, weight in base.items()}
    name = "transformer_blocks.0.attn.to_q.weight"
    change[name] = 1e-4 * rounded[name][:, :1] @ rounded[name][:1]
    product = make_product(klein_path, torch.bfloat16, extract_lora=1)
    product.finish({key: rounded[key] + change[key] for key in base}, tmp_path)
    assert extracted_lora(tmp_path).share == pytest.approx(1, abs=1e-2)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    prefix = f"transformer.{name.removesuffix('.weight')}.lora_"
    down, up = (state[f"{prefix}{matrix}.weight"].float() for matrix in "AB")
    assert (up @ down - change[name]).norm() < 0.02 * change[name].norm()


def test_a_lora_that_cannot_be_saved_loses_nothing_else(klein_path, tmp_path, caplog):
    (tmp_path / ".pytorch_lora_weights.safetensors.tmp").mkdir()
    make_product(klein_path, extract_lora=2).finish(student(klein_path), tmp_path)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    message = record.getMessage()
    assert "--extract_lora 2: no LoRA is saved (" in message and message.endswith("; the model is saved")
    assert load(tmp_path) and extracted_lora(tmp_path) is None


@pytest.mark.parametrize("rank", [None, 2])
def test_only_the_end_of_a_run_needs_the_weights_in_float32(klein_path, rank):
    roles = SimpleNamespace(whole_state_dict=lambda dtype, keep: dtype)
    product = make_product(klein_path, torch.bfloat16, extract_lora=rank)
    found = [product.collect(roles, keep=True, is_end=is_end) for is_end in (False, True)]
    assert found == [torch.bfloat16, torch.bfloat16 if rank is None else torch.float32]


def test_a_model_that_has_not_changed_has_no_lora(klein_path, tmp_path, caplog):
    weights = load_file(klein_path / "transformer/diffusion_pytorch_model.safetensors")
    make_product(klein_path, extract_lora=2).finish(weights, tmp_path)
    assert "no LoRA is saved (training has changed no linear module's matrix); the model is saved" in caplog.text


@pytest.mark.parametrize("content", ["{", "3", ""])
def test_a_damaged_index_is_one_line(klein_path, tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/model_index.json: cannot be used .*; copy it from the pretr"):
        publish(tmp_path, repo_id="a/b", private=False, token="x")
