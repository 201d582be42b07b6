"""A finished run on the Hugging Face Hub: its model card, and the upload.

The Hub's own client uploads. Where the package hf_xet is installed, it sends the weights through Xet; that path is not
tested. The tests switch it off (HF_HUB_DISABLE_XET=1) and run the LFS path against a server of their own.
"""

import json
import re
import shlex
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HTTPError

from .errors import InputError


LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"
SHEETS = ("preview.png", "story.png", "curves.png")
NUMBERED_SHEETS = ("validation", "rollout", "retention")  # validation-250.png: only the last is published

PAPER = "https://arxiv.org/abs/2605.05204"
TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "d-opsd", "template:sd-lora")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub")

# Not on the card: secrets, where things lie on this machine, and what says nothing about the weights.
HIDDEN_PREFIXES = ("hub_", "push_")
HIDDEN_SUFFIXES = ("_dir", "_path", "_token")
HIDDEN_SETTINGS = ("resume_from_checkpoint", "report_to", "local_rank", "preview_only")
PATH_OR_HUB_ID = ("dataset_name", "init_lora", "vlm_model_name_or_path")

# What its licence asks of those who pass on a derivative.
NON_COMMERCIAL_NOTICE = (
    "> This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License. Copyright Black "
    "Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, "
    "WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS "
    "MODEL."
)

# What the client raises: HTTPError when the Hub cannot be reached or answers with an error; OSError when it is told to
# stay offline or cannot read a file; ValueError for a bad repository name and for an answer that is malformed or
# refuses; RuntimeError around whatever stops the upload of weights.
CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)
MAX_REASON_CHARACTERS = 400


# Card


@dataclass(frozen=True)
class CardModel:
    """What the card says of the base model's kind.

    Attributes:
        pipeline: name of the stock pipeline's class.
        tags: of the model family.
        guidance_scale: at which the few-step model is sampled.
        sampling_defaults: the stock pipeline's own, by flag. The card names what a run did otherwise, since the LoRA
            wants the same.
    """

    pipeline: str
    tags: tuple[str, ...]
    guidance_scale: float
    sampling_defaults: dict


def write_card(
    folder: Path,
    *,
    model: CardModel,
    repo_id: str,
    base_model: str,
    instance_prompt: str | None,
    gallery: list[tuple[str, str]],
    settings: dict,
    retention: float | None,
) -> Path:
    """Writes the model card of a finished run, over an earlier one.

    Args:
        folder: the output folder. Its story.png and curves.png, if there, are shown on the card.
        repo_id: where the card will stand. Without an account, the card's code has ACCOUNT in its place.
        base_model: hub id, or a folder, of which the card gives the last part only.
        instance_prompt: the caption of all pictures, if they share one.
        gallery: (prompt, path of the picture relative to the folder, such as "images/validation_0.png").
        settings: flag without dashes -> value. `num_inference_steps` is needed. Left out: None and False, the hub's
            flags and token, folders and paths.
        retention: the last measured one, see the training script; None if none was.

    Returns:
        The path of the card.
    """
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        base_model_relation="adapter" if is_hub_id(base_model) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *model.tags],
        instance_prompt=instance_prompt,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in gallery] or None,
        **licence_of(base_model),
    )
    text = "\n\n".join(
        [
            *introduction(repo_id, base_model, instance_prompt, settings),
            *pictures(folder, gallery),
            *usage(model, repo_id, base_model, instance_prompt, gallery, settings),
            *measured(retention),
            *training(settings),
            *licence(base_model),
        ]
    )
    path = folder / CARD_FILE
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def is_hub_id(model: str) -> bool:
    """Whether `model` names a repository of the Hub, not a folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None and not Path(model).exists()


def public_name(model: str) -> str:
    """A hub id as it is, of a path the last part."""
    return model if is_hub_id(model) else Path(model).resolve().name


def licence_of(base_model: str) -> dict[str, str]:
    """The card's licence fields: the base model's, which a LoRA made from it follows.

    Z-Image and klein's 4B models are Apache-2.0, klein's 9B models non-commercial; of others, folders included,
    nothing is known but that theirs applies.
    """
    is_open = re.match(
        r"(black-forest-labs/FLUX\.2-klein-(base-)?4B\b|Tongyi-MAI/Z-Image(-Turbo)?$)", base_model, re.IGNORECASE
    )
    is_non_commercial = re.match(r"black-forest-labs/FLUX\.2-klein-(base-)?9B\b", base_model, re.IGNORECASE)
    if not is_hub_id(base_model) or not (is_open or is_non_commercial):
        return {"license": "other"}
    if is_open:
        return {"license": "apache-2.0"}
    return {
        "license": "other",
        "license_name": "flux-non-commercial-license",
        "license_link": f"https://huggingface.co/{base_model}/blob/main/LICENSE.md",
    }


def introduction(repo_id: str, base_model: str, instance_prompt: str | None, settings: dict) -> list[str]:
    prompt = [f"Trained with the prompt: {escape(instance_prompt)}"] if instance_prompt else []
    return [
        f"# {escape(repo_id.rpartition('/')[2])}",
        f"A LoRA for {link_to(base_model)}, trained by on-policy self-distillation (D-OPSD, "
        f"[arXiv 2605.05204]({PAPER})): on what the model itself draws in few steps, so that it goes on drawing in "
        f"{settings['num_inference_steps']}.",
        *prompt,
    ]


def link_to(base_model: str) -> str:
    name = escape(public_name(base_model))
    return f"[{name}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else name


def pictures(folder: Path, gallery: list[tuple[str, str]]) -> list[str]:
    """The gallery is the Hub's, which draws the widget's entries there."""
    shown = [("The run on one sheet", "story.png"), ("Loss, cosine and retention over steps", "curves.png")]
    return [
        *(["<Gallery />"] if gallery else []),
        *(f"![{title}]({name})" for title, name in shown if (folder / name).is_file()),
    ]


def usage(
    model: CardModel,
    repo_id: str,
    base_model: str,
    instance_prompt: str | None,
    gallery: list[tuple[str, str]],
    settings: dict,
) -> list[str]:
    """How to load. JSON's strings are Python's, and keep a prompt on its line, where it cannot end the code."""
    prompt = instance_prompt or next((prompt for prompt, _ in gallery), "your prompt")
    source = base_model if is_hub_id(base_model) else f"path/to/{public_name(base_model)}"
    target = repo_id if "/" in repo_id else f"ACCOUNT/{repo_id}"
    usual = model.sampling_defaults
    chosen = {name: settings.get(name, default) for name, default in usual.items()}
    lines = [
        "```python",
        "import torch",
        f"from diffusers import {model.pipeline}",
        "",
        f'pipe = {model.pipeline}.from_pretrained({quoted(source)}, dtype=torch.bfloat16).to("cuda")',
        f"pipe.load_lora_weights({quoted(target)})",
        "image = pipe(",
        f"    prompt={quoted(prompt)},",
        f"    num_inference_steps={settings['num_inference_steps']},",
        f"    guidance_scale={model.guidance_scale},",
        *(f"    {name}={value}," for name, value in chosen.items() if value != usual[name]),
        ").images[0]",
        'image.save("image.png")',
        "```",
    ]
    return ["## Use it", "\n".join(lines)]


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def measured(retention: float | None) -> list[str]:
    if retention is None:
        return []
    return [
        "## Retention",
        f"**{retention:.3f}** after the last step: on prompts that have nothing to do with the training pictures, how "
        "far the LoRA's final latents lie from the base's, from the same noise, over how far the base's lie from one "
        "another. 0 is unchanged, 1 is as unlike as another prompt's picture.",
    ]


def training(settings: dict) -> list[str]:
    shown = {name: value for name, value in settings.items() if is_shown(name, value)}
    shown |= {name: public_name(shown[name]) for name in PATH_OR_HUB_ID if name in shown}
    return [
        "## Training",
        table("flag", "value", [(f"`--{name}`", written(value)) for name, value in shown.items()]),
        table("package", "version", [(name, version(name)) for name in PACKAGES]),
    ]


def is_shown(name: str, value: object) -> bool:
    hidden = name.startswith(HIDDEN_PREFIXES) or name.endswith(HIDDEN_SUFFIXES) or name in HIDDEN_SETTINGS
    return (not hidden or name in PATH_OR_HUB_ID) and value is not None and value is not False


def written(value: object) -> str:
    if value is True:
        return "yes"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {escape(text)} |" for name, text in rows)])


def escape(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is, in a table's cell too."""
    return re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", " ".join(text.split()))


def licence(base_model: str) -> list[str]:
    fields = licence_of(base_model)
    if fields["license"] == "apache-2.0":
        return ["## Licence", f"Apache-2.0, as {link_to(base_model)}."]
    if "license_link" not in fields:
        return ["## Licence", f"The licence of the base model, {link_to(base_model)}, applies."]
    return [
        "## Licence",
        f"A derivative of {link_to(base_model)}, modified by training this LoRA, and under the same licence: the "
        f"[FLUX Non-Commercial License]({fields['license_link']}).",
        NON_COMMERCIAL_NOTICE,
    ]


# Upload


def published_files(folder: Path) -> list[str]:
    """What `publish` uploads, as paths relative to the folder: weights, card, sheets (of numbered ones the last) and
    the gallery. preview.png and story.png show training pictures."""
    names = [name for name in (LORA_FILE, CARD_FILE, *SHEETS) if (folder / name).is_file()]
    for kind in NUMBERED_SHEETS:
        found = (re.fullmatch(rf"{kind}-(\d+)\.png", path.name) for path in folder.iterdir())
        by_number = {int(match[1]): match[0] for match in found if match}
        names += [by_number[max(by_number)]] if by_number else []
    return names + sorted(f"images/{path.name}" for path in folder.glob("images/*.png"))


def publish(folder: Path, *, repo_id: str | None, private: bool, token: str | None) -> str:
    """Uploads the run in one commit, so that all of it appears or nothing; creates the repository where there is none.

    Args:
        folder: the output folder; see `published_files`.
        repo_id: ACCOUNT/NAME, or NAME in the token's account. None: the folder's name.
        private: create a private repository; one that exists and is public is refused. False leaves it to the
            account's default, which is public for most.
        token: None takes the one that `hf auth login` or HF_TOKEN left.

    Returns:
        The repository's url.

    Raises:
        InputError: there are no weights, or the Hub is offline, down or refuses. It says how to publish later, and
            holds no token.
    """
    if not (folder / LORA_FILE).is_file():
        raise InputError(
            f"--output_dir {folder}: holds no {LORA_FILE}; --push_only publishes the output folder of a finished run"
        )
    repo_id = repo_id or folder.resolve().name
    try:
        token = (token or get_token() or "").strip()
        if not token:
            raise ValueError("no token: run hf auth login, or pass --hub_token")
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise ValueError("it exists and is public: make it private on the Hub, or name another")
        operations = [CommitOperationAdd(name, folder / name) for name in published_files(folder)]
        api.create_commit(url.repo_id, operations, commit_message="Add the LoRA, its card and its pictures")
        return str(url)
    except CLIENT_ERRORS as error:
        later = ["--push_only", "--output_dir", str(folder), "--hub_model_id", repo_id]
        message = (
            f"--hub_model_id {repo_id}: could not be published ({reason(error, token)}); the weights are in {folder}, "
            f"to publish later: {shlex.join(later + ['--hub_private_repo'] * private)}"
        )
    # Outside of the except clause: the client's error, which may hold the token, must not travel along.
    raise InputError(message.replace(token, "[token]") if token else message)


def reason(error: Exception, token: str | None) -> str:
    """What the client said, in one line, without tokens and without the signatures of upload addresses."""
    # Around the error of one file's upload, the client raises a RuntimeError that names the file only.
    text = str(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
    text = re.sub(r"\?[^\s'\"]+", "", text)
    text = re.sub(r"hf_\w{16,}", "[token]", text.replace(token, "[token]") if token else text)
    return textwrap.shorten(text, MAX_REASON_CHARACTERS, placeholder="...")
