"""DenoiseDiffusion against closed forms: what can be computed by hand for one Gaussian."""

import math

import pytest
import torch

from ddpm import DenoiseDiffusion, draw_times, expand_like

M, S = 0.2, 0.1  # the data: N(M, S^2), which clipping to [-1, 1] leaves alone
BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def exact_eps(t, x, y=None):
    """E[eps | x_t = x] for that data at n_steps = 1000: eps and x_t are jointly Gaussian."""
    bar = BAR[t].reshape(-1, *[1] * (x.dim() - 1))
    return ((1 - bar).sqrt() * (x - bar.sqrt() * M) / (bar * S**2 + 1 - bar)).float()


def test_schedule_is_the_papers_at_1000_steps():
    d = DenoiseDiffusion(None, 1000)
    assert torch.equal(d.beta, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float())
    assert torch.allclose(d.alpha, 1 - d.beta)
    assert torch.allclose(d.alpha_bar, d.alpha.cumprod(0), rtol=1e-4)
    assert torch.equal(d.sigma2, d.beta)


@pytest.mark.parametrize("n_steps", [2, 3, 10, 20, 21, 50, 100, 500, 1000, 4000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_snr"])
def test_no_signal_is_left_at_the_end(n_steps, schedule):
    d = DenoiseDiffusion(None, n_steps, schedule=schedule)
    assert len(d.beta) == d.n_steps == n_steps and 0 < d.beta.min() and d.beta.max() < 1
    assert d.alpha_bar[-1].sqrt() < (0.01 if n_steps > 10 else 0.04)
    falling = d.alpha_bar if schedule != "log_snr" else -d.one_minus_alpha_bar  # float32 near 1
    assert (falling[1:] < falling[:-1]).all()


def test_cosine_schedule_by_hand():
    """Nichol & Dhariwal: alpha_bar falls as cos^2 from 1 before step 1; beta is capped at 0.999."""
    d = DenoiseDiffusion(None, 1000, schedule="cosine")
    for t in (0, 1, 100, 499, 900):
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (t + 1, 0)]
        assert d.alpha_bar[t].item() == pytest.approx(f[0] / f[1], rel=1e-4)
    assert d.beta[-1].item() == pytest.approx(0.999)
    assert d.beta[0].item() == pytest.approx(4.13e-5, rel=1e-2)


def test_on_the_log_snr_schedule_the_simple_loss_is_the_bound():
    """The weight of the squared error of the noise, Ho et al., eq. 12, is the same at every t."""
    m = DenoiseDiffusion(None, 1000, schedule="log_snr", variance="fixedsmall")
    beta, alpha, rest, var = (
        v.double()[1:] for v in (m.beta, m.alpha, m.one_minus_alpha_bar, m.sigma2)
    )
    weight = beta**2 / (2 * var * alpha * rest)
    expected = torch.full_like(weight, math.expm1(23.3 / 999) / 2)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)


def test_log_snr_schedule_by_hand():
    """Kingma et al.: log SNR falls by the same amount at every step."""
    d = DenoiseDiffusion(None, 234, schedule="log_snr")
    log_snr = (d.alpha_bar.double() / d.one_minus_alpha_bar.double()).log()
    assert log_snr.tolist() == pytest.approx([13.3 - 0.1 * t for t in range(234)], abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_steps": -1}, "n_steps must be at least 2, not -1"),
        ({"n_steps": 0}, "n_steps must be at least 2, not 0"),
        ({"n_steps": 1}, "n_steps must be at least 2, not 1"),
        ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, log_snr, not 'quadratic'"),
        ({"prediction": "score"}, "prediction must be one of eps, x0, v, not 'score'"),
        ({"weighting": "snr"}, "weighting must be one of simple, min_snr, not 'snr'"),
        ({"variance": "learned"}, "variance must be one of fixedlarge, fixedsmall, not 'learned'"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(ValueError) as refusal:
        DenoiseDiffusion(None, **options)
    assert str(refusal.value) == message


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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_snr"])
def test_both_forms_of_the_posterior_mean_agree_to_float_precision(schedule):
    d, t = DenoiseDiffusion(None, 1000, schedule=schedule), torch.arange(1000)
    x0, eps = torch.rand(1000, 8) * 1.8 - 0.9, torch.randn(1000, 8)
    xt = d.q_sample(x0, t, eps)
    assert torch.allclose(
        d.q_posterior_mean(xt, t, x0), d.q_posterior_mean_eps(xt, t, eps), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_prediction_is_read_as_the_same_x0_and_eps(prediction):
    t, x0, eps = torch.arange(0, 1000, 37), torch.rand(28, 5) * 2 - 1, torch.randn(28, 5)
    d = DenoiseDiffusion(None, prediction=prediction)
    alpha, sigma = d.scales(t, x0)
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]
    d.eps_model = lambda t, x, y: target
    xt = d.q_sample(x0, t, eps)
    got_x0, got_eps = d.predict(xt, t, alpha, sigma)
    assert torch.allclose(got_x0, x0, atol=2e-4) and torch.allclose(got_eps, eps, atol=2e-4)
    assert d.loss(x0, noise=eps, u=(t + 0.5) / 1000) == 0
    for clip in (False, True):
        assert torch.allclose(d.p_mean(xt, t, clip=clip), d.q_posterior_mean(xt, t, x0), atol=1e-4)


def test_min_snr_weighs_the_error_of_x0_the_same_whatever_is_predicted():
    """
    Models off by the same delta in x0, so by -alpha/sigma delta in eps and -delta/sigma in v. With
    simple weights the losses differ.
    """
    u, x0, noise = (torch.arange(1000) + 0.5) / 1000, torch.rand(1000, 4), torch.randn(1000, 4)
    delta, losses, simple = torch.randn(1000, 4), [], []
    for prediction in ("eps", "x0", "v"):
        for weighting, found in (("min_snr", losses), ("simple", simple)):
            d = DenoiseDiffusion(None, prediction=prediction, weighting=weighting)
            alpha, sigma = d.scales(torch.arange(1000), x0)
            wrong = {"eps": -alpha / sigma * delta, "x0": delta, "v": -delta / sigma}[prediction]
            target = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]
            d.eps_model = lambda t, x, y, wrong=wrong, target=target: target + wrong
            found.append(d.loss(x0, noise=noise, u=u).item())
            assert (
                simple == []
                or weighting == "min_snr"
                or simple[-1] == pytest.approx(wrong.square().mean().item())
            )
    snr = (BAR / (1 - BAR)).clamp(max=5)
    by_hand = (snr[:, None] * delta.square()).mean().item()
    assert (
        losses == pytest.approx([by_hand] * 3, rel=1e-3) and len({round(s, 3) for s in simple}) == 3
    )


def test_variances_of_p():
    large, small = (DenoiseDiffusion(None, variance=v) for v in ("fixedlarge", "fixedsmall"))
    prev = torch.cat([torch.ones(1), BAR[:-1]])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    tilde = beta * (1 - prev) / (1 - BAR)
    assert torch.equal(large.sigma2, beta.float())
    assert torch.allclose(small.sigma2[1:], tilde[1:].float(), rtol=1e-5)
    assert small.sigma2[0] == small.sigma2[1]


def test_posterior_mean_is_bayes_rule():
    """
    q(x_{t-1} | x_t, x_0) is a product of two Gaussians in x_{t-1}: precisions add, and weight
    the means.
    """
    d, t = DenoiseDiffusion(None, 1000), torch.arange(1, 1000)
    x0, eps = torch.full((999, 1), 0.3), torch.full((999, 1), 0.5)
    xt = d.q_sample(x0, t, eps).double()
    alpha = expand_like(d.alpha[t], xt).double()
    bar_prev = expand_like(d.alpha_bar[t - 1], xt).double()
    prior_mean, prior_var = bar_prev.sqrt() * x0, 1 - bar_prev
    seen_mean, seen_var = xt / alpha.sqrt(), (1 - alpha) / alpha
    mean = (prior_mean / prior_var + seen_mean / seen_var) / (1 / prior_var + 1 / seen_var)
    assert torch.allclose(d.q_posterior_mean_eps(xt.float(), t, eps).double(), mean, atol=1e-3)
    assert torch.allclose(d.q_posterior_mean(xt.float(), t, x0).double(), mean, atol=1e-5)


def test_the_last_step_adds_no_noise_and_the_others_do():
    d, x = DenoiseDiffusion(exact_eps, 1000), torch.randn(2, 1, 3, 3)
    last, other = (torch.full((2,), t) for t in (0, 1))
    assert torch.equal(d.p_sample(x, last), d.p_sample(x, last))
    noise = torch.stack([d.p_sample(x, other) for _ in range(2000)])
    assert torch.allclose(noise.std(0), d.sigma2[1].sqrt(), rtol=0.15)


def test_loss_of_the_exact_predictor_is_the_closed_form():
    """
    E (eps - E[eps | x_t])^2 = Var(eps | x_t) = abar S^2 / (abar S^2 + 1 - abar), averaged over t.
    """
    torch.manual_seed(0)
    x0, u = M + S * torch.randn(400_000, 1), (torch.arange(400_000) + 0.5) / 400_000
    expected = (BAR * S**2 / (BAR * S**2 + 1 - BAR)).mean().item()
    exact = DenoiseDiffusion(exact_eps, 1000)
    assert exact.loss(x0, u=u).item() == pytest.approx(expected, rel=0.02)
    worse = DenoiseDiffusion(lambda t, x, y: 1.1 * exact_eps(t, x), 1000)
    assert worse.loss(x0).item() > 1.05 * expected


def test_loss_takes_noise_labels_and_times():
    seen = {}

    def eps_model(t, x, y):
        seen.update(t=t, x=x, y=y)
        return torch.zeros_like(x)

    x0, noise, y = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.arange(4)
    d = DenoiseDiffusion(eps_model, 100)
    loss = d.loss(x0, y, noise=noise, u=torch.tensor([0, 0.25, 0.5, 0.999]))
    assert loss.item() == pytest.approx(noise.square().mean().item())
    assert seen["t"].tolist() == [0, 25, 50, 99] and seen["y"] is y
    assert torch.equal(seen["x"], d.q_sample(x0, seen["t"], noise))


@pytest.mark.parametrize(
    "n_steps, low, high", [(2, 0, 10.83), (10, 1.15, 27.88), (1000, 867.5, 1142.8)]
)
def test_times_to_train_at_are_by_default_uniform_over_all_t(n_steps, low, high):
    """chi^2 is outside these bounds twice in a thousand: too uneven, or too even to be random."""
    times = []

    def eps_model(t, x, y):
        times.append(t)
        return torch.zeros_like(x)

    torch.manual_seed(0)
    DenoiseDiffusion(eps_model, n_steps).loss(torch.zeros(200_000, 1))
    counts = torch.bincount(times[0]).double()
    assert len(counts) == n_steps and counts.min() > 0
    expected = 200_000 / n_steps
    assert low <= ((counts - expected) ** 2 / expected).sum() < high


def test_loss_draws_times_then_noise():
    d, x0 = DenoiseDiffusion(exact_eps, 1000), torch.rand(6, 1, 2, 2)
    torch.manual_seed(5)
    found = d.loss(x0)
    torch.manual_seed(5)
    u, noise = torch.rand(6), torch.randn_like(x0)
    assert torch.equal(found, d.loss(x0, noise=noise, u=u))


@pytest.mark.parametrize("mean, uniform", [(0.4, 0.1), (-3.0, 0.0), (3.0, 0.5)])
def test_loss_trains_at_the_times_that_are_asked_for(mean, uniform):
    times = []

    def eps_model(t, x, y):
        times.append(t)
        return torch.zeros_like(x)

    torch.manual_seed(6)
    DenoiseDiffusion(eps_model, 100, t_mean=mean, t_uniform=uniform).loss(torch.zeros(1000, 1))
    torch.manual_seed(6)
    assert torch.equal(times[0], (draw_times(1000, mean, uniform) * 100).long())


def test_a_model_of_unit_time_is_asked_for_the_same_in_shares_of_T():
    seen = []

    def eps_model(t, x, y):
        seen.append(t)
        return torch.tanh(x) + 0 * t.reshape(-1, 1)

    x, t = torch.randn(3, 2), torch.tensor([0, 25, 99])
    methods = [DenoiseDiffusion(eps_model, 100, unit_time=unit) for unit in (False, True)]
    for ask in (
        lambda d: d.loss(x, noise=-x, u=(t + 0.5) / 100),
        lambda d: d.p_mean(x, t),
        lambda d: d.velocity(torch.tensor([0.1, 0.5, 0.9]), x),
    ):
        seen.clear()
        plain, unit = (ask(d) for d in methods)
        assert torch.equal(plain, unit) and torch.equal(seen[1], seen[0] / 100)
        assert seen[0].max() > 1 > seen[1].max()
