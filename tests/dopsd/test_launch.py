import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_stopping import logged

from command_line import ROOT
from dopsd import launch
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.launch import check_accelerator, hide_tokens, resolve_seed, start_accelerator
from models import SLOW
from short_runs import default_settings
from toy_training import ToyTraining
from train_dopsd_flux2 import Flux2Klein
from train_dopsd_zimage import ZImageTurbo


SETTINGS = default_settings()


@pytest.mark.parametrize(
    ("name", "num_processes"), [("one_gpu", 1), ("one_node_of_gpus", 4), ("two_nodes_of_gpus", 16)]
)
def test_accelerate_reads_the_configurations(name, num_processes):
    config = load_config_from_file(str(ROOT / f"configs/{name}.yaml"))
    assert (config.mixed_precision, config.num_processes) == ("bf16", num_processes)


def test_each_machine_of_two_starts_eight_processes():
    launch_line = "--config_file configs/two_nodes_of_gpus.yaml --machine_rank 1 --main_process_ip 10.0.0.1 train.py"
    parsed = launch_command_parser().parse_args(launch_line.replace("configs", str(ROOT / "configs"), 1).split())
    arguments = _validate_launch_command(parsed)[0]
    prepare_multi_gpu_env(arguments)
    machine = arguments.nnodes, arguments.node_rank, arguments.nproc_per_node, arguments.rdzv_endpoint
    assert machine == ("2", 1, "8", "10.0.0.1:29500")


@pytest.mark.parametrize("model", [Flux2Klein(), ZImageTurbo()], ids=lambda model: model.name)
@pytest.mark.parametrize("name", ["full_80gb", "full_fsdp"])
def test_the_configurations_of_whole_models_are_flags(name, model):
    flags = ["--pretrained_model_name_or_path", "a/model", "--config", str(ROOT / f"configs/{name}.yaml")]
    settings = parse_settings(model, "", flags)
    assert settings.full.is_full and settings.performance.fsdp == (name == "full_fsdp")


def test_the_seed_is_the_flags_then_the_checkpoints_then_drawn(tmp_path, caplog):
    PartialState()
    caplog.set_level("INFO")
    ToyTraining().checkpoints(tmp_path, contract={"--seed": 7}).save(2)
    caplog.clear()
    assert resolve_seed(0, tmp_path / "checkpoint-2") == 0
    assert resolve_seed(None, tmp_path / "checkpoint-2") == 7
    assert not caplog.records
    drawn = [resolve_seed(None, None) for _ in range(2)]
    assert drawn[0] != drawn[1]
    messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    assert messages == [f"No --seed was given; using --seed {seed}" for seed in drawn]


# What accelerate is configured for


@pytest.mark.parametrize(
    ("variable", "mode"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
def test_modes_that_split_the_model_are_one_line(monkeypatch, variable, mode):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError) as caught:
        start_accelerator(SETTINGS, Flux2Klein())
    assert str(caught.value) == (
        f"accelerate is configured for {mode}: supported are one process, or several with one GPU each (see "
        "configs/; --fsdp shares the weights)"
    )


@pytest.mark.parametrize("value", ["", "false", "0"])
def test_a_mode_that_is_not_configured_is_no_error(monkeypatch, value):
    def end(**kwargs):
        raise ImportError("reached")

    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    monkeypatch.setattr(launch, "Accelerator", end)
    with pytest.raises(InputError, match="reached"):
        start_accelerator(SETTINGS, Flux2Klein())


def test_a_configuration_that_accelerate_cannot_start_is_one_line(monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("Distributed package doesn't have MPI built in.\nmore")

    monkeypatch.setattr(launch, "Accelerator", fail)
    with pytest.raises(InputError, match="MPI built in.*: supported are one process") as caught:
        start_accelerator(SETTINGS, Flux2Klein())
    assert "\n" not in str(caught.value)


def accelerator_stub(mode=DistributedType.NO, precision="bf16", device="cpu"):
    return SimpleNamespace(
        distributed_type=mode,
        num_processes=1,
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        device=torch.device(device),
    )


@pytest.mark.parametrize("mode", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.XLA])
def test_other_distributed_types_are_refused(monkeypatch, mode):
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    with pytest.raises(InputError, match=f"accelerate is configured for {mode.value}: supported are"):
        check_accelerator(accelerator_stub(mode), SETTINGS, Flux2Klein())


@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_mpi_is_refused_and_gloo_is_not(monkeypatch, backend):
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    stub = accelerator_stub(DistributedType.MULTI_CPU)
    if backend == "gloo":
        check_accelerator(stub, SETTINGS, Flux2Klein())
        return
    with pytest.raises(InputError, match="accelerate is configured for MPI"):
        check_accelerator(stub, SETTINGS, Flux2Klein())


def test_fsdp_needs_several_processes():
    fsdp = SETTINGS.replace(fsdp=True)
    with pytest.raises(InputError, match="^--fsdp: shares the weights among processes, and there is only one; start"):
        check_accelerator(accelerator_stub(), fsdp, Flux2Klein())
    stub = accelerator_stub()
    stub.num_processes = 2
    check_accelerator(stub, fsdp, Flux2Klein())


@pytest.mark.parametrize(
    ("flags", "accelerator", "problem"),
    [
        ({"ema_device": "cuda"}, {}, "--ema_device cuda: there is no GPU; pass auto or cpu"),
        ({}, {"num_processes": 2}, "--train_mode full: with several processes, pass --fsdp, so that they share"),
        (
            {"fsdp": True, "offload_transformer": True},
            {"num_processes": 2, "device": torch.device("cuda")},
            "--offload_transformer: cannot be combined with --train_mode full and --fsdp on GPUs",
        ),
        (
            {"bf16_update": "stochastic_rounding"},
            {"mixed_precision": "no"},
            "--bf16_update stochastic_rounding: goes with --mixed_precision bf16; pass that, or drop the flag$",
        ),
        ({}, {"mixed_precision": "fp16"}, "--train_mode full: cannot be trained in fp16, which accelerate is"),
    ],
)
def test_what_whole_models_cannot_do_is_one_line(flags, accelerator, problem):
    stub = accelerator_stub()
    vars(stub).update(accelerator)
    with pytest.raises(InputError, match=f"^{problem}"):
        check_accelerator(stub, SETTINGS.replace(train_mode="full", **flags), Flux2Klein())


def test_processes_wait_for_hours_while_others_draw(monkeypatch):
    options = {}

    def record(**kwargs):
        options.update(kwargs)
        raise ImportError("enough")

    monkeypatch.setattr(launch, "Accelerator", record)
    with pytest.raises(InputError):
        start_accelerator(SETTINGS, Flux2Klein())
    timeouts = [handler.timeout for handler in options["kwargs_handlers"] if hasattr(handler, "timeout")]
    assert [timeout.total_seconds() >= 3600 for timeout in timeouts] == [True]


# Precision


def test_fp16_is_refused_for_the_model_that_overflows_in_it():
    with pytest.raises(InputError, match="^--mixed_precision fp16: the activations of Z-Image-Turbo overflow in it"):
        check_accelerator(accelerator_stub(precision="fp16", device="cuda"), SETTINGS, ZImageTurbo())


def test_fp16_is_a_warning_for_the_other(caplog):
    PartialState()
    check_accelerator(accelerator_stub(precision="fp16", device="cuda"), SETTINGS, Flux2Klein())
    assert "--mixed_precision fp16: can overflow; prefer bf16" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_float32_on_a_gpu_is_a_warning(caplog, device):
    PartialState()
    check_accelerator(accelerator_stub(precision="no", device=device), SETTINGS, Flux2Klein())
    assert ("the frozen model is loaded in float32" in caplog.text) == (device == "cuda")
    caplog.clear()
    full = SETTINGS.replace(train_mode="full")
    check_accelerator(accelerator_stub(precision="no", device=device), full, Flux2Klein())
    assert ("the model is loaded in float32" in caplog.text) == (device == "cuda")


# What is logged


def test_log_lines_show_no_tokens():
    record = logging.LogRecord("any", logging.INFO, __file__, 1, "with %s", ("hf_abcdefghij",), None)
    assert hide_tokens(record) and record.getMessage() == "with [token]"


BITSANDBYTES_CPU = "bitsandbytes.backends.cpu.ops"


def log_as_libraries_do() -> None:
    os.dup2(2, 1)
    launch.set_up_logging()
    for name, text in (
        ("httpx", "HTTP Request: HEAD https://example.org"),
        ("httpx2", "HTTP Request: HEAD https://example.org"),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16"),
        ("bitsandbytes.autograd._functions", "something else"),
        (BITSANDBYTES_CPU, "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'"),
        (BITSANDBYTES_CPU, "something else"),
        ("torchao", "Failed to load /somewhere/_C_mxfp8.so: Could not load this library"),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported"),
        ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects. This may"),
    ):
        logging.getLogger(name).info(text)
        logging.getLogger(name).warning("httpx failed" if "httpx" in name else text)


def test_routine_messages_of_other_libraries_are_not_logged(forkserver):
    log = forkserver.new_log()
    process = forkserver.start(logged, str(log), log_as_libraries_do)
    process.join(timeout=60)
    text = log.read_text()
    assert process.exitcode == 0, text
    assert "HTTP Request" not in text and "MatMul8bitLt" not in text and "gemm_4bit_forward" not in text
    assert "mxfp8" not in text and "Enum" not in text and "Tensor objects" not in text
    assert text.count("httpx failed") == 2 and text.count("something else") == 4


@pytest.mark.parametrize("package", ["dopsd", "benchmarks"])
def test_a_package_mutes_a_message_of_bitsandbytes_before_anything_is_imported(package):
    log = f"import {package}, logging; log = logging.getLogger({BITSANDBYTES_CPU!r}).warning"
    code = f"{log}; log('Failed to load CPU gemm_4bit_forward from %s', 'none'); log('something else')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "something else\n")


@pytest.mark.parametrize("script", ["train_dopsd_flux2.py", pytest.param("train_dopsd_zimage.py", marks=SLOW)])
def test_a_script_starts_without_messages_of_bitsandbytes(script, tmp_path):
    """In a process of its own: what is imported first decides. The kernel is looked for on some CPUs only."""
    (tmp_path / "sitecustomize.py").write_text(
        "import logging, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'bitsandbytes':\n"
        f"            logger = logging.getLogger({BITSANDBYTES_CPU!r})\n"
        "            logger.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s', 'none')\n"
        "            logger.warning('bitsandbytes is imported')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = [sys.executable, ROOT / script, "--pretrained_model_name_or_path", tmp_path]
    done = subprocess.run(
        [*command, "--instance_data_dir", tmp_path / "none", "--output_dir", tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "--instance_data_dir" in done.stderr
    output = done.stdout + done.stderr
    assert "bitsandbytes is imported" in output and "gemm_4bit_forward" not in output


def test_the_hubs_client_is_one_that_is_muted():
    client = {name.partition(".")[0] for name in sys.modules if name.startswith("httpx")}
    assert client and client <= {"httpx", "httpx2"}


# The plan


def plan(prepare, caplog, **flags) -> tuple[SimpleNamespace, str]:
    """A prepared run, and what `log_plan` says of it."""
    run = prepare(**flags)
    caplog.set_level(logging.INFO)
    caplog.clear()
    launch.log_plan(run.settings, SimpleNamespace(num_processes=2), run.data, ToyTraining().roles, first_step=0)
    return run, caplog.text


def test_batches_that_buckets_keep_small_are_a_warning_with_the_real_numbers(prepare, caplog, tmp_path, make_picture):
    for number, (width, height) in enumerate([(128, 128), (128, 128), (176, 96), (96, 176)]):
        make_picture(number, width, height).save(tmp_path / f"{number}.png")
    flags = {"instance_data_dir": tmp_path, "resolution": 128, "use_aspect_ratio_buckets": True, "train_batch_size": 4}
    run, text = plan(prepare, caplog, **flags, gradient_accumulation_steps=3)
    assert "--train_batch_size 4: batches hold 1.33 pictures on average" in text
    counts = sorted(len(members) for members in run.data.order.members.values())
    assert counts == [1, 1, 2] and all(
        f"{shape.bucket[0]}x{shape.bucket[1]}: {len(m)}" in text for shape, m in run.data.order.members.items()
    )
    # 4 pictures in 3 batches, 3 x 2 batches per step: not 4 x 3 x 2 pictures.
    assert run.data.pictures_per_step(run.settings, num_processes=2) == 8
    assert "Pictures per step over all processes: 8;" in text


def test_full_batches_are_no_warning(prepare, caplog):
    run, text = plan(prepare, caplog, train_batch_size=3)
    assert "WARNING" not in text and run.data.pictures_per_step(run.settings, num_processes=2) == 6
