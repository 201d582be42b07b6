import numpy as np
import torch

from benchmarks.miniature import vae as vae_module
from benchmarks.miniature import world
from benchmarks.miniature.vae import encode, train_vae


def test_latents_are_those_of_the_pipeline(row_source):
    picture = world.draw(row_source.sprites[0], (1, 1), "sky", np.random.default_rng(0))
    image = world.to_image(picture)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    ours = encode(row_source.pipeline.vae, pixels)
    theirs = row_source.pipeline.encode_reference(image)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_decoding_undoes_encoding(monkeypatch):
    """With a VAE that changes nothing, up to the size of its latents."""

    class Identity:
        def encode(self, pictures):
            self.latents = torch.arange(pictures.shape[0] * 16 * 16 * 16.0).view(-1, 16, 16, 16)
            return self

        latent_dist = property(lambda self: self)

        def mode(self):
            return self.latents

        def decode(self, latents):
            self.sample = latents
            return self

    monkeypatch.setattr(vae_module, "latent_scale", lambda vae: (torch.tensor(2.0), torch.tensor(4.0)))
    vae = Identity()
    tokens = encode(vae, torch.zeros(2, 3, 64, 64))
    assert tokens.shape == (2, 8, 8, 64)
    assert torch.equal(vae_module.decode(vae, tokens), vae.latents)
    assert tokens[0, 0, 0, 0] == (0 - 2) / 4


def test_a_stopped_training_continues(row_source, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_module, "set_latent_statistics", lambda *args: None)
    monkeypatch.setattr(vae_module, "held_out_psnr", lambda vae: 0.0)
    monkeypatch.setattr(vae_module, "BATCH_SIZE", 2)
    steps, lines = [], []
    monkeypatch.setattr(vae_module, "trapezoid", lambda step, *args, **named: steps.append(step) or 1.0)
    state_path = tmp_path / "vae.pt"
    stopped, continued, complete = (
        train_vae(row_source.sprites, state_path, num_steps=num_steps, seed=0, log=lines.append).state_dict()
        for num_steps in (2, 3, 3)
    )
    assert steps == [0, 1, 2]  # the second call made one update, the third none
    assert [line["vae_step"] for line in lines if "vae_step" in line] == [2, 3]
    change = (continued["encoder.conv_in.weight"] - stopped["encoder.conv_in.weight"]).abs().max()
    assert 0 < change < 0.02  # one update away
    assert all(torch.equal(weight, continued[name]) for name, weight in complete.items())
