"""Publishing a finished run on the Hugging Face Hub.

The upload goes through huggingface_hub. With the package hf_xet installed, it transfers the weights over Xet, which is
not tested: the tests set HF_HUB_DISABLE_XET=1 and run the LFS transfer against a local server.
"""

import re
import shlex
import textwrap
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HTTPError

from .errors import InputError, OutputError
from .model_card import CARD_FILE
from .output import LORA_FILE, MODEL_INDEX, TRANSFORMER_DIR, numbered_sheets, pipeline_parts
from .settings import Settings


SHEETS = ("preview.png", "story.png", "curves.png")
NUMBERED_SHEETS = ("validation", "rollout", "retention")  # validation-250.png and so on; the last one is published

# What huggingface_hub raises. HTTPError: the Hub cannot be reached or returns an error. OSError: offline mode, or a
# file cannot be read. ValueError: invalid repository name, or a malformed or negative answer. RuntimeError: wraps any
# failure to upload the weights.
CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)
MAX_REASON_CHARACTERS = 400


def published_files(folder: Path) -> list[str]:
    """Paths of the files that `publish` uploads, relative to the folder.

    These are the weights, the card, the sheets and the images of the gallery; of numbered sheets only the last one.
    The weights are a LoRA, or a transformer with the other parts of its pipeline, as far as they are there.
    Note that preview.png and story.png show training pictures, and the gallery of an editor those to edit. So does
    report.html, which is not published.
    """
    names = [name for name in (MODEL_INDEX, LORA_FILE, CARD_FILE, *SHEETS) if (folder / name).is_file()]
    for part in model_parts(folder):
        paths = (path for path in (folder / part).rglob("[!.]*") if path.is_file())
        names += sorted(path.relative_to(folder).as_posix() for path in paths)
    for kind in NUMBERED_SHEETS:
        names += [*numbered_sheets(folder, kind).values()][-1:]
    return names + sorted(f"images/{path.name}" for path in folder.glob("images/*.png"))


def model_parts(folder: Path) -> list[str]:
    """The folders of a whole model's components: all of a pipeline's, or its transformer's alone."""
    return pipeline_parts(folder) or [TRANSFORMER_DIR] * (folder / TRANSFORMER_DIR).is_dir()


def push_to_hub(settings: Settings) -> None:
    """Publishes the run in `--output_dir` and prints the URL. See `publish` for the errors raised."""
    publishing = settings.publishing
    url = publish(
        Path(settings.training.output_dir),
        repo_id=publishing.hub_model_id,
        private=publishing.hub_private_repo,
        token=publishing.hub_token,
    )
    print(f"Published: {url}")


def publish(folder: Path, *, repo_id: str | None, private: bool, token: str | None) -> str:
    """Uploads a finished run to the Hub. Creates the repository if it does not exist.

    All files are in one commit, so a failure leaves the repository as it was.

    Args:
        folder: output folder of the run (see `published_files`).
        repo_id: ACCOUNT/NAME, or NAME in the token's account. None uses the folder's name.
        private: create the repository as a private one, and refuse a public one. False follows the account's default,
            which is public unless it was changed.
        token: None uses the token from `hf auth login` or HF_TOKEN.

    Returns:
        URL of the repository.

    Raises:
        InputError: the folder has no weights.
        OutputError: the upload failed. The message says how to publish later and never contains the token.
    """
    if not (folder / LORA_FILE).is_file() and not model_parts(folder):
        raise InputError(
            f"--output_dir {folder}: has no {LORA_FILE} and no {TRANSFORMER_DIR}; --push_only publishes the output "
            "folder of a finished run"
        )
    repo_id = repo_id or folder.resolve().name
    try:
        token = (token or get_token() or "").strip()
        return upload(folder, repo_id, private, token)
    except CLIENT_ERRORS as error:
        later = ["--push_only", "--output_dir", str(folder), "--hub_model_id", repo_id]
        message = (
            f"--hub_model_id {repo_id}: could not be published ({reason(error, token)}); the weights are in {folder}, "
            f"to publish later: {shlex.join(later + ['--hub_private_repo'] * private)}"
        )
    # Raised outside of the except clause, so that the client's error, which may contain the token, is not its context.
    raise OutputError(message.replace(token, "[token]") if token else message)


def upload(folder: Path, repo_id: str, private: bool, token: str) -> str:
    """Creates the repository and commits the files; returns its URL. Raises any of `CLIENT_ERRORS`."""
    if not token:
        raise ValueError("no token: run hf auth login, or pass --hub_token")
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(url.repo_id).private:
        raise ValueError("the repository exists and is public: make it private on the Hub, or choose another name")
    noun = "model" if model_parts(folder) else "LoRA"
    operations = [CommitOperationAdd(name, folder / name) for name in published_files(folder)]
    api.create_commit(url.repo_id, operations, commit_message=f"Add the {noun}, its model card and its images")
    return str(url)


def reason(error: Exception, token: str | None) -> str:
    """The client's error message on one line, without tokens and without the signatures of upload URLs."""
    # A RuntimeError names only the file whose upload failed; its cause says why.
    text = str(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
    text = re.sub(r"\?[^\s'\"]+", "", text)
    text = re.sub(r"hf_\w{16,}", "[token]", text.replace(token, "[token]") if token else text)
    return textwrap.shorten(text, MAX_REASON_CHARACTERS, placeholder="...")
