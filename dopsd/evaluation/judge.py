"""--judge: a vision-language model says how far a drawing shows what a training picture shows.

It answers with one of four grades, 4 to 1, those of the published code's evaluation: for a subject, whether it is the
same instance; for a style, how far it is kept. The question about edits, which have no published one, is like that
about styles.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..files import read_regular_file
from ..output import naming_file, replacing
from .chat import Chat, asking


# From the best to the worst, 4 to 1.
INSTANCE_GRADES = ("same instance", "mostly same", "partly similar", "different instance")
STYLE_GRADES = ("highly consistent", "mostly consistent", "slightly consistent", "not consistent")

INSTANCE_QUESTION = """You compare two pictures. The first one is a photograph or drawing of a certain {subject}, \
the second one was made by a program that was asked to show the very same {subject}.

Look at shape, proportions, colours, markings and parts of the {subject} in both. Ignore the background, the pose, \
the light and how good the pictures are. That both show a {subject} is not enough: the question is whether it is this \
one.

How sure is it that both show the same one? Answer with exactly one of these grades, and nothing else:
{grades}
Here "same instance" means that nothing speaks against it, "mostly same" that small details differ, "partly similar" \
that some features agree but it seems to be another one, "different instance" that it clearly is another one."""

STYLE_QUESTION = """You compare two pictures. The first one shows a certain style, the second one was made by a \
program that was asked to draw something else in the very same style.

Look at the technique, colours, lines, textures, light and mood of both. Ignore what is shown, how it is composed and \
how good the pictures are.

How far does the second picture keep the style of the first one? Answer with exactly one of these grades, and nothing \
else:
{grades}"""
EDIT_QUESTION = """You compare two pictures. The first one is the result of a certain edit{name}, the second one was \
made by a program that was asked to edit some other picture in the very same way.

Look at what the edit has done: its technique, colours, lines, textures, parts that were added or changed. Ignore \
what was shown before the edit, how it is composed and how good the pictures are.

How far was the second picture edited like the first one? Answer with exactly one of these grades, and nothing else:
{grades}"""
MAX_ANSWER_TOKENS = 16
ANSWERS_FILE = "judge.json"


class Judge:
    """Asks about drawings, and keeps the answers in a file, so that no question is asked twice.

    Args:
        chat: the model.
        kind: of what was taught: "style", "edit", or any other for a subject.
        subject: what it is in plain words, such as "dog"; "" if nobody has said it.
        folder: where `ANSWERS_FILE` is kept.
    """

    def __init__(self, chat: Chat, kind: str | None, subject: str, folder: Path):
        self.chat, self.path = chat, folder / ANSWERS_FILE
        questions = {"style": STYLE_QUESTION, "edit": EDIT_QUESTION}
        self.grades = STYLE_GRADES if kind in questions else INSTANCE_GRADES
        self.question = questions.get(kind, INSTANCE_QUESTION).format(
            subject=subject or "subject",
            name=f", called {subject!r}" if subject else "",
            grades="\n".join(self.grades),
        )

    @property
    def name(self) -> str:
        return self.chat.name

    def scores(self, pairs: dict[Path, Image.Image], device: torch.device) -> dict[Path, float]:
        """Drawing's file -> 1 to 4, without those for which the answer is no grade.

        Args:
            pairs: drawing's file -> the training picture that it is compared with.

        Raises:
            InputError: the model's weights cannot be loaded.
            OutputError: the answers cannot be written.
        """
        answers = self.read_answers()
        keys = {path: self.key(path, reference) for path, reference in pairs.items()}
        if missing := [path for path in pairs if keys[path] not in answers]:
            with asking(self.chat, device) as ask:
                for path in tqdm(missing, desc="Judging", unit="picture"):
                    with Image.open(path) as drawing:
                        pictures = [pairs[path], drawing.convert("RGB")]
                    answers[keys[path]] = ask(self.question, pictures, MAX_ANSWER_TOKENS)
                    self.write_answers(answers)
        grades = {path: grade(answers[keys[path]], self.grades) for path in pairs}
        return {path: float(score) for path, score in grades.items() if score is not None}

    def key(self, path: Path, reference: Image.Image) -> str:
        """Digest of everything that an answer depends on."""
        digest = hashlib.sha256(f"{self.chat.name}\n{self.question}\n{reference.size}".encode())
        digest.update(reference.convert("RGB").tobytes())
        digest.update(path.read_bytes())
        return digest.hexdigest()

    def read_answers(self) -> dict[str, str]:
        """Those of earlier runs; none if the file is missing or damaged."""
        try:
            answers = json.loads(read_regular_file(self.path))
        except (OSError, ValueError):
            return {}
        is_sound = isinstance(answers, dict) and all(isinstance(answer, str) for answer in answers.values())
        return answers if is_sound else {}

    def write_answers(self, answers: dict[str, str]) -> None:
        with naming_file(self.path), replacing(self.path) as unfinished:
            unfinished.write_text(json.dumps(answers, indent=1), encoding="utf-8")


def grade(answer: str, grades: tuple[str, ...]) -> int | None:
    """4 for the first of the grades to 1 for the last one; None unless the answer is exactly one of them.

    Case, spaces, quotes, asterisks and a full stop around it do not count.
    """
    words = re.sub(r"\s+", " ", answer).strip(" \"'*.`").casefold()
    return len(grades) - grades.index(words) if words in grades else None
