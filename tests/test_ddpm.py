"""DenoiseDiffusion against closed forms: whatever can be computed by hand for one Gaussian is compared here."""

import math

import pytest
import torch

from ddpm import DenoiseDiffusion, at

M, S = 0.2, 0.1  # the data: N(M, S^2), which clipping to [-1, 1] leaves alone
BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def exact_eps(t, x, y=None):
    """E[eps | x_t = x] for that data at n_steps = 1000, by hand: eps and x_t are jointly Gaussian."""
    bar = BAR[t].reshape(-1, *[1] * (x.dim() - 1))
    return ((1 - bar).sqrt() * (x - bar.sqrt() * M) / (bar * S**2 + 1 - bar)).float()


def test_schedule_is_the_papers_at_1000_steps():
    d = DenoiseDiffusion(None, 1000)
    assert torch.equal(d.beta, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float())
    assert torch.allclose(d.alpha, 1 - d.beta) and torch.allclose(d.alpha_bar, d.alpha.cumprod(0), rtol=1e-4)
    assert torch.equal(d.sigma2, d.beta)


@pytest.mark.parametrize("n_steps", [21, 50, 100, 500, 1000, 4000])
def test_no_signal_is_left_at_the_end(n_steps):
    d = DenoiseDiffusion(None, n_steps)
    assert len(d.beta) == d.n_steps == n_steps and 0 < d.beta.min() and d.beta.max() < 1
    assert d.alpha_bar[-1].sqrt() < 0.01


@pytest.mark.parametrize("n_steps", [-1, 0, 1, 20])
def test_too_few_steps_are_refused(n_steps):
    with pytest.raises(ValueError, match="at least 21"):
        DenoiseDiffusion(None, n_steps)


def test_q_xt_x0_is_the_chain_of_single_steps():
    d, x0 = DenoiseDiffusion(None, 1000), torch.tensor([[0.7]])
    mean, var = x0.double(), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(1000):  # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z
        beta = d.beta[t].double()
        mean, var = (1 - beta).sqrt() * mean, (1 - beta) * var + beta
        got_mean, got_var = d.q_xt_x0(x0, torch.tensor([t]))
        assert torch.allclose(got_mean.double(), mean, rtol=1e-4, atol=1e-7)
        assert torch.allclose(got_var.double(), var, rtol=1e-4, atol=1e-9)


def test_q_sample_uses_the_given_noise_and_each_pictures_own_time():
    d, x0, eps = DenoiseDiffusion(None, 1000), torch.rand(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    t = torch.tensor([0, 500, 999])
    mean, var = d.q_xt_x0(x0, t)
    assert mean.shape == x0.shape and var.shape == (3, 1, 1, 1)
    assert torch.equal(d.q_sample(x0, t, eps), mean + var.sqrt() * eps)
    assert not torch.equal(d.q_sample(x0, t), d.q_sample(x0, t))


def test_both_forms_of_the_posterior_mean_agree():
    d, t = DenoiseDiffusion(None, 1000), torch.arange(1000)
    x0, eps = torch.rand(1000, 8) * 1.8 - 0.9, torch.randn(1000, 8)
    xt = d.q_sample(x0, t, eps)
    assert torch.allclose(d.p_mean(xt, t, eps), d.p_mean(xt, t, eps, clip=True), atol=2e-4)


def test_posterior_mean_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is the product of two Gaussians in x_{t-1}: precisions add, means are weighted by them."""
    d, t = DenoiseDiffusion(None, 1000), torch.arange(1, 1000)
    x0, eps = torch.full((999, 1), 0.3), torch.full((999, 1), 0.5)
    xt = d.q_sample(x0, t, eps).double()
    alpha, bar_prev = (at(v, t, xt).double() for v in (d.alpha, d.alpha_bar_prev))
    prior_mean, prior_var = bar_prev.sqrt() * x0, 1 - bar_prev
    seen_mean, seen_var = xt / alpha.sqrt(), (1 - alpha) / alpha
    mean = (prior_mean / prior_var + seen_mean / seen_var) / (1 / prior_var + 1 / seen_var)
    assert torch.allclose(d.p_mean(xt.float(), t, eps).double(), mean, atol=1e-3)


def test_clipping_acts_on_the_prediction():
    d, xt, t = (
        DenoiseDiffusion(lambda t, x, y: torch.zeros_like(x), 1000),
        torch.full((1, 1), 3.0),
        torch.tensor([1]),
    )
    assert d.p_mean(xt, t, torch.zeros_like(xt), clip=True) < d.p_mean(xt, t, torch.zeros_like(xt)) - 0.5
    assert d.ddim_sample(xt, t, torch.tensor([-1])) == 1


def test_the_last_step_adds_no_noise_and_the_others_do():
    d, x = DenoiseDiffusion(exact_eps, 1000), torch.randn(2, 1, 3, 3)
    last, other = (torch.full((2,), t) for t in (0, 1))
    assert torch.equal(d.p_sample(x, last), d.p_sample(x, last))
    noise = torch.stack([d.p_sample(x, other) for _ in range(2000)])
    assert torch.allclose(noise.std(0), d.sigma2[1].sqrt(), rtol=0.15)


def test_loss_of_the_exact_predictor_is_the_closed_form():
    """E (eps - E[eps | x_t])^2 = Var(eps | x_t) = abar S^2 / (abar S^2 + 1 - abar), averaged over t."""
    torch.manual_seed(0)
    x0, u = M + S * torch.randn(400_000, 1), (torch.arange(400_000) + 0.5) / 400_000
    expected = (BAR * S**2 / (BAR * S**2 + 1 - BAR)).mean().item()
    assert DenoiseDiffusion(exact_eps, 1000).loss(x0, u=u).item() == pytest.approx(expected, rel=0.02)
    worse = DenoiseDiffusion(lambda t, x, y: 1.1 * exact_eps(t, x), 1000)
    assert worse.loss(x0).item() > 1.05 * expected


def test_loss_takes_noise_labels_and_times():
    seen = {}

    def eps_model(t, x, y):
        seen.update(t=t, x=x, y=y)
        return torch.zeros_like(x)

    d, x0, noise, y = (
        DenoiseDiffusion(eps_model, 100),
        torch.rand(4, 1, 2, 2),
        torch.randn(4, 1, 2, 2),
        torch.arange(4),
    )
    assert d.loss(x0, noise, y, torch.tensor([0, 0.25, 0.5, 0.999])).item() == pytest.approx(
        noise.square().mean().item()
    )
    assert seen["t"].tolist() == [0, 25, 50, 99] and seen["y"] is y
    assert torch.equal(seen["x"], d.q_sample(x0, seen["t"], noise))


@pytest.mark.parametrize("sampler, eta", [("ancestral", 0), ("ddim", 0), ("ddim", 1)])
def test_samplers_draw_the_data_given_the_exact_predictor(sampler, eta):
    torch.manual_seed(0)
    x = DenoiseDiffusion(exact_eps, 1000).sample(torch.randn(5000, 1), steps=1000, sampler=sampler, eta=eta)
    assert x.mean().item() == pytest.approx(M, abs=0.006) and x.std().item() == pytest.approx(S, rel=0.06)


def test_ddim_converges_to_the_flow_with_its_steps():
    """At eta = 0 the exact map from noise is x = M + S noise; the error halves as the steps double: order 1."""
    noise, errors = torch.linspace(-2, 2, 9)[:, None], []
    for steps in (50, 100, 200):
        x = DenoiseDiffusion(exact_eps, 1000).sample(noise, steps=steps)
        errors.append((x - (M + S * noise)).abs().max().item())
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4


@pytest.mark.parametrize("n_steps, steps, visits", [(1000, 7, 7), (1000, 1, 1), (100, 100, 100), (25, 50, 25)])
def test_ddim_visits_as_many_times_as_asked_and_there_are(n_steps, steps, visits):
    times = []

    def eps_model(t, x, y):
        times.append(t[0].item())
        return torch.zeros_like(x)

    DenoiseDiffusion(eps_model, n_steps).sample(torch.randn(1, 1), steps=steps)
    assert len(set(times)) == len(times) == visits and times[0] == n_steps - 1
    assert times == sorted(times, reverse=True) and times[-1] >= 0


def test_ddim_is_deterministic_at_eta_0_and_not_at_1():
    noise = torch.randn(5, 1)
    for eta, same in ((0, True), (1, False)):
        d = DenoiseDiffusion(exact_eps, 1000)
        assert torch.equal(d.sample(noise, steps=10, eta=eta), d.sample(noise, steps=10, eta=eta)) is same


def test_ddim_with_all_steps_and_eta_1_has_the_posteriors_variance():
    d, t = DenoiseDiffusion(None, 1000), torch.arange(1, 1000)
    bar_t, bar_s, beta = d.alpha_bar.double()[t], d.alpha_bar.double()[t - 1], d.beta.double()[t]
    assert torch.allclose(
        (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s), beta * (1 - bar_s) / (1 - bar_t), rtol=1e-2
    )


def test_variance_of_a_gaussian_survives_every_ddim_step():
    """With the exact predictor a deterministic step maps Gaussians to Gaussians; fine steps keep the marginals of q."""
    torch.manual_seed(0)
    d = DenoiseDiffusion(exact_eps, 1000)
    t, s = 500, 499
    x = d.q_sample(M + S * torch.randn(200_000, 1), torch.full((200_000,), t))
    x = d.ddim_sample(x, torch.full((200_000,), t), torch.full((200_000,), s))
    assert x.std().item() == pytest.approx(math.sqrt(d.alpha_bar[s] * S**2 + 1 - d.alpha_bar[s]), rel=5e-3)
