"""--write_prompts: a vision-language model writes prompts for the subject from the training pictures."""

import re
from collections.abc import Sequence

import torch
from PIL import Image

from ..errors import InputError
from ..text import text_problem
from .chat import Chat, asking


SHOWN_AT_ONCE = 4  # training pictures
MAX_ROUNDS = 4
TOKENS_PER_PROMPT = 40
MAX_WORDS = 40

QUESTIONS = {
    "subject": """These pictures show {subject}. Write {count} prompts for a program that draws {subject}. Each one \
puts {subject} into a new situation: another place, activity, light, view or technique than in these pictures. Half \
of them are everyday scenes, half are imaginative ones. Do not describe how {subject} looks, and do not repeat a \
place, pose or background of these pictures.""",
    "style": """These pictures share a style, which is called "{subject}". Write {count} prompts for a program that \
draws pictures in this style. Each one names another subject: people, animals, things and landscapes that are in none \
of these pictures. Do not describe the style, but end each prompt with "{subject}".""",
    "edit": """A program was taught to edit pictures; these are results of it. The edit is called "{subject}". Write \
{count} instructions that ask for this edit of an unknown picture, each in other words, and with "{subject}" in them. \
Do not describe these pictures.""",
}
FORM = """
Every prompt is one sentence of at most 20 words and has the words "{subject}" in it, exactly so. Write one prompt \
per line, without numbers, quotes or anything else."""
NOT_AGAIN = "\nThese are written already; write others:\n{prompts}"


def write_prompts(
    chat: Chat,
    pictures: Sequence[Image.Image],
    count: int,
    *,
    kind: str,
    subject: str,
    device: torch.device,
) -> list[str]:
    """Prompts that have the subject's words in them.

    Args:
        pictures: the training pictures. A few are shown at a time, others when more prompts are needed.
        kind: of what was taught: "style", "edit" or any other.
        subject: as the prompts name it, such as "sks dog" or "in sks style".

    Raises:
        InputError: the model's weights cannot be loaded, or it does not write enough prompts.
    """
    question = QUESTIONS.get(kind, QUESTIONS["subject"]) + FORM
    found: list[str] = []
    with asking(chat, device) as ask:
        for number in range(MAX_ROUNDS):
            missing = count - len(found)
            text = question.format(subject=subject, count=missing)
            if found:
                text += NOT_AGAIN.format(prompts="\n".join(found))
            first = number * SHOWN_AT_ONCE
            shown = [pictures[(first + place) % len(pictures)] for place in range(min(SHOWN_AT_ONCE, len(pictures)))]
            answer = ask(text, shown, TOKENS_PER_PROMPT * missing)
            known = {prompt.casefold() for prompt in found}
            found += [prompt for prompt in usable(answer, subject) if prompt.casefold() not in known][:missing]
            if len(found) == count:
                return found
    raise InputError(
        f"--write_prompts: {chat.name} wrote {len(found)} of {count} prompts that name {subject!r}; pass your own "
        "with --prompts, or a larger model with --vlm_name_or_path"
    )


def usable(answer: str, subject: str) -> list[str]:
    """The distinct lines of an answer that name the subject, without numbers, bullets and quotes around them."""
    name = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)
    found: dict[str, str] = {}
    for line in answer.splitlines():
        prompt = re.sub(r"^\s*(\(?\d+[.):]|[-*•])\s*", "", line).strip().strip("\"'“”*` ").rstrip(".")
        if name.search(prompt) and len(prompt.split()) <= MAX_WORDS and not text_problem(prompt):
            found.setdefault(prompt.casefold(), prompt)
    return list(found.values())
