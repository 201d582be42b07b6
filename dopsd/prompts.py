"""The prompts of a run besides those of prior preservation: which are drawn, and whether every text fits the model."""

import reprlib

from accelerate.logging import get_logger

from .contexts import Contexts, Encoding
from .errors import InputError
from .model import TokenLimit
from .model_flags import TeacherContext
from .prior import PriorPrompts
from .settings import RETENTION_PROMPTS, Settings, TeacherSettings, ValidationSettings


logger = get_logger(__name__)


def drawn_prompts(settings: ValidationSettings, prior: PriorPrompts) -> list[str]:
    """Every prompt that the gallery draws."""
    if settings.validation_steps == 0:
        return []
    final = [settings.final_validation_prompt] if settings.final_validation_prompt else []
    # The extra ones are drawn with the retention prompts.
    extra = prior.drawn.values() if settings.retention_prompts else []
    return [*settings.validation_prompt, *final, *settings.retention_prompts, *extra]


def resolve_prompts(settings: Settings, contexts: Contexts, teacher_context: TeacherContext) -> Settings:
    """Checks every text that will be encoded: stock pipelines silently truncate long ones.

    Args:
        settings: with the defaults that follow from the data.
        teacher_context: what the teacher sees.

    Returns:
        The settings without the default retention prompts that are too long for the model.

    Raises:
        InputError: a text that the user has given is too long, or student and teacher would see the same.
    """
    check_captions(contexts, settings.teacher, teacher_context)
    validation = settings.validation
    if validation.validation_steps == 0:
        return settings
    given = [("--validation_prompt", prompt) for prompt in validation.validation_prompt]
    if validation.final_validation_prompt:
        given.append(("--final_validation_prompt", validation.final_validation_prompt))
    if validation.retention_prompts == [*RETENTION_PROMPTS]:
        settings = settings.replace(retention_prompts=fitting_retention_prompts(contexts))
    else:
        given += [("--retention_prompts", prompt) for prompt in validation.retention_prompts]
    for flag, prompt in given:
        check_prompt(contexts, prompt, flag, "shorten it")
    return settings


def fitting_retention_prompts(contexts: Contexts) -> list[str]:
    """The default retention prompts that fit the model; none if fewer than two do, since one measures nothing."""
    fitting = [prompt for prompt in RETENTION_PROMPTS if contexts.fits(prompt)]
    limit = contexts.conditioning.student_limit
    if len(fitting) < 2:
        logger.warning(
            f"--retention_prompts: the default prompts are too long for {limit.flag} {limit.tokens}, so retention is "
            "not measured; give at least two prompts that fit"
        )
        return []
    if len(fitting) < len(RETENTION_PROMPTS):
        logger.warning(
            f"--retention_prompts: {len(RETENTION_PROMPTS) - len(fitting)} of the {len(RETENTION_PROMPTS)} default "
            f"prompts are too long for {limit.flag} {limit.tokens} and left out; give your own to replace them"
        )
    return fitting


def check_captions(contexts: Contexts, teacher: TeacherSettings, teacher_context: TeacherContext) -> None:
    """Checks the captions and the teacher's prompts.

    Raises:
        InputError: one is too long, or student and teacher would see the same.
    """
    for picture in contexts.data.pictures:
        for caption in picture.captions:
            check_prompt(contexts, caption, picture.name, "shorten the caption")
    advice = "shorten the caption or --teacher_prompt_suffix"
    choices = {"is_editing": contexts.data.is_editing, "shows_other": teacher.teacher_picture == "other"}
    default_suffix = teacher_context.defaults(**choices)["teacher_prompt_suffix"]
    if teacher.teacher_prompt_suffix and teacher.teacher_prompt_suffix == default_suffix:
        advice = "replace the default suffix with a shorter --teacher_prompt_suffix, or shorten the caption"
    if any(encoder.reads_prompt and encoder.sees_picture for encoder in contexts.conditioning.teacher):
        advice += ", or lower --vlm_min_pixels and --vlm_max_pixels"
    checked = set()
    for picture, encoding in contexts.all_teacher_encodings():
        inputs = encoding.encoder, encoding.prompt, encoding.sizes
        if encoding.encoder.reads_prompt and inputs not in checked:
            checked.add(inputs)
            limit = contexts.conditioning.teacher_limit
            check_length(contexts, encoding, limit, f"{picture.name}, the teacher's prompt", advice)
    check_teacher_knows_more(contexts, teacher)


def check_prompt(contexts: Contexts, prompt: str, name: str, advice: str) -> None:
    """Raises `InputError` if a prompt is beyond the student's limit. `name` says where it is from."""
    for encoding in contexts.student_encodings(prompt):
        check_length(contexts, encoding, contexts.conditioning.student_limit, name, advice)


def check_length(contexts: Contexts, encoding: Encoding, limit: TokenLimit, name: str, advice: str) -> None:
    count = encoding.encoder.num_tokens(encoding.prompt, encoding.sizes)
    if count > limit.tokens:
        others = ["the chat template"]
        if encoding.pictures:
            others.insert(0, "the picture" if len(encoding.pictures) == 1 else f"{len(encoding.pictures)} pictures")
        raise InputError(
            f"{name}: {reprlib.repr(encoding.prompt)} is {count} tokens long with {' and '.join(others)}; the limit "
            f"is {limit.tokens} ({limit.flag}): {advice}"
        )


def check_teacher_knows_more(contexts: Contexts, teacher: TeacherSettings) -> None:
    """Refuses a teacher that sees no picture and reads the student's captions: the loss would always be zero."""
    if contexts.conditioning.teacher_sees_picture or teacher.teacher_prompt_suffix:
        return
    if all(
        caption == (picture.teacher_caption or caption)
        for picture in contexts.data.pictures
        for caption in picture.captions
    ):
        raise InputError(
            f"--teacher_caption_column {teacher.teacher_caption_column}: the teacher would read the same captions as "
            "the student, so there is nothing to learn; name a column with longer captions"
        )
