"""A batch whose samples are at different noise levels, as a teacher that is asked once gets them."""

import torch

from dopsd.rollout import seeded_noise
from models import both_models


@both_models(quick="flux2")
def test_each_sample_has_its_own_timestep(model):
    kind = model.script.MODEL
    pipeline = kind.pipeline_class.from_pretrained(model.path, dtype=torch.float32)
    context = pipeline.encode_student(["a ball", "a ball"], max_sequence_length=64)
    single = pipeline.encode_student(["a ball"], max_sequence_length=64)
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1])
    timesteps = pipeline.schedule(64, 64, 4).timesteps[[1, 3]]
    with torch.no_grad():
        together = pipeline.predict_velocity(noise, timesteps, context)
        for latents, timestep, velocity in zip(noise.split(1), timesteps, together.split(1), strict=True):
            torch.testing.assert_close(velocity, pipeline.predict_velocity(latents, timestep, single))
        assert not torch.allclose(together, pipeline.predict_velocity(noise, timesteps[0], context), atol=1e-4)
