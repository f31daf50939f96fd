"""
Draw pictures with a checkpoint of ddpm.py or cfm.py, or measure how likely real ones are under it.

    python sample.py --out_dir=out/cfm                                # a grid: out/cfm/samples.png
    python sample.py --out_dir=out/cfm --labels=3,1,4 --guidance=2    # threes, ones, fours in turn
    python sample.py --out_dir=out/ddpm --sampler=ddim --eta=1 --steps=50 --save=digits    # PNGs
    python sample.py --out_dir=out/cfm --n_samples=30 --steps=40 --save=digits.gif  # an animation
    python sample.py --out_dir=out/cfm --n_samples=10000 --save=samples.npz         # for FID tools
    python sample.py --out_dir=out/ddpm --task=likelihood --n_samples=1000 --steps=20    # bits/dim

A sampler is a function of a velocity v(tau, z), of noise z, and of the times taus between which it
steps. On the straight path z = tau data + (1 - tau) noise, the velocity is v = E[data - noise | z].
cfm.py learns it; ddpm.py computes it from its prediction. v yields predictions of the data,
z + (1 - tau) v, and of the noise, z - tau v. This does not hold on cfm.py's curved paths, so ddim
and dpm++ cannot be used there.

The same seed gives the same pictures, whatever the batch_size, up to rounding.
"""
import math
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
out_dir = "out/cfm"       # folder of the run, with its ckpt.pt
task = "draw"             # or interpolate: each row goes from one noise to another;
#                           reconstruct: held-out pictures to noise and back;
#                           likelihood: bits/dim of held-out pictures
n_samples = 100           # pictures to draw, or held-out pictures to use
save = "auto"             # x.png: a grid; x.gif: a frame per evaluation; x.npz: arr_0, uint8
#                           (N, H, W, C), and arr_1, labels (N,); x: a folder of PNGs;
#                           auto: a grid in out_dir
keep_noise = False        # in an .npz, also each picture's noise (N, H, W, C): pairs to train on
sampler = "auto"          # euler, midpoint, heun, rk4, dopri5, meanflow, ddim, dpm++ or ancestral;
#                           auto: the run's own, but rk4 to reconstruct, dopri5 for a likelihood
steps = 0                 # 0: the run's sample_steps; 20 for reconstruct and cfm's likelihood; all
#                           for ddpm's likelihood, which fewer estimate. ancestral always takes all,
#                           dopri5 as many as it needs
eta = 0.0                 # noise in each step of ddim: 0 none, 1 as in ancestral with fixedsmall
clip = True               # clip predicted data to [-1, 1]; with cfm, only ddim and dpm++ predict it
atol = 1e-4               # dopri5's error tolerance per step: absolute,
rtol = 1e-4               # and relative
exact = False             # likelihood of cfm: exact divergence, for tiny pictures; false: estimated
guidance = 1.0            # guidance scale: 0 unconditional, 1 conditional, above 1 stronger
guidance_interval = (0.0, 1.0)  # times at which guidance acts: 0 is noise, 1 is data
labels = ""               # the classes to draw, in turn: 3 or 3,1,4 or cat,dog; "": all of them
dataset = ""              # where the run's data are, if they have moved
data_dir = ""             # and where downloads are kept
seed = 0                  # of the noise
ema = True                # the averaged weights; false: the latest
batch_size = 0            # pictures at a time; 0: 100 on a CPU, 250 elsewhere
device = "auto"           # cuda, cuda:1, mps or cpu
# -----------------------------------------------------------------------------
LIMITS = {
    "task": ["draw", "interpolate", "reconstruct", "likelihood"],
    "eta": (0, 1),
    "atol": (1e-7, 1),
    "rtol": (1e-7, 1),
    "seed": (0, 2**63 - 1),
    "guidance_interval": (0, 1),
    "n_samples": (1, math.inf),
    **dict.fromkeys(["steps", "guidance", "batch_size"], (0, math.inf)),
}


# ---- samplers of any flow: v(tau, z), tau a number or (B,); z (B, *dim); taus a list ----

def euler(v, z, taus):
    """Order 1."""
    for t, s in pairwise(taus):
        z = z + (s - t) * v(t, z)
    return z


def midpoint(v, z, taus):
    """Order 2: the velocity at the midpoint, which half an Euler step reaches."""
    for t, s in pairwise(taus):
        h = s - t
        z = z + h * v(t + h / 2, z + h / 2 * v(t, z))
    return z


def heun(v, z, taus):
    """
    Order 2: the mean of the velocities at both ends of a step.

    As in Karras et al. 2022 (arXiv 2206.00364), algorithm 1, the last step to the data is an Euler
    step. Theirs would divide by zero there; our models are least accurate there.
    """
    for t, s in pairwise(taus):
        now = v(t, z)
        last = s == taus[-1] and s > t
        ahead = now if last else v(s, z + (s - t) * now)
        z = z + (s - t) * (now / 2 + ahead / 2)
    return z


def rk4(v, z, taus):
    """Order 4: the classical Runge-Kutta method."""
    for t, s in pairwise(taus):
        h = s - t
        k1 = v(t, z)
        k2 = v(t + h / 2, z + h / 2 * k1)
        k3 = v(t + h / 2, z + h / 2 * k2)
        k4 = v(s, z + h * k3)
        z = z + h * (k1 / 6 + k2 / 3 + k3 / 3 + k4 / 6)
    return z


# Dormand & Prince 1980. Each stage: how far into the step, and the weights of the stages before it.
# The last stage is at the end of the step, and is also the first stage of the next one.
DOPRI5 = [
    (1/5, [1/5]),
    (3/10, [3/40, 9/40]),
    (4/5, [44/45, -56/15, 32/9]),
    (8/9, [19372/6561, -25360/2187, 64448/6561, -212/729]),
    (1, [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656]),
    (1, [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84]),
]
DOPRI5_ERROR = [71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40]  # order 5 minus 4


def dopri5(v, z, taus, atol=1e-4, rtol=1e-4):
    """
    Order 5, from the first of taus to the last, in as many steps as atol and rtol require.

    Each picture has its own step size, so the others in the batch make no difference. Raises
    FloatingPointError if no step is short enough.
    """
    start, end = taus[0], taus[-1]
    shape = len(z), *[1] * (z.dim() - 1)
    h = torch.full(shape, (end - start) / 20, device=z.device, dtype=z.dtype)
    t = torch.full_like(h, start)
    first = v(t.flatten(), z)
    while (t != end).any():
        last = (t + h - end) * (end - start) >= 0
        h = torch.where(last, end - t, h)
        k = [first]
        for ahead, weights in DOPRI5:
            ts = torch.where(last, end - (1 - ahead) * h, t + ahead * h)    # never beyond the end
            zs = z + h * sum(w * ki for w, ki in zip(weights, k))
            k.append(v(ts.flatten(), zs))
        error = h * sum(w * ki for w, ki in zip(DOPRI5_ERROR, k))
        error = error / (atol + rtol * torch.maximum(z.abs(), zs.abs()))
        error = error.flatten(1).square().mean(1).sqrt().reshape(shape)
        good = error <= 1
        z = torch.where(good, zs, z)
        t = torch.where(good, ts, t)
        first = torch.where(good, k[-1], first)
        h = h * (0.9 * error ** -0.2).clamp(0.2, 5).nan_to_num(0.2)
        if (h[t != end].abs() < 1e-6 * abs(end - start)).any():
            raise FloatingPointError("dopri5 cannot continue: the velocity is not finite, "
                                     "or atol and rtol are too small")
    return z


def meanflow(v, z, taus):
    """
    Follows mean velocities: from t to s in one evaluation, however far that is.

    Geng et al. 2025 (arXiv 2505.13447), section 4.1. The model must be trained with --spans.
    """
    for t, s in pairwise(taus):
        z = z + (s - t) * v((t, s), z)
    return z


# ---- samplers of straight paths ----

def predictions(tau, z, v, clip):
    """The data and noise in z that velocity v implies, (B, *dim); the noise fits clipped data."""
    data = z + (1 - tau) * v
    data = data.clamp(-1, 1) if clip else data
    return data, (z - tau * data) / (1 - tau)


def ddim(v, z, taus, clip=True, eta=0.0, randn=torch.randn_like):
    """
    Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16: remix the predicted data and noise.

    Without clipping this is Euler's method. eta replaces part of the noise by fresh draws randn(z).
    """
    for t, s in pairwise(taus):
        data, noise = predictions(t, z, v(t, z), clip)
        # eq. 16 over (a_s + b_s)^2, with b_s / (a_s + b_s) = 1 - s and a_t / b_t = t / (1 - t)
        var = eta**2 * ((1 - s) ** 2 - (t / s * (1 - s) ** 2 / (1 - t)) ** 2)
        z = s * data + math.sqrt((1 - s) ** 2 - var) * noise
        if var:
            z = z + math.sqrt(var) * randn(z)
    return z


def dpm_solver(v, z, taus, clip=True):
    """
    DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

    Like ddim, but with the predicted data extrapolated to the middle of the step, linearly in
    lambda = log(tau / (1 - tau)). At both ends, where lambda is infinite, it is ddim.
    """
    data_before, h_before = None, math.inf
    for t, s in pairwise(taus):
        data, _ = predictions(t, z, v(t, z), clip)
        h = math.log(s / (1 - s) / t * (1 - t)) if 0 < t and s < 1 else math.inf
        d = data
        if h < math.inf and h_before < math.inf:
            d = data + (data - data_before) * h / h_before / 2
        z = (1 - s) / (1 - t) * z + (s - t * (1 - s) / (1 - t)) * d
        data_before, h_before = data, h
    return z


SAMPLERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4, "dopri5": dopri5,
            "meanflow": meanflow, "ddim": ddim, "dpm++": dpm_solver}
STRAIGHT = ["ddim", "dpm++"]                                 # need predictions, so a straight path
LOOK_AHEAD = ["midpoint", "heun", "rk4", "dopri5"]           # prefer evenly spaced times
REVERSIBLE = ["euler", *LOOK_AHEAD]


def check_sampler(sampler, method):
    """ValueError if the sampler needs a straight path or mean velocities that the method lacks."""
    if sampler in STRAIGHT and not method.straight:
        raise ValueError(f"--sampler={sampler} is for straight paths, and this one is curved: "
                         "use --sampler=euler")
    if sampler == "meanflow" and not getattr(method, "spans", 0):
        raise ValueError("--sampler=meanflow needs a model of mean velocities: train one with "
                         "--spans, as config/one_step.py does")


def times(method, sampler, steps):
    """The method's times between which the sampler steps. dopri5 uses only the first and last."""
    steps = 2 if sampler == "dopri5" else steps
    return method.times(steps, even=sampler in [*LOOK_AHEAD, "meanflow"])


def flow(method, y=None, guidance=1.0, clip=False, interval=(0.0, 1.0), watch=None):
    """
    The method's velocity as a function v(tau, z), for labels y (B,) or None.

    tau is a number or (B,), or, for a mean velocity, a pair of numbers: the ends of a span.

    Guidance acts where tau is in the interval (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    watch(tau, z), if given, is called at each evaluation.
    """
    def v(tau, z):
        if watch:
            watch(tau, z)
        span = isinstance(tau, tuple)
        everywhere = tuple(interval) == (0, 1)
        at = tau[0] if span else tau
        scale = guidance if everywhere or interval[0] <= at <= interval[1] else 1.0
        dtype = torch.promote_types(z.dtype, torch.float32)
        tau = torch.as_tensor(tau, dtype=dtype, device=z.device)
        tau = tau.expand(len(z), 2) if span else tau.expand(len(z))
        return method.velocity(tau, z, y, scale, clip)

    return v


@torch.no_grad()
def draw(method, noise, y=None, sampler="dpm++", steps=5, guidance=1.0, clip=True,
         interval=(0.0, 1.0), watch=None, **options):
    """
    Pictures (B, *dim), in about [-1, 1], from noise (B, *dim) and labels y (B,) or None.

    Model evaluations per step: 2 for midpoint and heun, 4 for rk4, 6 for dopri5, 1 for the others.
    options are the sampler's own: eta, randn, atol, rtol. ValueError if it does not fit.
    """
    check_sampler(sampler, method)
    if tuple(interval) != (0, 1) and sampler in ("ancestral", "dopri5"):
        raise ValueError(f"a guidance interval does not go with {sampler}")
    if sampler == "ancestral":
        return method.sample(noise, y, guidance=guidance, clip=clip, **options)
    if sampler in STRAIGHT:
        options["clip"] = clip
    v, taus = flow(method, y, guidance, clip, interval, watch), times(method, sampler, steps)
    z = noise * math.hypot(taus[0], 1 - taus[0])             # z = x_T / (a + b), as a^2 + b^2 = 1
    z = SAMPLERS[sampler](v, z, taus, **options)
    return euler(v, z, [taus[-1], 1.0]) if taus[-1] < 1 else z       # the rest is one step


@torch.no_grad()
def encode(method, x, y=None, sampler="rk4", steps=20, **options):
    """The noise from which draw() makes the pictures x (B, *dim): the flow run backwards."""
    v, latest = flow(method, y), method.times(2, even=True)[-1]         # the last the model knows
    taus = [tau for tau in times(method, sampler, steps) if tau <= latest][::-1]
    z = x - (1 - taus[0]) * v(taus[0], x) if taus[0] < 1 else x
    return SAMPLERS[sampler](v, z, taus, **options) / math.hypot(taus[-1], 1 - taus[-1])


# ---- likelihoods: for both methods, as they measure the same thing and training needs neither ----

@torch.no_grad()
def bound(method, x0, y=None, randn=torch.randn_like, steps=None, u=None):
    """
    The terms of DDPM's bound on -log2 p(x0), Ho et al., eq. 5, in bits/dim, (B,) each.

    They are L_T, what is left of x0 at the end; the sum over t of KL(q(x_{t-1} | x_t, x_0) ||
    p(x_{t-1} | x_t)), each at a draw of x_t; and L_0, the discretised decoder of section 3.3.
    x0 (B, *dim) has 256 levels from -1 to 1. It takes T evaluations of the model, or steps of them,
    from 2 to T, else ValueError. Then the estimate is unbiased, from one t in each of steps - 1
    strata: u (B,) in [0, 1) is its position there, drawn unless given.
    """
    def column(table, t):
        return table[t].reshape(-1, *[1] * (x0.dim() - 1))

    def step(t):
        """A draw of x_t, and the mean and variance of p(x_{t-1} | x_t)."""
        xt = method.q_sample(x0, t, randn(x0))
        return xt, method.p_mean(xt, t, y, clip=True), column(method.sigma2, t)

    zero = torch.zeros(len(x0), dtype=torch.long, device=x0.device)          # the paper's t = 1
    last = method.n_steps - 1
    n = last if steps is None else steps - 1
    if not 1 <= n <= last:
        raise ValueError(f"the bound takes from 2 to {last + 1} steps, not {steps}")
    if u is None:                                            # with every t summed, u plays no part
        u = zero if n == last else torch.rand(len(x0), device=x0.device)
    mean, var = method.q_xt_x0(x0, zero + last)
    prior = (mean.square() + var - 1 - var.log()) / 2

    between = 0
    edges = [1 + last * i // n for i in range(n + 1)]
    for low, high in reversed(list(pairwise(edges))):
        t = low + (u * (high - low)).long()
        xt, mean, var = step(t)
        var_q = column(method.beta_tilde, t)
        gap = method.q_posterior_mean(xt, t, x0) - mean      # the KL between two Gaussians
        kl = (var_q / var + gap.square() / var - 1 + (var / var_q).log()) / 2
        between = between + (high - low) * kl

    _, mean, var = step(zero)
    terms = prior, between, decoder_nats(x0, mean, var)
    return [term.flatten(1).mean(1).float().cpu() / math.log(2) for term in terms]


def decoder_nats(x0, mean, var):
    """
    L_0 for each entry of x0 (B, *dim): -log of the mass of N(mean, var) on its grey level.

    A level has two edges. The outer edges of black and white are infinite: Ho et al., eq. 13.
    """
    x0, mean, std = (v.cpu().double() for v in (x0, mean, var.sqrt()))
    low = ((x0 - 1 / 255 - mean) / std).masked_fill(x0 < -0.999, -math.inf)
    high = ((x0 + 1 / 255 - mean) / std).masked_fill(x0 > 0.999, math.inf)
    swap = low > 0                                           # Phi is precise in the lower tail
    low, high = torch.where(swap, -high, low), torch.where(swap, -low, high)
    low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(high + torch.log1p(-torch.exp(low - high)))     # -log(Phi(high) - Phi(low))


def log_likelihood(method, x, y=None, sampler="dopri5", steps=20, probe=None, **options):
    """
    log p(x) in nats, (B,), of pictures x (B, *dim) under cfm.py's flow from N(0, I).

    Along the flow, d log p / dtau = -div v (Chen et al. 2018, arXiv 1806.07366, theorem 1). Without
    a probe the divergence is exact, at the cost of a backward pass for each entry of x. A probe is
    shaped like x, with entries 1 and -1, and gives Hutchinson's estimate probe . (dv / dz probe),
    the same probe all along (Grathwohl et al. 2018, arXiv 1810.01367, section 3.1). Raises
    ValueError for a flow that ends short of the data, as ddpm.py's does: use bound() there.
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


def slerp(a, b, t):
    """A point on the arc from noise a to noise b. Noise on the chord would be too short."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


# ---- the command ----

def load_model(checkpoint, path):
    """The checkpoint's UNet, with averaged or latest weights; calls fail() if it does not fit."""
    from configurator import explained, fail
    from unet import UNet

    if not ema and not checkpoint["model"]:
        fail(f"{path} holds only the averaged weights")
    with explained(f"{path} is from another version of this program: "):
        model = UNet(**checkpoint["model_args"]).eval().requires_grad_(False)
        model = model.to(memory_format=torch.channels_last)
        model.load_state_dict(checkpoint["ema" if ema else "model"])
        args, names = checkpoint["model_args"], checkpoint["data"]["classes"]
        if args["num_classes"] != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{args['num_classes']} classes, but these names: {names}")
        C, H, W = checkpoint["picture_shape"]
        if C != args["in_channels"] or min(H, W) < 1:
            raise ValueError(f"pictures of {C, H, W}")
    return model


def load_held_out(config, checkpoint):
    """
    The first n_samples held-out pictures of the run's data, uint8 (N, C, H, W), and labels (N,).

    Calls fail() if there are fewer, or if the data are not what the run was trained on.
    """
    from configurator import explained, fail
    from core.data import load_data

    where = dataset or config["dataset"]
    as_in_training = [config[name] for name in ("image_size", "conditional", "background")]
    with explained(f"the data of the run, {where}: "):
        data = load_data(where, data_dir or config["data_dir"], *as_in_training)
    changed = data.differences(checkpoint["data"])
    if changed:
        fail(f"--dataset={where} is not the data that the run was trained on ({changed}): "
             "give the path to those")
    x, y = data.held_out
    if n_samples > len(x):
        fail(f"--n_samples={n_samples}: only {len(x)} pictures are held out")
    return x[:n_samples], y[:n_samples]


def wanted_classes(classes):
    """Indices of the classes that --labels names, or of all; calls fail() for an unknown one."""
    from configurator import fail

    def key(name):
        return unicodedata.normalize("NFC", name.strip())    # macOS decomposes accents

    number = {key(name): i for i, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):        # then a number may stand for a name
        number = {str(i): i for i in range(len(classes))} | number
    if not labels.strip(" ,"):
        return list(range(len(classes)))
    if key(labels) in number:                                # a name may contain a comma
        return [number[key(labels)]]
    names = [key(name) for name in labels.split(",") if name.strip()]
    for name in names:
        if name not in number:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "") or "none"
            if len(classes) > 1 and classes == [str(i) for i in range(len(classes))]:
                known = f"0 to {len(classes) - 1}"
            fail(f"--labels: there is no class {name}, the model has {known}")
    return [number[name] for name in names]


def check_request(config, is_ddpm, num_classes, auto, paired):
    """Calls fail() if options, which are globals, do not fit each other or the run's config."""
    from configurator import fail

    adds_noise = sampler == "ancestral" or eta
    real = task in ("reconstruct", "likelihood")
    by_bound = task == "likelihood" and is_ddpm
    if by_bound and not auto:
        fail("--task=likelihood of ddpm computes the bound: drop --sampler")
    if by_bound and steps == 1:
        fail("--steps=1: the bound needs at least 2")
    if by_bound and not clip:
        fail("--clip=false: the bound uses clipped predictions")
    if task == "interpolate" and adds_noise:
        fail("--task=interpolate needs a sampler that adds no noise: add --sampler=ddim --eta=0")
    if real and sampler not in REVERSIBLE:
        fail(f"--sampler={sampler} cannot be run backwards: choose {' or '.join(REVERSIBLE)}")
    if sampler == "ancestral" and steps not in (0, config["n_steps"]):
        fail(f"--steps={steps}: ancestral sampling takes all {config['n_steps']} steps, "
             "--sampler=ddim any number")
    if is_ddpm and steps > config["n_steps"]:
        fail(f"--steps={steps}: the run has only {config['n_steps']}")
    if eta and sampler != "ddim":
        fail(f"--eta={eta} goes with --sampler=ddim, not with {sampler}")
    if eta and not is_ddpm and (config["path"] != "icfm" or config["sigma"]):
        fail(f"--eta={eta}: the noise to renew is independent of the data only for --path=icfm "
             "and --sigma=0")
    if sampler == "dopri5" and steps and not by_bound:
        fail(f"--steps={steps}: dopri5 takes as many as --atol and --rtol need")
    if task == "likelihood" and save != "auto":
        fail(f"--save={save}: a likelihood is printed, not saved")
    if keep_noise and (task != "draw" or Path(save).suffix != ".npz" or adds_noise):
        fail("--keep_noise goes with --save=x.npz and a sampler that adds no noise of its own")
    if paired and adds_noise:
        fail("the run was trained on pairs, so fresh noise does not go with it: drop "
             "--sampler=ancestral and --eta")
    if exact and (task != "likelihood" or is_ddpm):
        fail("--exact goes with --task=likelihood of cfm")
    if dataset and not real:
        fail(f"--dataset={dataset}: --task={task} reads no pictures")
    if labels and real:
        fail(f"--labels: --task={task} takes the held-out pictures' own labels")
    if guidance != 1 and real:
        fail(f"--guidance={guidance}: --task={task} uses the model without guidance")
    if guidance != 1 and not num_classes:
        fail(f"--guidance={guidance}: the model was trained without labels, "
             "so it cannot be guided")
    if guidance != 1 and not config["label_dropout"]:
        fail(f"--guidance={guidance}: the model was trained with --label_dropout=0, "
             "so it has not learned the unconditional model that guidance needs")
    if len(guidance_interval) != 2 or guidance_interval[0] > guidance_interval[1]:
        fail(f"--guidance_interval={guidance_interval}: must be two times, such as 0.2,0.8")
    if guidance_interval != (0, 1) and (guidance == 1 or sampler in ("dopri5", "ancestral")):
        fail("--guidance_interval goes with a --guidance, but not with dopri5 or ancestral")
    if Path(save).suffix == ".gif" and (task != "draw" or sampler in ("dopri5", "ancestral")):
        fail(f"--save={save}: a .gif has a frame per evaluation, so it goes with --task=draw and "
             "not with dopri5 or ancestral sampling")


def check_interval(method):
    """Calls fail() if guidance_interval has none of the times at which the model is evaluated."""
    from configurator import fail

    def v(tau, z):
        evaluated.append(tau[0] if isinstance(tau, tuple) else tau)
        return z

    taus, evaluated = times(method, sampler, steps), []
    SAMPLERS[sampler](v, torch.zeros(1), taus)               # a rehearsal, without the model
    if taus[-1] < 1:                                         # the last step, see draw()
        evaluated.append(taus[-1])
    low, high = guidance_interval
    if not any(low <= tau <= high for tau in evaluated):
        fail(f"--guidance_interval={low:g},{high:g} has none of the {len(evaluated)} times at "
             "which the model is evaluated: add --steps")


def bits_per_dim(method, x, y, draws, by_bound, options):
    """The terms (terms, B) of a bound on bits/dim, for x (B, C, H, W) of levels 0 to 255."""
    if by_bound:
        u = draws.rand().flatten(1)[:, 0] if steps < method.n_steps else None   # per picture
        return torch.stack(bound(method, x / 127.5 - 1, y, draws.randn, steps, u))
    # Dequantisation: with u uniform over the width of a level, 1 / 127.5, log P(level) is at least
    # E log p(x + u) - D log(127.5).
    spread = (x + draws.rand() - 0.5) / 127.5 - 1
    probe = None if exact else draws.randn().sign()
    nats = log_likelihood(method, spread, y, sampler, steps, probe, **options).cpu()
    return math.log2(127.5) - nats[None] / (x[0].numel() * math.log(2))


def describe_sampler(config, by_bound):
    """What the options ask for, for the first line of output."""
    if by_bound:
        return f"the bound, {steps} of {config['n_steps']} steps"
    if sampler == "ancestral":
        return "ancestral, all steps"
    if sampler == "dopri5":
        return f"dopri5, atol {atol}, rtol {rtol}"
    return f"{sampler}, {steps} steps"


def describe_bits(bits, relation):
    """A sentence on the bits/dim of N pictures, "about" or "at most" the sum of bits (terms, N)."""
    n, total = bits.shape[1], bits.sum(0)
    mean, of = f"{total.mean():.4f}", f"mean of {n} held-out pictures"
    if n > 1:
        mean, of = f"{mean} +- {total.std() / math.sqrt(n):.4f}", f"{of} +- std. error"
    text = f"{relation} {mean} bits/dim ({of})"
    if len(bits) == 3:                                       # those of bound()
        names = "L_T", "L_(T-1) to L_1", "L_0"
        terms = [f"{name} {term:.4f}" for name, term in zip(names, bits.mean(1))]
        text += f", of {' + '.join(terms)}"
    return text


class Evaluations:
    """Counts the evaluations of a model. If they take long, it prints their number now and then."""

    def __init__(self, model):
        model.register_forward_hook(self.add)
        self.restart()

    def restart(self):
        self.count, self.reported = 0, time.monotonic()

    def add(self, *_):
        from configurator import say

        self.count += 1
        if time.monotonic() - self.reported > 10:
            say(f"{self.count} evaluations of the model so far")
            self.reported = time.monotonic()


class Draws:
    """Random numbers, from one generator per picture, so that the batch size does not matter."""

    def __init__(self, numbers, shape, device):
        self.numbers, self.shape, self.device = numbers, shape, device
        self.sources = [torch.Generator().manual_seed(hash((seed, n))) for n in numbers]

    def randn(self, like=None):
        """Normal draws (B, *shape). Samplers call it with a tensor of this shape."""
        draws = [torch.randn(self.shape, generator=source) for source in self.sources]
        return torch.stack(draws).to(self.device)

    def rand(self):
        """Uniform draws (B, *shape)."""
        draws = [torch.rand(self.shape, generator=source) for source in self.sources]
        return torch.stack(draws).to(self.device)

    def between(self):
        """Noise (B, *shape) that goes from one noise to another in every ten pictures."""
        noise = []
        for n in self.numbers:
            ends = [torch.Generator().manual_seed(hash((seed, n // 10, end))) for end in (0, 1)]
            a, b = [torch.randn(self.shape, generator=end) for end in ends]
            noise.append(slerp(a, b, n % 10 / 9))
        return torch.stack(noise).to(self.device)


if __name__ == "__main__":
    import importlib

    import numpy as np

    from configurator import TRAINING, Options, configure, explained, fail, say
    from core.machine import choose_machine
    from core.run import catch_stop_signals, load_checkpoint
    from core.save import claim, labels_to_save, save_pictures, save_pngs, to_bytes

    configure(globals(), LIMITS)
    ckpt_path = Path(out_dir, "ckpt.pt")
    checkpoint = load_checkpoint(ckpt_path)
    if checkpoint["method"] not in ("ddpm", "cfm"):
        fail(f"{ckpt_path} is from another method: {checkpoint['method']}")
    is_ddpm = checkpoint["method"] == "ddpm"
    script = importlib.import_module(checkpoint["method"])
    config = Options(vars(script), TRAINING | script.LIMITS).restored(checkpoint["config"])
    model = load_model(checkpoint, ckpt_path)
    classes = checkpoint["data"]["classes"]
    C, H, W = checkpoint["picture_shape"]

    # the request, and whether it can be met
    auto, real = sampler == "auto", task in ("reconstruct", "likelihood")
    if auto:
        sampler = {"reconstruct": "rk4", "likelihood": "dopri5"}.get(task, config["sampler"])
    if sampler not in script.LIMITS["sampler"]:
        fail(f"--sampler={sampler} is not for {script.METHOD}: "
             f"choose {' or '.join(script.LIMITS['sampler'])}")
    by_bound = task == "likelihood" and is_ddpm
    check_request(config, is_ddpm, len(classes), auto, checkpoint["data"].get("pairs"))
    wanted = wanted_classes(classes)
    with explained():
        check_sampler(sampler, script.build(None, config))
    most = config.get("n_steps", math.inf)
    steps = steps or (most if by_bound else min(most, 20 if real else config["sample_steps"]))
    if guidance_interval != (0, 1):
        check_interval(script.build(None, config))
    device, _, _ = choose_machine(device)
    batch_size = batch_size or (100 if device == "cpu" else 250)
    if real or sampler == "dopri5":                          # their errors are smaller than TF32's
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    if save == "auto":
        save = Path(out_dir, "samples.png" if task == "draw" else f"{task}.png")
    save = Path(save)
    with explained(f"--n_samples={n_samples}: "):
        pictures = np.empty((n_samples, H, W, C), np.uint8)
        noises = np.empty(pictures.shape, np.float16)    # takes no memory unless it is filled
    if real:
        x_val, y = load_held_out(config, checkpoint)
    else:
        in_a_row = 10 if task == "interpolate" else 1
        y = torch.tensor(wanted or [-1]).repeat_interleave(in_a_row)
        y = y.repeat(math.ceil(n_samples / len(y)))[:n_samples]
    if task != "likelihood":
        claimed = claim(save)

    method = script.build(model.to(device), config, device)
    evaluations = Evaluations(model)
    say(f"{task}: {n_samples} pictures, {script.METHOD} at iteration {checkpoint['iteration']}: "
        f"{describe_sampler(config, by_bound)}, guidance {guidance}, on {device}")

    stop_signals, start = catch_stop_signals(), time.monotonic()
    options = {"dopri5": {"atol": atol, "rtol": rtol}, "ddim": {"eta": eta}}.get(sampler, {})
    bits, frames, cost, reported = [], [], 0, -math.inf
    for i in range(0, n_samples, batch_size):
        label = y[i:i + batch_size].to(device)
        draws = Draws(range(i, i + len(label)), (C, H, W), device)
        evaluations.restart()
        if real:
            x = x_val[i:i + len(label)].to(device).float()
        if sampler in ("ddim", "ancestral"):
            options["randn"] = draws.randn
        with explained(kind=FloatingPointError):             # dopri5 may fail
            if task == "likelihood":
                bits.append(bits_per_dim(method, x, label, draws, by_bound, options))
            else:
                noise = draws.between() if task == "interpolate" else draws.randn()
                if real:
                    noise = encode(method, x / 127.5 - 1, label, sampler, steps, **options)
                seen = []
                watch = (lambda tau, z: seen.append(z.cpu())) if save.suffix == ".gif" else None
                x = draw(method, noise, label, sampler, steps, guidance, clip and not real,
                         guidance_interval, watch, **options)
                if watch:
                    frames.append([*seen, x.cpu()])
                pictures[i:i + batch_size] = to_bytes(x)
                if keep_noise:
                    noises[i:i + batch_size] = noise.permute(0, 2, 3, 1).cpu()
                if save.suffix == "":
                    with explained(f"--save={save}: ", OSError):
                        save_pngs(save, pictures[i:i + batch_size], i)
        cost, done = max(cost, evaluations.count), i + len(label)
        if done < n_samples and stop_signals:
            say(f"stopped after {done} of {n_samples}")
            n_samples = done
            break
        if done < n_samples and time.monotonic() - reported > 10:     # at first, and now and then
            reported = time.monotonic()
            left = (reported - start) / done * (n_samples - done) / 60
            say(f"{done} done, {left:.1f} min left")
    pictures, y = pictures[:n_samples], y[:n_samples]
    took = f"{time.monotonic() - start:.1f} s, {cost} evaluations of the model"
    code = 128 + stop_signals[0] if stop_signals else 0

    if task == "likelihood":
        relation = "about" if by_bound and steps < config["n_steps"] else "at most"
        say(f"{describe_bits(torch.cat(bits, 1), relation)}; {took}")
        raise SystemExit(code)
    if task == "reconstruct":
        gap = pictures - x_val[:n_samples].permute(0, 2, 3, 1).numpy().astype(float)
        say(f"reconstructed to {np.sqrt((gap**2).mean()):.3f} of 255 grey levels (rms), "
            f"{abs(gap).max():.0f} at worst")
    if save.suffix:                                          # a folder has them already
        arrays = labels_to_save(classes, y) | ({"noise": noises[:n_samples]} if keep_noise else {})
        with explained(f"--save={save}: ", OSError):
            save_pictures(save, pictures, frames, arrays)
    elif claimed:
        Path(claimed.name).unlink(missing_ok=True)
    say(f"{took}: {save}")
    raise SystemExit(code)
