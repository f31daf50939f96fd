"""ConditionalFlowMatcher and VelocityField against closed forms."""

import math

import pytest
import torch

from cfm import ConditionalFlowMatcher, VelocityField, guided

M, S = 0.3, 0.5  # the data: N(M, S^2); the noise: N(0, 1)


def exact_velocity(t, x, y=None):
    """E[x1 - x0 | x_t = x] for independent x0 and x1, by hand: they are jointly Gaussian with x_t."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return M + (t * S**2 - (1 - t)) / (t**2 * S**2 + (1 - t) ** 2) * (x - t * M)


@pytest.mark.parametrize("sigma", [0, 0.0, 5e-4, 0.5, 1, 1.5])
@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4), (5, 1, 4, 4), (5, 2, 3, 4, 2), (5,)])
def test_path_and_order_of_draws(sigma, shape):
    x0, x1, matcher = torch.randn(shape), torch.randn(shape), ConditionalFlowMatcher(sigma)
    torch.manual_seed(7)
    t, xt, ut, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    torch.manual_seed(7)
    assert torch.equal(t, torch.rand(5)) and torch.equal(eps, torch.randn(shape))
    tb = t.reshape(-1, *[1] * (len(shape) - 1))
    assert torch.equal(xt, tb * x1 + (1 - tb) * x0 + sigma * eps)
    assert torch.equal(ut, x1 - x0)
    assert len(matcher.sample_location_and_conditional_flow(x0, x1)) == 3
    assert torch.equal(matcher.sample_location_and_conditional_flow(x0, x1, t=torch.ones(5))[0], torch.ones(5))


def test_a_negative_sigma_is_refused():
    with pytest.raises(ValueError, match="negative"):
        ConditionalFlowMatcher(-0.1)


def test_velocity_is_the_derivative_of_the_path():
    """u_t = sigma'/sigma (x - mu) + mu', by central differences in double precision."""
    matcher, x0, x1 = ConditionalFlowMatcher(0.3), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    t, h = torch.rand(4).double(), 1e-6
    mu_dot = (matcher.compute_mu_t(x0, x1, t + h) - matcher.compute_mu_t(x0, x1, t - h)) / (2 * h)
    sigma_dot = (matcher.compute_sigma_t(t + h) - matcher.compute_sigma_t(t - h)) / (2 * h)
    xt = matcher.sample_xt(x0, x1, t, torch.randn(4, 3).double())
    u = sigma_dot / matcher.compute_sigma_t(t) * (xt - matcher.compute_mu_t(x0, x1, t)) + mu_dot
    assert torch.allclose(u, matcher.compute_conditional_flow(x0, x1, t, xt), atol=1e-8)


def test_loss_of_the_exact_velocity_is_the_closed_form():
    """E (u - E[u | x_t])^2 = Var(x1 - x0) - Cov(x1 - x0, x_t)^2 / Var(x_t), averaged over t."""
    torch.manual_seed(0)
    x1 = M + S * torch.randn(200_000, 1)
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    expected = (1 + S**2 - (t * S**2 - (1 - t)) ** 2 / (t**2 * S**2 + (1 - t) ** 2)).mean().item()
    assert VelocityField(exact_velocity, ConditionalFlowMatcher()).loss(x1).item() == pytest.approx(
        expected, rel=0.02
    )
    worse = VelocityField(lambda t, x, y: 1.2 * exact_velocity(t, x), ConditionalFlowMatcher())
    assert worse.loss(x1).item() > expected + 0.01


def test_loss_takes_noise_labels_and_times():
    seen = {}

    def v_model(t, x, y):
        seen.update(t=t, x=x, y=y)
        return torch.zeros_like(x)

    x1, x0, y, u = (
        torch.rand(4, 1, 2, 2),
        torch.randn(4, 1, 2, 2),
        torch.arange(4),
        torch.tensor([0, 0.25, 0.5, 0.999]),
    )
    loss = VelocityField(v_model, ConditionalFlowMatcher()).loss(x1, x0, y, u)
    assert loss.item() == pytest.approx((x1 - x0).square().mean().item())
    assert torch.equal(seen["t"], u) and seen["y"] is y and torch.equal(seen["x"][0], x0[0])


class Double(torch.Tensor):
    """A double that .float() leaves as it is: sampling calls it for half precision, and it would hide order 4."""

    def float(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    "sampler, order, evaluations", [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 4)]
)
def test_samplers_converge_at_their_order(sampler, order, evaluations):
    """dx/dt = (1 + 2t) x, which takes x(0) to e^2 x(0)."""
    times, x0, errors = [], torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []

    def v_model(t, x, y):
        times.append(t[0].item())
        return ((1 + 2 * t.double()[:, None]) * x).as_subclass(Double)

    for steps in (32, 64):
        times.clear()
        x = VelocityField(v_model, ConditionalFlowMatcher()).sample(x0, steps=steps, sampler=sampler)
        assert len(times) == steps * evaluations and min(times) == 0 and max(times) <= 1
        errors.append((x - math.e**2 * x0).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_samples_follow_the_data_given_the_exact_velocity():
    torch.manual_seed(0)
    x = VelocityField(exact_velocity, ConditionalFlowMatcher()).sample(torch.randn(50_000, 1), steps=20)
    assert x.mean().item() == pytest.approx(M, abs=0.01) and x.std().item() == pytest.approx(S, rel=0.02)


def test_guidance_mixes_the_two_predictions_in_one_call():
    calls = []

    def model(t, x, y=None):
        calls.append(len(x))
        return x * 0 + (10.0 if y is None else torch.where(y < 0, 10.0, y.float()).reshape(-1, 1))

    t, x, y = torch.zeros(3), torch.zeros(3, 1), torch.tensor([0, 1, 2])
    assert guided(model, t, x, y, 1).flatten().tolist() == [0, 1, 2]
    assert guided(model, t, x, y, 0).flatten().tolist() == [10, 10, 10]
    assert guided(model, t, x, y, 3).flatten().tolist() == [-20, -17, -14]
    assert guided(model, t, x, None, 3).flatten().tolist() == [10, 10, 10]
    assert calls == [3, 6, 6, 3]
