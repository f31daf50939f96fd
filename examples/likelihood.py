"""
How likely are held-out pictures under a trained model? In bits/dim, for runs of both scripts.

    python examples/likelihood.py                                  # assets/cfm, by its own density
    python examples/likelihood.py --out_dir=out/ddpm --steps=20    # DDPM's bound, 20 of its terms
    python examples/likelihood.py --out_dir=out/cfm --marginal     # of p(x) instead of p(x | y)

For ddpm.py it is the bound of Ho et al. 2020 (arXiv 2006.11239), eq. 5. For cfm.py it is the
density at the end of the flow: Chen et al. 2018 (arXiv 1806.07366), theorem 1. dopri5 chooses its
steps, as nothing would limit the error of a fixed number. Both are upper bounds on
-log2 P(picture | label) / D for D pixel values, on average over the random draws. For a few terms
of the bound, or a sum of estimates over classes, the output says "about", not "at most".
"""
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.data import load_held_out
from core.machine import choose_machine
from core.run import catch_stop_signals
from ddpm import expand_like
from sample import SAMPLERS, Draws, Evaluations, flow, load_run, times

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
n_samples = 100           # held-out pictures to measure
marginal = False          # p(x), the mean of p(x | y) over all classes, which takes longer
steps = 0                 # ddpm: evaluate this many terms of the bound, at least 2; 0: all
exact = False             # cfm: exact divergence, for tiny pictures; false: Hutchinson's estimate
atol = 1e-4               # cfm: dopri5's error tolerance per step: absolute,
rtol = 1e-4               # and relative
dataset = ""              # where the run's data are, if they have moved
data_dir = ""             # and where downloads are kept
seed = 0                  # of all draws
ema = True                # the averaged weights; false: the latest
batch_size = 0            # pictures at a time; 0: 100 on a CPU, 250 elsewhere
device = "auto"           # cuda, cuda:1, mps or cpu
# -----------------------------------------------------------------------------
LIMITS = {
    "n_samples": (1, math.inf),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(["atol", "rtol"], (1e-7, 1e-3)),
    **dict.fromkeys(["steps", "batch_size"], (0, math.inf)),
}


# ---- the bound of ddpm.py ----

@torch.no_grad()
def bound(method, x0, y=None, randn=torch.randn_like, steps=None, offsets=None):
    """
    The terms of DDPM's bound on -log2 p(x0 | y), Ho et al., eq. 5, in bits/dim, (B,) each.

    They are L_T, what is left of x0 at the end; the sum over t of KL(q(x_{t-1} | x_t, x_0) ||
    p(x_{t-1} | x_t)), each at a draw of x_t; and L_0, the discretised decoder of section 3.3.
    x0 (B, *dim) has 256 levels from -1 to 1. It takes T evaluations of the model, or steps:
    ValueError unless 2 <= steps <= T. That estimate is unbiased, from one t in each of steps - 1
    strata: offsets (B,) in [0, 1) say where in each, and are drawn unless given.
    """
    def step(t):
        """A draw of x_t, and the mean and variance of p(x_{t-1} | x_t)."""
        xt = method.q_sample(x0, t, randn(x0))
        return xt, method.p_mean(xt, t, y, clip=True), expand_like(method.sigma2[t], x0)

    zero = torch.zeros(len(x0), dtype=torch.long, device=x0.device)          # the paper's t = 1
    last = method.n_steps - 1
    n = last if steps is None else steps - 1
    if not 1 <= n <= last:
        raise ValueError(f"the bound takes from 2 to {last + 1} steps, not {steps}")
    if offsets is None:
        offsets = torch.rand(len(x0), device=x0.device)
    mean, var = method.q_xt_x0(x0, zero + last)
    prior = (mean.square() + var - 1 - var.log()) / 2

    between = 0
    edges = [1 + last * i // n for i in range(n + 1)]
    for low, high in reversed(list(pairwise(edges))):
        t = low + (offsets * (high - low)).long()
        xt, mean, var = step(t)
        var_q = expand_like(method.beta_tilde[t], x0)
        gap = method.q_posterior_mean(xt, t, x0) - mean      # the KL between two Gaussians
        kl = (var_q / var + gap.square() / var - 1 + (var / var_q).log()) / 2
        between = between + (high - low) * kl

    _, mean, var = step(zero)
    terms = prior, between, decoder_nats(x0, mean, var)
    return [term.flatten(1).mean(1).float().cpu() / math.log(2) for term in terms]


def decoder_nats(x0, mean, var):
    """
    L_0 for each entry of x0 (B, *dim): -log of the mass of N(mean, var) on its grey level.

    A level has two edges. The outer edges of black and white lie at infinity: Ho et al., eq. 13.
    """
    x0, mean, std = (v.cpu().double() for v in (x0, mean, var.sqrt()))
    low = ((x0 - 1 / 255 - mean) / std).masked_fill(x0 < -0.999, -math.inf)
    high = ((x0 + 1 / 255 - mean) / std).masked_fill(x0 > 0.999, math.inf)
    swap = low > 0                                           # Phi is precise in the lower tail
    low, high = torch.where(swap, -high, low), torch.where(swap, -low, high)
    low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(high + torch.log1p(-torch.exp(low - high)))     # -log(Phi(high) - Phi(low))


# ---- the density of cfm.py's flow ----

def log_likelihood(method, x, y=None, sampler="dopri5", steps=20, probe=None, **options):
    """
    log p(x | y) in nats, (B,), of pictures x (B, *dim) under cfm.py's flow from N(0, I).

    Along the flow, d log p / dtau = -div v (Chen et al., theorem 1). Without a probe the divergence
    is exact, at the cost of a backward pass for each entry of x. A probe is shaped like x, with
    entries 1 and -1, and gives Hutchinson's estimate probe . (dv / dz probe), the same probe all
    along (Grathwohl et al. 2018, arXiv 1810.01367, section 3.1). options are the sampler's: atol
    and rtol of dopri5. Raises ValueError for a flow that ends short of the data, as ddpm.py's does:
    use bound() there.
    """
    v, taus = flow(method, y), times(method, sampler, steps)[::-1]
    if (taus[-1], taus[0]) != (0, 1):
        raise ValueError("the flow must go from tau = 0 to 1; for a DenoiseDiffusion use bound()")

    def with_divergence(tau, state):                         # (B, 1 + D): the divergence, then z
        with torch.enable_grad():
            z = state[:, 1:].detach().reshape(x.shape).requires_grad_()
            dz = v(tau, z)
            if probe is not None:
                product, = torch.autograd.grad((dz * probe).sum(), z)
                div = (product * probe).flatten(1).sum(1)
            else:
                div = 0
                for i, entry in enumerate(dz.flatten(1).sum(0)):
                    gradient, = torch.autograd.grad(entry, z, retain_graph=True)
                    div = div + gradient.flatten(1)[:, i]
        return torch.cat([div[:, None], dz.flatten(1)], 1).detach()

    state = torch.cat([torch.zeros_like(x.flatten(1)[:, :1]), x.flatten(1)], 1)
    state = SAMPLERS[sampler](with_divergence, state, taus, **options)
    noise = state[:, 1:]
    # from 1 to 0, so that state[:, 0] is minus the integral of div v over time
    return -(noise.square() + math.log(2 * math.pi)).sum(1) / 2 + state[:, 0]


# ---- bits/dim of pictures ----

def uniform(draws):
    """Numbers in [0, 1), (B, *shape), from the generators of sample.Draws, one per picture."""
    numbers = [torch.rand(draws.shape, generator=source) for source in draws.sources]
    return torch.stack(numbers).to(draws.device)


def bits_per_dim(method, x, y, draws, steps=0, exact=False, atol=1e-4, rtol=1e-4):
    """
    The terms (terms, B) of -log2 P(x | y) / D, for pictures x (B, C, H, W) of levels 0 to 255.

    A bound has three, see bound(), and a density one. For a density the levels are dequantised:
    with u uniform over the width of a level, 1 / 127.5, log P(level) is at least
    E log p(level + u) - D log(127.5). See Theis et al. 2015 (arXiv 1511.01844), section 3.1.
    """
    if hasattr(method, "q_sample"):
        steps = steps or method.n_steps
        offsets = uniform(draws).flatten(1)[:, 0] if steps < method.n_steps else None
        return torch.stack(bound(method, x / 127.5 - 1, y, draws.randn, steps, offsets))
    filled = (x + uniform(draws) - 0.5) / 127.5 - 1
    probe = None if exact else draws.randn().sign()
    nats = log_likelihood(method, filled, y, probe=probe, atol=atol, rtol=rtol).cpu()
    return math.log2(127.5) - nats[None] / (x[0].numel() * math.log(2))


def over_classes(bits, dim):
    """
    -log2 p(x) / dim, (B,), from -log2 p(x | y) / dim for each class y, (K, B).

    p(x) is the mean of p(x | y) over y. Random errors in bits make the result too small on average,
    as the sum prefers the smaller ones. Errors that all classes have in common do not.
    """
    nats = -bits.double() * dim * math.log(2)
    return (math.log(len(bits)) - nats.logsumexp(0)) / (dim * math.log(2))


def describe_bits(bits):
    """Mean and standard error of the sum of bits (terms, N), and the mean of each term of three."""
    n, total = bits.shape[1], bits.sum(0)
    mean, of = f"{total.mean():.4f}", f"mean of {n} held-out pictures"
    if n > 1:
        mean, of = f"{mean} +- {total.std() / math.sqrt(n):.4f}", f"{of} +- std. error"
    text = f"{mean} bits/dim ({of})"
    if len(bits) == 3:                                       # those of bound()
        terms = bits.mean(1).tolist()
        text += ", of L_T {:.4f} + L_(T-1) to L_1 {:.4f} + L_0 {:.4f}".format(*terms)
    return text


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, _, _ = choose_machine(device)
    torch.backends.cudnn.allow_tf32 = False                  # its errors are larger than dopri5's
    torch.set_float32_matmul_precision("highest")
    method, config, checkpoint = load_run(out_dir, ema, device)
    if "steps" in checkpoint["limits"]:
        fail(f"{out_dir} draws in one step only: it has no flow to compute a likelihood with")
    by_bound = hasattr(method, "q_sample")
    if by_bound:
        how = f"the bound, {steps or method.n_steps} of {method.n_steps} steps"
        if exact:
            fail("--exact is for a run of cfm.py: one of ddpm.py has a bound")
        if steps == 1 or steps > method.n_steps:
            fail(f"--steps={steps}: the bound of this run takes from 2 to {method.n_steps}")
    else:
        how = f"dopri5, atol {atol}, rtol {rtol}"
        if steps:
            fail(f"--steps={steps} is for a run of ddpm.py: dopri5 takes as many as it needs")
    batch_size = batch_size or (100 if device == "cpu" else 250)
    pictures, labels = load_held_out(config, checkpoint, n_samples, dataset, data_dir)
    n_classes, dim = len(checkpoint["data"]["classes"]), pictures[0].numel()
    marginal = marginal and n_classes > 0                    # without labels p(x) is all there is
    say(f"{n_samples} pictures, {checkpoint['method']} at iteration {checkpoint['iteration']}: "
        f"{how}, on {device}")
    evaluations = Evaluations(method.model)
    stop_signals, start = catch_stop_signals(), time.monotonic()
    bits, cost = [], 0                                       # of each batch; evaluations of one
    for i in range(0, n_samples, batch_size):
        x, y = (v[i:i + batch_size].to(device) for v in (pictures, labels))
        given = [torch.full_like(y, k) for k in range(n_classes)] if marginal else [y]
        found = []
        evaluations.restart()
        for label in given:                                  # with the same draws for all of them
            draws = Draws(range(i, i + len(x)), x.shape[1:], device, seed)
            with explained(kind=FloatingPointError):         # dopri5 may fail
                terms = bits_per_dim(method, x.float(), label, draws, steps, exact, atol, rtol)
            found.append(terms)
        if marginal:
            found = [over_classes(torch.stack(found).sum(1), dim)[None]]
        bits += found
        cost = max(cost, evaluations.count)
        if n_samples > batch_size:
            say(f"{i + len(x)} of {n_samples} done, {time.monotonic() - start:.0f} s")
        if stop_signals:
            break

    estimated = marginal and not exact or by_bound and 0 < steps < method.n_steps
    what = "-log p(x)" if marginal or not n_classes else "-log p(x | y)"
    say(f"{what} is {'about' if estimated else 'at most'} {describe_bits(torch.cat(bits, 1))}; "
        f"{time.monotonic() - start:.1f} s, {cost} evaluations of the model")
    raise SystemExit(128 + stop_signals[0] if stop_signals else 0)
