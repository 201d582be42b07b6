"""The flags of a short run on tiny models, and its preparation in this process, as `main` does it."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from transformers import PretrainedConfig

from dopsd.command_line import parse_settings
from dopsd.context_cache import ContextCache
from dopsd.contexts import Contexts, fill_cache, prepare_without_cache
from dopsd.data.order import Sample
from dopsd.data.training_data import TrainingData, load_training_data, resolve_data_defaults
from dopsd.launch import weight_dtype
from dopsd.model import Conditioning, FewStepPipeline, Model
from dopsd.pretrained import encoder_fingerprints, load_skeleton, load_text_encoder, open_pipeline
from dopsd.prior import PriorPrompts, prior_prompts
from dopsd.prompts import drawn_prompts, resolve_prompts
from dopsd.resuming import resume_contract
from dopsd.settings import Settings
from models import TinyModel


# The published method: all states of the rollout, without a prior. Most tests are about something else, and would take
# longer with the defaults, which encode a hundred prompts more. None for a flag restores its default.
PUBLISHED = {"num_trained_states": 4, "with_prior_preservation": False}


def default_settings(**flags: Any) -> Settings:
    """The settings' own defaults, without those of a model and without checks, but for these flags."""
    return Settings(*(group.type() for group in fields(Settings))).replace(**flags)


def short_run(model: TinyModel, photos: Path, output_dir: Path) -> dict[str, Any]:
    """Flags of a run of two steps with the published method that draws nothing."""
    return {
        "pretrained_model_name_or_path": model.path,
        "instance_data_dir": photos,
        "instance_prompt": "a ball",
        **model.flags,
        "output_dir": output_dir,
        "resolution": 64,
        "rank": 4,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "seed": 0,
        "report_to": "none",
        "validation_steps": 0,
        "ignore_exam": True,  # random weights teach nothing
        **PUBLISHED,
    }


def as_arguments(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line: True for a switch, None to leave a flag out, a list for several values."""
    arguments = []
    for name, value in flags.items():
        if value is None:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments += map(str, value if isinstance(value, list) else [value])
    return arguments


def one_process(device: str = "cpu", **changed) -> SimpleNamespace:
    """Stands in for the accelerator of a run with one process, without accelerate's global state."""
    attributes = {
        "device": torch.device(device),
        "num_processes": 1,
        "process_index": 0,
        "local_process_index": 0,
        "is_main_process": True,
        "is_local_main_process": True,
        "scaler": None,
        "wait_for_everyone": lambda: None,
    }
    return SimpleNamespace(**attributes | changed)


@dataclass(frozen=True)
class PreparedRun:
    """A run before anything is encoded."""

    model: Model
    settings: Settings
    data: TrainingData
    pipeline: FewStepPipeline
    folder: Path
    text_config: PretrainedConfig
    conditioning: Conditioning
    contexts: Contexts

    @property
    def prior(self) -> PriorPrompts:
        return prior_prompts(self.settings, self.data.captions, self.contexts.fits, one_process())

    def resolve_prompts(self) -> Settings:
        return resolve_prompts(self.settings, self.contexts, self.model.teacher_context(self.settings))

    def fill_cache(self, folder: Path, accelerator: Any) -> None:
        held, fingerprints = self.prior.trained, encoder_fingerprints(self.folder, self.settings.model)
        prompts = [*drawn_prompts(self.settings.validation, self.prior), *held]
        fill_cache(self.contexts, ContextCache(folder), fingerprints, prompts, accelerator, held)

    def encode_without_cache(self) -> "PreparedRun":
        prepare_without_cache(self.contexts)
        return self

    def all_contexts(self) -> list[torch.Tensor]:
        """Every tensor of the contexts of student and teacher, for each example, mirrored too if the run mirrors."""
        flips = (False, True) if self.settings.data.random_flip else (False,)
        tensors = []
        for example in range(len(self.data.examples)):
            for flip in flips:
                for context in self.contexts.load([Sample(example, epoch=0, caption=0, flip=flip)]):
                    tensors += context_tensors(context)
        return tensors

    def resume_contract(self, num_processes: int = 1) -> dict[str, Any]:
        return resume_contract(self.settings, self.conditioning, self.data, self.prior, num_processes)


def context_tensors(context: Any) -> list[torch.Tensor]:
    """All tensors of a context."""
    return [
        tensor for value in vars(context).values() for tensor in ([value] if torch.is_tensor(value) else value or ())
    ]


def same_tensors(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def prepare_run(model: Model, arguments: list[str]) -> PreparedRun:
    """Everything that `main` does before it encodes, but for what needs accelerate."""
    PartialState()  # accelerate's logger asks it which process this is
    settings = parse_settings(model, "", arguments)
    settings = settings.replace(mixed_precision=settings.training.mixed_precision or "no")
    data = load_training_data(settings, model.sizes, one_process(is_local_main_process=False))
    dtype = weight_dtype(settings.training.mixed_precision)
    skeleton = load_skeleton(model, settings.model)
    pipeline, folder, text_config = open_pipeline(model, settings.model, dtype)
    settings = resolve_data_defaults(settings, data, num_processes=1)
    settings = model.resolve_settings(settings, skeleton.config, text_config)
    conditioning = model.conditioning(pipeline, text_config, settings)
    contexts = Contexts(
        pipeline,
        conditioning,
        data,
        teacher_prompt_suffix=settings.teacher.teacher_prompt_suffix,
        load_text_encoder=partial(load_text_encoder, model, settings.model, folder, dtype),
        device=torch.device("cpu"),
    )
    return PreparedRun(model, settings, data, pipeline, folder, text_config, conditioning, contexts)
