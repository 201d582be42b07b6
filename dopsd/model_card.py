"""The model card of a finished run."""

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData

from .errors import OutputError
from .evaluation.comparison import Comparison
from .evaluation.results import markdown_table
from .full_settings import FULL_FLAGS
from .output import LORA_FILE, TRANSFORMER_DIR, LoRAOfChange, extracted_lora, naming_file, replacing
from .settings import LORA_FLAGS, ON_BY_DEFAULT, Settings


logger = get_logger(__name__)

CARD_FILE = "README.md"

PAPER = "https://arxiv.org/abs/2605.05204"
TASK, EDITING_TASK = "text-to-image", "image-to-image"  # the Hub's names
TAGS = ("diffusers", "diffusers-training", "lora", "d-opsd", "template:sd-lora")
LORA_TAGS = ("lora", "template:sd-lora")  # not those of whole models
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub")

# Left out of the card: secrets, local paths, and settings that do not affect the weights.
HIDDEN_PREFIXES = ("hub_", "push_")
HIDDEN_SUFFIXES = ("_dir", "_path", "_token")
HIDDEN_SETTINGS = (
    *("resume_from_checkpoint", "report_to", "local_rank", "preview_only", "validation_image"),
    *("evaluate", "evaluate_with"),
)
# Of a path, only the last part is shown.
PATH_OR_HUB_ID = ("dataset_name", "init_lora", "prior_prompts", "vlm_model_name_or_path")


class CardImage(NamedTuple):
    """A picture on the card.

    Attributes:
        prompt: the prompt, or the instruction.
        path: relative to the output folder, such as "images/validation_0.png".
        num_cond_images: how many pictures are edited, which are on its left.
    """

    prompt: str
    path: str
    num_cond_images: int = 0


@dataclass(frozen=True)
class License:
    """License of some base models. It also applies to what was trained from one of them.

    Attributes:
        hub_ids: regular expression that matches the complete hub ids of these base models, in upper or lower case.
        title: what to call the license on the card.
        id: the Hub's identifier, such as "apache-2.0", or "other".
        name: what the Hub shows for the identifier "other".
        file: path of the license in the base model's repository, if the card must link to it and call what was trained
            a derivative.
        notice: Markdown that the license requires on derivatives.
    """

    hub_ids: str
    title: str
    id: str
    name: str | None = None
    file: str | None = None
    notice: str | None = None

    def link(self, base_model: str) -> str | None:
        """URL of the license file in the repository `base_model`."""
        return f"https://huggingface.co/{base_model}/blob/main/{self.file}" if self.file else None

    def metadata(self, base_model: str) -> dict[str, str]:
        """The license fields of the card's metadata."""
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link(base_model)}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class CardInfo:
    """What a model card says about the kind of model that was trained.

    Attributes:
        pipeline: class name of the stock pipeline.
        tags: tags for this kind of model, in addition to `TAGS`.
        guidance_scale: guidance scale of few-step sampling.
        sampling_defaults: flag without dashes -> the stock pipeline's default for this argument. The card's example
            passes the argument if the run had another value, because what was trained needs the same one.
        licenses: licenses of the known base models. For other base models, folders included, the card only says that
            their own license applies.
    """

    pipeline: str
    tags: tuple[str, ...]
    guidance_scale: float
    sampling_defaults: dict[str, Any]
    licenses: tuple[License, ...] = ()

    def license_of(self, base_model: str) -> License | None:
        """The license of a base model; None if it is not known."""
        if not is_hub_id(base_model):
            return None
        known = (license for license in self.licenses if re.fullmatch(license.hub_ids, base_model, re.IGNORECASE))
        return next(known, None)


def write_run_card(
    settings: Settings,
    info: CardInfo,
    gallery: list[CardImage],
    retention: float | None,
    comparison: Comparison | None = None,
) -> None:
    """Writes the model card of a finished run, unless its output folder has a README.md that is not such a card.

    Args:
        settings: of the run.
        info, gallery, retention, comparison: see `write_card`.

    If it cannot be written, that is an error in the log: the weights are saved already.
    """
    folder = Path(settings.training.output_dir)
    card = folder / CARD_FILE
    # An empty card was left by an older version on a full disk.
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if text.strip() and "d-opsd" not in text:
        logger.warning(
            f"{card} is not the model card of a D-OPSD run, so it is not overwritten; --push_to_hub would publish it"
        )
        return
    try:
        with naming_file(card):
            write_card(
                folder,
                info=info,
                repo_id=settings.publishing.hub_model_id or folder.resolve().name,
                base_model=settings.model.pretrained_model_name_or_path,
                instance_prompt=settings.data.instance_prompt,
                gallery=gallery,
                settings=settings.flat(),
                retention=retention,
                comparison=comparison,
            )
    except OutputError as error:
        logger.error(f"{error}; the weights are saved")


def write_card(
    folder: Path,
    *,
    info: CardInfo,
    repo_id: str,
    base_model: str,
    instance_prompt: str | None,
    gallery: list[CardImage],
    settings: dict[str, Any],
    retention: float | None,
    comparison: Comparison | None = None,
) -> Path:
    """Writes a model card. Replaces an existing one.

    Args:
        folder: output folder of the run. The card shows its story.png and curves.png if they exist.
        info: what the card says about this kind of model.
        repo_id: the repository that the card is for. If it has no account, the card's example says ACCOUNT instead.
        base_model: hub id, or a folder, of which only the last part is shown.
        instance_prompt: caption of all training pictures, if they share one.
        gallery: what the student draws.
        settings: flag without dashes -> value. Must contain `num_inference_steps` and the size of validation images.
            Left out are None, False unless it is on by default, hub flags, tokens, folders and paths.
        retention: last measured retention, as defined in `measured`, or None.
        comparison: of the LoRA with the base, or None.

    Returns:
        The path of the card.
    """
    general = [tag for tag in TAGS if not (is_full(settings) and tag in LORA_TAGS)]
    license, task = info.license_of(base_model), EDITING_TASK if is_editor(settings) else TASK
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        base_model_relation=("finetune" if is_full(settings) else "adapter") if is_hub_id(base_model) else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, *general, *info.tags],
        instance_prompt=instance_prompt,
        widget=[{"text": image.prompt, "output": {"url": image.path}} for image in gallery] or None,
        **(license.metadata(base_model) if license else {"license": "other"}),
    )
    text = "\n\n".join(
        [
            *introduction(repo_id, base_model, instance_prompt, settings),
            *pictures(folder, gallery),
            *usage(info, repo_id, base_model, instance_prompt, gallery, settings),
            *extracted(extracted_lora(folder), repo_id, base_model),
            *measured(retention),
            *compared(comparison),
            *training(settings),
            *licensing(license, base_model, noun(settings)),
        ]
    )
    path = folder / CARD_FILE
    with replacing(path) as unfinished:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(unfinished)
    return path


def is_hub_id(model: str) -> bool:
    """Whether `model` is the name of a repository on the Hub rather than a folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None and not Path(model).exists()


def public_name(model: str) -> str:
    """A hub id unchanged, or the last part of a path."""
    return model if is_hub_id(model) else Path(model).resolve().name


def is_editor(settings: dict[str, Any]) -> bool:
    """Whether what was trained edits pictures."""
    return settings.get("cond_image_column") is not None


def is_full(settings: dict[str, Any]) -> bool:
    """Whether a whole model was trained."""
    return settings.get("train_mode") == "full"


def noun(settings: dict[str, Any]) -> str:
    """What was trained."""
    return "model" if is_full(settings) else "LoRA"


def introduction(repo_id: str, base_model: str, instance_prompt: str | None, settings: dict[str, Any]) -> list[str]:
    prompt = [f"Trained with the prompt: {escape(instance_prompt)}"] if instance_prompt else []
    editing = ", which edits pictures," if is_editor(settings) else ""
    what = f"A LoRA for {link_to(base_model)}{editing or ','}"
    if is_full(settings):
        modules = settings.get("trainable_modules")
        part = f"the modules {escape(modules)} of its transformer" if modules else "its whole transformer"
        what = f"{link_to(base_model)}{editing} with {part}"
    return [
        f"# {escape(repo_id.rpartition('/')[2])}",
        f"{what} trained by on-policy self-distillation (D-OPSD, "
        f"[arXiv 2605.05204]({PAPER})): on what the model itself draws in few steps, so that it goes on drawing in "
        f"{settings['num_inference_steps']}.",
        *prompt,
    ]


def link_to(base_model: str) -> str:
    """A Markdown link to the base model's repository, or the name of a folder."""
    name = escape(public_name(base_model))
    return f"[{name}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else name


def pictures(folder: Path, gallery: list[CardImage]) -> list[str]:
    """The Hub replaces `<Gallery />` with the images of the card's metadata."""
    shown = [("The run on one sheet", "story.png"), ("Loss, cosine and retention over steps", "curves.png")]
    is_edit = any(image.num_cond_images for image in gallery)
    return [
        *(["<Gallery />"] if gallery else []),
        *(["On the left what is edited, on the right the result."] if is_edit else []),
        *(f"![{title}]({name})" for title, name in shown if (folder / name).is_file()),
    ]


def usage(
    info: CardInfo,
    repo_id: str,
    base_model: str,
    instance_prompt: str | None,
    gallery: list[CardImage],
    settings: dict[str, Any],
) -> list[str]:
    """Example code that loads what was trained and generates an image, or edits one."""
    first = next(iter(gallery), None)
    prompt = instance_prompt or (first.prompt if first else "your prompt")
    source, target = places(repo_id, base_model)
    defaults = info.sampling_defaults
    values = {name: settings.get(name, default) for name, default in defaults.items()}
    imports = []
    subject = [f"    height={settings['validation_height']},", f"    width={settings['validation_width']},"]
    if is_editor(settings):  # the result has the size of the first picture
        imports = ["from diffusers.utils import load_image"]
        subject = [f"    image={loaded_images(first.num_cond_images if first else 0)},"]
    lines = [
        "```python",
        "import torch",
        *loading(info.pipeline, source, target, imports, settings),
        "image = pipe(",
        f"    prompt={quoted(prompt)},",
        *subject,
        f"    num_inference_steps={settings['num_inference_steps']},",
        f"    guidance_scale={info.guidance_scale},",
        *(f"    {name}={value}," for name, value in values.items() if value != defaults[name]),
        ").images[0]",
        'image.save("image.png")',
        "```",
    ]
    return ["## Use it", "\n".join(lines)]


def places(repo_id: str, base_model: str) -> tuple[str, str]:
    """Of the base model, and of what was trained, for code."""
    return (
        base_model if is_hub_id(base_model) else f"path/to/{public_name(base_model)}",
        repo_id if "/" in repo_id else f"ACCOUNT/{repo_id}",
    )


def loading(pipeline: str, source: str, target: str, imports: list[str], settings: dict[str, Any]) -> list[str]:
    """Lines of code that import and load the pipeline.

    Args:
        source, target: see `places`.
        imports: what else is imported.
    """
    load, variant, dtype = f"{pipeline}.from_pretrained", settings.get("variant"), "dtype=torch.bfloat16"
    if not is_full(settings):
        return [
            f"from diffusers import {pipeline}",
            *imports,
            "",
            f'pipe = {load}({quoted(source)}, {dtype}).to("cuda")',
            f"pipe.load_lora_weights({quoted(target)})",
        ]
    if not settings.get("save_transformer_only"):
        return [
            f"from diffusers import {pipeline}",
            *imports,
            "",
            f'pipe = {model_loader(target, pipeline, variant, dtype)}.to("cuda")',
        ]
    return [
        f"from diffusers import AutoModel, {pipeline}",
        *imports,
        "",
        f"transformer = {model_loader(target, None, variant, dtype)}",
        f'pipe = {load}({quoted(source)}, transformer=transformer, {dtype}).to("cuda")',
    ]


def model_loader(place: str, pipeline: str | None, variant: str | None, *options: str) -> str:
    """Code that loads a whole model.

    Args:
        place: its folder or repository.
        pipeline: class name of the pipeline that is there; None if it is the transformer alone.
        variant: of the transformer's files.
        options: other arguments, as code.
    """
    part = [] if pipeline else [f"subfolder={quoted(TRANSFORMER_DIR)}"]
    variants = [] if variant is None else [f"variant={quoted(variant)}"]
    return f"{pipeline or 'AutoModel'}.from_pretrained({', '.join([quoted(place), *part, *variants, *options])})"


def extracted(lora: LoRAOfChange | None, repo_id: str, base_model: str) -> list[str]:
    """The LoRA beside a whole model, if there is one."""
    if lora is None:
        return []
    _, target = places(repo_id, base_model)
    return [
        "## As a LoRA",
        f"`{LORA_FILE}` is the LoRA of rank {lora.rank} that is nearest to what training has changed: "
        f"it holds **{lora.share:.1%}** of the change (sum of squares over all weights). It goes with "
        f"{link_to(base_model)}: `pipe.load_lora_weights({quoted(target)})`.",
    ]


def loaded_images(count: int) -> str:
    """Code for the `image` argument that loads several pictures to edit, or one if their number is not known."""
    if count < 2:
        return 'load_image("to_edit.png")'
    return "[" + ", ".join(f'load_image("to_edit_{number}.png")' for number in range(1, count + 1)) + "]"


def quoted(text: str) -> str:
    """A Python string literal on one line. JSON escapes line breaks, so a prompt cannot end the code block."""
    return json.dumps(text, ensure_ascii=False)


def measured(retention: float | None) -> list[str]:
    if retention is None:
        return []
    return [
        "## Retention",
        f"**{retention:.3f}** after the last step: on prompts that have nothing to do with the training pictures, how "
        "far the student's final latents lie from the base's, from the same noise, over how far the base's lie from "
        "one another. 0 is unchanged, 1 is as unlike as another prompt's picture.",
    ]


def compared(comparison: Comparison | None) -> list[str]:
    """The figures of `--evaluate`."""
    if comparison is None:
        return []
    models = sorted({column.model for column in comparison.columns if column.model})
    return [
        "## Evaluation",
        f"On {len(comparison.prompts)} prompts that are no captions, at {comparison.settings['num_inference_steps']} "
        f"steps, measured with {escape(' and '.join(models))}. base: without the LoRA. A name with x0.5: at that "
        "strength.",
        markdown_table(comparison),
        *map(escape, comparison.notes),
    ]


def training(settings: dict[str, Any]) -> list[str]:
    shown = [(f"`--{name}`", formatted(value)) for name, value in shown_settings(settings).items()]
    kind = settings.get("quantize") or (settings.get("bnb_quantization_config_path") and "bitsandbytes")
    note = f"The base model was in fewer bits in training ({kind}). In full precision, pictures differ slightly."
    return [
        "## Training",
        *([note] if kind else []),
        table("flag", "value", shown),
        table("package", "version", [(name, version(name)) for name in PACKAGES]),
    ]


def shown_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that may be shown to others, paths by their last part."""
    unused = LORA_FLAGS if is_full(settings) else FULL_FLAGS
    if settings.get("optimizer") != "prodigy":
        unused += tuple(name for name in settings if name.startswith("prodigy_"))
    shown = {name: value for name, value in settings.items() if name not in unused and is_shown(name, value)}
    return shown | {name: public_name(shown[name]) for name in PATH_OR_HUB_ID if name in shown}


def is_shown(name: str, value: Any) -> bool:
    """Whether the card shows this setting."""
    hidden = name.startswith(HIDDEN_PREFIXES) or name.endswith(HIDDEN_SUFFIXES) or name in HIDDEN_SETTINGS
    is_off = value is None or (value is False and name not in ON_BY_DEFAULT)
    return (not hidden or name in PATH_OR_HUB_ID) and not is_off


def formatted(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {escape(text)} |" for name, text in rows)])


def escape(text: str) -> str:
    """Markdown that shows `text` literally on one line, also in a table cell."""
    return re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", " ".join(text.split()))


def licensing(license: License | None, base_model: str, noun: str) -> list[str]:
    if license is None:
        paragraphs = [f"The licence of the base model, {link_to(base_model)}, applies."]
    elif license.file is None:
        paragraphs = [f"{license.title}, as {link_to(base_model)}."]
    else:
        paragraphs = [
            f"A derivative of {link_to(base_model)}, modified by training this {noun}, and under the same licence: "
            f"the [{license.title}]({license.link(base_model)})."
        ]
    if license is not None and license.notice:
        paragraphs.append(license.notice)
    return ["## Licence", *paragraphs]
