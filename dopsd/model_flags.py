"""What the command line of a script depends on: a model's flags, defaults and limits.

This module, and all that it imports, imports no library that takes seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from .settings import ModelSettings, Settings
from .sizes import SizeLimits


# Defaults of a teacher that sees the result of an edit after what is edited.
EDITING = {"teacher_prompt_suffix": " The last image shows the result of this edit: reproduce it exactly."}


@dataclass(frozen=True)
class TeacherContext:
    """One choice of `--teacher_context`.

    Attributes:
        description: continues the sentence "the teacher: ...".
        encoders: names of the encoders whose tensors make up the teacher's context.
        prompt_suffix: default of `--teacher_prompt_suffix`.
        flags: the flags that only this choice uses, with their defaults. None is resolved later.
        editing: defaults with `--cond_image_column`, where they differ.
        other_suffix: default of `--teacher_prompt_suffix` with `--teacher_picture other`; None if it is the same.
        flag_help: what `--help` adds to some of them.
    """

    description: str
    encoders: tuple[str, ...]
    prompt_suffix: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    editing: dict[str, Any] = field(default_factory=dict)
    other_suffix: str | None = None
    flag_help: dict[str, str] = field(default_factory=dict)

    def defaults(self, *, is_editing: bool, shows_other: bool) -> dict[str, Any]:
        """Flag -> default, of all flags of the teacher whose default depends on the choice."""
        is_other = shows_other and self.other_suffix is not None
        values = {"teacher_prompt_suffix": self.other_suffix if is_other else self.prompt_suffix, **self.flags}
        return values | self.editing if is_editing else values


# The `caption` teacher: it reads more than the student, and needs no picture.
CAPTION_CONTEXT = TeacherContext(
    "it reads --teacher_caption_column, and sees no picture",
    encoders=("text",),
    flags={"teacher_caption_column": None},
)


def vlm_context(
    vlm: str,
    default_models: dict[int, str],
    *,
    min_pixels: int,
    max_pixels: int,
    editing: Mapping[str, Any] = MappingProxyType({}),
) -> TeacherContext:
    """The `vlm` teacher, whose text encoder sees the picture through the vision tower of `vlm`.

    Args:
        default_models: hub ids by the text encoder's hidden size; the default is the one that fits.
        min_pixels, max_pixels: defaults of the flags; pictures are scaled to an area between them.
        editing: see `TeacherContext`.
    """
    return TeacherContext(
        f"its text encoder sees the picture through {vlm}'s vision tower",
        encoders=("vlm",),
        editing=dict(editing),
        flags={
            "vlm_model_name_or_path": None,
            "vlm_min_pixels": min_pixels,
            "vlm_max_pixels": max_pixels,
            "vlm_rope": "vlm",
        },
        flag_help={
            "vlm_model_name_or_path": f"Default: {' or '.join(default_models.values())}, by the text encoder's size."
        },
    )


class ModelFlags:
    """A few-step model, as far as its flags depend on it.

    Attributes:
        name, example: what to call it in messages, and a hub id of it.
        sizes: the sizes it can be trained at.
        can_edit: whether it takes pictures to edit, so that it can be trained on editing pairs.
        teacher_contexts: choices of `--teacher_context`; the first is the default.
        settings_class: `ModelSettings`, or a subclass with flags that only this model has.
        default_settings: flag -> default, where it depends on the model. Holds "max_train_steps", which is the default
            unless `--num_train_epochs` is given.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    sizes: ClassVar[SizeLimits]
    can_edit: ClassVar[bool] = False
    teacher_contexts: ClassVar[dict[str, TeacherContext]]
    settings_class: ClassVar[type[ModelSettings]] = ModelSettings
    default_settings: ClassVar[dict[str, Any]]

    def teacher_context(self, settings: Settings) -> TeacherContext:
        return self.teacher_contexts[settings.teacher.teacher_context]
