"""The samplers of sample.py, with models known in closed form: see exact.py."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from exact import ONE, TWO, cdf, count_calls, exact_cfm, exact_ddpm, transported

import sample
from cfm import PATHS, ConditionalFlowMatcher, VelocityField
from core.save import save_gif
from ddpm import DenoiseDiffusion
from sample import (
    LOOK_AHEAD,
    ddim,
    dopri5,
    dpm_solver,
    draw,
    euler,
    flow,
    heun,
)
from unet import UNet

NOISE = torch.linspace(-2, 2, 33)[:, None]
METHODS = {
    "cfm": lambda: exact_cfm(TWO),
    "ddpm": lambda: exact_ddpm(TWO),
    "ddpm cosine": lambda: exact_ddpm(TWO, schedule="cosine"),
    "ddpm x0": lambda: exact_ddpm(TWO, prediction="x0"),
    "ddpm v": lambda: exact_ddpm(TWO, prediction="v"),
}


def drawn(method, steps, sampler):
    """
    Drawn from NOISE. With ddpm, dpm++ takes steps even in t: at its own, which are whole t, lambda
    is not smooth. heun takes steps even in tau: even in t, its last, Euler's, is too long.
    """
    if sampler not in ("dpm++", "heun") or isinstance(method, VelocityField):
        return draw(method, NOISE, sampler=sampler, steps=steps, clip=False)
    taus = method.times(steps, even=True)
    z = NOISE * math.hypot(taus[0], 1 - taus[0])
    if sampler == "dpm++":
        return dpm_solver(flow(method), z, [*taus, 1.0], clip=False)
    even = torch.linspace(taus[0], taus[-1], steps).tolist()
    z = heun(flow(method), z, [*even[:-1], taus[-1]])
    return euler(flow(method), z, [taus[-1], 1.0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "sampler, order, steps",
    [
        ("euler", 1, (64, 128)),
        ("ddim", 1, (64, 128)),
        ("midpoint", 2, (64, 128)),
        ("heun", 2, (64, 128)),
        ("dpm++", 2, (128, 256)),
        ("rk4", 4, (8, 16)),
    ],
)
def test_every_sampler_converges_to_the_exact_flow_at_its_order(name, sampler, order, steps):
    method = METHODS[name]()
    expected = transported(TWO, method, NOISE)
    errors = [(drawn(method, n, sampler) - expected).abs().max().item() for n in steps]
    slope = math.log2(errors[0] / errors[1])
    # On cfm's steps, lambda = log(tau / (1 - tau)) is infinite at both ends: order 2 up to a log.
    slack = 0.45 if (name, sampler) == ("cfm", "dpm++") else 0.7 if sampler == "rk4" else 0.15
    assert order - slack < slope < order + 0.7 and errors[1] < 0.03, (slope, errors)


@pytest.mark.parametrize("name", METHODS)
def test_dopri5_keeps_its_tolerance(name):
    method = METHODS[name]()
    expected = transported(TWO, method, NOISE)
    calls, found = count_calls(method), []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        calls.clear()
        x = draw(method, NOISE, sampler="dopri5", clip=False, atol=tolerance, rtol=tolerance)
        found.append(((x - expected).abs().max().item(), len(calls)))
    errors, evaluations = zip(*found)
    assert errors[0] < 0.03 and errors[3] < 2e-4 and errors[3] < errors[1] / 20
    assert evaluations[0] < evaluations[1] < evaluations[3] < 200


def test_the_last_step_of_heun_to_the_data_is_one_of_eulers():
    def v(tau, z):
        return torch.cos(3 * z) + tau

    z = torch.randn(5, 3)
    assert torch.equal(heun(v, z, [0.4, 1.0]), euler(v, z, [0.4, 1.0]))
    for t, s in ((0.4, 0.7), (1.0, 0.6)):  # not earlier steps, nor steps back from the data
        by_hand = z + (s - t) * (v(t, z) + v(s, z + (s - t) * v(t, z))) / 2
        assert not torch.allclose(by_hand, euler(v, z, [t, s]), atol=1e-3)
        if s > t:
            by_hand = euler(v, by_hand, [s, 0.9])
        assert torch.allclose(heun(v, z, [t, s, 0.9] if s > t else [t, s]), by_hand, atol=1e-6)


def test_dopri5_is_scipys_rk45():
    """One problem, one picture, the same tolerances: as accurate, in about as many evaluations."""
    integrate = pytest.importorskip("scipy.integrate")
    calls, start = 0, torch.tensor([[1.0, -0.5]])

    def f(t, x):
        nonlocal calls
        calls += 1
        return torch.stack([x[:, 1], 6 * torch.cos(6 * t) * x[:, 0]], 1)

    def f_numpy(t, x):
        return [x[1], 6 * math.cos(6 * t) * x[0]]

    ours = dopri5(f, start, [0.0, 2.0], atol=1e-4, rtol=1e-4)
    problem = f_numpy, (0, 2), start[0].numpy()
    peer = integrate.solve_ivp(*problem, method="RK45", atol=1e-4, rtol=1e-4)
    exact = integrate.solve_ivp(*problem, method="DOP853", atol=1e-12, rtol=1e-12).y[:, -1]
    error, error_peer = abs(ours[0].numpy() - exact).max(), abs(peer.y[:, -1] - exact).max()
    assert error < 3 * error_peer + 1e-5 and error < 5e-3 and calls < 1.5 * peer.nfev


def test_dopri5_never_leaves_the_interval_and_ends_at_its_end():
    for start, end in ((0.0, 1.0), (1.0, 0.0), (0.3, 0.7)):
        times = []

        def f(t, x):
            times.append(t)
            assert t.dtype == x.dtype == torch.float32
            return torch.cos(20 * t)[:, None] * x

        x = dopri5(f, torch.randn(5, 3), [start, end])
        low, high = torch.cat(times).min().item(), torch.cat(times).max().item()
        assert x.dtype == torch.float32
        assert low == pytest.approx(min(start, end)) == low and high <= max(start, end)
        assert torch.cat(times)[-1] == torch.tensor(end)


def test_dopri5_gives_up_on_a_model_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        dopri5(lambda t, x: x / (t[:, None] < 0.5), torch.ones(2, 1), [0.0, 1.0])


def test_what_a_picture_becomes_does_not_depend_on_its_batch():
    method, noise = exact_cfm(TWO), torch.randn(6, 1, 2, 2)
    together = draw(method, noise, sampler="dopri5")
    alone = torch.cat([draw(method, one, sampler="dopri5") for one in noise.split(1)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    "sampler, of_cfm, of_ddpm",
    [
        ("euler", 10, 10),
        ("midpoint", 20, 19),
        ("heun", 19, 18),
        ("rk4", 40, 37),
        ("ddim", 10, 10),
        ("dpm++", 10, 10),
    ],
)
@pytest.mark.parametrize("guidance", [1, 3])
def test_evaluations(sampler, of_cfm, of_ddpm, guidance):
    """
    Steps means steps. The last of ddpm is ddim's, whatever the sampler, and heun's own last is
    Euler's: each takes one evaluation. Guidance adds none, but doubles the batch of each.
    """
    batches, watched = [], []

    def model(t, x, y):
        batches.append(len(x))
        assert len(t) == len(y) == len(x)
        return torch.zeros_like(x)

    y = torch.arange(4)
    for method, expected in (
        (VelocityField(model, ConditionalFlowMatcher()), of_cfm),
        (DenoiseDiffusion(model), of_ddpm),
    ):
        batches.clear(), watched.clear()
        options = {"sampler": sampler, "steps": 10, "guidance": guidance}
        draw(method, torch.randn(4, 1), y, watch=lambda tau, z: watched.append(tau), **options)
        assert len(watched) == len(batches) == expected
        assert set(batches) == {4 if guidance == 1 else 8}


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++"])
def test_steps_of_a_flow_are_shifted_towards_the_noise(sampler):
    method, even = VelocityField(None, ConditionalFlowMatcher()), sampler in LOOK_AHEAD
    assert method.times(1, even) == [0, 1]
    assert method.times(4, even) == pytest.approx([0, 1 / 7, 1 / 3, 3 / 5, 1])
    # those that look ahead take even steps
    assert method.times(4, "rk4" in LOOK_AHEAD) == [0, 1 / 4, 1 / 2, 3 / 4, 1]
    taus = method.times(1000, even)
    lengths = [b - a for a, b in zip(taus, taus[1:])]
    assert lengths == sorted(lengths)
    assert lengths[0] * 1000 == pytest.approx(1 / 2, rel=1e-2)
    assert lengths[-1] * 1000 == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize(
    "n_steps, steps, visits", [(1000, 7, 7), (1000, 1, 1), (100, 100, 100), (25, 50, 25)]
)
def test_ddim_visits_as_many_times_as_asked_and_there_are(n_steps, steps, visits):
    times = []

    def eps_model(t, x, y):
        times.append(t[0].item())
        return torch.zeros_like(x)

    draw(DenoiseDiffusion(eps_model, n_steps), torch.randn(1, 1), sampler="ddim", steps=steps)
    assert len(set(times)) == len(times) == visits and times[0] == n_steps - 1
    assert times == sorted(times, reverse=True) and times == [round(t) for t in times]


@pytest.mark.parametrize("name", [*METHODS, "ddpm cosine v"])
def test_dpm_solver_on_its_own_steps_comes_as_near_whatever_the_model_predicts(name):
    """Rounding to whole t spoils its order, but not its error."""
    methods = METHODS | {
        "ddpm cosine v": lambda: exact_ddpm(TWO, schedule="cosine", prediction="v")
    }
    method = methods[name]()
    found = draw(method, NOISE, sampler="dpm++", steps=256, clip=False)
    assert (found - transported(TWO, method, NOISE)).abs().max() < 2e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_snr"])
@pytest.mark.parametrize("n_steps", [2, 3, 25, 100])
def test_where_steps_are_many_each_t_comes_once(schedule, n_steps):
    method = exact_ddpm(TWO, n_steps, schedule=schedule)
    for steps in range(1, n_steps + 1):
        *taus, end = method.times(steps)
        t = [(method.tau == tau).nonzero().item() for tau in taus]
        assert end == 1 and len(t) == steps and t[0] == n_steps - 1
        assert all(a > b for a, b in zip(t, t[1:]))
        wanted = [i / (2 * steps - i) for i in range(1, steps)]
        noisier = [(method.tau.double() <= tau).nonzero() for tau in wanted]
        first = [t.min().item() if len(t) else n_steps for t in noisier]
        # each is moved only if it must be
        for i, (now, before, ideal) in enumerate(zip(t[1:], t, first), 1):
            assert now == max(min(ideal, before - 1), steps - 1 - i)
    x = draw(method, NOISE, sampler="dpm++", steps=n_steps)
    assert torch.isfinite(x).all() and (n_steps < 100 or x.std() > 0.3)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_snr"])
@pytest.mark.parametrize("steps", [1, 2, 6, 20, 50])
def test_ddpm_takes_the_steps_of_cfm_at_the_t_that_come_next_in_noise(sampler, schedule, steps):
    method, even = DenoiseDiffusion(None, 10_000, schedule=schedule), sampler in LOOK_AHEAD
    field = VelocityField(None, ConditionalFlowMatcher())
    wanted = torch.tensor(field.times(steps, even)[1:-1])
    *taus, end = method.times(steps, even)
    t = [(method.tau == tau).nonzero().item() for tau in taus]
    assert end == 1 and len(t) == steps and t[0] == 9999
    t = torch.tensor(t[1:], dtype=torch.long)
    assert (method.tau[t] <= wanted).all() and (method.tau[t - 1] > wanted).all()


def test_ddim_is_deterministic_at_eta_0_and_not_at_1():
    method = exact_ddpm(ONE)
    for eta, same in ((0, True), (1, False)):
        a, b = (draw(method, NOISE, sampler="ddim", steps=10, eta=eta) for _ in range(2))
        assert torch.equal(a, b) is same


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddpm", {"sampler": "ancestral"}),
        ("fixedsmall", {"sampler": "ancestral"}),
        ("cosine", {"sampler": "ancestral"}),
        ("ddpm", {"sampler": "ddim", "steps": 200, "eta": 0.5}),
        ("ddpm", {"sampler": "ddim", "steps": 500, "eta": 1}),
        ("cfm", {"sampler": "ddim", "steps": 200, "eta": 1}),
        ("cfm", {"sampler": "ddim", "steps": 200, "eta": 0.5}),
        ("cfm", {"sampler": "dopri5"}),
        ("ddpm", {"sampler": "dpm++", "steps": 100}),
    ],
)
def test_samples_have_the_distribution_of_the_data(name, options):
    """
    With 20,000 samples, the largest gap between empirical and exact cdf exceeds 0.0137 once in a
    thousand.
    """
    method = {
        "ddpm": lambda: exact_ddpm(TWO),
        "fixedsmall": lambda: exact_ddpm(TWO, variance="fixedsmall"),
        "cosine": lambda: exact_ddpm(TWO, schedule="cosine"),
        "cfm": lambda: exact_cfm(TWO),
    }[name]()
    torch.manual_seed(0)
    x = draw(method, torch.randn(20_000, 1), clip=False, **options)
    x = x.flatten().double().sort().values
    gap = (cdf(TWO, 1.0, x) - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert gap < 0.02


def test_clipping_acts_on_the_prediction_and_the_noise_follows():
    method = DenoiseDiffusion(lambda t, x, y: torch.zeros_like(x))
    xt, t = torch.full((1, 1), 3.0), torch.tensor([1])
    assert method.p_mean(xt, t, clip=True) < method.p_mean(xt, t) - 0.5
    for sampler in ("ddim", "dpm++"):
        assert draw(method, xt, sampler=sampler, steps=1) == 1
        assert draw(method, xt, sampler=sampler, steps=1, clip=False) > 100
    z, tau = torch.tensor([0.3, 2.0]), 0.6
    data, noise = sample.predictions(tau, z, torch.tensor([0.1, 3.0]), True)
    assert data.tolist() == pytest.approx([0.34, 1])
    assert torch.allclose(tau * data + (1 - tau) * noise, z)


def test_ddim_with_eta_1_from_one_step_to_the_next_is_the_posterior():
    """
    Its mean and variance are those of q(x_{t-1} | x_t, x_0) at the predicted x0: eq. 7 of Ho et
    al.
    """
    for t in (1, 10, 300, 998):
        method = DenoiseDiffusion(lambda t, x, y: torch.tanh(x), 1000)
        xt, z = torch.randn(50, 4), torch.randn(50, 4)
        now, before = method.tau[t].item(), method.tau[t - 1].item()
        start = xt * math.hypot(now, 1 - now)
        step = ddim(flow(method), start, [now, before], clip=True, eta=1.0, randn=lambda _: z)
        # hypot is 1 / (alpha + sigma); the step added the noise in z, so this scales it back, too
        x, t = step / math.hypot(before, 1 - before), torch.full((50,), t)
        x0, _ = method.predict(xt, t, *method.scales(t, xt))
        mean = method.q_posterior_mean(xt, t, x0.clamp(-1, 1))
        expected = mean + method.beta_tilde[t][:, None].sqrt() * z
        assert torch.allclose(x, expected, atol=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_snr"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4", "dopri5", "ddim", "dpm++"])
def test_an_error_in_eps_is_not_magnified_where_almost_all_is_noise(schedule, sampler):
    """
    x0 = (x - sigma eps) / alpha, and alpha ends at 5e-5 in the cosine schedule: clipping limits
    the error.
    """
    exact = exact_ddpm(((1.0, 0.0, 0.4),), schedule=schedule)
    wrong = exact_ddpm(((1.0, 0.0, 0.4),), schedule=schedule)
    wrong.eps_model = lambda t, x, y, right=exact.eps_model: right(t, x) * 1.02
    noise = torch.linspace(-1.5, 1.5, 9)[:, None]
    good, bad = (draw(method, noise, sampler=sampler, steps=50) for method in (exact, wrong))
    assert (good - bad).abs().max() < 0.3 and good.abs().max() < 1.1


def path_by_hand(name, sigma, t):
    """(a, b, c) and their derivatives, in xt = a x0 + b x1 + c eps."""
    turn, one, zero = math.pi / 2, torch.ones_like(t), torch.zeros_like(t)
    return {
        "icfm": ((1 - t, t, sigma * one), (-one, one, zero)),
        "target": ((zero, t, 1 - (1 - sigma) * t), (zero, one, -(1 - sigma) * one)),
        "vp": (
            ((turn * t).cos(), (turn * t).sin(), sigma * one),
            (-turn * (turn * t).sin(), turn * (turn * t).cos(), zero),
        ),
        "sb": (
            (1 - t, t, sigma * (t * (1 - t)).sqrt()),
            (-one, one, sigma * (0.5 - t) / (t * (1 - t)).sqrt().clamp(min=1e-6)),
        ),
    }[name]


@pytest.mark.parametrize("name", ["icfm", "target", "vp", "sb"])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_every_path_leads_its_own_start_to_the_data(name, sigma):
    """
    For Gaussian data N(m, s^2) the velocity E[u | xt] is linear in xt, and so is the flow, from the
    path's own start to its end, with standard deviation sqrt(b^2 s^2 + c^2). No other field has as
    small a loss.
    """
    m, s = 0.2, 0.5

    def v_model(t, x, y=None):
        (a, b, c), (da, db, dc) = path_by_hand(name, sigma, t.double())
        slope = (a * da + b * db * s**2 + c * dc) / (a**2 + b**2 * s**2 + c**2)
        return (db[:, None] * m + slope[:, None] * (x.double() - b[:, None] * m)).float()

    matcher = PATHS[name](sigma)
    matcher.pair = lambda x0, x1, y=None: x0  # an independent coupling, as in the formula
    (a, b, c), _ = path_by_hand(name, sigma, torch.tensor([0.0, 1.0]))
    start, end = (a**2 + b**2 * s**2 + c**2).sqrt().tolist()
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = draw(VelocityField(v_model, matcher), start * noise, sampler="rk4", steps=100)
    assert torch.allclose(x, m + end * noise, atol=5e-3)
    torch.manual_seed(0)
    x1, x0, u = m + s * torch.randn(50_000, 1), torch.randn(50_000, 1), torch.rand(50_000)
    losses = []
    for factor in (0.9, 1.0, 1.1):
        torch.manual_seed(1)  # the same epsilon
        field = VelocityField(lambda t, x, y, f=factor: f * v_model(t, x), matcher)
        losses.append(field.loss(x1, noise=x0, u=u).item())
    assert losses[1] == min(losses)


def test_flow_reads_ddpm_at_its_own_times():
    """At the taus of whole t the eps model is called with these t, and Euler's step is ddim's."""
    seen = {}

    def eps_model(t, x, y):
        seen.update(t=t, x=x)
        return torch.sin(3 * x)

    method = DenoiseDiffusion(eps_model, 1000)
    t, s = torch.tensor([0, 1, 500, 999]), torch.tensor([0, 0, 400, 900])
    x0, eps = torch.rand(4, 3), torch.randn(4, 3)
    xt = method.q_sample(x0, t, eps)
    alpha, sigma = method.scales(t, xt)
    tau, tau_s = method.tau[t], method.tau[s][:, None]
    z = xt / (alpha + sigma)
    z_s = z + (tau_s - tau[:, None]) * flow(method)(tau, z)
    assert torch.equal(seen["t"], t.float()) and torch.allclose(seen["x"], xt, atol=1e-5)
    alpha_s, sigma_s = method.scales(s, xt)
    out = torch.sin(3 * xt)
    expected = alpha_s * (xt - sigma * out) / alpha + sigma_s * out
    assert torch.allclose(z_s * (alpha_s + sigma_s), expected, atol=2e-4)


def tell_labels_apart(t, x, y=None):
    """A model whose output depends on every input."""
    label = torch.full((len(x),), -1) if y is None else y
    shape = -1, *[1] * (x.dim() - 1)
    return torch.sin(3 * x + t.reshape(shape)) + label.float().reshape(shape) / 10


LABELLED = {
    "cfm": lambda: VelocityField(tell_labels_apart, ConditionalFlowMatcher()),
    "ddpm": lambda: DenoiseDiffusion(tell_labels_apart, unit_time=True),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_flow_is_guided_inside_the_interval_alone(name):
    """The ends count as inside. With guidance, the batch is doubled."""
    method, z, y = LABELLED[name](), torch.randn(4, 3), torch.arange(4)
    calls = count_calls(method)
    v = flow(method, y, guidance=3.0, interval=(0.3, 0.7))
    for tau, inside in ((0.1, 0), (0.29, 0), (0.3, 1), (0.5, 1), (0.7, 1), (0.71, 0), (0.9, 0)):
        calls.clear()
        found = v(tau, z)
        assert calls == [8 if inside else 4]
        times = torch.full((4,), tau)
        guided, plain = (method.velocity(times, z, y, scale) for scale in (3.0, 1.0))
        assert torch.equal(found, guided if inside else plain)
        assert not torch.allclose(guided, plain, atol=0.05)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++", "midpoint", "heun", "rk4"])
def test_draw_guides_inside_the_interval_alone(name, sampler):
    method, noise, y = LABELLED[name](), torch.randn(4, 3), torch.arange(4)
    calls, taus, options = count_calls(method), [], {"sampler": sampler, "steps": 4}

    def drawn_with(**more):
        calls.clear(), taus.clear()
        watch = {"watch": lambda tau, z: taus.append(tau)}
        return draw(method, noise, y, clip=False, **options, **watch, **more)

    part = drawn_with(guidance=3.0, interval=(0.1, 0.5))
    assert calls == [8 if 0.1 <= tau <= 0.5 else 4 for tau in taus] and len(set(calls)) == 2
    if sampler not in LOOK_AHEAD:  # steps start at 0, 1/7, 1/3 and 3/5, or just before
        assert calls == [4, 8, 8, 4]
    plain = drawn_with()
    assert set(calls) == {4}
    whole = drawn_with(guidance=3.0)
    assert set(calls) == {8}
    gaps = [(a - b).abs().max() for a, b in ((part, plain), (part, whole), (plain, whole))]
    assert min(gaps) > 0.01
    assert torch.equal(drawn_with(guidance=3.0, interval=(0.0, 1.0)), whole)
    assert torch.equal(drawn_with(guidance=3.0, interval=(0.401, 0.402)), plain)
    assert set(calls) == {4} and not any(0.401 <= tau <= 0.402 for tau in taus)
    assert torch.equal(drawn_with(guidance=1.0, interval=(0.1, 0.5)), plain)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("path", PATHS)
def test_ddim_and_dpm_solver_are_refused_on_curved_paths(path, sampler):
    method, noise = VelocityField(tell_labels_apart, PATHS[path](0.5)), torch.randn(4, 3)
    assert method.matcher.straight == (path not in ("vp", "sb", "sb_exact"))
    if method.matcher.straight:
        assert torch.isfinite(draw(method, noise, sampler=sampler)).all()
        return
    calls = count_calls(method)
    with pytest.raises(ValueError, match="is for straight paths, and this one is curved"):
        draw(method, noise, sampler=sampler)
    assert calls == []


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk4", "dopri5"])
@pytest.mark.parametrize("path", PATHS)
def test_the_other_samplers_go_along_any_path(path, sampler):
    method, noise = VelocityField(tell_labels_apart, PATHS[path](0.5)), torch.randn(4, 3)
    assert torch.isfinite(draw(method, noise, sampler=sampler)).all()
    assert DenoiseDiffusion.straight


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 100])
def test_sample_of_cfm_is_eulers_method_in_even_steps(steps, guidance):
    method, noise, y = LABELLED["cfm"](), torch.randn(4, 1, 3, 3), torch.arange(4)
    taus = [i / steps for i in range(steps + 1)]
    expected = euler(flow(method, y, guidance), noise, taus)
    assert torch.equal(method.sample(noise, y, steps=steps, guidance=guidance), expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("clip", [False, True])
def test_sample_of_ddpm_is_a_loop_of_p_sample(clip, guidance):
    method = DenoiseDiffusion(tell_labels_apart, 50, schedule="cosine", unit_time=True)
    noise, y = torch.randn(4, 1, 3, 3), torch.arange(4)
    torch.manual_seed(3)
    x = noise
    for t in range(49, -1, -1):
        x = method.p_sample(x, torch.full((4,), t), y, guidance, clip)
    torch.manual_seed(3)
    assert torch.equal(method.sample(noise, y, guidance=guidance, clip=clip), x)
    torch.manual_seed(3)
    assert torch.equal(draw(method, noise, y, "ancestral", guidance=guidance, clip=clip), x)


AROUND_A_NETWORK = {
    "cfm": lambda net: VelocityField(net, ConditionalFlowMatcher()),
    "cfm vp": lambda net: VelocityField(net, PATHS["vp"](0.1), t_mean=-0.4, t_uniform=0.2),
    "ddpm": lambda net: DenoiseDiffusion(net, 100),
    "ddpm v": lambda net: DenoiseDiffusion(
        net,
        100,
        schedule="cosine",
        prediction="v",
        weighting="min_snr",
        variance="fixedsmall",
        t_mean=0.4,
        t_uniform=0.1,
        unit_time=True,
    ),
}


def method_and_network(name):
    torch.manual_seed(0)
    network = UNet(channels=8, num_classes=3)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)  # else it predicts zero
    return AROUND_A_NETWORK[name](network), network


def loss_and_pictures(method):
    """Both with the same seed."""
    torch.manual_seed(1)
    x, y = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        loss = method.loss(x, y)
    return loss, draw(method, torch.randn_like(x), y, sampler="heun", steps=3, guidance=2.0)


def network_of(method):
    return method.v_model if isinstance(method, VelocityField) else method.eps_model


@pytest.mark.parametrize("name", AROUND_A_NETWORK)
def test_a_pickled_method_comes_back_the_same(name):
    method, _ = method_and_network(name)
    again = pickle.loads(pickle.dumps(method))
    assert type(again) is type(method) and type(network_of(again)) is UNet
    for a, b in zip(loss_and_pictures(again), loss_and_pictures(method)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", AROUND_A_NETWORK)
def test_a_deep_copy_of_a_method_has_a_model_of_its_own(name):
    method, network = method_and_network(name)
    before, again = loss_and_pictures(method), copy.deepcopy(method)
    assert network_of(method) is network and network_of(again) is not network
    for p, q in zip(network.parameters(), network_of(again).parameters()):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    for a, b in zip(loss_and_pictures(again), before):
        assert torch.equal(a, b)
    with torch.no_grad():
        for q in network_of(again).parameters():
            q.add_(0.1)
    for a, b, changed in zip(loss_and_pictures(method), before, loss_and_pictures(again)):
        assert torch.equal(a, b) and not torch.allclose(a, changed, rtol=1e-3)


@pytest.mark.parametrize("sampler", ["dopri5", "ancestral"])
def test_an_interval_of_guidance_needs_steps(sampler):
    with pytest.raises(ValueError, match="does not go with"):
        draw(exact_ddpm(ONE), NOISE, sampler=sampler, guidance=2, interval=(0.2, 0.8))


def test_a_long_animation_still_takes_five_seconds(tmp_path):
    """Browsers slow down frames of less than 20 ms: at most 150 of many are kept, and the last."""
    from PIL import Image

    frames = [torch.full((1, 1, 4, 4), -1 + i / 200) for i in range(401)]
    for n in (10, 150, 151, 401):
        with open(tmp_path / "x.gif", "wb") as f:
            save_gif(f, [*frames[:n - 1], frames[400]])
        with Image.open(tmp_path / "x.gif") as gif:
            pauses = []
            for i in range(gif.n_frames):
                gif.seek(i)
                pauses.append(gif.info["duration"])
            assert np.asarray(gif.convert("L")).max() > 250
        assert min(pauses) >= 20 and 4000 < sum(pauses) <= 5100
