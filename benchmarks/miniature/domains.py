"""A domain: objects in a style of their own, taught with captions that name the objects and a new word."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.baselines import EncodedPictures, encode_pictures
from benchmarks.miniature.concepts import MAX_EVAL_COUNT, old_task, write_pictures
from benchmarks.miniature.evaluate import measure
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.metrics import LatentFeatures, PictureReader, frechet_distance
from benchmarks.miniature.tasks import Task, random_picture
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


NUM_DOMAIN_PICTURES = 64
# Another colour for each one that words name, and blue outlines.
NEON = world.Style(
    palette=((240, 80, 220), (250, 120, 20), (160, 250, 40), (60, 220, 250), (160, 110, 255), (150, 60, 190)),
    outline=(20, 40, 160),
)


@dataclass(frozen=True)
class Domain:
    """A style to be taught.

    Attributes:
        word: stands before the objects' words in the captions.
    """

    name: str
    word: str
    style: world.Style

    @property
    def title(self) -> str:
        return f'{NUM_DOMAIN_PICTURES} pictures, such as "{self.pictures(0)[1][0]}"'

    def pictures(self, seed: int) -> tuple[list[Image.Image], list[str]]:
        """The training pictures and their captions. Each shows another object; no task asks for one of these."""
        asked = {*old_task(MAX_EVAL_COUNT).wanted}
        unasked = [item for item in world.known_appearances() if item not in asked]
        rng = np.random.default_rng([50, seed])
        images, captions = [], []
        for index in rng.permutation(len(unasked))[:NUM_DOMAIN_PICTURES]:
            background = world.random_background(rng)
            images.append(world.to_image(random_picture(unasked[index], background, rng, self.style)))
            captions.append(world.caption(f"{self.word} {unasked[index].words}", background))
        return images, captions

    def write_training_data(self, folder: Path, seed: int) -> None:
        write_pictures(folder, *self.pictures(seed))

    @property
    def training_flags(self) -> dict[str, str]:
        return {"teacher_prompt_suffix": world.REFERENCE_SUFFIX}

    def encoded_pictures(self, pipeline: Flux2KleinDOPSDPipeline, seed: int) -> EncodedPictures:
        return encode_pictures(
            pipeline,
            *self.pictures(seed),
            prompt_suffix=world.REFERENCE_SUFFIX,
        )

    def new_task(self, count: int, seed: int = 51) -> Task:
        """The old prompts with the new word: objects that no training picture shows. `seed`: of the real pictures."""
        old = old_task(count)
        rng = np.random.default_rng(seed)
        scenes = [*zip(old.wanted, old.backgrounds, strict=True)]
        return replace(
            old,
            prompts=[world.caption(f"{self.word} {item.words}", background) for item, background in scenes],
            real=world.to_tensor([random_picture(item, background, rng, self.style) for item, background in scenes]),
        )

    def tasks(self, count: int, seed: int) -> dict[str, Task]:
        """ "new"; the same prompts without the word ("old"); and with other made-up words ("wrong_words")."""
        old = old_task(count)
        rng = np.random.default_rng(52)
        words = [word if (word := world.nonsense_word(rng)) != self.word else "mip" for _ in range(count)]
        wrong = [
            world.caption(f"{word} {item.words}", background)
            for word, item, background in zip(words, old.wanted, old.backgrounds, strict=True)
        ]
        return {"new": self.new_task(count), "old": old, "wrong_words": replace(old, prompts=wrong)}

    def teacher_tasks(self, count: int, seed: int, suffix: str) -> dict[str, Task]:
        """The new prompts as the teacher reads them, each with a picture of what is asked for."""
        new = self.new_task(count)
        rng = np.random.default_rng([53, seed])
        references = [
            world.to_image(random_picture(item, world.random_background(rng), rng, self.style)) for item in new.wanted
        ]
        prompts = [prompt + world.REFERENCE_SUFFIX for prompt in new.prompts]
        return {"new": replace(new, prompts=prompts, references=references)}

    @cached_property
    def reader(self) -> PictureReader:
        return PictureReader(world.all_appearances(), (world.ORDINARY, self.style))

    @cached_property
    def features(self) -> LatentFeatures:
        return LatentFeatures(AutoencoderKLFlux2.from_pretrained(MODEL / "vae").eval())

    def measure(self, pictures: torch.Tensor, task: Task, seed: int, reader: PictureReader) -> dict[str, float]:
        """`measure` in whichever style is nearer, the distance of latents ("latent_fd"), and shares of pictures.

        "look": with the domain's look; "whole": with it and the right object; "ordinary": with the right object as the
        base draws it.
        """
        figures = measure(pictures, task, self.reader)
        objects = self.reader.read(pictures).objects.tolist()
        is_right = torch.tensor(
            [self.reader.appearances[index] == wanted for index, wanted in zip(objects, task.wanted, strict=True)]
        )
        is_domain = torch.tensor([self.reader.styles[index] == self.style for index in objects])
        shares = {"look": is_domain, "whole": is_domain & is_right, "ordinary": ~is_domain & is_right}
        figures["latent_fd"] = round(frechet_distance(pictures, task.real, self.features), 3)
        return figures | {name: round(float(share.float().mean()), 3) for name, share in shares.items()}


DOMAIN = Domain("domain", "zofu", NEON)
