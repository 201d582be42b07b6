"""Settings of a run: one frozen dataclass per group, one field per flag.

Each field says next to its type whether a resumed run must keep it: `MustMatch` for what changes the trained weights,
`MayDiffer` for everything else, and for the number of steps, so that a run can be extended. Defaults that depend on
the model come from the script (`Model.default_settings`).
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .finished_settings import AfterTrainingSettings, PublishingSettings
from .flag_types import (
    MUST_MATCH,
    BelowOne,
    Count,
    CountOrZero,
    Fraction,
    MayDiffer,
    MustMatch,
    NotNegative,
    Positive,
    Repeats,
    Seed,
    annotations,
    flag,
)
from .full_settings import FullSettings
from .planner.cards import CardName


# Unlike each other and unlike what people train on, so the base model's images for them should not change.
RETENTION_PROMPTS = (
    "a lighthouse on a cliff at sunset, oil painting",
    "a bowl of ramen on a wooden table, top view",
    "an astronaut riding a horse through a snowy forest",
    "a city street at night in the rain, neon signs",
)

# Those of `diffusers.optimization.SchedulerType` that need no rules of their own.
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

QUANTIZATION_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
NO_QUANTIZATION = "none"  # undoes a preset's; resolved settings have None
Quantization = Literal[(*QUANTIZATION_PACKAGES, NO_QUANTIZATION)]


@dataclass(frozen=True)
class ModelSettings:
    _argument_group_name = "model"

    # Checkpoints keep the model's identity (`pretrained.model_identity`) rather than its path.
    pretrained_model_name_or_path: MayDiffer[str | None] = flag(
        None, "Hub id or folder of the few-step model. Default: none, it is required."
    )
    revision: MayDiffer[str | None] = flag(None, "Branch, tag or commit of the hub checkpoint. Default: main.")
    variant: MustMatch[str | None] = flag(
        None, "Variant of the checkpoint's files, such as fp16. Default: the files without a variant."
    )
    cache_dir: MayDiffer[str | None] = flag(None, "Folder for downloads. Default: the Hugging Face cache.")
    bnb_quantization_config_path: MustMatch[str | None] = flag(
        None,
        "JSON file with a bitsandbytes configuration: loads the frozen transformer quantized. Needs a GPU. "
        "Default: not quantized.",
    )
    quantize: MustMatch[Quantization | None] = flag(
        None,
        "Load the frozen transformer in fewer bits: nf4 (bitsandbytes, needs a GPU), int8 or float8 (torchao). The "
        "LoRA stays in float32. none undoes what a preset or --config sets. Default: not quantized.",
    )
    quantize_text_encoder: MustMatch[Quantization | None] = flag(
        None,
        "Load the text encoder in fewer bits, which changes the encodings. none undoes what a preset or --config "
        "sets. Default: not quantized.",
    )
    max_sequence_length: MustMatch[Count] = flag(512, "Maximum number of tokens in a prompt.")


@dataclass(frozen=True)
class DataSettings:
    _argument_group_name = "data"

    # Checkpoints keep what was read (names, contents and captions of the pictures) rather than from where.
    instance_data_dir: MayDiffer[str | None] = flag(
        None,
        "Folder of training pictures: with --instance_prompt, with a .txt file beside each picture, or with a "
        "metadata.jsonl or metadata.csv. Default: none, this or --dataset_name is required.",
    )
    dataset_name: MayDiffer[str | None] = flag(
        None,
        "Data set on the Hub or on disk, read by `datasets`. Default: none, this or --instance_data_dir is required.",
    )
    dataset_config_name: MayDiffer[str | None] = flag(
        None, "Configuration of the data set. Default: the only configuration."
    )
    image_column: MayDiffer[str] = flag("image", "Column with the pictures.")
    caption_column: MayDiffer[list[str] | None] = flag(
        None,
        "Column with the captions. If several are given, one is drawn each time a picture is used. "
        "Default: --instance_prompt is every picture's caption.",
    )
    instance_prompt: MayDiffer[str | None] = flag(
        None, "Caption of all pictures. Default: none; every picture then needs a caption of its own."
    )
    cond_image_column: MayDiffer[list[str] | None] = flag(
        None,
        "Column with the pictures to edit: the caption is then an instruction, and the training picture its result. A "
        "cell holds one picture or a list of them; several columns follow each other. Column X may also be called "
        "X_file_name. Default: none, no editing.",
    )
    group_column: MayDiffer[str | None] = flag(
        None,
        "With --teacher_picture other: column that names each picture's subject. Default: the pictures of a "
        "folder, without those of its subfolders, show one subject; all pictures of a data set do.",
    )
    multiline_captions: MayDiffer[Literal["one_caption", "caption_per_line"] | None] = flag(
        None,
        "How to read a .txt file of several lines beside a picture: as one caption with line breaks, or as one "
        "caption per line, of which one is drawn each time the picture is used. Default: one_caption, with a warning.",
    )
    repeats: MustMatch[Repeats] = flag(1, "Number of times each picture is used per epoch.")
    resolution: MustMatch[Count] = flag(
        1024, "Training resolution, in pixels: pictures are scaled and cropped to a square of this side."
    )
    use_aspect_ratio_buckets: MustMatch[bool] = flag(
        False,
        "Keep each picture close to its own aspect ratio, at about resolution x resolution pixels. Smaller pictures "
        "are not enlarged.",
    )
    aspect_ratio_buckets: MustMatch[str | None] = flag(
        None,
        "Buckets to use with --use_aspect_ratio_buckets: 'height,width;height,width'. Default: computed from "
        "--resolution.",
    )
    center_crop: MustMatch[bool] = flag(False, "Crop at the center instead of at a random position.")
    random_flip: MustMatch[bool] = flag(False, "Flip pictures horizontally half of the time.")


@dataclass(frozen=True)
class TeacherSettings:
    """What the teacher is conditioned on. Choices and defaults depend on the model's teacher contexts."""

    _argument_group_name = "teacher"

    teacher_context: MustMatch[str] = flag("", "What the teacher sees of the target picture.")
    teacher_prompt_suffix: MustMatch[str | None] = flag(None, "Text appended to the caption in the teacher's prompt.")
    teacher_picture: MustMatch[Literal["target", "other"]] = flag(
        "target",
        "Picture that the teacher sees: the training picture itself, or another one of the same subject, of at most "
        "four that are drawn from, so that the student cannot learn what only the training picture shows.",
    )
    teacher_resolution: MustMatch[Count | None] = flag(
        None,
        "Resolution, in pixels, to which the teacher's reference picture is shrunk, so that the teacher takes less "
        "time. Smaller pictures are not enlarged. Default: the size of the training picture.",
    )
    # Checkpoints keep the captions themselves.
    teacher_caption_column: MayDiffer[str | None] = flag(
        None, "Column with the teacher's captions, for --teacher_context caption. Default: none, it is required there."
    )
    # Checkpoints keep the content of the vision tower's files.
    vlm_model_name_or_path: MayDiffer[str | None] = flag(
        None,
        "Hub id or folder of the vision-language model whose vision tower is used. Only the tower's weights are read.",
    )
    vlm_min_pixels: MustMatch[Count | None] = flag(
        None, "Smaller pictures are enlarged to this area, in pixels, for the vision tower."
    )
    vlm_max_pixels: MustMatch[Count | None] = flag(
        None, "Larger pictures are shrunk to this area, in pixels, for the vision tower."
    )
    vlm_rope: MustMatch[Literal["vlm", "text_encoder"] | None] = flag(
        None,
        "RoPE base of the text encoder when it reads a picture: the vision-language model's (as in the published "
        "runs) or the text encoder's own.",
    )


@dataclass(frozen=True)
class DistillationSettings:
    _argument_group_name = "D-OPSD"

    teacher: MustMatch[Literal["ema", "base", "student"]] = flag(
        "ema",
        "Weights of the teacher: an exponential moving average of the student's, the base model's, or the student's "
        "current ones.",
    )
    ema_decay: MustMatch[Fraction] = flag(0.9999, "Decay of the exponential moving average.")
    num_rollout_steps: MustMatch[Count] = flag(4, "Sampling steps of the student's rollout.")
    num_trained_states: MustMatch[Count] = flag(
        1,
        "States of the rollout that are trained on, drawn at random for each micro-batch. More cost more per step, "
        "with the same gradient on average. The published runs train on all: as many as --num_rollout_steps.",
    )
    loss_space: MustMatch[Literal["x0", "velocity"]] = flag(
        "x0",
        "Compare the predicted clean latents (as in the published runs) or the velocities (Eq. 7 of the paper).",
    )


@dataclass(frozen=True)
class PriorSettings:
    _argument_group_name = "prior preservation"

    # Checkpoints keep these and the prompts' digest in one entry (`resuming.PRIOR`).
    with_prior_preservation: MayDiffer[bool] = flag(
        True,
        "Hold the student to the base model on prompts that have nothing to do with the pictures, at states that it "
        "visits itself. No pictures are drawn for it. Default: true; false switches it off, as in the published runs.",
    )
    prior_loss_weight: MayDiffer[NotNegative] = flag(1.0, "Weight of the loss of prior preservation.")
    prior_every: MayDiffer[Count] = flag(1, "Compute this loss only in every N-th step.")
    class_prompt: MayDiffer[list[str] | None] = flag(
        None,
        "Prompts to hold in addition, such as 'a photo of a dog'. Default: none. With --cond_image_column they are "
        "instructions for the pictures to edit; without the flag, about thirty that come with this project.",
    )
    prior_prompts: MayDiffer[str | None] = flag(
        None,
        "Text file with the prompts to hold, one per line; the last one is only drawn, and lines that begin with # "
        "are skipped. Default: about a hundred that come with this project.",
    )
    trigger_word: MayDiffer[list[str] | None] = flag(
        None,
        "The new words in the captions, each as WORD or WORD=CLASS. Prior preservation then also holds the captions "
        "without them, or with the class in their place, and the captions with made-up words in their place: "
        "otherwise every unknown word may draw what was learned. Default: none.",
    )
    class_data_dir: MayDiffer[str | None] = flag(
        None, "Has no effect, accepted for compatibility: no pictures of the class are needed. Default: none."
    )
    num_class_images: MayDiffer[Count | None] = flag(
        None, "Has no effect, accepted for compatibility: no pictures of the class are needed. Default: none."
    )
    prior_generation_precision: MayDiffer[str | None] = flag(
        None, "Has no effect, accepted for compatibility: no pictures of the class are needed. Default: none."
    )


@dataclass(frozen=True)
class LoRASettings:
    _argument_group_name = "LoRA"

    rank: MustMatch[Count] = flag(64, "Rank of the LoRA.")
    lora_alpha: MustMatch[Positive | None] = flag(
        None, "Scale of the LoRA: the update is multiplied by alpha / rank. Default: twice the rank."
    )
    lora_dropout: MustMatch[BelowOne] = flag(0.0, "Dropout probability in the student's training forward pass.")
    lora_layers: MustMatch[str] = flag(
        "",
        "Modules to train: names or endings of names, separated by commas, or a regular expression that matches whole "
        "names. The default covers attention and feed-forward layers of all blocks.",
    )
    init_lora: MustMatch[str | None] = flag(
        None, "LoRA file, folder or hub id from which student and teacher start. Default: a new LoRA."
    )
    upcast_before_saving: MayDiffer[bool] = flag(
        False, "Save what was trained in float32. By default it is saved in the precision of the model."
    )


@dataclass(frozen=True)
class TrainingSettings:
    _argument_group_name = "training"

    output_dir: MayDiffer[str] = flag("dopsd-lora", "Folder for the LoRA or the model, checkpoints, sheets and logs.")
    seed: MustMatch[Seed | None] = flag(
        None, "Random seed. Default: chosen at random, logged and saved in the checkpoints."
    )
    train_batch_size: MustMatch[Count] = flag(1, "Batch size per device.")
    num_train_epochs: MayDiffer[Count | None] = flag(
        None, "Number of epochs. Ignored if --max_train_steps is given. Default: none, --max_train_steps decides."
    )
    max_train_steps: MayDiffer[Count | None] = flag(
        None, "Number of optimizer steps. If only --num_train_epochs is given, as many as that takes."
    )
    # Checkpoints keep the number of micro-batches per step over all processes.
    gradient_accumulation_steps: MayDiffer[Count] = flag(1, "Micro-batches per optimizer step and device.")
    mixed_precision: MustMatch[Literal["no", "fp16", "bf16"] | None] = flag(
        None,
        "Precision of the model; LoRA weights are always float32. Default: what accelerate is configured for.",
    )
    allow_tf32: MayDiffer[bool] = flag(False, "Allow TF32 matrix products on Ampere and later GPUs.")
    checkpointing_steps: MayDiffer[Count] = flag(500, "Steps between checkpoints.")
    checkpoints_total_limit: MayDiffer[Count | None] = flag(
        None, "Maximum number of checkpoints to keep. Default: all are kept."
    )
    resume_from_checkpoint: MayDiffer[str | None] = flag(
        None, "Name of a checkpoint in --output_dir, its path, or latest. Default: start a new run."
    )
    logging_dir: MayDiffer[str] = flag("logs", "Folder for tracker files, in --output_dir.")
    report_to: MayDiffer[Literal["tensorboard", "wandb", "comet_ml", "all", "none"]] = flag(
        "tensorboard", "Tracker for scalars; tensorboard and wandb get the sheets too."
    )
    context_cache_dir: MayDiffer[str | None] = flag(
        None, "Folder for encoded prompts and pictures. Default: context_cache in --output_dir."
    )
    encode_only: MayDiffer[bool] = flag(
        False,
        "Fill the context cache, then stop: for example on a CPU, if the text encoder does not fit on the GPU that "
        "trains. Pass the other flags as for training.",
    )
    no_context_cache: MayDiffer[bool] = flag(
        False, "Keep the encoders in memory and encode every batch when it is needed."
    )
    cache_latents: MayDiffer[bool] = flag(
        False, "Has no effect, accepted for compatibility: pictures are always encoded in advance."
    )
    offload: MayDiffer[bool] = flag(
        False, "Has no effect, accepted for compatibility: encoders are always moved off the accelerator."
    )
    local_rank: MayDiffer[int] = flag(-1, "Has no effect, accepted for compatibility: the launcher sets the rank.")


@dataclass(frozen=True)
class PerformanceSettings:
    """What changes time and memory rather than what is learned."""

    _argument_group_name = "memory and speed"

    gradient_checkpointing: MayDiffer[bool] = flag(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    offload_transformer: MayDiffer[bool] = flag(
        False,
        "Keep the weights of the transformer's blocks in host memory; each comes when it computes. Trains models that "
        "are larger than the GPU, slower.",
    )
    offload_activations: MayDiffer[bool] = flag(
        False, "With --gradient_checkpointing: keep what it stores in host memory. Less GPU memory, slower."
    )
    fsdp: MayDiffer[bool] = flag(
        False,
        "Share the weights of the transformer's blocks among the GPUs of a machine instead of keeping all on each.",
    )
    # Like other GPUs or libraries, these two change rounding only, so a run may be resumed without them.
    compile: MayDiffer[bool] = flag(
        False,
        "Compile the transformer's blocks with torch.compile: faster steps after some minutes. If the compiler fails, "
        "the run goes on without it.",
    )
    attention_backend: MayDiffer[str | None] = flag(
        None,
        "Implementation of attention, by the name that diffusers gives it, such as native, _native_cudnn, flash or "
        "xformers. It is tried before any weight is loaded. Default: diffusers' own choice, which is native.",
    )

    dry_run: MayDiffer[bool] = flag(
        False,
        "Print what the run will take, then stop: memory, time and disk, and if it does not fit, which flags make it "
        "fit. Loads no weights and writes nothing.",
    )
    card: MayDiffer[CardName | None] = flag(
        None,
        "With --dry_run: the GPU to plan for; 8gb and the like are any GPU of that memory, whose speed is unknown. "
        "Default: this machine's, or its CPU if it has none.",
    )

    @property
    def is_sharded(self) -> bool:
        """Whether the transformer's weights are not on the accelerator as a whole."""
        return self.offload_transformer or self.fsdp


@dataclass(frozen=True)
class OptimizerSettings:
    _argument_group_name = "optimizer"

    optimizer: MustMatch[Literal["adamw", "prodigy"]] = flag("adamw", "Optimizer, in upper or lower case.")
    use_8bit_adam: MustMatch[bool] = flag(
        False, "Keep AdamW's states in 8 bits: by bitsandbytes, or with --train_mode full by torchao."
    )
    learning_rate: MustMatch[Positive] = flag(1e-4, "Learning rate. Prodigy expects 1.")
    scale_lr: MustMatch[bool] = flag(False, "Multiply the learning rate by the pictures per step over all processes.")
    lr_scheduler: MustMatch[Literal[SCHEDULERS]] = flag("constant", "Learning rate schedule.")
    lr_warmup_steps: MustMatch[CountOrZero] = flag(0, "Number of warm-up steps.")
    lr_num_cycles: MustMatch[Count] = flag(1, "Number of restarts of the cosine_with_restarts schedule.")
    lr_power: MustMatch[Positive] = flag(1.0, "Power of the polynomial schedule.")
    max_grad_norm: MustMatch[Positive] = flag(1.0, "Maximum gradient norm; larger gradients are clipped.")
    adam_beta1: MustMatch[BelowOne] = flag(0.9, "First beta of Adam and Prodigy.")
    adam_beta2: MustMatch[BelowOne] = flag(0.999, "Second beta of Adam and Prodigy.")
    adam_weight_decay: MustMatch[NotNegative] = flag(0.0, "Weight decay.")
    adam_epsilon: MustMatch[Positive] = flag(1e-8, "Epsilon of Adam and Prodigy.")
    prodigy_beta3: MustMatch[BelowOne | None] = flag(
        None, "Beta for Prodigy's step size. Default: the square root of --adam_beta2."
    )
    prodigy_decouple: MustMatch[bool] = flag(True, "Use AdamW-style decoupled weight decay in Prodigy.")
    prodigy_use_bias_correction: MustMatch[bool] = flag(True, "Use Adam's bias correction in Prodigy.")
    prodigy_safeguard_warmup: MustMatch[bool] = flag(
        True, "Leave the learning rate out of Prodigy's step size estimate, which helps with warm-up."
    )


@dataclass(frozen=True)
class ValidationSettings:
    _argument_group_name = "preview and validation"

    validation_prompt: MayDiffer[list[str] | None] = flag(
        None, "Prompts for which the base model and the student draw images. Default: the first two captions."
    )
    final_validation_prompt: MayDiffer[str | None] = flag(
        None, "Additional prompt for the last validation. Default: none."
    )
    num_validation_images: MayDiffer[Count] = flag(
        4, "Number of images per validation prompt, with seeds 0, 1, 2 and so on."
    )
    validation_steps: MayDiffer[CountOrZero] = flag(
        250, "Steps between validations. 0 disables preview and validation."
    )
    num_inference_steps: MayDiffer[Count] = flag(4, "Sampling steps for preview and validation.")
    validation_height: MayDiffer[Count | None] = flag(
        None, "Height of validation images, in pixels. Default: --resolution."
    )
    validation_width: MayDiffer[Count | None] = flag(
        None, "Width of validation images, in pixels. Default: --resolution."
    )
    retention_prompts: MayDiffer[list[str]] = flag(
        RETENTION_PROMPTS,
        "At least two prompts unrelated to the training pictures; their images should not change. Default ones "
        "that are too long for the model are left out.",
    )
    validation_image: MayDiffer[list[str] | None] = flag(
        None,
        "With --cond_image_column: picture to edit for each --validation_prompt, or one for all; 'a.png,b.png' gives "
        "a prompt several. Default: those of the first two captions.",
    )
    exam_model: MayDiffer[str | None] = flag(
        None,
        "Hub id or folder of a model whose features compare pictures in the teacher's exam, such as "
        "facebook/dinov2-small. Default: none, the VAE's latents are compared.",
    )
    ignore_exam: MayDiffer[bool] = flag(
        False, "Train even if the exam finds the teacher no better than the base model."
    )
    preview_only: MayDiffer[bool] = flag(False, "Draw the preview (base model, teacher, training picture), then stop.")


@dataclass(frozen=True)
class Settings:
    """All settings of a run. A stage receives the group that it needs."""

    model: ModelSettings
    data: DataSettings
    teacher: TeacherSettings
    distillation: DistillationSettings
    prior: PriorSettings
    validation: ValidationSettings
    lora: LoRASettings
    full: FullSettings
    training: TrainingSettings
    performance: PerformanceSettings
    evaluation: AfterTrainingSettings
    publishing: PublishingSettings
    optimizer: OptimizerSettings

    def flat(self) -> dict[str, Any]:
        """Flag name without dashes -> value, for all groups."""
        groups = [getattr(self, group.name) for group in fields(self)]
        return {item.name: getattr(group, item.name) for group in groups for item in fields(group)}

    def replace(self, **values: Any) -> "Settings":
        """The settings with other values for these flags; each goes to its group."""
        changed = {}
        for group in fields(self):
            own = getattr(self, group.name)
            names = {item.name for item in fields(own)} & values.keys()
            changed[group.name] = replace(own, **{name: values[name] for name in names})
        assert values.keys() <= self.flat().keys()
        return replace(self, **changed)

    def must_match(self) -> dict[str, Any]:
        """`--flag` -> value of every setting that a resumed run must share with its checkpoint."""
        groups = [getattr(self, group.name) for group in fields(self)]
        return {
            f"--{name}": getattr(group, name)
            for group in groups
            for name, markers in annotations(type(group)).items()
            if MUST_MATCH in markers
        }


# Flags without effect on whole models.
LORA_FLAGS = tuple(item.name for item in fields(LoRASettings) if item.name != "upcast_before_saving")
# Switches that `false` turns off.
ON_BY_DEFAULT = frozenset(
    item.name for group in fields(Settings) for item in fields(group.type) if item.default is True
)
