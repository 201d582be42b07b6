"""Contexts for training and drawing: which encodings a run needs, when they are computed, and where they are kept."""

import copy
import itertools
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from .context_cache import ContextCache, content_key
from .data.buckets import Crop
from .data.order import Sample
from .data.pictures import Picture
from .data.training_data import TrainingData
from .errors import InputError
from .model import Conditioning, Context, Encoder, FewStepPipeline, Size
from .sharing import (
    failing_together,
    machine_of_each_process,
    machine_share,
    part_of,
    share_on_each_machine,
    share_on_own_machine,
)


logger = get_logger(__name__)

# What is encoded at a time: 8 prompts of 512 tokens. Bounds the memory for hidden states and logits.
MAX_BATCH_TOKENS = 4096

# A cache that grows by more than this is announced with what would make it smaller.
LARGE_BYTES = 20 * 10**9

# Increased when the encoding of the same inputs changes, so that older cache entries are not used.
ENCODING_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Encoding:
    """The input of one encoder, which identifies its output: a prompt, pictures, or both."""

    encoder: Encoder
    prompt: str = ""
    pictures: tuple[Crop, ...] = ()

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(crop.size for crop in self.pictures)


class Contexts:
    """Contexts of student and teacher, read from the cache or, without one, encoded when they are asked for.

    Args:
        pipeline: with its VAE, without its text encoder.
        conditioning: what student and teacher are conditioned on.
        data: the pictures and captions.
        teacher_prompt_suffix: appended to the caption in the teacher's prompt.
        load_text_encoder: returns the pipeline's text encoder. Called when an encoding needs it.
        device: the accelerator.
    """

    def __init__(
        self,
        pipeline: FewStepPipeline,
        conditioning: Conditioning,
        data: TrainingData,
        *,
        teacher_prompt_suffix: str,
        load_text_encoder: Callable[[], torch.nn.Module],
        device: torch.device,
    ):
        self.pipeline, self.conditioning, self.data = pipeline, conditioning, data
        self.teacher_prompt_suffix = teacher_prompt_suffix
        self.load_text_encoder = load_text_encoder
        self.device = device
        self.cache: ContextCache | None = None
        self.fingerprints: dict[str, str] = {}

    # What a context is made of

    def student_encodings(self, prompt: str, cond_images: tuple[Crop, ...] = ()) -> tuple[Encoding, ...]:
        prompts = (Encoding(encoder, prompt) for encoder in self.conditioning.student)
        return *prompts, *self.cond_encodings(cond_images)

    def cond_encodings(self, cond_images: tuple[Crop, ...]) -> tuple[Encoding, ...]:
        """Of the pictures to edit, which student and teacher share."""
        return tuple(Encoding(self.conditioning.cond_encoder, pictures=(crop,)) for crop in cond_images)

    def teacher_encodings(self, sample: Sample) -> tuple[Encoding, ...]:
        data, encoders = self.data, self.conditioning.teacher
        prompt = (data.picture(sample).teacher_caption or data.caption(sample)) + self.teacher_prompt_suffix
        cond_images, crop = data.cond_crops(sample), data.teacher_crop(sample)
        reading = (
            Encoding(encoder, prompt, (*cond_images, crop) if encoder.sees_picture else ())
            for encoder in encoders
            if encoder.reads_prompt
        )
        seeing = (Encoding(encoder, pictures=(crop,)) for encoder in encoders if not encoder.reads_prompt)
        return *reading, *self.cond_encodings(cond_images), *seeing

    def all_teacher_encodings(self) -> Iterator[tuple[Picture, Encoding]]:
        """Every encoding that some sample's teacher may need, with the sample's picture."""
        for sample in self.all_samples():
            for encoding in self.teacher_encodings(sample):
                yield self.data.picture(sample), encoding

    def all_samples(self) -> Iterator[Sample]:
        return itertools.chain.from_iterable(map(self.data.order.variants, range(len(self.data.examples))))

    def all_encodings(self, prompts: list[str]) -> Iterator[Encoding]:
        """Every encoding of a run that needs these prompts besides the captions. May contain duplicates."""
        for prompt in prompts:
            yield from self.student_encodings(prompt)
        for request in self.data.editing_requests:
            yield from self.student_encodings(request.prompt, request.cond_images)
        if self.data.is_editing:
            for sample in self.all_samples():
                yield from self.student_encodings(self.data.caption(sample), self.data.cond_crops(sample))
        else:
            for caption in self.data.captions:
                yield from self.student_encodings(caption)
        for _, encoding in self.all_teacher_encodings():
            yield encoding

    def fits(self, prompt: str) -> bool:
        """Whether a prompt is within the student's limit."""
        limit = self.conditioning.student_limit.tokens
        encodings = self.student_encodings(prompt)
        return all(encoding.encoder.num_tokens(prompt, ()) <= limit for encoding in encodings)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the encodings. The VAE would look for it in all of its modules each time it is asked."""
        return self.pipeline.vae.dtype

    def num_bytes(self, encodings: Iterable[Encoding]) -> int:
        """Size of the encodings in the cache, without encoding them."""
        shapes = (encoding.encoder.shape(encoding.prompt, encoding.sizes) for encoding in encodings)
        return sum(map(math.prod, shapes)) * self.dtype.itemsize

    def key(self, encoding: Encoding) -> str:
        """The cache key: everything that the encoding depends on."""
        encoder = encoding.encoder
        parts = [ENCODING_FORMAT, encoder.name, self.fingerprints[encoder.component], str(self.dtype)]
        if encoder.reads_prompt:
            parts.append(encoding.prompt)
        parts += encoder.cache_key()
        for crop in encoding.pictures:
            parts += crop.key
        return content_key(*parts)

    # Encoding

    def attach_text_encoder(self, encoders: Iterable[Encoder]) -> None:
        """Loads the pipeline's text encoder onto the accelerator and attaches these encoders to it."""
        self.pipeline.text_encoder = self.load_text_encoder().to(self.device)
        for encoder in encoders:
            encoder.attach()

    def free_text_encoder(self) -> None:
        for encoder in self.conditioning.encoders:
            encoder.detach()
        self.pipeline.text_encoder = None
        free_memory()

    def encode(self, encoding: Encoding) -> torch.Tensor:
        """Computes an encoding; its encoder's component is on the accelerator.

        Raises:
            InputError: the result is not finite.
        """
        return self.encode_batch([encoding])[0]

    @torch.no_grad()
    def encode_batch(self, batch: list[Encoding]) -> list[torch.Tensor]:
        """Computes the encodings of one of the `batches`; see `encode`."""
        first, encoder = batch[0], batch[0].encoder
        if len(batch) > 1:
            encoded = encoder.encode_batch([encoding.prompt for encoding in batch])
        else:
            encoded = [encoder.encode(first.prompt, tuple(map(self.data.pixels, first.pictures)))]
        for encoding, tensor in zip(batch, encoded, strict=True):
            if not tensor.isfinite().all():
                name = encoding.pictures[-1].file.name if encoding.pictures else reprlib.repr(encoding.prompt)
                in_fp16 = self.dtype == torch.float16
                advice = "use --mixed_precision bf16 or no" if in_fp16 else "check the checkpoint's weights"
                raise InputError(f"{name}: its encoding is not finite; {advice}")
        return encoded

    def tensor(self, encoding: Encoding) -> torch.Tensor:
        return self.encode(encoding) if self.cache is None else self.cache.load(self.key(encoding))

    # Contexts of a batch, on the device

    def on(self, device: torch.device) -> "Contexts":
        """The same contexts, but on another device."""
        other = copy.copy(self)
        other.device = device
        return other

    def student(self, prompts: list[str], cond_images: Sequence[tuple[Crop, ...]] | None = None) -> Context:
        """The student's context for each prompt, with its pictures to edit if there are any."""
        cond_images = cond_images or [()] * len(prompts)
        return self._stack([self.student_encodings(*pair) for pair in zip(prompts, cond_images, strict=True)])

    def teacher(self, samples: list[Sample]) -> Context:
        return self._stack([self.teacher_encodings(sample) for sample in samples])

    def load(self, samples: list[Sample], *, num_copies: int = 1) -> tuple[Context, Context]:
        """Contexts of the student and of the teacher for one batch; the teacher's holds it `num_copies` times."""
        captions, cond_images = (list(map(part, samples)) for part in (self.data.caption, self.data.cond_crops))
        return self.student(captions, cond_images), self.teacher(samples * num_copies)

    def _stack(self, samples: list[tuple[Encoding, ...]]) -> Context:
        return self.conditioning.stack([tuple(map(self.tensor, encodings)) for encodings in samples]).to(self.device)


def prepare_without_cache(contexts: Contexts) -> None:
    """Loads all encoders onto the accelerator, where they encode each batch when it is needed."""
    contexts.attach_text_encoder(contexts.conditioning.encoders)
    contexts.pipeline.vae.to(contexts.device)


def batches(encodings: Iterable[Encoding]) -> Iterator[list[Encoding]]:
    """One encoder's encodings in groups that are encoded at once: see `Encoder.batch_length`."""
    by_length: dict[int | None, list[Encoding]] = {}
    for encoding in encodings:
        length = None if encoding.pictures else encoding.encoder.batch_length(encoding.prompt)
        by_length.setdefault(length, []).append(encoding)
    for length, members in by_length.items():
        count = 1 if length is None else max(1, MAX_BATCH_TOKENS // length)
        for start in range(0, len(members), count):
            yield members[start : start + count]


def fill_cache(
    contexts: Contexts,
    cache: ContextCache,
    fingerprints: dict[str, str],
    prompts: list[str],
    accelerator: Accelerator,
    held: Sequence[str] = (),
) -> None:
    """Encodes what the cache does not hold yet, shared among processes. If nothing is missing, no encoder is loaded.

    Args:
        fingerprints: component -> what identifies its weights, see `pretrained.encoder_fingerprints`.
        prompts: other prompts, which are encoded along with the captions.
        held: those of them that prior preservation holds.

    Raises:
        InputError, OutputError: something cannot be encoded, or the cache cannot be written.
    """
    contexts.cache, contexts.fingerprints = cache, fingerprints
    encoding_of: dict[str, Encoding] = {}
    for encoding in contexts.all_encodings(prompts):
        encoding_of.setdefault(contexts.key(encoding), encoding)
    bar = partial(tqdm, desc="Checking the context cache", disable=not accelerator.is_local_main_process)
    # Sorted keys are in random order, so that each process checks as many large entries as the others.
    by_machine = share_on_each_machine(partial(cache.missing, progress=bar), sorted(encoding_of), accelerator)
    missing_keys = set().union(*by_machine)
    missing = {key: encoding for key, encoding in encoding_of.items() if key in missing_keys}
    shares = split_among(missing, accelerator.num_processes)
    num_bytes = contexts.num_bytes(missing.values())
    advice = fewer_held_prompts(contexts, missing.values(), held)
    announce(contexts, missing.values(), encoding_of.values(), num_bytes, advice)
    with failing_together():
        cache.check_space(num_bytes, advice)
        encode_missing(contexts, [missing[key] for key in shares[accelerator.process_index]], accelerator)
    # A machine with a disk of its own lacks what the others have encoded.
    machines = machine_of_each_process(accelerator)
    others = [number != machines[accelerator.process_index] for number in machines]
    elsewhere = sorted(itertools.chain.from_iterable(itertools.compress(shares, others)))
    lacking = share_on_own_machine(
        lambda keys: [key for key in keys if not cache.is_valid(key)], elsewhere, accelerator
    )
    with failing_together():
        share = [encoding_of[key] for key in machine_share(lacking, accelerator)]
        encode_missing(contexts, share, accelerator)


def split_among(encodings: dict[str, Encoding], count: int) -> list[list[str]]:
    """The keys that each of `count` processes encodes: about as many of each encoder.

    Keys that follow each other stay together, since they may be of one picture, which is then decoded once.
    """
    keys_of: dict[Encoder, list[str]] = {}
    for key, encoding in encodings.items():
        keys_of.setdefault(encoding.encoder, []).append(key)
    return [
        list(itertools.chain.from_iterable(part_of(keys, index, count) for keys in keys_of.values()))
        for index in range(count)
    ]


def announce(
    contexts: Contexts,
    missing: Iterable[Encoding],
    needed: Iterable[Encoding],
    num_bytes: int,
    more_advice: Iterable[str] = (),
) -> None:
    """Logs what will be encoded and its size on disk; warns if it is large.

    Args:
        num_bytes: of what is missing.
        more_advice: what else would make it smaller.
    """
    folder = contexts.cache.folder
    sizes = f"{in_units(num_bytes)} of {in_units(contexts.num_bytes(needed))}"
    logger.info(f"Encoding {summarize(missing, needed)}: {sizes} in {folder}")
    if num_bytes > LARGE_BYTES:
        advice = "; ".join([*smaller_cache(contexts), *more_advice])
        logger.warning(f"The context cache needs {in_units(num_bytes)} more in {folder}: {advice}")


def encode_missing(contexts: Contexts, share: list[Encoding], accelerator: Accelerator) -> None:
    """Encodes this process's share into the cache.

    Only one of text encoder and VAE is on the accelerator at a time; afterwards neither is.
    """
    encoders = list(dict.fromkeys(encoding.encoder for encoding in share))

    def encode_with(component: str) -> None:
        for encoder in (encoder for encoder in encoders if encoder.component == component):
            encodings = [encoding for encoding in share if encoding.encoder is encoder]
            is_quiet = not accelerator.is_local_main_process
            with tqdm(total=len(encodings), desc=f"Encoding {encoder.noun}", disable=is_quiet) as bar:
                for batch in batches(encodings):
                    for encoding, tensor in zip(batch, contexts.encode_batch(batch), strict=True):
                        contexts.cache.save(contexts.key(encoding), tensor)
                    bar.update(len(batch))

    components = {encoder.component for encoder in encoders}
    assert components <= {"text_encoder", "vae"}
    if "text_encoder" in components:
        contexts.attach_text_encoder(encoders)
        encode_with("text_encoder")
        contexts.free_text_encoder()
    if "vae" in components:
        contexts.pipeline.vae.to(accelerator.device)
        encode_with("vae")
        contexts.pipeline.vae.to("cpu")
        free_memory()


def summarize(missing: Iterable[Encoding], needed: Iterable[Encoding]) -> str:
    """How many encodings of each kind are missing: "1 of 2 prompts and 0 of 3 pictures"."""
    num_missing, num_needed = (Counter(encoding.encoder.noun for encoding in some) for some in (missing, needed))
    return " and ".join(f"{num_missing[noun]} of {count} {noun}" for noun, count in num_needed.items())


def in_units(num_bytes: int) -> str:
    """The number in MB or GB."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 10**9 else f"{num_bytes / 1e9:,.1f} GB"


def smaller_cache(contexts: Contexts) -> list[str]:
    """What makes the cache smaller, most useful first."""
    conditioning = contexts.conditioning
    advice = []
    has_teacher_captions = any(picture.teacher_caption for picture in contexts.data.pictures)
    is_shared = any(encoder in conditioning.teacher for encoder in conditioning.student)
    if contexts.teacher_prompt_suffix and is_shared and not has_teacher_captions:
        advice.append('with --teacher_prompt_suffix "" one encoding of each caption serves student and teacher')
    flags = dict.fromkeys(flag for encoder in conditioning.encoders for flag in encoder.size_flags())
    advice.append(" and ".join(["fewer captions", *(f"a lower {flag}" for flag in flags)]) + " make it smaller")
    return [*advice, "--no_context_cache does without it, but keeps the encoders in memory"]


def fewer_held_prompts(contexts: Contexts, missing: Iterable[Encoding], held: Iterable[str]) -> list[str]:
    """What makes the missing share of prior preservation's prompts smaller; nothing if none of them is missing."""
    held = {*held}
    num_bytes = contexts.num_bytes(encoding for encoding in missing if encoding.prompt in held)
    if num_bytes == 0:
        return []
    return [
        f"prior preservation's prompts take {in_units(num_bytes)} of it: give a shorter list with --prior_prompts, or "
        "switch it off with --with_prior_preservation false"
    ]
