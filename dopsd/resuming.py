"""The checkpoint that a run resumes from: which one, whether it is intact, and which settings the run must keep."""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from .context_cache import content_key
from .data.training_data import TrainingData
from .encoders import VLM_FLAG
from .errors import InputError, first_line
from .files import read_regular_file
from .model import Conditioning
from .output import ADAPTERS_FILE, LORA_FILE, RESULTS, checkpoint_step, list_checkpoints
from .pretrained import model_identity
from .prior import PriorPrompts
from .settings import Settings, TrainingSettings
from .sharing import failing_together
from .training_state import TRAINER_FILE


logger = get_logger(__name__)

PICTURES, PRIOR, TRAINED_STATES = "pictures and captions", "prior preservation", "--num_trained_states"
TEACHER_PICTURE, COND_IMAGES = "--teacher_picture", "pictures to edit"
CHANGED_DEFAULTS = (TRAINED_STATES, PRIOR)  # earlier versions trained on all states, without a prior

STATE_FILE = "state.json"
EARLIER_FILES = (ADAPTERS_FILE, TRAINER_FILE, LORA_FILE)  # of versions that saved no checksums


def resume_contract(
    settings: Settings, conditioning: Conditioning, data: TrainingData, prior: PriorPrompts, num_processes: int
) -> dict[str, Any]:
    """Everything that a resumed run must share with its checkpoint to end with the same weights, in JSON types."""
    identities = {VLM_FLAG: ""}
    for encoder in conditioning.encoders:
        identities |= encoder.identity()
    values = settings.must_match() | identities
    values["model"] = model_identity(settings.model)
    # What a run does not use is left out, as in checkpoints from before it could be used.
    shows_other = settings.teacher.teacher_picture == "other"
    values[PICTURES] = {}
    for picture, digest in zip(data.pictures, data.digests, strict=True):
        used = [picture.group] if shows_other and picture.group else []
        values[PICTURES][picture.name] = content_key(digest, picture.captions, picture.teacher_caption, *used)[:16]
    if data.is_editing:
        rows = zip(data.pictures, data.cond_digests, strict=True)
        values[COND_IMAGES] = {picture.name: content_key(digests)[:16] for picture, digests in rows}
    held = settings.prior
    held_prompts = content_key(prior.trained, *[prior.instructions] * bool(prior.instructions))
    values[PRIOR] = [held.prior_loss_weight, held.prior_every, held_prompts] if prior.trained else None
    accumulation_steps = settings.training.gradient_accumulation_steps
    values["processes x --gradient_accumulation_steps"] = num_processes * accumulation_steps
    return json.loads(json.dumps(values))


# Finding


def find_checkpoint(settings: TrainingSettings, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, whose files are as they were saved; None for a new run.

    The main process chooses, so that all processes resume from the same one.

    Raises:
        InputError: there is none, this run would overwrite another one's results or mix with them, or a machine does
            not have the checkpoint. All processes raise it.
    """
    chosen = None
    with failing_together():
        if accelerator.is_main_process:
            chosen = choose_checkpoint(settings)
    chosen, state = broadcast_object_list([chosen, chosen and read_state(chosen)])
    with failing_together():
        if chosen is not None and (not (chosen / STATE_FILE).is_file() or read_state(chosen) != state):
            raise InputError(
                f"--resume_from_checkpoint {chosen}: not every machine has this checkpoint; copy it to each, or use a "
                "folder that they share"
            )
    return chosen


def choose_checkpoint(settings: TrainingSettings) -> Path | None:
    """See `find_checkpoint`, which calls it on the main process."""
    output_dir, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    existing = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in existing) or "none"
    if wanted is None and existing:
        raise InputError(
            f"--output_dir {output_dir}: holds an earlier run ({names}); choose another folder, or continue it with "
            "--resume_from_checkpoint latest"
        )
    if wanted in (None, "latest"):
        if not existing:
            refuse_finished(output_dir)
        return newest_intact(existing)
    for path in (output_dir / wanted, Path(wanted)):
        if checkpoint_step(path) >= 0:
            if existing and checkpoint_step(existing[-1]) > checkpoint_step(path):
                raise InputError(
                    f"--resume_from_checkpoint {wanted}: {output_dir} holds newer checkpoints ({names}), which this "
                    "run would mix with; move them away, or resume from latest"
                )
            if problem := damage(path):
                raise InputError(f"--resume_from_checkpoint {wanted}: {problem}; resume from latest")
            return path
    raise InputError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has: {names}")


def refuse_finished(output_dir: Path) -> None:
    if found := [name for name in RESULTS if (output_dir / name).exists()]:
        raise InputError(
            f"--output_dir {output_dir}: holds a finished run's {found[0]} and no checkpoint to continue from; "
            "choose another folder"
        )


def newest_intact(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints.

    Those that an older version saved without checksums come last.

    Args:
        checkpoints: oldest first.

    Raises:
        InputError: all of them are damaged, or one cannot be read.
    """
    unverified = None
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is not None:
            logger.warning(f"{path}: {problem}; trying the checkpoint before it")
        elif read_state(path)["files"]:
            return path
        else:
            unverified = unverified or path
    if unverified is not None:
        logger.warning(f"{unverified}: an older version saved it without checksums, so it is not verified")
        return unverified
    if checkpoints:
        raise InputError(
            f"--resume_from_checkpoint latest: no checkpoint in {checkpoints[0].parent} is intact; move them away to "
            "start anew"
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were saved.

    Raises:
        InputError: a file cannot be read, which does not mean that it is damaged.
    """
    try:
        state = read_state(checkpoint)
    except StateError as error:
        return str(error)
    if missing := [name for name in state["files"] or EARLIER_FILES if not (checkpoint / name).is_file()]:
        return f"it has no {missing[0]}"
    for name, digest in state["files"].items():
        try:
            found = file_digest(checkpoint / name)
        except OSError as error:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: {name} cannot be read ({first_line(error)}); correct that, "
                "then try again"
            ) from error
        if found != digest:
            return f"{name} is damaged or from another checkpoint"
    if state["step"] != checkpoint_step(checkpoint):
        return f"it is the checkpoint of step {state['step']}"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StateError(InputError):
    """A checkpoint's state file is damaged or missing. The message does not name the checkpoint."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's step, the settings that it was trained with, and the SHA-256 of its other files.

    Older versions saved no digests; "files" is then empty.

    Raises:
        StateError: the file is damaged or missing.
    """
    try:
        state = json.loads(read_regular_file(checkpoint / STATE_FILE))
        if state.keys() == {"step", "settings"} and state["settings"].keys() >= {"--seed", "model", PICTURES}:
            return state | {"files": {}}
        checksum = state.pop("checksum")
        if checksum == content_key(state) and state["files"]:
            return state
        problem = "is damaged"
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is damaged"
    raise StateError(f"its {STATE_FILE} {problem}")


def earlier_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The values that settings which came later had in effect in a checkpoint's run, if it does not name them."""
    trained_states = settings.get("--num_rollout_steps")
    earlier = {TRAINED_STATES: trained_states, PRIOR: None, TEACHER_PICTURE: "target", COND_IMAGES: None}
    full = {"--train_mode": "lora", "--trainable_modules": None, "--bf16_update": "master_weights"}
    return earlier | full


def check_resumable(checkpoint: Path, contract: dict[str, Any], max_train_steps: int) -> None:
    """Raises `InputError` if the run's contract differs from the checkpoint's, or it has too few steps."""
    flag, state = f"--resume_from_checkpoint {checkpoint.name}", read_state(checkpoint)
    earlier = earlier_settings(state["settings"])
    saved_contract = {name: value for name, value in earlier.items() if name in contract} | state["settings"]
    # An older version did not know all of today's flags.
    new = contract if state["files"] else {}
    names = dict.fromkeys([*saved_contract, *new])
    if differing := [name for name in names if saved_contract.get(name) != contract.get(name)]:
        raise InputError(
            f"{flag}: {difference(differing, saved_contract, contract)}, or start in another --output_dir"
        )
    if state["step"] > max_train_steps:
        raise InputError(
            f"--max_train_steps {max_train_steps}: {checkpoint.name} is past it; pass at least {state['step']}, or "
            "use what is in that folder"
        )


def difference(names: list[str], saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What the first of these settings was in the checkpoint's run, and what to do.

    If its default has changed, the others whose defaults have changed are named too: one correction then suffices.
    """
    name = names[0]
    if name in (PICTURES, COND_IMAGES) and saved.get(name) and now.get(name):
        before, after = saved[name], now[name]
        changed = sorted(
            picture for picture in before.keys() | after.keys() if before.get(picture) != after.get(picture)
        )
        what = "or its caption was added, changed or removed"
        if name == COND_IMAGES:
            what = "has other pictures to edit than before"
        return f"{changed[0]} {what} (pictures affected: {len(changed)}); undo that"
    told = [other for other in names if other in CHANGED_DEFAULTS] if name in CHANGED_DEFAULTS else [name]
    return ", and ".join(setting_was(name, saved.get(name), now.get(name)) for name in told) + "; pass the same"


def setting_was(name: str, saved: Any, now: Any) -> str:
    if name == COND_IMAGES:
        return f"it had {'pictures' if saved else 'no pictures'} to edit (--cond_image_column)"
    if name != PRIOR:
        return f"its {name} was {saved}, now it is {now}"
    if saved is None:
        return "it had no prior preservation (--with_prior_preservation false)"
    return (
        "its prior preservation was set differently (--with_prior_preservation, --prior_loss_weight, --prior_every, "
        "--prior_prompts, --class_prompt, --trigger_word)"
    )
