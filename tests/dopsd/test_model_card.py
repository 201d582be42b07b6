"""The model card, parsed like the Hub does."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import parse_settings
from dopsd.evaluation.comparison import Column, Comparison, Figure, Prompt
from dopsd.model_card import CardImage, escape, write_card, write_run_card
from dopsd.output import LORA_FILE, LoRAOfChange
from loopback_hub import TOKEN


FLUX2, ZIMAGE = train_dopsd_flux2.MODEL.card, train_dopsd_zimage.MODEL.card
KLEIN_4B = "black-forest-labs/FLUX.2-klein-4B"
KLEIN_9B = "black-forest-labs/FLUX.2-klein-9B"
DIFFICULT_PROMPTS = [
    "plain",
    "it's \"quoted\" \\ and 'so on'",
    "first line\nsecond line\r\nthird\n\n\n# fifth",
    "a: b, c: [d, {e: f}] # g & *h !i %j @k",
    "---\nlicense: mit\n---\n",
    "x\n---\ny",
    "| a | b |\n|---|---|\n\\| c",
    "```python\n<script>alert(1)</script> </details> [x](y) ![x](y) `code` **bold** $x$ ~~s~~ &amp;",
    "'''\n\"\"\"",
    "- item",
    "null",
    "2024-01-01",
    " padded ",
    "柯基犬 🐕 ünï \u2028 \x85 \ufeff",
]


SIZE = {"validation_height": 768, "validation_width": 1024}


def write(folder: Path, **changed) -> ModelCard:
    """Writes a card and parses it like the Hub."""
    arguments = {
        "info": FLUX2,
        "repo_id": "someone/corgi",
        "base_model": KLEIN_4B,
        "instance_prompt": "a photo of sks corgi",
        "gallery": [CardImage("a corgi on the moon", "images/validation_0.png")],
        "settings": {"num_inference_steps": 4, "max_sequence_length": 512, "learning_rate": 2e-5},
        "retention": 0.1234,
    }
    arguments |= changed
    arguments["settings"] = SIZE | arguments["settings"]
    path = write_card(folder, **arguments)
    assert path == folder / "README.md"
    return ModelCard.load(path)


def test_card_of_klein_4b(tmp_path):
    card = write(tmp_path)
    assert card.data.to_dict() == {
        "base_model": KLEIN_4B,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "d-opsd",
            "template:sd-lora",
            "flux2",
            "flux2-klein",
        ],
        "instance_prompt": "a photo of sks corgi",
        "widget": [{"text": "a corgi on the moon", "output": {"url": "images/validation_0.png"}}],
    }
    for text in ("# corgi", "arxiv.org/abs/2605.05204", "<Gallery />", "**0.123**", "| `--learning_rate` | 2e-05 |"):
        assert text in card.text
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub"):
        assert re.search(rf"^\| {package} \| \d+\.\d+", card.text, re.MULTILINE)
    assert "story.png" not in card.text and "Non-Commercial" not in card.text


FULL = {"num_inference_steps": 4, "train_mode": "full", "rank": 64, "bf16_update": "master_weights"}


def test_card_of_a_whole_model(tmp_path):
    card = write(tmp_path, settings=FULL)
    assert (card.data.base_model, card.data.base_model_relation) == (KLEIN_4B, "finetune")
    assert card.data.tags == ["text-to-image", "diffusers", "diffusers-training", "d-opsd", "flux2", "flux2-klein"]
    assert "with its whole transformer trained by on-policy self-distillation" in card.text
    assert 'Flux2KleinPipeline.from_pretrained("someone/corgi", dtype=' in card.text
    assert "| `--bf16_update` | master\\_weights |" in card.text
    assert "lora" not in str(card).lower() and "`--rank`" not in card.text
    assert "`--bf16_update`" not in write(tmp_path, settings=FULL | {"train_mode": "lora"}).text


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_prodigys_settings_are_shown_if_it_is_used(tmp_path, optimizer):
    flags = {"num_inference_steps": 4, "optimizer": optimizer, "prodigy_decouple": True}
    assert ("`--prodigy_decouple`" in write(tmp_path, settings=flags).text) == (optimizer == "prodigy")


def test_card_of_a_part_of_a_whole_model_without_its_pipeline(tmp_path):
    flags = {"trainable_modules": "to_q,[x]", "save_transformer_only": True, "variant": "half"}
    card = write(tmp_path, settings=FULL | flags | {"cond_image_column": "before"})
    title = rf"[{KLEIN_4B}](https://huggingface.co/{KLEIN_4B}), which edits pictures, with the modules "
    assert title + r"to\_q,\[x\] of its transformer trained by" in card.text
    place = '"someone/corgi", subfolder="transformer", variant="half", dtype=torch.bfloat16'
    assert f"transformer = AutoModel.from_pretrained({place})" in card.text
    assert f'Flux2KleinPipeline.from_pretrained("{KLEIN_4B}", transformer=transformer, dtype' in card.text


def test_the_card_says_what_the_extracted_lora_holds(tmp_path):
    header = LoRAOfChange(16, 0.877).header
    save_file({"x": torch.zeros(1)}, tmp_path / LORA_FILE, metadata=header)
    text = write(tmp_path, settings=FULL).text
    assert "the LoRA of rank 16 that is nearest" in text and "**87.7%** of the change" in text
    assert 'pipe.load_lora_weights("someone/corgi")' in text
    save_file({"x": torch.zeros(1)}, tmp_path / LORA_FILE)
    assert "nearest" not in write(tmp_path, settings=FULL).text


def test_card_of_klein_9b_links_to_its_license(tmp_path):
    card = write(tmp_path, base_model=KLEIN_9B)
    assert card.data.base_model == KLEIN_9B
    link = f"https://huggingface.co/{KLEIN_9B}/blob/main/LICENSE.md"
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "flux-non-commercial-license",
        link,
    )
    assert link in card.text and "apache" not in str(card).lower()


@pytest.mark.parametrize(
    ("script", "base_model", "license"),
    [
        (train_dopsd_flux2, KLEIN_4B, "apache-2.0"),
        (train_dopsd_flux2, "black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
        (train_dopsd_flux2, "black-forest-labs/flux.2-klein-4b-fp8", "apache-2.0"),
        (train_dopsd_flux2, KLEIN_9B, "flux-non-commercial-license"),
        (train_dopsd_flux2, "black-forest-labs/FLUX.2-klein-base-9B", "flux-non-commercial-license"),
        (train_dopsd_flux2, "black-forest-labs/FLUX.2-klein-40B", None),
        (train_dopsd_flux2, "black-forest-labs/FLUX.2-dev", None),
        (train_dopsd_flux2, "someone/FLUX.2-klein-4B", None),
        (train_dopsd_flux2, "/models/black-forest-labs/FLUX.2-klein-4B", None),
        (train_dopsd_zimage, "Tongyi-MAI/Z-Image-Turbo", "apache-2.0"),
        (train_dopsd_zimage, "Tongyi-MAI/Z-Image", "apache-2.0"),
        (train_dopsd_zimage, "Tongyi-MAI/Z-Image-Other", None),
    ],
)
def test_the_license_is_that_of_the_base_model(tmp_path, script, base_model, license):
    data = write(tmp_path, info=script.MODEL.card, base_model=base_model).data
    assert (data.license_name or data.license) == (license or "other")
    assert (data.license_link is not None) == (license == "flux-non-commercial-license")


def test_a_folder_with_the_name_of_a_hub_repository_has_an_unknown_license(tmp_path, monkeypatch):
    (tmp_path / KLEIN_9B).mkdir(parents=True)
    assert FLUX2.license_of(KLEIN_9B).notice in write(tmp_path, base_model=KLEIN_9B).text
    monkeypatch.chdir(tmp_path)
    assert FLUX2.license_of(KLEIN_9B) is None
    assert "The licence of the base model, FLUX.2-klein-9B, applies." in write(tmp_path, base_model=KLEIN_9B).text


def test_only_the_name_of_a_local_base_model_is_on_the_card(tmp_path, monkeypatch):
    model = tmp_path / "secret_place" / "my-klein"
    model.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(model), "secret_place/my-klein", "./secret_place/my-klein/"):
        card = write(tmp_path, base_model=path)
        assert card.data.base_model is None and "base_model_relation" not in card.data
        assert card.data.license == "other" and card.data.license_name is None
        assert "The licence of the base model, my-klein, applies." in card.text
        assert '"path/to/my-klein"' in card.text
        assert "secret" not in str(card)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quantize": "int8"}, "int8"),
        ({"bnb_quantization_config_path": "/private/bnb.json"}, "bitsandbytes"),
        ({"quantize": None, "bnb_quantization_config_path": None, "quantize_text_encoder": "int8"}, None),
    ],
)
def test_the_card_says_that_the_base_was_quantized_in_training(tmp_path, settings, kind):
    text = write(tmp_path, settings={"num_inference_steps": 4} | settings).text
    assert (f"The base model was in fewer bits in training ({kind})." in text) == (kind is not None)
    assert ("in fewer bits" in text) == (kind is not None)


def test_secrets_and_paths_are_not_on_the_card(tmp_path):
    settings = {
        "num_inference_steps": 4,
        "hub_token": TOKEN,
        "hub_model_id": "private-name",
        "push_to_hub": True,
        "pretrained_model_name_or_path": "/private/klein",
        "instance_data_dir": "/private/photos",
        "output_dir": "/private/out",
        "cache_dir": "/private/cache",
        "context_cache_dir": "/private/context_cache",
        "logging_dir": "private-logs",
        "bnb_quantization_config_path": "/private/bnb.json",
        "resume_from_checkpoint": "/private/out/checkpoint-5",
        "dataset_name": "/private/my_pictures",
        "init_lora": "someone/earlier-lora",
        "prior_prompts": "/private/prompts.txt",
        "with_prior_preservation": False,
        "center_crop": False,
        "random_flip": True,
        "revision": None,
        "rank": 64,
        "retention_prompts": ["a | b", "c"],
    }
    card = write(tmp_path, settings=settings)
    assert TOKEN not in str(card) and "private" not in str(card)
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", card.text, re.MULTILINE)
    assert rows == [
        ("validation_height", "768"),
        ("validation_width", "1024"),
        ("num_inference_steps", "4"),
        ("dataset_name", r"my\_pictures"),
        ("init_lora", "someone/earlier-lora"),
        ("prior_prompts", "prompts.txt"),
        ("with_prior_preservation", "no"),
        ("random_flip", "yes"),
        ("rank", "64"),
        ("retention_prompts", r'\["a \| b", "c"\]'),
    ]


@pytest.mark.parametrize("prompt", DIFFICULT_PROMPTS)
def test_any_prompt_is_kept_and_cannot_break_the_card(tmp_path, prompt):
    gallery = [CardImage(prompt, "images/validation_0.png"), CardImage("a: b", "images/validation_1.png")]
    settings = {"num_inference_steps": 4, "validation_prompt": [prompt], "teacher_prompt_suffix": prompt, "rank": 8}
    card = write(tmp_path, instance_prompt=prompt, gallery=gallery, settings=settings)
    assert card.data.instance_prompt == prompt
    assert [CardImage(entry["text"], entry["output"]["url"]) for entry in card.data.widget] == gallery
    assert card.data.license == "apache-2.0"
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [
        "# corgi",
        "## Use it",
        "## Retention",
        "## Training",
        "## Licence",
    ]
    # The table continues after the prompt, and each of its rows has two cells.
    rows = re.findall(r"^\| `--\w+`.*$", card.text, re.MULTILINE)
    assert len(rows) == len(SIZE) + 4 and "--rank" in rows[-1]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    assert prompt_of(card) == prompt


def example(card: ModelCard) -> ast.Module:
    return ast.parse(re.search(r"^```python\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)[1])


def pipe_call(card: ModelCard) -> ast.Call:
    calls = [node for node in ast.walk(example(card)) if isinstance(node, ast.Call)]
    return next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe")


def pipe_arguments(card: ModelCard) -> dict:
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in pipe_call(card).keywords}


def prompt_of(card: ModelCard) -> str:
    return pipe_arguments(card)["prompt"]


def test_escape_gives_one_line_without_markup():
    assert escape("a\n | b\\|  <i>*x*_y_`z`[u](v)") == r"a \| b\\\| \<i\>\*x\*\_y\_\`z\`\[u\](v)"


def test_the_example_passes_what_differs_from_the_defaults(tmp_path):
    usual = {"num_inference_steps": 4, "max_sequence_length": 512, "text_encoder_out_layers": [9, 18, 27]}
    expected = {"prompt": "a photo of sks corgi", "height": 768, "width": 1024}
    expected |= {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert pipe_arguments(write(tmp_path, settings=usual)) == expected
    other = {"num_inference_steps": 8, "max_sequence_length": 128, "text_encoder_out_layers": [1, 2, 3]}
    assert pipe_arguments(write(tmp_path, settings=other)) == expected | other
    card = write(tmp_path)
    assert f'from_pretrained("{KLEIN_4B}", dtype=torch.bfloat16)' in card.text
    assert 'load_lora_weights("someone/corgi")' in card.text
    assert 'load_lora_weights("ACCOUNT/corgi")' in write(tmp_path, repo_id="corgi").text


EDITOR = {"num_inference_steps": 4, "cond_image_column": ["source"], "validation_image": ["/private/a.png"]}


@pytest.mark.parametrize(
    ("num_cond_images", "image"),
    [
        (1, 'load_image("to_edit.png")'),
        (2, '[load_image("to_edit_1.png"), load_image("to_edit_2.png")]'),
        (None, None),
    ],
)
def test_the_card_of_an_editor_says_so_and_edits(tmp_path, num_cond_images, image):
    gallery = [CardImage("make it blue", "images/validation_0.png", num_cond_images)] if num_cond_images else []
    card = write(tmp_path, instance_prompt=None, gallery=gallery, settings=EDITOR)
    assert card.data.pipeline_tag == card.data.tags[0] == "image-to-image"
    assert "text-to-image" not in str(card) and "private" not in str(card)
    assert ", which edits pictures, trained by on-policy" in card.text
    assert ("On the left what is edited, on the right the result." in card.text) == bool(gallery)
    assert r'| `--cond_image_column` | \["source"\] |' in card.text
    assert "from diffusers.utils import load_image\n" in card.text
    expected = {"prompt": repr("make it blue" if gallery else "your prompt"), "num_inference_steps": "4"}
    expected |= {"image": (image or 'load_image("to_edit.png")').replace('"', "'"), "guidance_scale": "1.0"}
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in pipe_call(card).keywords}
    assert keywords == expected
    other = write(tmp_path)
    assert "edit" not in other.text and "load_image" not in other.text


@pytest.mark.parametrize("script", [train_dopsd_flux2, train_dopsd_zimage])
def test_sampling_defaults_are_those_of_the_stock_pipeline(script):
    parameters = inspect.signature(script.MODEL.stock_pipeline_class.__call__).parameters
    assert script.MODEL.card.pipeline == script.MODEL.stock_pipeline_class.__name__
    for name, expected in script.MODEL.card.sampling_defaults.items():
        default = parameters[name].default
        assert (list(default) if isinstance(default, tuple) else default) == expected


def test_card_of_z_image(tmp_path):
    settings = {"num_inference_steps": 8, "max_sequence_length": 512, "vlm_model_name_or_path": "/home/me/Qwen3-VL-4B"}
    card = write(tmp_path, info=ZIMAGE, base_model="Tongyi-MAI/Z-Image-Turbo", settings=settings)
    assert card.data.license == "apache-2.0" and card.data.base_model == "Tongyi-MAI/Z-Image-Turbo"
    assert "z-image" in card.data.tags and "flux2" not in card.data.tags
    expected = {"prompt": "a photo of sks corgi", "height": 768, "width": 1024}
    expected |= {"num_inference_steps": 8, "guidance_scale": 0.0}
    assert pipe_arguments(card) == expected
    assert 'ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo", dtype=torch.bfloat16)' in card.text
    assert "| `--vlm_model_name_or_path` | Qwen3-VL-4B |" in card.text
    assert "klein" not in str(card).lower() and "/home" not in card.text


def test_a_card_has_no_empty_sections(tmp_path):
    (tmp_path / "README.md").write_text("an earlier card")
    card = write(tmp_path, instance_prompt=None, gallery=[], retention=None)
    assert "instance_prompt" not in card.data and "widget" not in card.data
    assert "Gallery" not in card.text and "Retention" not in card.text and "Trained with the prompt" not in card.text
    assert prompt_of(card) == "your prompt"


def test_sheets_are_shown_if_they_exist(tmp_path):
    (tmp_path / "story.png").touch()
    text = write(tmp_path).text
    assert "](story.png)" in text and "curves.png" not in text


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_card_that_a_full_disk_left_is_replaced(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    run = ["--pretrained_model_name_or_path", KLEIN_4B, "--output_dir", str(tmp_path)]
    write_run_card(parse_settings(train_dopsd_flux2.MODEL, "", run), FLUX2, [], retention=None)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"


def test_a_card_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    def fill_the_disk(card, path):
        Path(path).write_text("---")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", fill_the_disk)
    run = ["--pretrained_model_name_or_path", KLEIN_4B, "--output_dir", str(tmp_path)]
    write_run_card(parse_settings(train_dopsd_flux2.MODEL, "", run), FLUX2, [], retention=None)
    (record,) = caplog.records
    assert re.search("README.md could not be written .*: make room; the weights are saved", record.getMessage())
    assert record.exc_info is None and not list(tmp_path.iterdir())


def test_the_card_has_the_figures_of_the_evaluation(tmp_path):
    assert "## Evaluation" not in write(tmp_path).content
    column = Column("likeness/dino", "likeness (DINO)", "higher", "How alike they are.", "some/model_x")
    figures = {name: {column.key: Figure(mean, None, None, 4)} for name, mean in (("base", 0.25), ("corgi", 0.75))}
    settings, notes = {"num_inference_steps": 6}, ["Only 2 pictures_x are known."]
    comparison = Comparison(settings, [Prompt("a", "a", "concept")] * 3, [column], figures, {}, notes)
    text = write(tmp_path, comparison=comparison).content
    assert "## Evaluation" in text and "On 3 prompts" in text and "at 6 steps" in text and "some/model\\_x" in text
    assert "Only 2 pictures\\_x are known." in text
    assert re.search(r"\| base \| 0\.250 \|\n\| corgi \| 0\.750 \|", text)
