"""The script from its command line: what it leaves, how it resumes, what it says to bad input."""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from pipelines.adapters import StudentTeacherLoRA
from tiny_klein import make_tiny_klein


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_dopsd_flux2.py"
LORA_FILE = "pytorch_lora_weights.safetensors"
BUCKETS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,128;112,64"}


@dataclass
class Result:
    code: int
    log: str

    @property
    def error(self) -> str:
        """The one line that a failed run leaves, without log lines and progress bars."""
        assert "Traceback" not in self.log, self.log
        lines = [line for line in self.log.splitlines() if line.startswith(SCRIPT.name + ": error: ")]
        assert self.code != 0 and len(lines) == 1, self.log
        assert self.log.rstrip().endswith(lines[0]), self.log
        return lines[0]


def run_as_main(arguments: list[str], log: str) -> None:
    """In a child process: the script as `python train_dopsd_flux2.py ARGUMENTS` runs it."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Runs the script's command line, forked from a process that has its imports: 1 second each, not 8."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    os.environ["ACCELERATE_USE_CPU"] = "true"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_dopsd_flux2", "prodigyopt", "bitsandbytes", "torch.utils.tensorboard"])
    logs = tmp_path_factory.mktemp("logs")

    def run(*arguments) -> Result:
        log = logs / f"{len(list(logs.iterdir()))}.log"
        process = context.Process(target=run_as_main, args=([str(argument) for argument in arguments], str(log)))
        process.start()
        process.join(timeout=300)
        assert process.exitcode is not None, "the run hangs"
        return Result(process.exitcode, log.read_text(errors="replace"))

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory, make_picture):
    """Three pictures of different shapes, without captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate([(64, 64), (128, 72), (70, 110)]):
        make_picture(number, width, height).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def train(command, klein_path, photos, tmp_path):
    """A short run. Keyword arguments are flags: True for a switch, None to leave one out, a list for several."""

    def run(folder="run", **flags) -> Result:
        flags = {
            "pretrained_model_name_or_path": klein_path,
            "instance_data_dir": photos,
            "instance_prompt": "a ball",
            "teacher_prompt_suffix": " like this",
            "output_dir": tmp_path / folder,
            "resolution": 64,
            "max_sequence_length": 80,
            "rank": 4,
            "learning_rate": 1e-2,
            "max_train_steps": 2,
            "seed": 0,
            "report_to": "none",
        } | flags
        arguments = []
        for name, value in flags.items():
            if value is None:
                continue
            arguments.append(f"--{name}")
            if value is not True:
                arguments += value if isinstance(value, list) else [value]
        return command(*arguments)

    return run


def succeed(result: Result) -> Result:
    assert result.code == 0, result.log
    return result


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / LORA_FILE)


def same_weights(first, second) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def sample(pipeline, **settings):
    call = {"prompt": "a ball", "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    call |= {"max_sequence_length": 80, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline(**call | settings).images.float()


# What a run leaves


@pytest.mark.parametrize(
    ("precision", "rank", "alpha", "tolerance"),
    # alpha / rank is folded into lora_B: exact for powers of two, one rounding otherwise.
    [("no", 4, None, 0.0), ("no", 4, 2, 0.0), ("no", 4, 12, 1e-6), ("bf16", 4, None, 1e-2), ("bf16", 4, 12, 1e-2)],
)
def test_stock_pipeline_gives_the_images_of_trainings_student(
    train, klein_path, tmp_path, recwarn, precision, rank, alpha, tolerance
):
    succeed(train(mixed_precision=precision, rank=rank, lora_alpha=alpha, max_train_steps=10, checkpointing_steps=10))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {dtype}

    state = load_file(tmp_path / "run/checkpoint-10/adapters.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    in_training = Flux2KleinPipeline.from_pretrained(klein_path, dtype=dtype)
    modules = sorted({name.split(".", 1)[1].rsplit(".lora_", 1)[0] for name in state})
    roles = StudentTeacherLoRA(in_training.transformer, modules, rank=rank, alpha=alpha or 2 * rank)
    roles.load_state_dict(state)

    stock = Flux2KleinPipeline.from_pretrained(klein_path, dtype=dtype)
    base = sample(stock)
    recwarn.clear()
    stock.load_lora_weights(tmp_path / "run")
    assert not [str(warning.message) for warning in recwarn.list]
    student, loaded = sample(in_training), sample(stock)
    assert (student - base).norm() / base.norm() > 0.01
    assert (loaded - student).norm() / student.norm() <= tolerance


def test_a_checkpoint_holds_adapters_and_optimizer_and_never_the_base(train, tmp_path):
    succeed(train(checkpointing_steps=1, max_train_steps=3, checkpoints_total_limit=2))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-3", LORA_FILE]
    checkpoint = tmp_path / "run/checkpoint-3"
    expected = ["adapters.safetensors", LORA_FILE, "state.json", "trainer_state.pt"]
    assert sorted(path.name for path in checkpoint.iterdir()) == expected
    names = {name.split(".lora_")[0].split(".", 1)[1] for name in load_file(checkpoint / "adapters.safetensors")}
    assert len(names) == 28
    assert same_weights(checkpoint, tmp_path / "run")
    assert set(torch.load(checkpoint / "trainer_state.pt", weights_only=True)) == {"optimizer", "lr_scheduler"}


def test_the_lora_file_is_the_same_for_the_same_command(train, tmp_path):
    succeed(train("first"))
    succeed(train("second"))
    assert (tmp_path / "first" / LORA_FILE).read_bytes() == (tmp_path / "second" / LORA_FILE).read_bytes()


def test_upcast_before_saving(train, tmp_path):
    succeed(train(mixed_precision="bf16", upcast_before_saving=True))
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_weight(train, tmp_path):
    succeed(train("plain", lora_dropout=0.2))
    succeed(train("saving", lora_dropout=0.2, gradient_checkpointing=True))
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)


def test_student_comes_closer_to_what_the_teacher_draws(train, klein_path, photos, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "0.png", one)
    succeed(train(instance_data_dir=one, max_train_steps=60, teacher="base", rank=8))
    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    with Image.open(one / "0.png") as picture:
        teacher = sample(stock, prompt="a ball like this", image=picture.convert("RGB"))
    before = (sample(stock) - teacher).norm()
    stock.load_lora_weights(tmp_path / "run")
    after = (sample(stock) - teacher).norm()
    assert after < 0.6 * before


def test_what_the_run_says(train):
    log = succeed(train(lora_layers="attn.to_q,attn.to_k,attn.to_v,attn.to_out.0", seed=None)).log
    assert "Training 8 modules, 2,048 parameters, rank 4" in log
    assert "--seed " in log and "was drawn" in log
    for bar in ("Reading pictures", "Encoding prompts", "Encoding pictures", "Steps"):
        assert bar in log
    assert "load_lora_weights" in log


def test_tensorboard_files_hold_the_scalars(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed(train(report_to="tensorboard"))
    file = next((tmp_path / "run/logs").glob("*/events*"))
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_an_undistilled_klein_gets_a_warning(train, tmp_path):
    base = make_tiny_klein(tmp_path / "base", is_distilled=False)
    assert "is not step-distilled" in succeed(train(pretrained_model_name_or_path=base)).log
    assert "is not step-distilled" not in succeed(train("distilled")).log


@pytest.mark.parametrize("flag", [{"teacher": "base"}, {"teacher": "student"}, {"loss_space": "velocity"}])
@pytest.mark.parametrize("other", [{"num_rollout_steps": 2}])
def test_method_flags_reach_the_training(train, tmp_path, flag, other):
    # One step leaves lora_A alone, and base, average and student agree until then.
    succeed(train("default", max_train_steps=3, ema_decay=0.5))
    succeed(train("flag", max_train_steps=3, ema_decay=0.5, **flag))
    succeed(train("both", max_train_steps=3, ema_decay=0.5, **flag, **other))
    assert not same_weights(tmp_path / "default", tmp_path / "flag")
    assert not same_weights(tmp_path / "flag", tmp_path / "both")


def test_init_lora_is_where_training_starts(train, tmp_path):
    succeed(train("first", lora_alpha=12))
    succeed(train("second", init_lora=tmp_path / "first", lora_alpha=4, learning_rate=1e-12))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:
        torch.testing.assert_close(first[name], second[name])


# Data


def with_sidecars(folder, photos):
    shutil.copytree(photos, folder)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"ball {number}")
    return {"instance_data_dir": folder, "instance_prompt": None}


def with_jsonl(folder, photos):
    shutil.copytree(photos, folder)
    rows = [{"file_name": f"{n}.png", "short": f"ball {n}", "long": f"ball {n}, round"} for n in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"instance_data_dir": folder, "instance_prompt": None, "caption_column": ["short", "long"]}


def with_csv(folder, photos):
    shutil.copytree(photos, folder)
    (folder / "metadata.csv").write_text('file_name,text\n0.png,None\n1.png,1984\n2.png,"a, b"\n')
    return {"instance_data_dir": folder, "instance_prompt": None, "caption_column": "text"}


def with_parquet(folder, photos):
    folder.mkdir()
    table = datasets.Dataset.from_dict(
        {"picture": [str(photos / f"{n}.png") for n in range(3)], "text": [f"ball {n}" for n in range(3)]}
    ).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_name": folder, "caption_column": "text"}
    return flags | {"image_column": "picture", "cache_dir": folder / "cache"}


@pytest.mark.parametrize("form", [with_sidecars, with_jsonl, with_csv, with_parquet])
def test_every_data_form_trains(train, photos, tmp_path, form):
    flags = form(tmp_path / "data", photos)
    log = succeed(train(**flags, random_flip=True, repeats=2, train_batch_size=2, **BUCKETS)).log
    assert "Pictures: 3" in log
    assert weights(tmp_path / "run")


# Resuming


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mixed_precision": "bf16", "use_8bit_adam": True},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "lora_dropout": 0.3, "random_flip": True, "repeats": 2},
        {"gradient_accumulation_steps": 2, "train_batch_size": 2} | BUCKETS,
    ],
    ids=["adamw", "bf16-8bit", "prodigy", "cosine-dropout-flip", "accumulation-buckets"],
)
def test_a_resumed_run_ends_in_the_same_weights(train, photos, tmp_path, flags):
    flags = with_jsonl(tmp_path / "data", photos) | flags | {"checkpointing_steps": 3, "max_train_steps": 7}
    succeed(train("whole", **flags))
    for name in ("latest", "checkpoint-3"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(tmp_path / "whole/checkpoint-3", folder / "checkpoint-3")
        log = succeed(train(name, **flags, resume_from_checkpoint=name)).log
        assert "steps: 3 to 7" in log
        assert same_weights(tmp_path / "whole", folder)
        whole, resumed = (load_file(tmp_path / n / "checkpoint-6/adapters.safetensors") for n in ("whole", name))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_resuming_takes_the_drawn_seed(train, tmp_path):
    succeed(train(seed=None, checkpointing_steps=1, max_train_steps=2))
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "again/checkpoint-1")
    succeed(train("again", seed=None, max_train_steps=2, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "run", tmp_path / "again")


def test_latest_without_a_checkpoint_starts_from_the_beginning(train, tmp_path):
    (tmp_path / "run/.checkpoint-1.tmp").mkdir(parents=True)  # a killed run's unfinished one
    assert "steps: 0 to 2" in succeed(train(resume_from_checkpoint="latest")).log


def test_resuming_with_other_settings_is_refused(train):
    succeed(train(checkpointing_steps=1))
    result = train(rank=8, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "--rank 4, not 8" in result.error
    assert "--seed 0, not 5" in train(seed=5, resume_from_checkpoint="latest").error
    assert succeed(train(max_train_steps=3, resume_from_checkpoint="latest"))


def test_results_do_not_depend_on_the_number_of_pictures_at_once(train, tmp_path):
    """Noise, captions and crops belong to a sample's place; the batch is only how many are computed together."""
    succeed(train("one", train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=3))
    succeed(train("three", train_batch_size=3, gradient_accumulation_steps=1, max_train_steps=3))
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    for name in one:
        torch.testing.assert_close(one[name], three[name], atol=1e-4, rtol=1e-3)


# Bad input


def png(folder, name="0.png", content=None):
    folder.mkdir(exist_ok=True)
    if content is None:
        Image.new("RGB", (64, 64)).save(folder / name)
    else:
        (folder / name).write_bytes(content)
    return {"instance_data_dir": folder}


def metadata(folder, row):
    png(folder)
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return {"instance_data_dir": folder, "caption_column": "text", "instance_prompt": None}


BAD_DATA = {
    "no folder": (lambda f: {"instance_data_dir": f / "nowhere"}, "nowhere"),
    "no picture": (lambda f: png(f, "notes.md", b"x"), "holds no picture"),
    "unreadable": (lambda f: png(f, "bad.png", b"no picture"), "bad.png"),
    "truncated": (lambda f: png(f, "cut.png", (lambda p: p.read_bytes()[:60])(full_png(f))), "cut.png"),
    "no caption": (lambda f: png(f) | {"instance_prompt": None}, "--instance_prompt"),
    "empty caption": (lambda f: metadata(f, {"file_name": "0.png", "text": " "}), "metadata.jsonl line 1"),
    "number caption": (lambda f: metadata(f, {"file_name": "0.png", "text": 7}), "metadata.jsonl line 1"),
    "unknown column": (lambda f: metadata(f, {"file_name": "0.png", "caption": "x"}), "'file_name', 'caption'"),
    "leads out": (lambda f: metadata(f, {"file_name": "../0.png", "text": "x"}), "leads out"),
    "row without picture": (lambda f: metadata(f, {"file_name": "1.png", "text": "x"}), "1.png"),
    "two sources": (lambda f: png(f) | {"dataset_name": f}, "--dataset_name"),
    "no source": (lambda f: {"instance_data_dir": None}, "--instance_data_dir"),
}


def full_png(folder):
    folder.mkdir(exist_ok=True)
    path = folder.parent / "full.png"
    Image.effect_noise((64, 64), 50).save(path)
    return path


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_that_names_it(train, tmp_path, case):
    make, expected = BAD_DATA[case]
    result = train(**make(tmp_path / "data"))
    assert expected in result.error
    assert "Loading" not in result.log  # no model was loaded
    assert not (tmp_path / "run" / LORA_FILE).exists()


BAD_FLAGS = {
    "resolution": ({"resolution": 100}, "--resolution 100"),
    "resolution limit": ({"resolution": 1056}, "--resolution 1056"),
    "bucket": (
        {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "2048,2048"},
        "--aspect_ratio_buckets: 2048,2048",
    ),
    "bucket text": ({"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64x64"}, "--aspect_ratio_buckets"),
    "rank": ({"rank": 0}, "--rank"),
    "steps": ({"max_train_steps": 0}, "--max_train_steps"),
    "rollout steps": ({"num_rollout_steps": 0}, "--num_rollout_steps"),
    "unknown flag": ({"learning_rat": 1}, "--learning_rat"),
    "no number": ({"ema_decay": "much"}, "--ema_decay"),
    "no checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint checkpoint-7"),
    "no model": (
        {"pretrained_model_name_or_path": "nowhere/at-all"},
        "--pretrained_model_name_or_path nowhere/at-all",
    ),
    "targets": ({"lora_layers": "to_q,ff.net.0.proj"}, "'ff.net.0.proj' matches no linear module"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
    "8-bit prodigy": ({"use_8bit_adam": True, "optimizer": "prodigy"}, "--use_8bit_adam"),
    "no quantization file": (
        {"bnb_quantization_config_path": "nowhere.json"},
        "--bnb_quantization_config_path nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_one_line_that_names_them(train, tmp_path, case):
    flags, expected = BAD_FLAGS[case]
    result = train(**flags)
    assert expected in result.error
    assert "Loading" not in result.log
    assert not (tmp_path / "run" / LORA_FILE).exists()


def test_another_model_is_refused(train, klein_path, tmp_path):
    folder = shutil.copytree(klein_path, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "is a FluxPipeline, not FLUX.2-klein" in train(pretrained_model_name_or_path=folder).error


def test_an_earlier_runs_checkpoints_are_not_mixed_with_a_new_run(train, tmp_path):
    succeed(train(checkpointing_steps=1))
    before = (tmp_path / "run" / LORA_FILE).read_bytes()
    assert "--output_dir" in train(checkpointing_steps=1, seed=7).error
    assert (tmp_path / "run" / LORA_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "flags", [{"text_encoder_out_layers": ["9", "18"]}, {"text_encoder_out_layers": ["9", "18", "40"]}]
)
def test_wrong_text_layers_are_refused(train, flags):
    assert "--text_encoder_out_layers" in train(**flags).error


def test_a_prompt_that_would_be_cut_is_refused(train):
    assert "0.png" in train(max_sequence_length=30).error


def test_init_lora_that_is_not_there_is_refused(train, tmp_path):
    assert "--init_lora" in train(init_lora=tmp_path / "nothing").error


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(train, klein_path, tmp_path):
    folder = shutil.copytree(klein_path, tmp_path / "broken")
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(float("nan"))
    pipeline.transformer.save_pretrained(folder / "transformer")
    result = train(pretrained_model_name_or_path=folder)
    assert "at step 1 the loss is nan" in result.error
    assert not list((tmp_path / "run").iterdir())


def test_the_last_good_weights_are_kept_when_the_loss_breaks(train, tmp_path):
    result = train(learning_rate=1e30, max_train_steps=5)
    assert "at step 2 the loss is" in result.error
    assert "checkpoint-1" in result.error
    state = load_file(tmp_path / "run/checkpoint-1/adapters.safetensors")
    assert all(weight.isfinite().all() for weight in state.values())


# The launchers


@pytest.fixture
def launch_arguments(klein_path, photos, tmp_path):
    def arguments(folder, *more):
        return [
            *(str(SCRIPT), "--pretrained_model_name_or_path", str(klein_path), "--instance_data_dir", str(photos)),
            *("--instance_prompt", "a ball", "--teacher_prompt_suffix", " like this", "--resolution", "64"),
            *("--max_sequence_length", "80", "--rank", "4", "--learning_rate", "1e-3", "--max_train_steps", "3"),
            *("--seed", "0", "--report_to", "none", "--lora_dropout", "0.1", "--output_dir", str(tmp_path / folder)),
            *more,
        ]

    return arguments


@pytest.mark.slow
def test_two_processes_give_the_lora_of_one_with_twice_the_accumulation(launch_arguments, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    bin_folder = Path(sys.executable).parent
    one = [bin_folder / "accelerate", "launch", "--cpu", "--num_processes", "1"]
    two = [bin_folder / "torchrun", "--nproc-per-node", "2", "--master_addr", "127.0.0.1", "--master_port", "29541"]
    for launcher, folder, accumulation in ((one, "one", "4"), (two, "two", "2")):
        arguments = launch_arguments(folder, "--gradient_accumulation_steps", accumulation)
        subprocess.run([*launcher, *arguments], check=True, env=environment, cwd=tmp_path)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)
