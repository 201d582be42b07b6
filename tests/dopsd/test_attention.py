import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from dopsd.attention import backend_problem, check_attention_backend
from dopsd.errors import InputError
from dopsd.execution import prepare_transformer
from dopsd.settings import PerformanceSettings
from pipelines.flux2_klein import KleinContext
from short_runs import one_process


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
EFFICIENT = AttentionBackendName._NATIVE_EFFICIENT


@pytest.fixture(autouse=True)
def same_backend_afterwards():
    """diffusers sets the backend for the whole process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def replace_backend(monkeypatch):
    """Makes `_native_efficient` another function of torch's attention: (change(output, attn_mask)) -> None."""
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]

    def replace(change) -> None:
        def attend(query, key, value, attn_mask=None):
            return change(native(query, key, value, attn_mask=attn_mask), attn_mask)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, EFFICIENT, attend)
        names = {"query", "key", "value", "attn_mask"}
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, EFFICIENT, names)

    return replace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_backends_that_train_on_a_cpu_are_accepted(name, dtype):
    for masked in (False, True):
        check_attention_backend(name, CPU["device"], dtype, masked=masked)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("flash5", "diffusers has no such backend"),
        ("FLASH", "diffusers has no such backend"),
        ("flash", "Flash Attention backend 'flash' is not usable because of missing package"),
        ("sage", "Sage Attention backend 'sage' is not usable because of missing package"),
        ("flash_hub", "Backend 'flash_hub' is not usable because the `kernels` package isn't available"),
        ("_native_cudnn", ""),
    ],
)
def test_a_backend_that_cannot_train_here_is_one_line(name, problem):
    with pytest.raises(InputError) as caught:
        check_attention_backend(name, **CPU, masked=False)
    message = str(caught.value)
    assert message.startswith(f"--attention_backend {name}: {problem}") and ".;" not in message
    working = message.partition("; these work here: ")[2].split(", ")
    assert {"native", "_native_math"} <= set(working) and not {name, "flash_hub"} & set(working)
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE


def test_a_backend_without_masks_is_refused_only_where_tokens_are_masked():
    assert backend_problem("_native_flash", **CPU, masked=False) is None
    problem = "`attn_mask` is not supported for native flash attention"
    assert backend_problem("_native_flash", **CPU, masked=True) == problem


def test_a_backend_without_a_backward_pass_is_refused(replace_backend):
    replace_backend(lambda output, mask: output.detach())
    assert backend_problem(EFFICIENT.value, **CPU, masked=False) == "it has no backward pass"


def test_a_backend_that_takes_the_mask_for_something_else_is_refused(replace_backend):
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    replace_backend(lambda output, mask: output)
    assert backend_problem(EFFICIENT.value, **CPU, masked=True) is None
    # As xformers' does with a boolean mask of four dimensions: true becomes 1, which is added to the scores.
    _AttentionBackendRegistry._backends[EFFICIENT] = lambda query, key, value, attn_mask=None: native(
        query, key, value, attn_mask=attn_mask.to(query.dtype)
    )
    problem = "its output or its gradients are not those of torch's attention with a mask"
    assert backend_problem(EFFICIENT.value, **CPU, masked=True) == problem


def test_the_transformer_computes_with_the_chosen_backend(pipeline, monkeypatch):
    chosen, calls = AttentionBackendName._NATIVE_MATH, []
    attend = _AttentionBackendRegistry._backends[chosen]

    def counted(**arguments):
        calls.append(arguments["query"].shape)
        return attend(**arguments)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, chosen, counted)
    generator = torch.Generator().manual_seed(0)
    latents, prompt = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 4, 4), (1, 7, 96)))

    def velocity(**settings) -> torch.Tensor:
        prepare_transformer(pipeline.transformer, [], PerformanceSettings(**settings), one_process())
        with torch.no_grad():
            return pipeline.predict_velocity(latents, torch.tensor(700.0), KleinContext(prompt))

    expected = velocity()
    assert not calls
    torch.testing.assert_close(velocity(attention_backend=chosen.value), expected, rtol=1e-4, atol=1e-5)
    assert calls == [(1, 7 + 16, 2, 16)] * 4
