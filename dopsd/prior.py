"""On-policy prior preservation: the prompts on which the student is held to the base model.

On these prompts the student samples as it does on the captions. At the states that it visits, it is pulled towards the
base model with the same prompt and no picture. Nothing is drawn beforehand: the loss is zero at the start and grows
only where something is forgotten. The idea of preserving a prior is DreamBooth's (arXiv 2208.12242).

Prompts that have nothing to do with the pictures do not suffice: a model that is held on known words only answers to
any unknown word with what it has learned. So the captions without the new word, and with other made-up words in its
place, are held as well.

An editor is held on two kinds: on unrelated prompts without a picture, and on instructions (`--class_prompt` or the
package's own, captions without the new word or with another one) for the pictures to edit of the micro-batch.
"""

import random
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from .errors import InputError, first_line
from .files import read_regular_file
from .settings import RETENTION_PROMPTS, PriorSettings, Settings
from .sharing import failing_together
from .text import text_problem


logger = get_logger(__name__)

MAX_FILE_BYTES = 1_000_000
# They bound the number of encodings: captions that prompts are made from, made-up words, captions with such words.
MAX_CAPTIONS, NUM_WORDS, NUM_WITH_OTHER_WORDS = 32, 24, 64

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
# What three syllables of these letters may spell.
REAL_WORDS = frozenset(
    "banana before bonobo debate define delete demote denote devote dilate dilute divine domino donate female figure "
    "finale finite future gazebo genome karate kimono levite lolita madame marina mature medina minute morale nature "
    "negate novena palate panama parade patina penile pirate potato rebate refine regime relate remade remote rename "
    "repute retina rotate safari salami sedate senate tamale tirade tomato vagina volume".split()
)
# A letter, digit or underscore, but of a script that is written without blanks between words.
_WORD_CHARACTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"


@dataclass(frozen=True)
class PriorPrompts:
    """The prompts of a run by kind. Without prior preservation, only those that are drawn exist.

    Attributes:
        unrelated: what the model should go on knowing.
        without_word: captions without the new word, or with its class in its place.
        other_words: captions with other made-up words in its place.
        instructions: for an editor, of `--class_prompt` or the package's own.
        held_out: an unrelated prompt that is only drawn: shows whether the protection reaches other prompts.
        wrong_word: a caption with a made-up word, which is only drawn.
        no_word: a caption without its new word, which is only drawn, if the captions allow it.
        other_edit: for an editor, an instruction that is only drawn.
    """

    unrelated: tuple[str, ...] = ()
    without_word: tuple[str, ...] = ()
    other_words: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    held_out: str | None = None
    wrong_word: str | None = None
    no_word: str | None = None
    other_edit: str | None = None

    @property
    def trained(self) -> list[str]:
        return list(dict.fromkeys([*self.unrelated, *self.without_word, *self.other_words, *self.instructions]))

    @property
    def drawn(self) -> dict[str, str]:
        """Name -> prompt of those that are drawn with the retention prompts."""
        names = ("held_out", "wrong_word", "no_word", "other_edit")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def is_unrelated(self, prompt: str) -> bool:
        return prompt in self.unrelated or prompt == self.held_out

    def draw(self, seed: int, place: int, count: int, *, have_one_kind: bool = False) -> list[str]:
        """The prompts of one micro-batch. Half of them have other made-up words, if there are such prompts.

        Args:
            seed: `--seed`.
            place: the micro-batch's index in the run.
            have_one_kind: whether they are of one kind, so that all or none are held with pictures to edit.
        """
        rng = random.Random(f"{seed}/prior/{place}")
        kinds = [kind for kind in (self.unrelated, self.without_word, self.instructions) if kind]
        kinds = [*kinds, *[self.other_words] * max(1, len(kinds))] if self.other_words else kinds
        kinds = [rng.choice(kinds)] if have_one_kind else kinds
        return [rng.choice(rng.choice(kinds)) for _ in range(count)]


def prior_prompts(
    settings: Settings, captions: list[str], fits: Callable[[str], bool], accelerator: Accelerator
) -> PriorPrompts:
    """The prompts of a run, the same in all processes.

    Args:
        settings: with a seed.
        fits: whether a prompt is within the text encoder's limit.

    Raises:
        InputError: the file cannot be read, a prompt in it is too long, or no caption has a trigger word. All
            processes raise it.
    """
    prompts = None
    with failing_together():
        if accelerator.is_main_process:
            prompts = make_prompts(settings, captions, fits)
    return broadcast_object_list([prompts])[0]


def make_prompts(settings: Settings, captions: list[str], fits: Callable[[str], bool]) -> PriorPrompts:
    """See `prior_prompts`, which calls it on the main process."""
    prior = settings.prior
    warn_of_flags(prior)
    words = [TriggerWord.parse(argument) for argument in prior.trigger_word or []]
    all_made = word_prompts(words, captions, settings.training.seed)
    made = without(all_made, lambda prompt: not fits(prompt))
    is_editing = settings.data.cond_image_column is not None
    *default_instructions, other_edit = package_prompts("prior_instructions.txt")
    taught = {text.casefold() for text in [*captions, *(prior.class_prompt or [])]}
    is_other = is_editing and fits(other_edit) and other_edit.casefold() not in taught
    drawn = {"other_edit": other_edit if is_other else None}
    if not prior.with_prior_preservation:
        return PriorPrompts(wrong_word=made.wrong_word, no_word=made.no_word, **drawn)
    if num_long := len(all_made.other_words) - len(made.other_words):
        logger.warning(
            f"--trigger_word: {num_long} of the {len(all_made.other_words)} captions with made-up words are longer "
            "than the text limit and not held; shorten the captions"
        )
    if settings.lora.init_lora is not None:
        logger.warning(
            "--init_lora: on the prompts that prior preservation holds, the student is pulled towards the model "
            "without this LoRA; to keep what it does to them, pass --with_prior_preservation false"
        )
    if not words and not is_editing:  # an edit rarely has a new word
        logger.warning(
            "--trigger_word: not given; if the captions have a new word, name it, or every other unknown word may "
            "draw what is learned"
        )
    given = given_prompts(prior, fits, default_instructions if is_editing else None)
    prompts = replace(made, **given, **drawn)
    known = {caption.casefold() for caption in captions}
    clashing = [
        prompt
        for prompt in [*prompts.trained, *filter(None, [prompts.held_out])]
        if prompt.casefold() in known
        or (source(prompt, prior, prompts) != "--trigger_word" and any(word.is_in(prompt) for word in words))
    ]
    if clashing:
        logger.warning(
            f"{source(clashing[0], prior, prompts)}: {reprlib.repr(clashing[0])} is what is to be learned, so it is "
            f"not held (prompts affected: {len(clashing)})"
        )
        prompts = without(prompts, lambda prompt: prompt in clashing)
    if not prompts.trained:
        raise InputError(
            "--with_prior_preservation: no prompt is left to hold; give others with --prior_prompts, or switch it off "
            "with --with_prior_preservation false"
        )
    retained = settings.validation.retention_prompts if settings.validation.validation_steps else []
    if both := [prompt for prompt in retained if prompt in prompts.trained]:
        default = "the default prompt " if both[0] in RETENTION_PROMPTS else ""
        logger.warning(
            f"--retention_prompts: {default}{reprlib.repr(both[0])} is held by prior preservation "
            f"({source(both[0], prior, prompts)}), so it does not show what other prompts forget; give others "
            f"(prompts affected: {len(both)})"
        )
    return prompts


def source(prompt: str, settings: PriorSettings, prompts: PriorPrompts) -> str:
    """The flag that a prompt to be held is from, or that replaces it."""
    if prompt in (settings.class_prompt or []):
        return "--class_prompt"
    if prompt in prompts.instructions:
        return "--class_prompt, one of the default instructions"
    if not prompts.is_unrelated(prompt):
        return "--trigger_word"
    return "--prior_prompts" + (", one of the default prompts" if settings.prior_prompts is None else "")


def warn_of_flags(settings: PriorSettings) -> None:
    """Warns of flags that have no effect."""
    defaults = PriorSettings()
    for name in ("class_data_dir", "num_class_images", "prior_generation_precision"):
        if getattr(settings, name) != getattr(defaults, name):
            logger.warning(f"--{name}: is not needed; the base model's pictures of the class are not drawn")
    if not settings.with_prior_preservation:
        for name in ("class_prompt", "prior_prompts", "prior_loss_weight", "prior_every"):
            if getattr(settings, name) != getattr(defaults, name):
                logger.warning(f"--{name}: has no effect with --with_prior_preservation false")


def without(prompts: PriorPrompts, is_unwanted: Callable[[str], bool]) -> PriorPrompts:
    """The prompts without unwanted ones."""
    changed = {}
    for name, value in vars(prompts).items():
        if isinstance(value, tuple):
            changed[name] = tuple(prompt for prompt in value if not is_unwanted(prompt))
        else:
            changed[name] = None if value is None or is_unwanted(value) else value
    return PriorPrompts(**changed)


def given_prompts(
    settings: PriorSettings, fits: Callable[[str], bool], default_instructions: list[str] | None
) -> dict:
    """The fields `unrelated`, `instructions` and `held_out` of `PriorPrompts`: the file's last prompt is held out.

    The package's own prompts are left out if they do not fit.

    Args:
        default_instructions: for an editor without `--class_prompt`. None if no editor is trained.

    Raises:
        InputError: a prompt that the user has given does not fit.
    """
    own = [prompt for prompt in settings.class_prompt or [] if prompt.strip()]
    listed = read_prompts(settings.prior_prompts)
    given = {"--class_prompt": own, f"--prior_prompts {settings.prior_prompts}": listed}
    if settings.prior_prompts is None:
        del given["--prior_prompts None"]
        num_listed, listed = len(listed), [prompt for prompt in listed if fits(prompt)]
        if len(listed) < num_listed:
            logger.info(
                f"--prior_prompts: {num_listed - len(listed)} of the {num_listed} default prompts are longer than the "
                "text limit and left out; give your own to replace them"
            )
    for flag, prompts in given.items():
        if too_long := [prompt for prompt in prompts if not fits(prompt)]:
            raise InputError(f"{flag}: {reprlib.repr(too_long[0])} is longer than the text limit; shorten it")
    held_out = next((prompt for prompt in reversed(listed) if prompt not in own), None) if len(listed) > 1 else None
    unrelated = dict.fromkeys(prompt for prompt in [*own, *listed] if prompt != held_out)
    instructions = ()
    if default_instructions is not None:
        instructions = tuple(dict.fromkeys(own or filter(fits, default_instructions)))
    unrelated = tuple(prompt for prompt in unrelated if prompt not in instructions)
    return {"unrelated": unrelated, "instructions": instructions, "held_out": held_out}


def package_prompts(name: str) -> list[str]:
    """The prompts of a file that comes with this package."""
    return prompt_lines(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def prompt_lines(text: str) -> list[str]:
    """The distinct lines without those that are blank or begin with #."""
    lines = (line.strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a text file, one per line; without a file, those that come with this package.

    Raises:
        InputError: it cannot be read, or holds no prompts.
    """
    if path is None:
        return package_prompts("prior_prompts.txt")
    try:
        text = read_regular_file(Path(path), MAX_FILE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--prior_prompts {path}: cannot be read ({first_line(error)}); give a UTF-8 text file"
        ) from error
    prompts = prompt_lines(text)
    for prompt in prompts:
        if problem := text_problem(prompt):
            raise InputError(f"--prior_prompts {path}: {reprlib.repr(prompt)} {problem}")
    if not prompts:
        raise InputError(f"--prior_prompts {path}: holds no prompts; write one per line")
    return prompts


# The new word


@dataclass(frozen=True)
class TriggerWord:
    """A new word, and what stands in its place in the captions without it; "" to leave it out."""

    word: str
    class_words: str

    @classmethod
    def parse(cls, argument: str) -> "TriggerWord":
        """Reads WORD or WORD=CLASS.

        Raises:
            InputError: the word is blank, or part of its own class.
        """
        word, _, class_words = argument.partition("=")
        trigger = cls(word.strip(), class_words.strip())
        if not trigger.word:
            raise InputError(f"--trigger_word {argument!r}: is blank; give the new word, or WORD=CLASS")
        if trigger.is_in(trigger.class_words):
            raise InputError(f"--trigger_word {argument!r}: the class must not contain the new word; name what it is")
        return trigger

    @property
    def expression(self) -> str:
        return rf"(?<!{_WORD_CHARACTER}){re.escape(self.word)}(?!{_WORD_CHARACTER})"

    def is_in(self, text: str) -> bool:
        return re.search(self.expression, text, re.IGNORECASE) is not None


def word_prompts(words: list[TriggerWord], captions: list[str], seed: int) -> PriorPrompts:
    """The prompts that are made from the captions.

    Raises:
        InputError: no caption has one of the words.
    """
    for word in words:
        if not any(word.is_in(caption) for caption in captions):
            raise InputError(f"--trigger_word {word.word}: no caption has this word; write it as in the captions")
    used = [caption for caption in captions if any(word.is_in(caption) for word in words)]
    if not used:
        return PriorPrompts()
    rng = random.Random(f"{seed}/prior words")
    used = rng.sample(used, min(MAX_CAPTIONS, len(used)))
    taken = {part.casefold() for caption in captions for part in re.findall(r"\w+", caption)}
    made_up = made_up_words(rng, NUM_WORDS, taken)
    wrong, others = made_up[: len(words)], made_up[len(words) :]
    plain = list(dict.fromkeys(filter(None, (replaced(caption, words, None) for caption in used))))
    known = {caption.casefold() for caption in captions}
    no_word = next((prompt for prompt in plain if prompt.casefold() not in known), None)
    return PriorPrompts(
        without_word=tuple(prompt for prompt in plain if prompt != no_word) or tuple(plain),
        other_words=tuple(
            dict.fromkeys(
                replaced(rng.choice(used), words, rng.sample(others, len(words))) for _ in range(NUM_WITH_OTHER_WORDS)
            )
        ),
        wrong_word=replaced(used[0], words, wrong),
        no_word=no_word,
    )


def replaced(caption: str, words: list[TriggerWord], others: list[str] | None) -> str:
    """The caption with each trigger word's class, or with another word, in its place; "" if no letter is left.

    Args:
        others: one per trigger word; None for the classes.
    """
    instead = [word.class_words for word in words] if others is None else others
    longest_first = sorted(range(len(words)), key=lambda index: -len(words[index].word))
    expression = "|".join(f"(?P<word{index}>{words[index].expression})" for index in longest_first)
    text = re.sub(
        expression, lambda match: instead[int(match.lastgroup.removeprefix("word"))], caption, flags=re.IGNORECASE
    )
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split())).strip(" ,.;:-")
    return text if re.search(r"[^\W\d_]", text) else ""


def made_up_words(rng: random.Random, count: int, avoided: set[str]) -> list[str]:
    """Distinct words of three syllables without a meaning, such as "kebidu"."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))
        if word not in avoided and word not in REAL_WORDS:
            words[word] = None
    return list(words)
