"""The interface to a vision-language model, of which this package knows no more."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from PIL import Image

from ..errors import naming_flag


Ask = Callable[[str, list[Image.Image], int], str]  # (question, pictures, most new tokens) -> answer


class Chat(Protocol):
    """A vision-language model that answers with what is likeliest, so that it always answers the same.

    Attributes:
        name: hub id or folder.
    """

    name: str

    def loaded(self, device: torch.device) -> AbstractContextManager[Ask]:
        """Context with the model on the device.

        Raises:
            InputError: its weights cannot be loaded.
        """


@contextmanager
def asking(chat: Chat, device: torch.device) -> Iterator[Ask]:
    """Context with the model on the device; the error for weights that cannot be loaded names the flag."""
    with ExitStack() as stack:
        with naming_flag("--vlm_name_or_path"):
            ask = stack.enter_context(chat.loaded(device))
        yield ask
