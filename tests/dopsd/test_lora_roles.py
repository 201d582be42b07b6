"""Roles, gradients, the teacher's EMA and the LoRA file, on a tiny real transformer."""

import copy

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from dopsd.adapted_linear import CastLinear
from dopsd.errors import InputError
from dopsd.lora_roles import StudentTeacherLoRA, lora_target_modules
from dopsd.pretrained import transformer_skeleton
from dopsd.rollout import rollout, seeded_noise
from pipelines.published import KLEIN_LORA_LAYERS


PUBLISHED_LAYERS = (
    "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out"
)


def make_roles(transformer, *, lora_layers="to_q,to_v", rank=4, alpha=8, seed=0, **settings):
    torch.manual_seed(seed)
    targets = lora_target_modules(transformer, lora_layers)
    return StudentTeacherLoRA(transformer, targets, rank=rank, alpha=alpha, **settings)


def randomise(parameters, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def skeleton(klein_path):
    """The transformer on the meta device."""
    return transformer_skeleton(Flux2Transformer2DModel, klein_path)


@pytest.fixture
def velocity(pipeline):
    """The velocity that the transformer predicts at a fixed state, in its current role."""
    context = pipeline.encode_student(["a ball"], max_sequence_length=64)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0])
    time = pipeline.schedule(64, 64, 4).timesteps[1]

    def predict(dtype=torch.float32):
        cast = type(context)(context.prompt_embeds.to(dtype))
        return pipeline.predict_velocity(noise.to(dtype), time, cast)

    return predict


# Targets


def test_default_targets_are_attention_and_feed_forward_layers_of_all_blocks(skeleton):
    names = lora_target_modules(skeleton, KLEIN_LORA_LAYERS)
    assert len(names) == 2 * 12 + 2 * 2
    assert "transformer_blocks.1.attn.to_out.0" in names
    assert "transformer_blocks.0.ff_context.linear_out" in names
    assert "single_transformer_blocks.1.attn.to_qkv_mlp_proj" in names
    assert "single_transformer_blocks.0.attn.to_out" in names
    assert not [name for name in names if "modulation" in name or "embed" in name]


def test_published_targets_are_the_attention_of_the_double_blocks(skeleton):
    names = lora_target_modules(skeleton, PUBLISHED_LAYERS)
    assert len(names) == 2 * 8
    assert all(name.startswith("transformer_blocks.") and ".attn." in name for name in names)


@pytest.mark.parametrize(
    ("lora_layers", "message"),
    [
        ("ff.net.0.proj", "'ff.net.0.proj' matches no linear module; some of the linear modules are "),
        ("to_q,ff.net.2", "'ff.net.2' matches no linear module"),
        ("to_q,", "'' matches no linear module"),
        ("o_q", "'o_q' matches no linear module"),
        (r"blocks\.\d+\.nothing", "the expression matches no linear module"),
        ("attn.(to_q", "not a valid regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(skeleton, lora_layers, message):
    with pytest.raises(InputError) as caught:
        lora_target_modules(skeleton, lora_layers)
    assert str(caught.value).startswith(f"--lora_layers {lora_layers}: {message}")


def test_layers_that_other_software_does_not_load_get_one_warning(skeleton, caplog):
    lora_target_modules(skeleton, "to_q,to_k", KLEIN_LORA_LAYERS)
    lora_target_modules(skeleton, "x_embedder")  # of a model whose portable layers are not known
    assert not caplog.records
    names = lora_target_modules(skeleton, "x_embedder,proj_out,to_q", KLEIN_LORA_LAYERS)
    (record,) = caplog.records
    assert f"no name for 2 of the {len(names)} trained modules, such as x_embedder, and leave" in record.getMessage()


def test_only_linear_modules_are_targets(skeleton):
    # "to_out" is a linear layer in the single blocks and a ModuleList in the double blocks.
    names = lora_target_modules(skeleton, "to_out")
    assert names == [f"single_transformer_blocks.{block}.attn.to_out" for block in range(2)]


# Roles


def test_lora_is_float32_and_the_bfloat16_base_is_frozen(pipeline):
    transformer = pipeline.transformer.to(torch.bfloat16)
    roles = make_roles(transformer)
    assert {parameter.dtype for parameter in roles.student_parameters + roles.teacher_parameters} == {torch.float32}
    trainable = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(roles.student_parameters)
    assert all(".default." in name for name in trainable)
    assert {p.dtype for n, p in transformer.named_parameters() if "lora" not in n} == {torch.bfloat16}


def test_a_fresh_adapter_changes_nothing_even_in_bfloat16(pipeline, velocity):
    pipeline.transformer.to(torch.bfloat16)
    with torch.no_grad():
        before = velocity(torch.bfloat16)
        make_roles(pipeline.transformer, lora_layers=KLEIN_LORA_LAYERS)
        assert torch.equal(velocity(torch.bfloat16), before)


@pytest.mark.parametrize("teacher", ["ema", "base", "student"])
def test_each_kind_of_teacher_has_its_own_weights(pipeline, velocity, teacher):
    with torch.no_grad():
        base = velocity()
        roles = make_roles(pipeline.transformer, teacher=teacher)
        randomise(roles.student_parameters, seed=1)
        if teacher == "ema":
            randomise(roles.teacher_parameters, seed=2)
        student = velocity()
        teacher_velocity = roles.as_teacher(velocity)()
        assert not torch.allclose(student, base, atol=1e-4)
        if teacher == "base":
            assert torch.equal(teacher_velocity, base)
        elif teacher == "student":
            assert torch.equal(teacher_velocity, student)
        else:
            assert not torch.allclose(teacher_velocity, student, atol=1e-4)
            assert not torch.allclose(teacher_velocity, base, atol=1e-4)
            torch._foreach_copy_(roles.student_parameters, roles.teacher_parameters)
            assert torch.equal(teacher_velocity, velocity())


@pytest.mark.parametrize("teacher", ["ema", "base", "student"])
def test_the_student_is_back_after_the_teacher_even_after_an_error(pipeline, velocity, teacher):
    roles = make_roles(pipeline.transformer, teacher=teacher, dropout=0.5)
    randomise(roles.student_parameters)
    torch.manual_seed(0)
    before = velocity()
    with pytest.raises(RuntimeError, match="midway"), roles.teacher_role():
        raise RuntimeError("midway")
    torch.manual_seed(0)
    after = velocity()
    assert torch.equal(before, after)
    assert after.requires_grad
    assert all(parameter.requires_grad for parameter in roles.student_parameters)
    assert not any(parameter.requires_grad for parameter in roles.teacher_parameters)


def test_equal_contexts_and_weights_give_zero_loss_and_gradients_reach_only_the_student(pipeline, velocity):
    roles = make_roles(pipeline.transformer, lora_layers=KLEIN_LORA_LAYERS)
    context = pipeline.encode_student(["a ball"], max_sequence_length=64)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0])
    schedule = pipeline.schedule(64, 64, 4)

    def student(latents, timestep):
        return pipeline.predict_velocity(latents, timestep, context)

    assert [step.loss.item() for step in rollout(student, roles.as_teacher(student), noise, schedule)] == [0.0] * 4

    randomise(roles.teacher_parameters)
    for step in rollout(student, roles.as_teacher(student), noise, schedule):
        assert step.loss.item() > 0
        step.loss.backward()
    students = {id(parameter) for parameter in roles.student_parameters}
    for name, parameter in pipeline.transformer.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in students), name
    assert any(parameter.grad.abs().max() > 0 for parameter in roles.student_parameters)


def test_gradient_checkpointing_recomputes_in_the_students_role(pipeline, make_picture):
    """A role that the teacher did not leave would change the recomputed activations."""

    def gradients(checkpointing):
        transformer = copy.deepcopy(pipeline.transformer)
        original, pipeline.transformer = pipeline.transformer, transformer
        roles = make_roles(transformer, dropout=0.3)
        randomise(roles.student_parameters, seed=1)
        randomise(roles.teacher_parameters, seed=2)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        student_context = pipeline.encode_student(["a ball"], max_sequence_length=64)
        teacher_context = pipeline.encode_edit_teacher(["a ball"], [make_picture(1)], max_sequence_length=64)
        torch.manual_seed(0)
        for step in rollout(
            lambda x, t: pipeline.predict_velocity(x, t, student_context),
            roles.as_teacher(lambda x, t: pipeline.predict_velocity(x, t, teacher_context)),
            seeded_noise(pipeline.latent_shape(64, 64), [0]),
            pipeline.schedule(64, 64, 4),
        ):
            step.loss.backward()
        pipeline.transformer = original
        return [parameter.grad for parameter in roles.student_parameters]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_only_the_training_student_has_dropout(pipeline, velocity):
    roles = make_roles(pipeline.transformer, dropout=0.5, teacher="student")
    randomise(roles.student_parameters)
    with torch.no_grad():
        assert not torch.equal(velocity(), velocity())
        in_role = roles.as_teacher(velocity)
        assert torch.equal(in_role(), in_role())
        assert not torch.equal(velocity(), velocity())


# The EMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_follows_the_float32_formula_for_every_model_dtype(pipeline, dtype):
    roles = make_roles(pipeline.transformer.to(dtype))
    randomise(roles.student_parameters, seed=1, std=1.0)
    randomise(roles.teacher_parameters, seed=2, std=1.0)
    decay, updates = 0.9999, 500
    expected = [
        student.double() + (teacher.double() - student.double()) * decay**updates
        for student, teacher in zip(roles.student_parameters, roles.teacher_parameters, strict=True)
    ]
    start = [teacher.clone() for teacher in roles.teacher_parameters]
    for _ in range(updates):
        roles.update_teacher(decay)
    for teacher, value, first in zip(roles.teacher_parameters, expected, start, strict=True):
        moved = (value - first.double()).abs().mean()
        assert moved > 0.02  # in bfloat16, every single update would be rounded away
        assert (teacher.double() - value).abs().mean() < 1e-3 * moved


def test_teacher_starts_as_a_copy_of_the_student_and_extreme_decays_are_exact(pipeline):
    roles = make_roles(pipeline.transformer)
    pairs = list(zip(roles.student_parameters, roles.teacher_parameters, strict=True))
    assert all(torch.equal(student, teacher) for student, teacher in pairs)
    randomise(roles.student_parameters)
    before = [teacher.clone() for teacher in roles.teacher_parameters]
    roles.update_teacher(1.0)
    assert all(torch.equal(old, teacher) for old, teacher in zip(before, roles.teacher_parameters, strict=True))
    roles.update_teacher(0.0)
    assert all(torch.equal(student, teacher) for student, teacher in pairs)


# Precision


def test_cast_linear_computes_in_the_dtype_of_its_input_and_keeps_no_copy_of_it():
    linear = CastLinear(8, 4, bias=False)
    inputs = torch.randn(3, 8, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        output = linear(inputs)
    assert output.dtype == torch.bfloat16
    assert inputs.data_ptr() in {tensor.data_ptr() for tensor in saved}
    output.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_the_adapters_keep_no_float32_activations_of_a_bfloat16_model(pipeline, velocity):
    """peft's own forward pass would keep a float32 copy of every input."""
    pipeline.transformer.to(torch.bfloat16)

    def count_large_float32():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            velocity(torch.bfloat16)
        num_tokens, width = 64 + 16, pipeline.transformer.inner_dim
        return sum(tensor.dtype == torch.float32 and tensor.numel() >= num_tokens * width for tensor in saved)

    pipeline.transformer.requires_grad_(False)
    pipeline.transformer.x_embedder.requires_grad_(True)  # the whole model has a graph, even without adapters
    without_adapters = count_large_float32()
    make_roles(pipeline.transformer, lora_layers=KLEIN_LORA_LAYERS)
    assert count_large_float32() <= without_adapters


# The LoRA file


def save(roles, folder, dtype=torch.float32):
    weights, metadata = roles.export(dtype)
    Flux2KleinPipeline.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )
    return folder


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (6, 3)])
def test_stock_pipeline_generates_the_students_images(pipeline, klein_path, tmp_path, recwarn, rank, alpha):
    roles = make_roles(pipeline.transformer, rank=rank, alpha=alpha, lora_layers=KLEIN_LORA_LAYERS)
    randomise(roles.student_parameters, std=0.4)
    save(roles, tmp_path)
    call = {
        "prompt": "a ball",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_sequence_length": 64,
        "output_type": "latent",
    }
    student = pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    stock = Flux2KleinPipeline.from_pretrained(klein_path)
    base = stock(**call, generator=torch.Generator().manual_seed(0)).images
    recwarn.clear()
    stock.load_lora_weights(tmp_path)
    assert not [str(warning.message) for warning in recwarn if "deprecat" not in str(warning.message).lower()]
    loaded = stock(**call, generator=torch.Generator().manual_seed(0)).images
    assert not torch.allclose(base, student, atol=1e-2)
    assert torch.equal(loaded, student)  # exact, because alpha / rank is a power of two in all three cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_role_equals_what_the_stock_pipeline_loads_bit_for_bit(
    pipeline, klein_path, tmp_path, velocity, dtype
):
    pipeline.transformer.to(dtype)
    roles = make_roles(pipeline.transformer, rank=4, alpha=12, lora_layers=KLEIN_LORA_LAYERS, dropout=0.5)
    randomise(roles.student_parameters, std=0.4)
    before = [parameter.clone() for parameter in roles.student_parameters]
    with roles.shipped_role(dtype):
        with roles.teacher_role():
            pass
        shipped = velocity(dtype)
    assert not shipped.requires_grad
    assert all(torch.equal(old, new) for old, new in zip(before, roles.student_parameters, strict=True))
    assert velocity(dtype).requires_grad
    assert not torch.equal(velocity(dtype), velocity(dtype))  # dropout is active again

    save(roles, tmp_path, dtype)
    stock = Flux2KleinPipeline.from_pretrained(klein_path, dtype=dtype)
    stock.load_lora_weights(tmp_path)
    pipeline.transformer = stock.transformer
    with torch.no_grad():
        assert torch.equal(shipped, velocity(dtype))


def test_base_role_equals_the_model_before_training(pipeline, velocity):
    with torch.no_grad():
        base = velocity()
    roles = make_roles(pipeline.transformer)
    randomise(roles.student_parameters)
    with roles.base_role():
        assert torch.equal(velocity(), base)
    assert not torch.equal(velocity(), base)
    assert velocity().requires_grad


def test_software_that_ignores_the_metadata_loads_the_same_strength(pipeline, tmp_path):
    roles = make_roles(pipeline.transformer, rank=4, alpha=12)
    randomise(roles.student_parameters)
    file = save(roles, tmp_path) / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    raw = roles.named_parameters("default")
    module = "transformer_blocks.0.attn.to_q"
    update = weights[f"transformer.{module}.lora_B.weight"] @ weights[f"transformer.{module}.lora_A.weight"]
    expected = 12 / 4 * raw[f"{module}.lora_B.weight"] @ raw[f"{module}.lora_A.weight"]
    torch.testing.assert_close(update, expected)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()["lora_adapter_metadata"]
    assert '"transformer.lora_alpha": 4' in metadata
    assert '"transformer.r": 4' in metadata
    assert all("teacher" not in key and key.startswith("transformer.") for key in weights)
    assert len(weights) == len(roles.student_parameters)


def test_checkpoint_state_holds_the_training_weights_of_both_adapters(pipeline):
    roles = make_roles(pipeline.transformer)
    randomise(roles.student_parameters, seed=1)
    randomise(roles.teacher_parameters, seed=2)
    state = {name: weight.clone() for name, weight in roles.state_dict().items()}
    assert {name.split(".")[0] for name in state} == {"student", "teacher"}
    randomise(roles.student_parameters, seed=3)
    randomise(roles.teacher_parameters, seed=4)
    roles.load_state_dict(state)
    assert all(torch.equal(weight, state[name]) for name, weight in roles.state_dict().items())
    state.popitem()
    with pytest.raises(ValueError, match="other target modules"):
        roles.load_state_dict(state)


# Starting from an existing LoRA


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (4, 2)])
def test_load_lora_initialises_student_and_teacher_at_its_strength(
    pipeline, klein_path, tmp_path, velocity, rank, alpha
):
    first = make_roles(pipeline.transformer, rank=4, alpha=12)
    randomise(first.student_parameters)
    with torch.no_grad():
        expected = velocity()
    save(first, tmp_path)
    state, metadata = Flux2KleinPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)

    pipeline.transformer = type(pipeline.transformer).from_pretrained(klein_path, subfolder="transformer")
    roles = make_roles(pipeline.transformer, rank=rank, alpha=alpha, seed=9, lora_layers="to_q,to_v,to_k")
    missing = roles.load_lora(state, metadata, origin="x")
    assert missing == 2  # to_k of two double blocks
    with torch.no_grad():
        torch.testing.assert_close(velocity(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(roles.as_teacher(velocity)(), expected, atol=1e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in roles.student_parameters)
    assert list(pipeline.transformer.peft_config) == ["default", "teacher"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_layers": "to_q"}, "--init_lora x: it changes .*to_v, which is not trained; choose --lora_layers that"),
        ({"rank": 8}, r"--init_lora x: .* has shape \(.*4.*\), but the adapter's is \(.*8.*\); .* as --rank"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(pipeline, klein_path, tmp_path, settings, message):
    save(make_roles(pipeline.transformer), tmp_path)
    state, metadata = Flux2KleinPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    pipeline.transformer = type(pipeline.transformer).from_pretrained(klein_path, subfolder="transformer")
    roles = make_roles(pipeline.transformer, **settings)
    with pytest.raises(InputError, match=message):
        roles.load_lora(state, metadata, origin="x")
