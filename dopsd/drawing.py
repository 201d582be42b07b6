"""Drawing with base, student and teacher, shared among processes."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import offload_models
from PIL import Image
from tqdm.auto import tqdm

from .contexts import Contexts
from .data.order import Sample
from .data.requests import Request
from .errors import DOPSDError, one_line
from .model import Context, FewStepPipeline
from .roles import Roles
from .rollout import seeded_noise
from .settings import Settings
from .sharding import calls_must_match
from .stopping import StopRequest


Result = TypeVar("Result")


class Subject(NamedTuple):
    """What is drawn, and the seed of its noise."""

    request: Request
    seed: int


class DrawingStopped(Exception):
    """The run was asked to stop."""


class DrawingFailed(DOPSDError):
    """Another process could not draw an image."""


@dataclass(frozen=True)
class Drawing:
    """An image and the latents that it was decoded from."""

    latents: torch.Tensor  # for `FewStepPipeline.decode`, one sample, on the CPU
    image: Image.Image


class Studio:
    """Draws with base, student and teacher at the deployed number of steps.

    Every image is what the stock pipeline draws from the same noise with what is saved. Drawing touches neither the
    weights nor the random generators that training uses.

    Args:
        settings: resolved.
        accelerator: of the run.
        pipeline, roles, contexts: used to draw images.
        save_dtype: of the saved weights.
        stop: if it is set, what is left of a group of drawings is not drawn.

    Attributes:
        base_drawings: what the base has drawn, the same on all processes.
        is_out_of_step: an error now leaves other processes waiting for this one's part of the weights.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: Roles,
        contexts: Contexts,
        save_dtype: torch.dtype,
        stop: StopRequest,
    ):
        self.settings = settings.validation
        self.accelerator, self.pipeline, self.roles, self.contexts = accelerator, pipeline, roles, contexts
        self.save_dtype, self.stop = save_dtype, stop
        self.calls_match = calls_must_match(settings.performance, accelerator)
        self.is_out_of_step = False
        self.base_drawings: dict[Subject, Drawing] = {}

    def noise(self, height: int, width: int, seed: int) -> torch.Tensor:
        """(1, C, h, w) noise: in float32, what a pipeline draws from `torch.Generator().manual_seed(seed)`."""
        noise = seeded_noise(self.pipeline.latent_shape(height, width), [seed])
        return noise.to(self.accelerator.device, self.pipeline.latents_dtype)

    def draw(self, context: Context, noise: torch.Tensor) -> Drawing:
        latents = self.pipeline.sample(context, noise, self.settings.num_inference_steps)
        return Drawing(latents.cpu(), self.decode(latents)[0])

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Decodes with the VAE on the accelerator for the time of the call."""
        with offload_models(self.pipeline.vae, device=self.accelerator.device, offload=True):
            return self.pipeline.decode(latents)

    def encode(self, pictures: list[Image.Image]) -> list[torch.Tensor]:
        """The pictures' latents, (C, h, w), from the VAE on the accelerator for the time of the call."""
        with offload_models(self.pipeline.vae, device=self.accelerator.device, offload=True):
            return [self.pipeline.picture_latents(picture) for picture in pictures]

    def draw_request(self, request: Request, seed: int) -> Drawing:
        """As the role that is active, from the student's context."""
        context = self.contexts.student([request.prompt], [request.cond_images])
        return self.draw(context, self.noise(*request.size, seed))

    def base_drawing(self, request: Request, seed: int) -> Drawing:
        with self.roles.base_role():
            return self.draw_request(request, seed)

    def student_drawing(self, request: Request, seed: int) -> Drawing:
        with self.roles.shipped_role(self.save_dtype):
            return self.draw_request(request, seed)

    def teacher_drawing(self, sample: Sample, seed: int) -> Drawing:
        """The teacher at the size of the training picture."""
        with self.roles.teacher_role():
            return self.draw(self.contexts.teacher([sample]), self.noise(*self.contexts.data.bucket(sample), seed))

    def share(self, jobs: dict[Hashable, Callable[[], Result]], description: str) -> dict[Hashable, Result]:
        """Runs the jobs, shared among the processes. Every process gets all results, in the jobs' order.

        If processes share the transformer's weights, each of them runs all of the jobs.

        Raises:
            DrawingStopped, DrawingFailed, or a job's own error: a process could not run its jobs. All processes raise.
        """
        if self.calls_match:
            return self.run_together(jobs, description)
        accelerator = self.accelerator
        own, failure = {}, None
        bar = tqdm(
            list(jobs)[accelerator.process_index :: accelerator.num_processes],
            desc=description,
            leave=False,
            disable=not accelerator.is_local_main_process,
        )
        try:
            for key in bar:
                if self.stop.is_set:
                    raise DrawingStopped
                own[key] = jobs[key]()
        except Exception as error:
            failure = error
        reports = gather_object([(own, type(failure) is DrawingStopped, failure and one_line(failure))])
        if any(is_stopped for _, is_stopped, _ in reports):
            raise DrawingStopped
        if failure is not None:
            raise failure
        for _, _, problem in reports:
            if problem is not None:
                raise DrawingFailed(problem)
        results = {key: result for part, _, _ in reports for key, result in part.items()}
        return {key: results[key] for key in jobs}

    def run_together(self, jobs: dict[Hashable, Callable[[], Result]], description: str) -> dict[Hashable, Result]:
        """Runs all jobs on every process, in step with the others."""
        results = {}
        is_quiet = not self.accelerator.is_local_main_process
        for key in tqdm(list(jobs), desc=description, leave=False, disable=is_quiet):
            if self.stop.is_set_on_any(self.accelerator):
                raise DrawingStopped
            self.is_out_of_step = True
            results[key] = jobs[key]()
            self.is_out_of_step = False
        return results

    def compare(self, subjects: list[Subject], description: str) -> dict[Subject, tuple[Drawing, Drawing]]:
        """The base's and the student's drawing of each subject, shared among the processes."""
        new = [subject for subject in subjects if subject not in self.base_drawings]
        jobs = {("base", subject): partial(self.base_drawing, *subject) for subject in new}
        jobs |= {("student", subject): partial(self.student_drawing, *subject) for subject in subjects}
        drawn = self.share(jobs, description)
        self.base_drawings |= {subject: drawn["base", subject] for subject in new}
        return {subject: (self.base_drawings[subject], drawn["student", subject]) for subject in subjects}
