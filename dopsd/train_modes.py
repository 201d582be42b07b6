"""`--train_mode`: what a run trains, from the checks before any weight is loaded to the files that it leaves."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .compilation import CompiledBlocks
from .execution import prepare_transformer
from .init_lora import read_init_lora, start_from_lora
from .lora_roles import StudentTeacherLoRA, adapter_options
from .model import Model
from .products import LoRAFile, PipelineFolder, Product
from .roles import Roles
from .settings import Settings
from .training_state import AdapterState, TrainingState, WeightState
from .weight_bytes import WeightBytes, weight_bytes
from .weight_roles import StudentTeacherWeights, freeze_others, trained_weights


logger = get_logger(__name__)


class TrainMode(ABC):
    """What a run trains.

    Args:
        model: of the run.
        settings: not yet resolved by the checkpoint.
        skeleton: the transformer on the meta device.

    Raises:
        InputError: a flag does not fit the transformer.
    """

    @abstractmethod
    def __init__(self, model: Model, settings: Settings, skeleton: torch.nn.Module): ...

    @abstractmethod
    def prepare(
        self, transformer: torch.nn.Module, settings: Settings, accelerator: Accelerator, *, has_prior: bool
    ) -> tuple[Roles, CompiledBlocks | None]:
        """The roles on a transformer that is ready to be trained; with `--compile`, its blocks.

        Args:
            transformer: loaded, see `loading_device`.
            settings: resolved.
            has_prior: whether training needs the base model at each step.
        """

    @abstractmethod
    def training_state(self, roles: Roles, optimizer: torch.optim.Optimizer) -> TrainingState:
        """What checkpoints hold of the roles that `prepare` returned, and of their optimizer."""

    @abstractmethod
    def product(self, folder: Path, dtype: torch.dtype) -> Product:
        """What the run saves.

        Args:
            folder: the checkpoint's, without the transformer.
            dtype: of the transformer.
        """


def train_mode(model: Model, settings: Settings, skeleton: torch.nn.Module) -> TrainMode:
    """See `TrainMode` for the arguments and errors."""
    return (FullMode if settings.full.is_full else LoRAMode)(model, settings, skeleton)


class LoRAMode(TrainMode):
    """Adapters on a frozen transformer."""

    def __init__(self, model: Model, settings: Settings, skeleton: torch.nn.Module):
        self.model, self.settings = model, settings
        self.options = adapter_options(settings.lora, skeleton, model.portable_lora_layers)
        lora, cache_dir = settings.lora.init_lora, settings.model.cache_dir
        self.init_lora = read_init_lora(model, lora, skeleton, self.options, cache_dir)

    def prepare(
        self, transformer: torch.nn.Module, settings: Settings, accelerator: Accelerator, *, has_prior: bool
    ) -> tuple[Roles, CompiledBlocks | None]:
        roles = StudentTeacherLoRA(transformer, **self.options, teacher=settings.distillation.teacher)
        start_from_lora(roles, self.init_lora, settings.lora.init_lora)
        return roles, prepare_transformer(transformer, roles.parameters, settings.performance, accelerator)

    def training_state(self, roles: StudentTeacherLoRA, optimizer: torch.optim.Optimizer) -> TrainingState:
        return AdapterState(roles, optimizer)

    def product(self, folder: Path, dtype: torch.dtype) -> Product:
        save_dtype = torch.float32 if self.settings.lora.upcast_before_saving else dtype
        return LoRAFile(self.model.stock_pipeline_class, save_dtype)


class FullMode(TrainMode):
    """The transformer's own weights."""

    def __init__(self, model: Model, settings: Settings, skeleton: torch.nn.Module):
        self.model, self.settings = model, settings
        self.names = trained_weights(skeleton, settings.full.trainable_modules)

    def prepare(
        self, transformer: torch.nn.Module, settings: Settings, accelerator: Accelerator, *, has_prior: bool
    ) -> tuple[Roles, CompiledBlocks | None]:
        freeze_others(transformer, self.names)
        compiled = prepare_transformer(transformer, None, settings.performance, accelerator)
        kept = weight_bytes(settings, transformer.dtype, has_prior=has_prior)
        device = self.device_of_copies(transformer, kept, settings, accelerator)
        roles = StudentTeacherWeights(
            transformer,
            teacher=settings.distillation.teacher,
            has_master_weights=settings.full.bf16_update == "master_weights",
            ema_device=device,
            # Where it is drawn only, it does not stay on the accelerator.
            base_device=device if kept.has_base else torch.device("cpu"),
        )
        return roles, compiled

    def device_of_copies(
        self, transformer: torch.nn.Module, kept: WeightBytes, settings: Settings, accelerator: Accelerator
    ) -> torch.device:
        """Where the teacher's and the base model's weights are (`--ema_device`)."""
        chosen, device = settings.full.ema_device, accelerator.device
        if chosen == "cpu" or settings.performance.offload_transformer:
            return torch.device("cpu")
        if chosen == "auto" and device.type == "cuda":
            count = sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad)
            fit = kept.copies_fit(count // accelerator.num_processes, *torch.cuda.mem_get_info(device))
            # In all processes the same: those that share weights must call the transformer equally often.
            if not accelerator.gather(torch.tensor([fit], device=device)).all():
                logger.info("--ema_device auto: the teacher's weights do not fit on the GPU and are in host memory")
                return torch.device("cpu")
        return device

    def training_state(self, roles: StudentTeacherWeights, optimizer: torch.optim.Optimizer) -> TrainingState:
        return WeightState(roles, optimizer)

    def product(self, folder: Path, dtype: torch.dtype) -> Product:
        return PipelineFolder(self.model, self.settings, folder, dtype)
