"""Plans beside measured steps of models that are small, but not tiny: on this CPU, with real tensors."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torchao.optim.subclass_8bit import OptimState8bit

import train_dopsd_flux2
from dopsd.launch import weight_dtype
from dopsd.optimizers import build_lr_scheduler, build_optimizer
from dopsd.planner.allocations import AllocationTracker, module_bytes, storage_bytes
from dopsd.planner.plan import Planner
from dopsd.planner.reading import read_run
from dopsd.pretrained import load_skeleton, load_transformer
from dopsd.step import TrainingStep, prepare_student
from dopsd.train_modes import train_mode
from dopsd.weight_roles import StudentTeacherWeights
from editing_pairs import write_pairs
from models import make_model
from short_runs import as_arguments, one_process, prepare_run, short_run


pytestmark = pytest.mark.slow

TOLERANCE = 0.1


@pytest.fixture(scope="session")
def small_checkpoints(tmp_path_factory):
    """Makes a tiny checkpoint's transformer larger: (model, layers) -> the model with it."""

    def make(name: str, klein_path: Path, zimage_path: Path, vlm_folder: Path, layers: int = 4):
        model = make_model(name, klein_path, zimage_path, vlm_folder)
        folder = model.make(tmp_path_factory.mktemp(name))
        torch.manual_seed(0)
        if name == "zimage":
            transformer = ZImageTransformer2DModel(
                in_channels=4,
                dim=384,
                n_layers=layers,
                n_refiner_layers=1,
                n_heads=6,
                n_kv_heads=6,
                cap_feat_dim=32,
                axes_dims=[16, 24, 24],
                axes_lens=[1536, 512, 512],
            )
        else:
            transformer = Flux2Transformer2DModel(
                in_channels=16,
                num_layers=layers // 2,
                num_single_layers=layers,
                attention_head_dim=64,
                num_attention_heads=6,
                joint_attention_dim=96,
                axes_dims_rope=(16, 16, 16, 16),
                guidance_embeds=False,
            )
        transformer.save_pretrained(folder / "transformer")
        return model, folder

    return make


def prepared_step(prepared, cache: Path) -> TrainingStep:
    """The run's training step, with its contexts in a cache, as `main` puts it together."""
    settings, pipeline = prepared.settings, prepared.pipeline
    prepared.fill_cache(cache, one_process())
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=settings.training.gradient_accumulation_steps,
    )
    dtype = weight_dtype(settings.training.mixed_precision)
    pipeline.transformer = load_transformer(prepared.model, settings.model, dtype)
    mode = train_mode(prepared.model, settings, load_skeleton(prepared.model, settings.model))
    roles, _ = mode.prepare(pipeline.transformer, settings, accelerator, has_prior=bool(prepared.prior.trained))
    is_full = settings.full.is_full
    optimizer = build_optimizer(settings.optimizer, roles.student_parameters, 1, is_full=is_full)
    scheduler = build_lr_scheduler(settings.optimizer, optimizer, settings.training.max_train_steps)
    student, optimizer = prepare_student(pipeline, optimizer, settings.performance, accelerator)
    return TrainingStep(
        settings,
        accelerator,
        pipeline=pipeline,
        roles=roles,
        contexts=prepared.contexts,
        student=student,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        prior=prepared.prior,
    )


WHOLE, BF16 = {"train_mode": "full", "rank": None}, {"mixed_precision": "bf16", "gradient_checkpointing": True}
ROUNDED = {"bf16_update": "stochastic_rounding"}
SETTINGS = {
    "klein, defaults": ("flux2", {"num_trained_states": None, "with_prior_preservation": None}),
    "klein, bf16, checkpointing": ("flux2", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    "klein, vlm, batch of 2": ("flux2-vlm", {"train_batch_size": 2, "rank": 32}),
    "klein, editing pairs": (
        "flux2",
        {"cond_image_column": "source", "with_prior_preservation": None, "class_prompt": "make it red"},
    ),
    "Z-Image, rank 32, one state": ("zimage", {"rank": 32, "num_trained_states": 1}),
    "Z-Image, bf16, checkpointing, batch of 2": (
        "zimage",
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "train_batch_size": 2},
    ),
    "klein, whole, float32, prior": ("flux2", WHOLE | {"num_trained_states": 1, "with_prior_preservation": None}),
    "klein, whole, master weights": ("flux2", WHOLE | BF16),
    "klein, whole, rounded, one state": ("flux2", WHOLE | BF16 | ROUNDED | {"num_trained_states": 1}),
    "klein, whole, rounded, 8 bits": ("flux2", WHOLE | BF16 | ROUNDED | {"use_8bit_adam": True}),
    "Z-Image, whole, master weights, 8 bits": ("zimage", WHOLE | BF16 | {"use_8bit_adam": True}),
    "Z-Image, some modules, teacher base": (
        "zimage",
        WHOLE | {"trainable_modules": "to_q,to_k,to_v", "teacher": "base", "num_trained_states": 1},
    ),
}

REPEATS = {"klein, whole, rounded, one state", "Z-Image, whole, master weights, 8 bits"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in REPEATS else name for name in SETTINGS]
)
def test_a_plan_is_within_a_tenth_of_measured(
    name, small_checkpoints, klein_path, zimage_path, vlm_folder, tmp_path, make_picture
):
    kind, changed = SETTINGS[name]
    model, folder = small_checkpoints(kind, klein_path, zimage_path, vlm_folder)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        make_picture(number, 256, 256).save(photos / f"{number}.png")
    flags = short_run(model, photos, tmp_path / "run")
    flags |= {"pretrained_model_name_or_path": folder, "resolution": 256, "rank": 8, "max_train_steps": 3} | changed
    if "cond_image_column" in changed:
        flags |= write_pairs(tmp_path / "pairs", make_picture, *[((256, 256), [(256, 256), (128, 256)])] * 2)
    prepared = prepare_run(model.script.MODEL, as_arguments(flags))
    plan = Planner(read_run(prepared.settings, model.script.MODEL), on_gpu=False).plan()
    phase = next(phase for phase in plan.phases if phase.name == "training")

    step = prepared_step(prepared, tmp_path / "cache")
    step(0)  # makes the optimizer's states
    resident = module_bytes(step.pipeline.transformer) + storage_bytes(kept_tensors(step))
    with AllocationTracker() as tracker:
        step(1)
    measured = resident + tracker.peak
    print(f"\n{name}: planned {phase.peak / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert phase.peak == pytest.approx(measured, rel=TOLERANCE)
    working = phase.parts["gradients, activations"]
    assert working == pytest.approx(tracker.peak, rel=TOLERANCE)


def kept_tensors(step: TrainingStep) -> Iterator[torch.Tensor]:
    """The optimizer's states and, beside the transformer, what the roles of whole weights keep."""
    for state in step.optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            # Of 8-bit states, what they consist of.
            yield from (
                [getattr(value, name) for name in value.tensor_attrs] if isinstance(value, OptimState8bit) else [value]
            )
    if isinstance(step.roles, StudentTeacherWeights):
        copies = step.roles._base.values, step.roles.ema, step.roles._masters
        yield from (value for values in copies for value in values.values())


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def grown_memory(arguments: list[str], cache: str) -> int:
    """Most resident memory that two training steps and the weights add to this process, in bytes."""
    prepared = prepare_run(train_dopsd_flux2.MODEL, arguments)
    prepared.fill_cache(Path(cache), one_process())
    gc.collect()
    before, peak, is_done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step = prepared_step(prepared, Path(cache))
    step(0)
    step(1)
    is_done.set()
    watcher.join()
    return peak[0] - before


@pytest.mark.exhaustive
def test_a_plan_is_within_a_tenth_of_resident_memory(
    small_checkpoints, klein_path, zimage_path, vlm_folder, tmp_path, make_picture
):
    model, folder = small_checkpoints("flux2", klein_path, zimage_path, vlm_folder, layers=8)
    photos = tmp_path / "photos"
    photos.mkdir()
    make_picture(0, 512, 512).save(photos / "0.png")
    flags = short_run(model, photos, tmp_path / "run")
    flags |= {"pretrained_model_name_or_path": folder, "resolution": 512, "num_trained_states": 1}
    arguments = as_arguments(flags)
    prepared = prepare_run(model.script.MODEL, arguments)
    plan = Planner(read_run(prepared.settings, model.script.MODEL), on_gpu=False).plan()
    planned = next(phase.peak for phase in plan.phases if phase.name == "training")

    # In a process of its own: this one's memory has gaps that tensors fill. Large blocks are given back at once.
    code = "import sys; from test_planner_measured import grown_memory; print(grown_memory(sys.argv[2:], sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1])
    print(f"\nresident: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)
