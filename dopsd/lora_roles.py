"""The roles as LoRA adapters on one transformer: targets, roles, the teacher's EMA, LoRA files."""

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import LoraConfig
from torch import nn

from .adapted_linear import AdaptedLinear
from .errors import InputError
from .module_names import select_names
from .roles import Roles, TeacherKind
from .settings import LoRASettings


logger = get_logger(__name__)

# diffusers reads the metadata of the adapter called "default", so the student has this name.
STUDENT = "default"
TEACHER = "teacher"

LORA_PREFIX = "transformer."


def lora_target_modules(transformer: nn.Module, lora_layers: str, portable: str | None = None) -> list[str]:
    """Full names of the linear modules that `--lora_layers` selects.

    Args:
        transformer: may be on the meta device.
        lora_layers: names or endings of names, separated by commas ("to_q,to_k"), or a regular expression that
            matches whole names.
        portable: `Model.portable_lora_layers`; a selection beyond it gets a warning.

    Raises:
        InputError: a name or the regular expression matches no linear module.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = select_names(f"--lora_layers {lora_layers}", lora_layers, linear, "linear module")
    warn_of_unportable("--lora_layers", names, portable)
    return names


def warn_of_unportable(flag: str, names: list[str], portable: str | None) -> None:
    """Warns if other software cannot load the LoRA of all these modules; see `Model.portable_lora_layers`."""
    unknown = [] if portable is None else [name for name in names if not re.fullmatch(portable, name)]
    if unknown:
        logger.warning(
            f"{flag}: ComfyUI and Forge have no name for {len(unknown)} of the {len(names)} trained modules, "
            f"such as {unknown[0]}, and leave their part of the LoRA out; diffusers loads all of it"
        )


def adapter_options(settings: LoRASettings, transformer: nn.Module, portable: str | None = None) -> dict[str, Any]:
    """Keyword arguments of `StudentTeacherLoRA`; see `lora_target_modules`."""
    return {
        "target_modules": lora_target_modules(transformer, settings.lora_layers, portable),
        "rank": settings.rank,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
    }


class StudentTeacherLoRA(Roles):
    """The roles as two LoRA adapters on a frozen transformer.

    Outside of the role context managers, the student's adapter is active and trainable. LoRA weights are float32
    whatever the transformer's dtype: an EMA with decay 0.9999 stalls in bfloat16.

    Args:
        transformer: a diffusers model. Its own weights are frozen.
        target_modules: full names, from `lora_target_modules`.
        rank, alpha: of the LoRA, whose update is scaled by alpha / rank.
        dropout: dropout probability in the student's training forward pass. No other role has dropout.
        teacher: weights of the teacher. "ema" is an exponential moving average of the student's, "base" the model
            without an adapter, "student" the student's current weights.
    """

    def __init__(
        self,
        transformer: nn.Module,
        target_modules: list[str],
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        teacher: TeacherKind = "ema",
    ):
        transformer.requires_grad_(False)
        transformer.eval()
        self.transformer = transformer
        self.rank, self.alpha, self.teacher = rank, alpha, teacher
        self._add_adapter(STUDENT, target_modules, dropout)
        if teacher == "ema":
            self._add_adapter(TEACHER, target_modules, dropout=0.0)
        self._layers: dict[str, AdaptedLinear] = {
            name: module for name, module in transformer.named_modules() if isinstance(module, AdaptedLinear)
        }
        for layer in self._layers.values():
            layer.store_in_float32()
        self._dropouts = [layer.lora_dropout[STUDENT] for layer in self._layers.values() if dropout > 0]
        self._set_student_training(True)
        self._activate(STUDENT, trainable=True)
        self.copy_student_to_teacher()

    def _add_adapter(self, name: str, target_modules: list[str], dropout: float) -> None:
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
        )
        config._register_custom_module({nn.Linear: AdaptedLinear})
        with _no_adapter_warnings():
            self.transformer.add_adapter(config, adapter_name=name)

    # Roles

    def teacher_role(self) -> AbstractContextManager[None]:
        """Context in which the transformer is the teacher, without gradients or dropout."""
        return self._role({"ema": TEACHER, "base": None, "student": STUDENT}[self.teacher])

    def idle_role(self) -> AbstractContextManager[None]:
        """The base's: adapters are not shared."""
        return self._role(None)

    def base_role(self) -> AbstractContextManager[None]:
        """Context in which the transformer is the model before training, without adapters or gradients."""
        return self._role(None)

    @contextmanager
    def _role(self, adapter: str | None) -> Iterator[None]:
        """Context with this adapter, or with none. The student's adapter is active again on leaving."""
        was_training = self._student_training
        try:
            self._set_student_training(False)
            if adapter is None:
                self._enable_adapters(False)
            else:
                self._activate(adapter, trainable=False)
            with torch.no_grad():
                yield
        finally:
            self._enable_adapters(True)
            self._activate(STUDENT, trainable=True)
            self._set_student_training(was_training)

    @contextmanager
    def shipped_role(self, dtype: torch.dtype) -> Iterator[None]:
        """Context in which the student has the weights that `export(dtype)` saves, without gradients or dropout.

        The layers round as peft's do, so that the model computes what the stock pipeline does, bit for bit.
        The training weights are back on leaving, bit for bit.
        """
        scale = self.alpha / self.rank
        raw = {name: parameter.data for name, parameter in self.named_parameters(STUDENT).items()}
        try:
            self._set_student_training(False)
            for name, parameter in self.named_parameters(STUDENT).items():
                shipped = parameter.data * scale if ".lora_B." in name else parameter.data
                parameter.data = shipped.to(dtype).float()
            for layer in self._layers.values():
                layer.scaling[STUDENT] = 1.0
                layer.peft_arithmetic = True
            with torch.no_grad():
                yield
        finally:
            for layer in self._layers.values():
                layer.scaling[STUDENT] = scale
                layer.peft_arithmetic = False
            for name, parameter in self.named_parameters(STUDENT).items():
                parameter.data = raw[name]
            self._set_student_training(True)

    def _activate(self, name: str, *, trainable: bool) -> None:
        for layer in self._layers.values():
            layer.set_adapter(name, inference_mode=not trainable)

    def _enable_adapters(self, enabled: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(enabled)

    def _set_student_training(self, training: bool) -> None:
        self._student_training = training
        for dropout in self._dropouts:
            dropout.train(training)

    # Weights

    def named_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """`<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank) of one adapter."""
        return {
            f"{module}.{matrix}.weight": getattr(layer, matrix)[adapter].weight
            for module, layer in self._layers.items()
            for matrix in ("lora_A", "lora_B")
        }

    def describe(self) -> str:
        count = sum(parameter.numel() for parameter in self.student_parameters)
        return f"{len(self._layers)} modules, {count:,} parameters, rank {self.rank}"

    @property
    def student_parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters(STUDENT).values())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters."""
        return [*self.student_parameters, *self.teacher_parameters]

    @property
    def teacher_parameters(self) -> list[nn.Parameter]:
        """The EMA weights, in the order of `student_parameters`; empty for the other kinds of teacher."""
        return list(self.named_parameters(TEACHER).values()) if self.teacher == "ema" else []

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        """Starts the EMA at the student's weights. Adapters are initialised with different random A matrices."""
        if self.teacher == "ema":
            torch._foreach_copy_(self.teacher_parameters, self.student_parameters)

    def after_optimizer_step(self, ema_decay: float) -> None:
        self.update_teacher(ema_decay)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * student, in float32 (arXiv 2605.05204)."""
        if self.teacher == "ema":
            torch._foreach_lerp_(self.teacher_parameters, self.student_parameters, 1 - decay)

    # Files

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Float32 training weights of both adapters for a checkpoint; names start with `student.` or `teacher.`."""
        state = {f"student.{name}": weight.detach() for name, weight in self.named_parameters(STUDENT).items()}
        if self.teacher == "ema":
            state |= {f"teacher.{name}": weight.detach() for name, weight in self.named_parameters(TEACHER).items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: names or shapes differ, because of other target modules, another rank or another teacher.
        """
        own = self.state_dict()
        if {name: weight.shape for name, weight in own.items()} != {name: w.shape for name, w in state.items()}:
            raise ValueError("the checkpoint's adapters have other target modules, another rank or another teacher")
        for name, weight in own.items():
            weight.copy_(state[name])

    def export(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict]:
        """The student's weights and metadata as `save_lora_weights` expects them.

        alpha / rank is multiplied into lora_B, and the metadata say alpha = rank. Software that ignores the metadata
        then loads the LoRA at the same strength, and diffusers generates the same images as in training.

        Returns:
            Weights in `dtype` on the CPU, and the adapter's metadata.
        """
        scale = self.alpha / self.rank
        weights = {
            name: (weight.detach() * scale if ".lora_B." in name else weight.detach()).to("cpu", dtype).contiguous()
            for name, weight in self.named_parameters(STUDENT).items()
        }
        metadata = self.transformer.peft_config[STUDENT].to_dict()
        # peft keeps the targets in a set, whose order differs from run to run.
        targets = sorted(metadata["target_modules"])
        metadata.update(lora_alpha=self.rank, lora_dropout=0.0, inference_mode=True, target_modules=targets)
        return weights, metadata

    def check_lora(self, state: dict[str, torch.Tensor], *, origin: str) -> None:
        """Checks that `load_lora` can load these weights. The transformer may be on the meta device.

        Args:
            state: as for `load_lora`.
            origin: the value of `--init_lora`, for the error message.

        Raises:
            InputError: the LoRA changes modules that are not trained, or has another rank.
        """
        own = self.named_parameters(STUDENT)
        for key, weight in sorted(state.items()):
            name = key.removeprefix(LORA_PREFIX)
            if name not in own:
                raise InputError(
                    f"--init_lora {origin}: it changes {name.rsplit('.lora_', 1)[0]}, which is not trained; choose "
                    "--lora_layers that include all of its modules"
                )
            if weight.shape != own[name].shape:
                raise InputError(
                    f"--init_lora {origin}: {name} has shape {tuple(weight.shape)}, but the adapter's is "
                    f"{tuple(own[name].shape)}; pass the LoRA's rank as --rank"
                )

    @torch.no_grad()
    def load_lora(self, state: dict[str, torch.Tensor], metadata: dict | None, *, origin: str) -> int:
        """Initialises student and teacher from an existing LoRA, at the strength that diffusers would give it.

        Args:
            state, metadata: what the stock pipeline's `lora_state_dict(..., return_lora_metadata=True)` returns.
            origin: the value of `--init_lora`, for the error message.

        Returns:
            Number of trained modules that the LoRA does not change. Their update starts at zero.

        Raises:
            InputError: the LoRA changes modules that are not trained, or has another rank.
        """
        weights = {name.removeprefix(LORA_PREFIX): weight for name, weight in state.items()}
        self.check_lora(state, origin=origin)
        own = self.named_parameters(STUDENT)
        # diffusers itself resolves alpha, rank patterns and missing metadata.
        with _no_adapter_warnings():
            self.transformer.load_lora_adapter(state, metadata=metadata, adapter_name="init")
            strength = {name: layer.scaling["init"] for name, layer in self._layers.items() if "init" in layer.scaling}
            self.transformer.delete_adapters("init")
        for name, weight in weights.items():
            module, matrix = name.rsplit(".lora_", 1)
            scale = strength[module] * self.rank / self.alpha if matrix == "B.weight" else 1.0
            own[name].copy_(weight.float() * scale)
        self._activate(STUDENT, trainable=True)
        self.copy_student_to_teacher()
        return len(self._layers) - len(strength)


@contextmanager
def _no_adapter_warnings() -> Iterator[None]:
    """Ignores peft's warnings about adding a second adapter and deleting the active one. Both are intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter init was active")
        yield
