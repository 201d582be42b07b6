"""Drawing with the stock pipeline: every contender from the same noise, one prompt's text encoded once."""

import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory
from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError
from ..launch import weight_dtype
from ..loading import is_device_error, limited_size, reporting_load_errors
from ..pretrained import hub_options
from .comparison import Contender, Drawn, LoRA, Prompt, Role
from .contenders import adapter_name, load_into, read_weights
from .deployment import Deployment
from .pictures import Job, PictureStore
from .prompts import PROMPTS_FILE
from .settings import EvaluationSettings


logger = get_logger(__name__)

DEFAULT_BATCH_SIZE = 4


def all_jobs(
    contenders: dict[Contender, tuple[Role, ...]], prompts: list[Prompt], settings: EvaluationSettings
) -> list[Job]:
    """Every picture of the comparison, in the order of drawing: as few changes of the LoRA as possible."""
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    return [
        Job(contender, prompt, seed)
        for contender in sorted(contenders, key=lambda one: [lora.name for lora in one.loras])
        for prompt in sorted(prompts, key=lambda one: -1 if one.image is None else one.image)
        if prompt.role in contenders[contender]
        for seed in seeds
    ]


def drawn_pictures(jobs: list[Job], store: PictureStore, contenders: dict[Contender, tuple[Role, ...]]) -> Drawn:
    """Where each picture is, when all are drawn; contenders and prompts in their own order."""
    drawn: Drawn = {contender: {} for contender in contenders}
    for job in jobs:
        drawn[job.contender].setdefault(job.prompt, []).append(store.path(job))
    return drawn


def check_lengths(prompts: Iterable[Prompt], deployment: Deployment, settings: EvaluationSettings) -> None:
    """Checks, by the tokenizer alone, that the pipeline reads every prompt to its end.

    Raises:
        InputError: one is too long.
    """
    pipeline = load_pipeline(deployment, settings, transformer=None, vae=None, text_encoder=None)
    limit = settings.max_sequence_length
    for prompt in prompts:
        length = deployment.count_tokens(pipeline, prompt.text)
        if length > limit:
            raise InputError(
                f"--max_sequence_length {limit}: {reprlib.repr(prompt.text)} is {length} tokens long with the chat "
                f"template; raise the limit, or shorten it in {Path(settings.output_dir, PROMPTS_FILE)} and pass "
                "that with --prompts"
            )


def draw_missing(
    jobs: list[Job],
    store: PictureStore,
    deployment: Deployment,
    settings: EvaluationSettings,
    device: torch.device,
) -> int:
    """Draws what the store does not have, and frees the pipeline.

    Args:
        settings: with the precision and the sampling steps.

    Returns:
        Number of pictures that were drawn.

    Raises:
        InputError: the checkpoint cannot be loaded.
        OutputError: a picture cannot be written.
        torch.OutOfMemoryError: not even one picture fits the memory.
    """
    by_key = {store.key(job): job for job in jobs}  # the same LoRA under two names is drawn once
    missing = [job for job in tqdm(by_key.values(), "Looking for pictures", leave=False) if not store.has(job)]
    if not missing:
        return 0
    embeds, negative = encode_prompts({job.prompt.text for job in missing}, deployment, settings, device)
    with loaded_pipeline(deployment, settings, device) as pipeline, tqdm(desc="Drawing", total=len(missing)) as bar:
        painter = Painter(pipeline, deployment, settings, store, embeds=embeds, negative=negative, device=device)
        for contender, own in groupby(missing, key=lambda job: job.contender):
            painter.switch_to(contender)
            for _, alike in groupby(own, key=lambda job: (job.prompt.image, store.size(job.prompt))):
                for count in painter.draw(list(alike)):
                    bar.update(count)
    return len(missing)


def encode_prompts(
    texts: set[str], deployment: Deployment, settings: EvaluationSettings, device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Text -> its embeddings on the CPU, and those of the empty prompt where they are needed.

    The text encoder is loaded for the time of the call only. No LoRA of these pipelines changes it.
    """
    pipeline = load_pipeline(deployment, settings, transformer=None, vae=None).to(device)

    wanted = sorted({*texts, ""} if deployment.needs_negative else texts)
    with torch.no_grad():
        embeds = {
            text: deployment.encode(pipeline, text, settings.max_sequence_length).cpu()
            for text in tqdm(wanted, "Encoding prompts", leave=False)
        }
    del pipeline
    free_memory()
    return embeds, embeds[""] if deployment.needs_negative else None


def load_pipeline(deployment: Deployment, settings: EvaluationSettings, **left_out: None) -> DiffusionPipeline:
    """The stock pipeline without some components, on the CPU."""
    with reporting_load_errors(settings), limited_size():
        return deployment.pipeline_class.from_pretrained(
            settings.pretrained_model_name_or_path,
            dtype=weight_dtype(settings.mixed_precision),
            variant=settings.variant,
            use_safetensors=True,
            trust_remote_code=False,
            **hub_options(settings),
            **left_out,
        )


@contextmanager
def loaded_pipeline(
    deployment: Deployment, settings: EvaluationSettings, device: torch.device
) -> Iterator[DiffusionPipeline]:
    """Context with the pipeline without its text encoder. Its memory is given back."""
    pipeline = load_pipeline(deployment, settings, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        if settings.enable_model_cpu_offload and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        yield pipeline
    finally:
        pipeline.remove_all_hooks()
        pipeline.register_modules(transformer=None, vae=None)  # whoever entered the context still has the pipeline
        free_memory()


class Painter:
    """Draws with one contender after the other.

    Args:
        pipeline: without its text encoder. It has no LoRA yet.
        embeds, negative: from `encode_prompts`.
        device: that the pipeline computes on.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        deployment: Deployment,
        settings: EvaluationSettings,
        store: PictureStore,
        *,
        embeds: dict[str, Any],
        negative: Any,
        device: torch.device,
    ):
        self.pipeline, self.deployment, self.settings, self.store = pipeline, deployment, settings, store
        self.embeds, self.negative, self.device = embeds, negative, device
        self.batch_size = settings.batch_size or DEFAULT_BATCH_SIZE
        self.loaded: list[LoRA] = []

    def switch_to(self, contender: Contender) -> None:
        """Loads the contender's LoRAs at its strength, and removes others."""
        for lora in [lora for lora in self.loaded if lora not in contender.loras]:
            self.pipeline.delete_adapters(adapter_name(lora.name))
            self.loaded.remove(lora)
        if not contender.loras:
            self.pipeline.unload_lora_weights()
            return
        for lora in [lora for lora in contender.loras if lora not in self.loaded]:
            weights, metadata = read_weights(self.deployment, lora)
            load_into(self.deployment, self.pipeline.transformer, lora.name, weights, metadata, self.pipeline)
            self.loaded.append(lora)
        names = [adapter_name(lora.name) for lora in contender.loras]
        self.pipeline.set_adapters(names, adapter_weights=[contender.strength] * len(names))

    def draw(self, jobs: list[Job]) -> Iterator[int]:
        """Draws and saves pictures of one size from the same pictures to edit. Yields how many more are drawn.

        A batch that does not fit the memory is drawn in halves, and so are those that follow.
        """
        place = 0
        while place < len(jobs):
            batch = jobs[place : place + self.batch_size]
            try:
                images = self.draw_batch(batch)
            except Exception as error:
                if not is_device_error(error) or "out of memory" not in str(error) or len(batch) == 1:
                    raise
                self.batch_size = len(batch) // 2
                logger.info(f"{len(batch)} pictures do not fit the GPU's memory; {self.batch_size} are drawn at once")
                del error
                free_memory()
                continue
            for job, image in zip(batch, images, strict=True):
                self.store.save(job, image)
            place += len(batch)
            yield len(batch)

    def draw_batch(self, jobs: list[Job]) -> list[Image.Image]:
        prompt = jobs[0].prompt
        height, width = self.store.size(prompt)
        embeds = [self.embeds[job.prompt.text].to(self.device) for job in jobs]
        negative = None if self.negative is None else self.negative.to(self.device)
        arguments = self.deployment.call_arguments(embeds, negative)
        if prompt.image is not None:
            arguments["image"] = list(self.store.edited[prompt.image].images)
        return self.pipeline(
            **arguments,
            height=height,
            width=width,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.deployment.guidance_scale,
            # On the CPU and one per picture: the noise depends neither on the device nor on the batch.
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        ).images
