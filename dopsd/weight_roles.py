"""The roles when the transformer's own weights are trained: master weights, the teacher's EMA, the frozen start."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import InputError
from .module_names import select_names
from .roles import Roles, TeacherKind
from .weight_copies import WeightCopy, local


def trained_weights(transformer: nn.Module, trainable_modules: str | None) -> list[str]:
    """Names of the parameters that `--trainable_modules` selects; all without the flag.

    Args:
        transformer: may be on the meta device.

    Raises:
        InputError: a name or the regular expression matches no module, or only modules without weights.
    """
    names = [name for name, _ in transformer.named_parameters()]
    if trainable_modules is None:
        return names
    flag = f"--trainable_modules {trainable_modules}"
    modules = [name for name, _ in transformer.named_modules() if name]
    prefixes = tuple(f"{module}." for module in select_names(flag, trainable_modules, modules, "module"))
    selected = [name for name in names if name.startswith(prefixes)]
    if not selected:
        raise InputError(f"{flag}: the modules have no weights; name others")
    return selected


def freeze_others(transformer: nn.Module, names: Collection[str]) -> None:
    """Leaves gradients to the named parameters only. Called before the transformer is sharded."""
    names = {*names}
    transformer.eval()
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in names)


class StudentTeacherWeights(Roles):
    """The roles as values of the transformer's own weights.

    The EMA is float32 at any precision of the weights: with a decay of 0.9999, it stalls in bfloat16.

    Args:
        transformer: on its device, sharded if it is to be, with gradients for what is trained (`freeze_others`).
        teacher: see `Roles`.
        has_master_weights: whether weights that are not float32 are trained as float32 copies. Their gradients are
            then added up in float32 too.
        ema_device: where the EMA is.
        base_device: where the weights before training are.
    """

    averages_gradients = True

    def __init__(
        self,
        transformer: nn.Module,
        *,
        teacher: TeacherKind = "ema",
        has_master_weights: bool = True,
        ema_device: torch.device,
        base_device: torch.device,
    ):
        self.transformer, self.teacher = transformer, teacher
        self.weights = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
        self._base = WeightCopy(transformer, self.weights, device=base_device)
        self._ema = None
        if teacher == "ema":
            self._ema = WeightCopy(transformer, self.weights, device=ema_device, dtype=torch.float32)
        self._teacher = {"ema": self._ema, "base": self._base, "student": None}[teacher]
        self._is_away = False
        self._masters = {}
        if has_master_weights:
            for name, weight in self.weights.items():
                if weight.dtype != torch.float32:
                    self._masters[name] = nn.Parameter(weight.detach().float())
                    weight.register_post_accumulate_grad_hook(gradient_collector(self._masters[name]))

    # Roles

    def teacher_role(self) -> AbstractContextManager[None]:
        return self._role(self._teacher)

    def base_role(self) -> AbstractContextManager[None]:
        return self._role(self._base)

    def shipped_role(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """The student: its weights are those that the stock pipeline loads in its own dtype."""
        return self._role(None)

    def idle_role(self) -> AbstractContextManager[None]:
        return self._role(None)

    @property
    def teacher_is_off_device(self) -> bool:
        return self._teacher is not None and self._teacher.is_off_device

    @property
    def base_is_off_device(self) -> bool:
        return self._base.is_off_device

    @contextmanager
    def _role(self, copy: WeightCopy | None) -> Iterator[None]:
        assert not self._is_away, "a role with other weights than the student's contains no other role"
        self._is_away = copy is not None
        try:
            with torch.no_grad(), nullcontext() if copy is None else copy.in_place():
                yield
        finally:
            self._is_away = False

    # Weights

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by the names of the weights: master weights where there are any."""
        return self.weights | self._masters

    @property
    def student_parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    @property
    def ema(self) -> dict[str, torch.Tensor]:
        """The average, by the names of the weights; empty for the other kinds of teacher."""
        return {} if self._ema is None else self._ema.values

    def describe(self) -> str:
        count = sum(weight.numel() for weight in self.weights.values())
        whole = sum(parameter.numel() for parameter in self.transformer.parameters())
        share = "the whole transformer" if count == whole else f"{count / whole:.1%} of the transformer"
        return f"{share}, {count:,} parameters"

    @torch.no_grad()
    def after_optimizer_step(self, ema_decay: float) -> None:
        """weights <- master weights; EMA <- decay * EMA + (1 - decay) * student, in float32 (arXiv 2605.05204)."""
        self.copy_masters_to_weights()
        if self._ema is not None:
            self._ema.average_with(self.trained, 1 - ema_decay)

    @torch.no_grad()
    def copy_masters_to_weights(self) -> None:
        for name, master in self._masters.items():
            local(self.weights[name]).copy_(local(master))

    # Files

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: the roles' own tensors. Names start with `student.` or `teacher.`.

        After values were loaded into them, `copy_masters_to_weights` brings the weights up to date.
        """
        state = {f"student.{name}": parameter.detach() for name, parameter in self.trained.items()}
        return state | {f"teacher.{name}": value for name, value in self.ema.items()}

    @torch.no_grad()
    def whole_state_dict(self, dtype: torch.dtype, *, keep: bool) -> dict[str, torch.Tensor]:
        """The student's transformer as a state dict of whole tensors in `dtype`, on the CPU.

        All processes must call it if they share the weights.

        Args:
            keep: whether this process needs it; the others get an empty one.
        """
        trained, state = self.trained, {}
        for name, tensor in self.transformer.state_dict().items():
            tensor = trained.get(name, tensor).detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                kind = dtype if whole.is_floating_point() else whole.dtype
                state[name] = whole.to("cpu", kind, copy=True)
        return state


def gradient_collector(master: nn.Parameter) -> Callable[[nn.Parameter], None]:
    """A hook that adds a weight's gradient to its master weight's, in float32, and frees it."""

    def collect(weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad.float(), None
        if master.grad is None:
            master.grad = gradient
        else:
            master.grad += gradient

    return collect
