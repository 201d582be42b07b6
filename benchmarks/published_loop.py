"""Loops that the training step is compared with: one of the published shape, and flow-matching LoRA."""

import itertools

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from benchmarks.miniature.baselines import flow_matching_loss
from benchmarks.step_measure import Call
from benchmarks.step_models import RandomModel
from dopsd.data.order import noise_seed
from dopsd.lora_roles import adapter_options
from dopsd.model import Context
from dopsd.optimizers import build_optimizer
from dopsd.rollout import seeded_noise


STUDENT, TEACHER = "student", "teacher"


class PeftLoop:
    """A transformer with peft's own LoRA, and the optimizer of one of its adapters.

    Args:
        model: the model, of which this loop has a copy with the same weights.
        flags: of the training script.
        adapters: names; the first one is trained.
        weights_in_float32: whether adapters are kept in float32 beside a model in lower precision.

    Attributes:
        parameters: the trained ones, by the names that `StudentTeacherLoRA` gives them.
    """

    period = 1

    def __init__(self, model: RandomModel, flags: list[str], adapters: tuple[str, ...], *, weights_in_float32: bool):
        self.settings, self.accelerator = model.settings(flags), model.accelerator
        transformer = model.transformer()
        self.pipeline = model.pipeline(transformer)
        self.contexts = model.contexts(self.pipeline, self.settings)
        lora = adapter_options(self.settings.lora, transformer)
        config = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            init_lora_weights="gaussian",
            target_modules=lora["target_modules"],
        )
        trained, *others = adapters
        self.model = get_peft_model(
            transformer, config, adapter_name=trained, autocast_adapter_dtype=weights_in_float32
        )
        for name in others:
            self.model.add_adapter(name, config, autocast_adapter_dtype=weights_in_float32)
        self.model.set_adapter(trained)
        if self.settings.performance.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.pipeline.transformer = self.model
        self.parameters = self.named_parameters(trained)
        self.optimizer = build_optimizer(self.settings.optimizer, list(self.parameters.values()), 1)
        self.prepared = self.accelerator.prepare(self.optimizer)
        self.places = itertools.count()

    def named_parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return {
            name.removeprefix("base_model.model.").replace(f".{adapter}.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if f".{adapter}." in name
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Loads what `StudentTeacherLoRA.state_dict` returned, as far as this loop has the adapters."""
        for adapter in self.model.peft_config:
            for name, parameter in self.named_parameters(adapter).items():
                parameter.copy_(state[f"{adapter}.{name}"])

    def update(self, loss: torch.Tensor) -> None:
        """Backward pass, clipping and optimizer step, then the figures that are logged."""
        self.accelerator.backward(loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.max_grad_norm)
        self.prepared.step()
        self.prepared.zero_grad()
        self.logs = {"loss": loss.item(), "grad_norm": grad_norm.item()}


class PublishedLoop(PeftLoop):
    """A step of the shape of the published training loop (arXiv 2605.05204), with this project's schedule and loss.

    - The graphs of all K states are kept, and one backward pass goes through all of them. The latents of each state
      require a gradient.
    - Student and teacher are switched with peft's `set_adapter`, in every state.
    - LoRA layers compute as peft does. Adapters have the precision of the model, as in the published runs' bfloat16
      engine.
    - The EMA is taken one parameter at a time.

    The published loop also encodes prompt and picture in every step. Here they are read from the same cache as in the
    training step; what encoding takes is measured by itself.
    """

    def __init__(self, model: RandomModel, flags: list[str]):
        super().__init__(model, flags, (STUDENT, TEACHER), weights_in_float32=False)

    def __call__(self) -> None:
        pipeline, distillation = self.pipeline, self.settings.distillation
        samples = self.contexts.data.order.batch(next(self.places))
        student, teacher = self.contexts.load(samples)
        height, width = self.contexts.data.bucket(samples[0])
        seeds = [noise_seed(self.settings.training.seed, sample) for sample in samples]
        latents = seeded_noise(pipeline.latent_shape(height, width), seeds)
        latents = latents.to(self.accelerator.device, pipeline.latents_dtype)
        schedule = pipeline.schedule(height, width, distillation.num_rollout_steps, self.accelerator.device)
        losses = []
        for index, timestep in enumerate(schedule.timesteps):
            sigma, next_sigma = schedule.sigmas[index : index + 2].to(latents.device, latents.dtype)
            latents = latents.detach().requires_grad_(True)
            with torch.no_grad():
                self.model.set_adapter(TEACHER)
                teacher_x0 = latents - sigma * self.velocity(latents, timestep, teacher)
            self.model.set_adapter(STUDENT)
            velocity = self.velocity(latents, timestep, student)
            losses.append(F.mse_loss(latents - sigma * velocity, teacher_x0))
            latents = latents + velocity * (next_sigma - sigma)
        self.update(sum(losses) / len(losses))
        self.update_teacher(distillation.ema_decay)

    def gradient_calls(self) -> list[Call]:
        return [self]

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        return self.pipeline.predict_velocity(latents, timestep, context)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        teacher = self.named_parameters(TEACHER)
        for name, parameter in self.parameters.items():
            teacher[name].mul_(decay).add_(parameter, alpha=1 - decay)


class FlowMatchingLoop(PeftLoop):
    """A step of LoRA training as diffusers' DreamBooth scripts do it: one forward and backward pass.

    The picture's latents are mixed with noise at a random sigma. Adapters are float32, under autocast.
    """

    def __init__(self, model: RandomModel, flags: list[str]):
        super().__init__(model, flags, (STUDENT,), weights_in_float32=True)
        self.generator = torch.Generator(model.device).manual_seed(0)
        shape = self.pipeline.latent_shape(*[self.settings.data.resolution] * 2)
        self.x0 = torch.randn(1, *shape, generator=self.generator, device=model.device)
        self.autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)

    def __call__(self) -> None:
        samples = self.contexts.data.order.batch(next(self.places))
        context = self.contexts.student([self.contexts.data.caption(sample) for sample in samples])

        def student(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with self.autocast:
                velocity = self.pipeline.predict_velocity(latents.to(self.pipeline.latents_dtype), timestep, context)
            return velocity.float()

        self.update(flow_matching_loss(student, self.x0, self.generator))

    def gradient_calls(self) -> list[Call]:
        return []  # of another loss
