"""The quantities of a comparison, and what each of them means."""

from typing import Literal, NamedTuple

from .comparison import Column, Role


class Quantity(NamedTuple):
    """A quantity, which has a column per feature model that it is measured with.

    Attributes:
        label: its heading, without the model.
        meaning: what it is, and when it misleads.
    """

    label: str
    is_better: Literal["higher", "lower", None]
    meaning: str


CLIP, DINO, JUDGE = "clip", "dino", "judge"
MODELS = {CLIP: "CLIP", DINO: "DINO"}
MASKED = "masked"  # the features of the subject alone

LIKENESS, CLOSENESS, COPIES = "likeness", "closeness", "copies"
FOLLOWING, FOLLOWING_UNRELATED = "following", "following_unrelated"
SHARPNESS, SHARPNESS_UNRELATED = "sharpness", "sharpness_unrelated"
DETAIL, DETAIL_UNRELATED = "detail", "detail_unrelated"
DIVERSITY, RETENTION, KEPT, SCORE = "diversity", "retention", "kept", "score"
LEAKAGE: dict[Role, str] = {"neighbour": "leakage_neighbours", "other_word": "leakage_words"}

QUANTITIES = {
    LIKENESS: Quantity(
        "likeness",
        "higher",
        "Mean cosine of the drawings with the training pictures. Place, pose and light count as much as the subject, "
        "so a LoRA that copies its pictures scores best. People are judged badly; trust the masked figure more.",
    ),
    f"{LIKENESS}_{MASKED}": Quantity(
        "likeness of the subject",
        "higher",
        "Likeness with everything but the subject masked, so that the background does not count. Faces are still "
        "judged badly. Misleads where the mask misses a part of the subject; pictures without a clear one are left "
        "out.",
    ),
    CLOSENESS: Quantity(
        "closeness to one picture",
        None,
        "Mean of the highest cosine of each drawing with a single training picture, background included. Above what "
        "the training pictures have among themselves, a picture was memorised with its background and pose. Grows "
        "with likeness, too; with a style, it also grows with the subjects that the prompts share with the pictures.",
    ),
    COPIES: Quantity(
        "copies",
        "lower",
        "Share of the drawings that are nearly a training picture, pixel by pixel at low resolution: memorised, with "
        "background and pose. 0 is good. Blind to copies that are cropped or mirrored; a prompt that asks for what a "
        "training picture shows makes one without a fault.",
    ),
    SCORE: Quantity(
        "judge",
        "higher",
        "Answers of a vision-language model that is asked whether a drawing shows what a training picture shows: 4 is "
        "the same, 3 mostly, 2 partly, 1 not. Coarse, generous to subjects without marks of their own, and the "
        "answers of another model are not comparable.",
    ),
    FOLLOWING: Quantity(
        "prompt following",
        "higher",
        "Cosine of the drawings with their prompts in plain words. Compare with the base, which has no subject to "
        "draw: a good LoRA falls short of it only a little. Blind to order, number and relations.",
    ),
    FOLLOWING_UNRELATED: Quantity(
        "prompt following, unrelated prompts",
        "higher",
        "Cosine of the drawings with prompts that have nothing to do with the subject. If it is the base's while "
        "retention is lower, the LoRA draws other pictures, but not worse ones.",
    ),
    SHARPNESS: Quantity(
        "sharpness",
        None,
        "Of edges: finest detail relative to the next coarser one, over the base's for the same prompts, at the steps "
        "that were drawn with. Well below 1 is blur, well above 1 is noise. The base does not know the subject, whose "
        "edges may be softer or harder than those that it draws instead. Blind to lost grain; see fine detail.",
    ),
    SHARPNESS_UNRELATED: Quantity(
        "sharpness, unrelated prompts",
        None,
        "Sharpness where both draw the same: below 1, the LoRA undoes the few-step distillation, as training with a "
        "plain diffusion loss does. About 1 is no proof that it does not, since lost grain is not seen.",
    ),
    DETAIL: Quantity(
        "fine detail",
        None,
        "Of grain and fine texture away from edges, over the base's for the same prompts. Well below 1 is smooth, as "
        "after training that blurs the few steps; well above 1 is noise. The subject, or a style, may be plainer or "
        "grainier than what the base draws instead.",
    ),
    DETAIL_UNRELATED: Quantity(
        "fine detail, unrelated prompts",
        None,
        "Fine detail where both draw the same: below 1, the LoRA undoes the few-step distillation; far above 1, its "
        "pictures are noisy.",
    ),
    DIVERSITY: Quantity(
        "diversity",
        "higher",
        "Mean of 1 - cosine between the drawings of one prompt from different seeds. Compare LoRAs with each other: "
        "near 0, one draws the same picture again and again. The base has more, since a word that it does not know "
        "may become anything, and so have noise and broken pictures.",
    ),
    KEPT: Quantity(
        "likeness to the edited picture",
        None,
        "Cosine of the result with the picture that was to be edited. 1 means that nothing was changed, so it should "
        "be neither near 1 nor far below the base's.",
    ),
    RETENTION: Quantity(
        "retention",
        "higher",
        "Cosine with the base's picture of the same unrelated prompt and seed: 1 is unchanged. A small change early "
        "in sampling can become another picture that is as good; see prompt following on unrelated prompts.",
    ),
    LEAKAGE["neighbour"]: Quantity(
        "leakage to neighbours",
        "lower",
        "How much more than the base's the drawings of the class, without the trigger word, are like the training "
        "pictures: 0 is none. A subject that is taught without a trigger word is meant to leak.",
    ),
    LEAKAGE["other_word"]: Quantity(
        "leakage to other words",
        "lower",
        "The same for prompts with another made-up word in the trigger word's place: above 0, every unknown word "
        "draws the subject.",
    ),
}
# Heading -> quantities, for tables that fit a page.
GROUPS = {
    "The subject": (LIKENESS, f"{LIKENESS}_{MASKED}", SCORE, CLOSENESS, COPIES),
    "Prompts and pictures": (FOLLOWING, SHARPNESS, DETAIL, DIVERSITY, KEPT),
    "Everything else": (RETENTION, FOLLOWING_UNRELATED, SHARPNESS_UNRELATED, DETAIL_UNRELATED, *LEAKAGE.values()),
}


def column(quantity: str, kind: str | None = None, model: str | None = None) -> Column:
    """The column of a quantity.

    Args:
        kind: `CLIP`, `DINO` or `JUDGE`; None if it depends on no model.
        model: the model's public name.
    """
    label, is_better, meaning = QUANTITIES[quantity]
    name = f"{label} ({MODELS[kind]})" if kind in MODELS else label
    return Column(f"{quantity}/{kind}" if kind else quantity, name, is_better, meaning, model)


def quantity_of(column: Column) -> str:
    return column.key.partition("/")[0]
