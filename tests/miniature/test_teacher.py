import torch

from benchmarks.miniature.teacher import PosteriorTeacher


def make_teacher(row_source, **settings) -> tuple[PosteriorTeacher, torch.Tensor]:
    sigmas = row_source.pipeline.schedule(64, 64, 4).sigmas
    return PosteriorTeacher(row_source.latents, sigmas, **{"num_substeps": 6} | settings), sigmas


def test_it_follows_the_exact_flow_of_one_gaussian(row_source):
    teacher, sigmas = make_teacher(row_source, num_directions=64, num_substeps=2)
    mean = row_source.latents.means[:2, 0].float()
    covariance = row_source.latents.covariance.double()
    state = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    identity = torch.eye(64).double()
    for segment in range(4):
        arrived = teacher.advance(state, torch.full((2,), segment), mean[:, None])
        # dx/dsigma = (x - E[x0 | x]) / sigma in 1000 Euler steps, with the Gaussian's own E[x0 | x].
        x, m = state.double(), mean.double()
        path = torch.linspace(float(sigmas[segment]), float(sigmas[segment + 1]), 1001).double()
        for sigma, following in zip(path[:-1], path[1:], strict=True):
            state_covariance = (1 - sigma) ** 2 * covariance + sigma**2 * identity
            x0 = m + (x - (1 - sigma) * m) @ ((1 - sigma) * covariance @ torch.linalg.inv(state_covariance)).T
            x = x + (following - sigma) / sigma * (x - x0)
        assert torch.allclose(arrived.double(), x, atol=2e-2 * x.std().item())
        state = arrived


def test_the_posterior_is_that_of_two_gaussians(row_source):
    teacher, sigmas = make_teacher(row_source, num_directions=64, num_substeps=1)
    sigma = float(sigmas[2])
    first = row_source.latents.means[0, 0].float()
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    means = torch.stack([first, first + 0.07 * direction])
    state = (1 - sigma) * (first + 0.5 * direction)
    covariance = (1 - sigma) ** 2 * row_source.latents.covariance + sigma**2 * torch.eye(64)
    tokens = torch.distributions.MultivariateNormal((1 - sigma) * means, covariance)
    weights = tokens.log_prob(state).sum((1, 2)).softmax(0)
    assert 0.05 < weights[0] < 0.95
    expected = (weights[:, None, None, None] * means).sum(0)
    segments = torch.tensor([2])
    # Given the expected picture alone, the Gaussian flow is the same.
    alone = teacher.advance(state[None], segments, expected[None, None])
    torch.testing.assert_close(teacher.advance(state[None], segments, means[None]), alone, rtol=1e-4, atol=1e-5)


def test_it_ends_at_one_of_the_allowed_pictures(row_source):
    teacher, _ = make_teacher(row_source, num_directions=64)
    means = row_source.latents.means[:1].float()  # one scene at every pose
    states = torch.randn(16, *means.shape[2:], generator=torch.Generator().manual_seed(0))
    for segment in range(4):
        states = teacher.advance(states, torch.full((16,), segment), means.expand(16, -1, -1, -1, -1))
    distances = (states[:, None] - means).square().mean((2, 3, 4))
    nearest = distances.sort(1).values
    assert (nearest[:, 0] < 0.5 * nearest[:, 1]).all()
    assert len(distances.argmin(1).unique()) > 2
