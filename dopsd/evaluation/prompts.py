"""The prompts that every contender draws: built-in ones, those of a file, or a vision-language model's."""

import json
import random
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..context_cache import content_key
from ..errors import InputError, first_line
from ..files import read_regular_file
from ..output import naming_file, replacing
from ..prior import MAX_FILE_BYTES, TriggerWord, made_up_words, prompt_lines, replaced
from ..text import text_problem
from .comparison import ROLES, Prompt
from .settings import DEFAULT_CLASS, EvaluationSettings


logger = get_logger(__name__)

PROMPTS_FILE = "prompts.json"
# Prompts for the subject that are drawn again without the new word, and again with another made-up word.
NUM_NEIGHBOURS = NUM_OTHER_WORDS = 4
ARTICLE = re.compile(r"(an?|the)\s+", re.IGNORECASE)


def templates() -> dict[str, list[str]]:
    """Kind, "unrelated" or "unrelated_edits" -> its built-in prompts, some with the place of the {subject}."""
    return json.loads(files(__package__).joinpath("templates.json").read_text(encoding="utf-8"))


def choose_prompts(
    settings: EvaluationSettings, captions: list[str], written: Callable[[], list[str]] | None, basis: list[str]
) -> list[Prompt]:
    """The prompts of the comparison, which are saved in its folder. An earlier run's are used again if they fit.

    Args:
        settings: resolved.
        captions: of the training pictures, none of which is drawn.
        written: writes prompts for the subject, for `--write_prompts`.
        basis: what these depend on besides the flags.

    Raises:
        InputError: a file's prompts cannot be used.
        OutputError: they cannot be saved.
    """
    path = Path(settings.output_dir, PROMPTS_FILE)
    names = ("kind", "trigger_word", "class_word", "num_prompts", "seed", "validation_image", "prompts")
    made_from = {name: getattr(settings, name) for name in names}
    made_from |= {"captions": content_key(captions), "written": None if written is None else basis}
    if settings.prompts is None and (saved := saved_prompts(path, made_from)) is not None:
        return saved
    num_images = len(settings.validation_image or ())
    if settings.prompts is not None and Path(settings.prompts).suffix.lower() == ".json":
        prompts = without_captions(read_prompts(settings.prompts, num_images), captions)
    else:
        if settings.prompts is not None:
            concept = read_lines(settings.prompts)
        else:
            concept = built_in_prompts(settings) if written is None else written()
        prompts = make_prompts(settings, concept, captions)
    save_prompts(path, prompts, made_from)
    return prompts


def make_prompts(settings: EvaluationSettings, concept: list[str], captions: Iterable[str]) -> list[Prompt]:
    """All prompts of a comparison, in the order of `ROLES`.

    Args:
        settings: resolved.
        concept: the prompts for the subject, with the new word if there is one.
        captions: of the training pictures, none of which is drawn.

    Raises:
        InputError: every prompt for the subject is a caption.
    """
    num_images = len(settings.validation_image or ())
    word, class_word = settings.trigger_word, settings.class_word
    if word is not None and not any(TriggerWord(word, "").is_in(text) for text in concept):
        raise InputError(
            f"--trigger_word {word}: no prompt for the subject has this word; write it as in the captions of the "
            "training pictures"
        )
    if num_images > len(concept):  # every picture is edited
        concept = [concept[index % len(concept)] for index in range(num_images)]
    subjects = paired(concept, [plain_text(text, word, class_word, settings.kind) for text in concept], num_images)
    found = [Prompt(text, plain, "concept", image) for text, plain, image in subjects]
    unrelated = templates()["unrelated_edits" if num_images else "unrelated"]
    unrelated = paired(unrelated, unrelated, num_images)
    found += [Prompt(text, text, "unrelated", image) for text, _, image in unrelated]
    if word is not None:
        marked = [one for one in subjects if TriggerWord(word, "").is_in(one[0])]
        found += [Prompt(plain, plain, "neighbour", image) for _, plain, image in marked[:NUM_NEIGHBOURS]]
        taken = {part.casefold() for text in (word, *concept, *captions) for part in re.findall(r"\w+", text)}
        others = made_up_words(random.Random(f"{settings.seed}/evaluation"), NUM_OTHER_WORDS, taken)
        for (text, plain, image), other in zip(marked, others, strict=False):
            found.append(Prompt(replaced(text, [TriggerWord(word, "")], [other]), plain, "other_word", image))
    return without_captions(list(dict.fromkeys(found)), captions)


def paired(texts: list[str], plain: list[str], num_images: int) -> list[tuple[str, str, int | None]]:
    """(text, plain, image to edit), which uses the pictures to edit in turn."""
    return [
        (*both, index % num_images if num_images else None)
        for index, both in enumerate(zip(texts, plain, strict=True))
    ]


def without_captions(prompts: list[Prompt], captions: Iterable[str]) -> list[Prompt]:
    """The prompts that are no captions of training pictures, which a LoRA may know by heart.

    Raises:
        InputError: none for the subject is left.
    """
    known = {folded(caption) for caption in captions}
    kept = [prompt for prompt in prompts if folded(prompt.text) not in known]
    dropped = [prompt.text for prompt in prompts if prompt not in kept]
    if not any(prompt.role == "concept" for prompt in kept):
        raise InputError(
            "--prompts: all prompts for the subject are captions of training pictures, which a LoRA may know by "
            "heart; give others"
        )
    if dropped:
        logger.warning(
            f"{len(dropped)} prompts are captions of training pictures and are left out, such as "
            f"{reprlib.repr(dropped[0])}"
        )
    return kept


def folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


# Prompts for the subject


def built_in_prompts(settings: EvaluationSettings) -> list[str]:
    """`--num_prompts` prompts of the kind, or all there are."""
    own = templates()[settings.kind]
    if settings.num_prompts > len(own):
        logger.warning(
            f"--num_prompts {settings.num_prompts}: there are {len(own)} built-in prompts of --kind {settings.kind}, "
            "which are all used; give more with --prompts"
        )
    own = own[: settings.num_prompts]
    if settings.kind == "style":
        # Such as "a lighthouse, in sks style, oil painting".
        style = dict.fromkeys(filter(None, [subject_words(settings), settings.class_word]))
        return [", ".join([scene, *style]) for scene in own]
    return [template.format(subject=subject_words(settings)) for template in own]


def subject_words(settings: EvaluationSettings) -> str:
    """What stands for the subject: "sks dog", "sks", without a new word "a dog"; for a style "in sks style"."""
    word, class_word = settings.trigger_word, settings.class_word
    if settings.kind == "style":
        return f"in {word} style" if word else class_word
    if word is None:
        return with_article(class_word)
    if settings.kind == "edit" or class_word == DEFAULT_CLASS.get(settings.kind):
        return word
    return f"{word} {ARTICLE.sub('', class_word, count=1)}" if class_word else word


def with_article(words: str) -> str:
    if not words or ARTICLE.match(words):
        return words
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def plain_text(text: str, word: str | None, class_word: str, kind: str | None) -> str:
    """The prompt in words that every model knows: the class in the place of the new word, or nothing for a style."""
    if word is None:
        return text
    expression = TriggerWord(word, "").expression
    if kind == "style":
        style = rf"[,\s]*(\bin\s+)?(\bthe\s+)?(\bstyle\s+of\s+)?{expression}(\s+style\b)?"
        plain = re.sub(style, "", text, flags=re.IGNORECASE).strip(" ,.;:")
        has_class = class_word.casefold() in plain.casefold()
        return plain if has_class else f"{plain}, {class_word}".strip(" ,")
    if not class_word:
        return replaced(text, [TriggerWord(word, "")], None) or text
    bare = ARTICLE.sub("", class_word, count=1)
    subject = rf"(\b(?P<article>an?|the)\s+)?{expression}(\s+{re.escape(bare)}\b)?"

    def known(match: re.Match) -> str:
        return f"the {bare}" if (match["article"] or "").lower() == "the" else with_article(class_word)

    return re.sub(subject, known, text, flags=re.IGNORECASE)


# Files


def save_prompts(path: Path, prompts: list[Prompt], made_from: dict[str, Any]) -> None:
    """Writes the prompts.

    Args:
        made_from: what they depend on, so that the next run knows whether it may use them.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {"made_from": made_from, "prompts": [asdict(prompt) for prompt in prompts]}
    with naming_file(path), replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def saved_prompts(path: Path, made_from: dict[str, Any]) -> list[Prompt] | None:
    """The prompts of an earlier run that were made from the same; None if there are none."""
    try:
        content = json.loads(read_regular_file(path, MAX_FILE_BYTES))
        if content["made_from"] != json.loads(json.dumps(made_from)):
            return None
        return [as_prompt(entry) for entry in content["prompts"]] or None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_lines(path: str) -> list[str]:
    """Prompts for the subject, the lines of a text file.

    Raises:
        InputError: it cannot be read, or holds no prompts that can be used.
    """
    lines = prompt_lines(read_text(path))
    if not lines:
        raise InputError(f"--prompts {path}: holds no prompts; write one per line")
    check_texts(path, lines)
    return lines


def read_prompts(path: str, num_images: int) -> list[Prompt]:
    """The prompts of another comparison's prompts.json.

    Args:
        num_images: pictures to edit.

    Raises:
        InputError: it cannot be read, or holds no prompts that can be used.
    """
    flag = f"--prompts {path}"
    try:
        found = [as_prompt(entry) for entry in json.loads(read_text(path))["prompts"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{flag}: is not the prompts.json of a comparison ({first_line(error)}); give one, or a text file with "
            "one prompt per line"
        ) from error
    check_texts(path, [text for prompt in found for text in (prompt.text, prompt.plain)])
    if not any(prompt.role == "concept" for prompt in found):
        raise InputError(f"{flag}: holds no prompt for the subject, of the role concept; add some")
    for prompt in found:
        if prompt.image is None and num_images:
            raise InputError(f"{flag}: {reprlib.repr(prompt.text)} names no image to edit; drop --validation_image")
        if prompt.image is not None and not 0 <= prompt.image < num_images:
            raise InputError(
                f"{flag}: {reprlib.repr(prompt.text)} edits picture {prompt.image}, but --validation_image gives "
                f"{num_images}; pass the same pictures as for that comparison"
            )
    return list(dict.fromkeys(found))


def read_text(path: str) -> str:
    try:
        return read_regular_file(Path(path), MAX_FILE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read ({first_line(error)}); give a UTF-8 text file") from error


def as_prompt(entry: dict[str, Any]) -> Prompt:
    """Raises ValueError, TypeError or KeyError if it is none."""
    match entry:
        case {"text": str(text), "plain": str(plain), "role": str(role), "image": int() | None as image}:
            if role not in ROLES:
                raise ValueError(f"there is no role {reprlib.repr(role)}")
            return Prompt(text, plain, role, image)
    raise ValueError(f"{reprlib.repr(entry)} lacks text, plain, role or image")


def check_texts(path: str, texts: list[str]) -> None:
    """Raises `InputError` for a text that cannot be drawn."""
    for text in texts:
        if problem := text_problem(text):
            raise InputError(f"--prompts {path}: {reprlib.repr(text)} {problem}")
        if not text.strip():
            raise InputError(f"--prompts {path}: a prompt is blank; write it, or remove it")
