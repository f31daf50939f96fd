"""ConditionalFlowMatcher and VelocityField against closed forms."""

import itertools
import math
import sys

import pytest
import torch

import cfm
from cfm import (
    PATHS,
    ConditionalFlowMatcher,
    VelocityField,
    classifier_free_guidance,
    draw_times,
    expand_like,
    sinkhorn,
)

M, S = 0.3, 0.5  # the data: N(M, S^2); the noise: N(0, 1)


def exact_velocity(t, x, y=None):
    """E[x1 - x0 | x_t = x] for independent x0 and x1, which are jointly Gaussian with x_t."""
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
    t, _, _ = matcher.sample_location_and_conditional_flow(x0, x1, t=torch.ones(5))
    assert torch.equal(t, torch.ones(5))


@pytest.mark.parametrize("path", PATHS.values())
def test_a_negative_sigma_is_refused(path):
    with pytest.raises(ValueError, match="sigma"):
        path(-0.1)


def test_a_bridge_needs_a_width():
    with pytest.raises(ValueError, match="above 0"):
        PATHS["sb"](0.0)


@pytest.mark.parametrize("path", PATHS.values())
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 1, 3, 3)])
def test_velocity_is_the_derivative_of_the_path(path, shape):
    """u_t = sigma'/sigma (x - mu) + mu', by central differences in double precision."""
    matcher, x0, x1 = path(0.3), torch.randn(shape).double(), torch.randn(shape).double()
    t, h = torch.rand(4).double() * 0.9 + 0.05, 1e-6
    mu_dot = (matcher.compute_mu_t(x0, x1, t + h) - matcher.compute_mu_t(x0, x1, t - h)) / (2 * h)
    sigma_dot = (matcher.compute_sigma_t(t + h) - matcher.compute_sigma_t(t - h)) / (2 * h)
    xt = matcher.sample_xt(x0, x1, t, torch.randn(shape).double())
    growth = torch.as_tensor(sigma_dot / matcher.compute_sigma_t(t)).double()
    u = expand_like(growth.expand(4), xt) * (xt - matcher.compute_mu_t(x0, x1, t)) + mu_dot
    assert torch.allclose(u, matcher.compute_conditional_flow(x0, x1, t, xt), atol=1e-6)


@pytest.mark.parametrize("path", PATHS.values())
def test_every_path_leads_from_noise_to_data(path):
    matcher, x0, x1 = path(0.3), torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    start, end = torch.zeros(4), torch.ones(4)
    if path is PATHS["target"]:  # from N(0, I), whatever x0, to N(x1, sigma^2)
        assert matcher.compute_mu_t(x0, x1, start).abs().max() == 0
        assert (matcher.compute_sigma_t(start) == 1).all() and torch.allclose(
            matcher.compute_sigma_t(end), end * 0.3
        )
    else:
        assert torch.equal(matcher.compute_mu_t(x0, x1, start), x0)
    assert torch.allclose(matcher.compute_mu_t(x0, x1, end), x1, atol=1e-6)


def test_a_bridge_has_no_width_at_its_ends_and_is_widest_between():
    width = PATHS["sb"](0.5).compute_sigma_t(torch.tensor([0, 0.5, 1]))
    assert width.tolist() == [0, 0.25, 0]


@pytest.mark.parametrize("path", ["ot", "sb_exact"])
def test_pairing_is_the_best_of_all_permutations(path):
    pytest.importorskip("scipy")
    for shape in ((6, 2), (6, 1, 3, 3)):
        x0, x1 = torch.randn(shape), torch.randn(shape)
        paired = PATHS[path](0.5).pair(x0, x1)
        cost = [(x0[list(p)] - x1).square().sum().item() for p in itertools.permutations(range(6))]
        assert (paired - x1).square().sum().item() == pytest.approx(min(cost), rel=1e-5)
        assert min(cost) < 0.9 * cost[0]


def test_pairing_loses_nothing_and_stays_within_each_class():
    pytest.importorskip("scipy")
    x0, x1, y = torch.randn(40, 1, 2, 2), torch.randn(40, 1, 2, 2), torch.arange(40) % 4 - 1
    paired = PATHS["ot"]().pair(x0, x1, y)
    # index of the noise each picture got: from its own class; -1, no label, counts as a class
    order = [(x0 == p).flatten(1).all(1).nonzero().item() for p in paired]
    assert sorted(order) == list(range(40)) and order != list(range(40))
    assert torch.equal(y[order], y)
    for label in y.unique():
        own = y == label
        assert torch.equal(paired[own], PATHS["ot"]().pair(x0[own], x1[own]))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_a_bridge_between_gaussians_has_the_closed_form(sigma, monkeypatch):
    """
    Between N(0, 1) and N(M, S^2): the entropic plan's covariance, and the marginals' variance.

    Janati et al. 2020 (arXiv 2006.02572), theorem 1, for the cost |x0 - x1|^2 + 2 sigma^2 KL.
    """
    torch.manual_seed(0)
    n = 1500
    x0, x1, matcher = torch.randn(n, 1), M + S * torch.randn(n, 1), PATHS["sb"](sigma)
    plans = []                                       # 20 pairings are drawn from a single plan

    def once(cost, reg):
        plans.extend([] if plans else [sinkhorn(cost, reg)])
        return plans[0]

    monkeypatch.setattr(cfm, "sinkhorn", once)
    drawn = torch.stack([matcher.pair(x0, x1) for _ in range(20)])
    assert drawn.mean().item() == pytest.approx(x0.mean().item(), abs=0.02)
    assert drawn.std().item() == pytest.approx(x0.std().item(), abs=0.02)
    covariance = (drawn * (x1 - x1.mean())).mean().item()
    expected = (math.sqrt(4 * S**2 + sigma**4) - sigma**2) / 2
    assert covariance == pytest.approx(expected, abs=0.04 * S)
    t = torch.full((n,), 0.3)
    xt = torch.stack([matcher.sample_xt(d, x1, t, torch.randn(n, 1)) for d in drawn])
    variance = 0.7**2 + 0.3**2 * S**2 + 2 * 0.3 * 0.7 * expected + sigma**2 * 0.3 * 0.7
    assert xt.var().item() == pytest.approx(variance, rel=0.05)


def test_a_bridge_draws_within_each_class_and_becomes_optimal_without_noise():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    x0, x1, y = torch.randn(40, 1, 2, 2), torch.randn(40, 1, 2, 2), torch.arange(40) % 4 - 1
    drawn = PATHS["sb"](0.5).pair(x0, x1, y)
    order = [(x0 == p).flatten(1).all(1).nonzero().item() for p in drawn]
    assert torch.equal(y[order], y) and order != list(range(40))
    assert torch.equal(PATHS["sb"](0.01).pair(x0, x1, y), PATHS["sb_exact"](0.01).pair(x0, x1, y))


@pytest.mark.parametrize("scale", [0, 1e-3, 1, 30])
@pytest.mark.parametrize("reg", [1e-3, 0.5, 100])
def test_sinkhorn_keeps_its_marginals_at_any_scale(scale, reg):
    torch.manual_seed(0)
    cost = torch.cdist(scale * torch.randn(12, 5), scale * torch.randn(12, 5)) ** 2
    cost[:6, 6:] = cost[6:, :6] = math.inf
    plan = sinkhorn(cost, reg)
    assert plan[:6, 6:].sum() == plan[6:, :6].sum() == 0
    for marginal in (plan.sum(0), plan.sum(1)):
        assert torch.allclose(marginal, torch.full_like(marginal, 1 / 12), rtol=0.02)


def test_an_unknown_plan_is_refused():
    with pytest.raises(ValueError, match="sinkhorn or exact"):
        PATHS["sb"](0.5, ot_method="unbalanced")


def test_loss_pairs_with_the_labels_and_keeps_them():
    pytest.importorskip("scipy")
    seen = {}

    def v_model(t, x, y):
        seen.update(x=x, y=y)
        return torch.zeros_like(x)

    x1, x0, y = torch.randn(8, 3), torch.randn(8, 3), torch.arange(8) % 2
    matcher = PATHS["ot"]()
    loss = VelocityField(v_model, matcher).loss(x1, y, noise=x0, u=torch.zeros(8))
    assert torch.equal(seen["x"], matcher.pair(x0, x1, y)) and torch.equal(seen["y"], y)
    assert loss.item() == pytest.approx((x1 - matcher.pair(x0, x1, y)).square().mean().item())
    unpaired = VelocityField(v_model, ConditionalFlowMatcher())
    assert loss < unpaired.loss(x1, y, noise=x0, u=torch.zeros(8))


def test_a_bridge_keeps_off_its_ends():
    times = []

    def v_model(t, x, y):
        times.append(t)
        return torch.zeros_like(x)

    for name in ("icfm", "sb"):
        field = VelocityField(v_model, PATHS[name](0.5))
        field.matcher.pair = lambda x0, x1, y: x0
        field.loss(torch.zeros(1000, 1), u=torch.linspace(0, 1, 1000))
    assert (times[0].min(), times[0].max()) == (0, 1)
    assert times[1].min() == pytest.approx(1e-3) and times[1].max() == pytest.approx(1 - 1e-3)


def test_times_are_uniform_or_logit_normal():
    torch.manual_seed(0)
    uniform, logits = draw_times(100_000, 4, 1), torch.logit(draw_times(100_000, -0.4, 0))
    below = (draw_times(1000, 4, 0.2) < 0.5).sum()  # half of the uniform ones, hardly any others
    assert below == pytest.approx(100, abs=30)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(1, abs=0.02)


def test_loss_of_the_exact_velocity_is_the_closed_form():
    """E (u - E[u | x_t])^2 = Var(x1 - x0) - Cov(x1 - x0, x_t)^2 / Var(x_t), averaged over t."""
    torch.manual_seed(0)
    x1 = M + S * torch.randn(200_000, 1)
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    explained = (t * S**2 - (1 - t)) ** 2 / (t**2 * S**2 + (1 - t) ** 2)
    expected = (1 + S**2 - explained).mean().item()
    exact = VelocityField(exact_velocity, ConditionalFlowMatcher())
    assert exact.loss(x1).item() == pytest.approx(expected, rel=0.02)
    worse = VelocityField(lambda t, x, y: 1.2 * exact_velocity(t, x), ConditionalFlowMatcher())
    assert worse.loss(x1).item() > expected + 0.01


def test_loss_takes_noise_labels_and_times():
    seen = {}

    def v_model(t, x, y):
        seen.update(t=t, x=x, y=y)
        return torch.zeros_like(x)

    x1, x0, y = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.arange(4)
    u = torch.tensor([0, 0.25, 0.5, 0.999])
    loss = VelocityField(v_model, ConditionalFlowMatcher()).loss(x1, y, noise=x0, u=u)
    assert loss.item() == pytest.approx((x1 - x0).square().mean().item())
    assert torch.equal(seen["t"], u) and seen["y"] is y and torch.equal(seen["x"][0], x0[0])


def test_guidance_mixes_the_two_predictions_in_one_call():
    calls = []

    def model(t, x, y=None):
        calls.append(len(x))
        return x * 0 + (10.0 if y is None else torch.where(y < 0, 10.0, y.float()).reshape(-1, 1))

    t, x, y = torch.zeros(3), torch.zeros(3, 1), torch.tensor([0, 1, 2])
    for labels, scale, expected in (
        (y, 1, [0, 1, 2]),
        (y, 0, [10, 10, 10]),
        (y, 3, [-20, -17, -14]),
        (None, 3, [10, 10, 10]),
    ):
        found = classifier_free_guidance(model, t, x, labels, scale)
        assert found.flatten().tolist() == expected
    assert calls == [3, 6, 6, 3]


@pytest.mark.parametrize("path", ["ot", "sb_exact"])
def test_pairing_says_that_it_needs_scipy(path, monkeypatch):
    matcher = PATHS[path](0.5)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        matcher.pair(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ImportError, match="pip install scipy"):
        VelocityField(exact_velocity, matcher).loss(torch.randn(4, 3))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_calls_itself_straight_is_a_line(path):
    """For fixed noise, its midpoint is the mean of its ends if and only if it is straight."""
    matcher, ends = PATHS[path](0.3), (torch.zeros(4), torch.ones(4), torch.full((4,), 0.5))
    x0, x1, epsilon = torch.randn(3, 4, 2, 3)
    start, end, middle = (matcher.sample_xt(x0, x1, t, epsilon) for t in ends)
    straight = torch.allclose(middle, (start + end) / 2, atol=1e-6)
    assert straight == matcher.straight == (path in ("icfm", "ot", "target"))
    assert VelocityField(exact_velocity, matcher).straight == matcher.straight


def test_loss_draws_times_then_noise():
    x1, field = torch.rand(6, 1, 2, 2), VelocityField(exact_velocity, ConditionalFlowMatcher(0.1))
    torch.manual_seed(5)
    found = field.loss(x1)
    torch.manual_seed(5)
    u, x0 = torch.rand(6), torch.randn_like(x1)
    assert torch.equal(found, field.loss(x1, noise=x0, u=u))


@pytest.mark.parametrize("mean, uniform", [(0.0, 1.0), (-0.4, 0.0), (4.0, 0.2)])
def test_loss_trains_at_the_times_that_are_asked_for(mean, uniform):
    times = []

    def v_model(t, x, y):
        times.append(t)
        return torch.zeros_like(x)

    x1 = torch.zeros(1000, 1)
    options = {} if uniform == 1 else {"t_mean": mean, "t_uniform": uniform}
    torch.manual_seed(6)
    VelocityField(v_model, ConditionalFlowMatcher(), **options).loss(x1)
    torch.manual_seed(6)
    assert torch.equal(times[0], draw_times(1000, mean, uniform))
