"""
Denoising diffusion probabilistic models in one file: Ho et al. 2020 (arXiv 2006.11239).

    python ddpm.py                                             # MNIST, ten epochs, into out/ddpm
    python ddpm.py --n_steps=1000 --batch_size=128             # any option below; --help lists them
    python ddpm.py --dataset=path/to/pictures --image_size=64  # your own, labelled by subfolders
    python ddpm.py --init_from=resume                          # continue a run that was stopped
    torchrun --standalone --nproc_per_node=4 ddpm.py           # four processes, for as many GPUs

The forward process q adds noise to a picture in n_steps small steps, until little else is left. The
reverse process p is learned, and undoes them one by one. The bound on -log p(x0) is, except for its
first and last terms, a sum of
    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)).
Each is between Gaussians of fixed variance: up to a constant, a squared distance between their
means. Up to a weight, which training drops, that is the squared error of a model that predicts the
noise in x_t. docs/mathematics.md derives it all. Sibling files are imported where they are used, so
the classes here need only torch.
"""
import copy
import math
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
# the method; the options of training, the same in cfm.py, are below
out_dir = "out/ddpm"      # for checkpoints, grids and log.csv
n_steps = 1000            # T, the number of noising steps
schedule = "cosine"       # of the noise: cosine (Nichol & Dhariwal), linear (Ho et al.) or log_snr
prediction = "v"          # what the model predicts: eps as in Ho et al., x0, or v, a mix of both
weighting = "simple"      # of the loss: equal at all t; min_snr: min(snr, 5) on the error of x0
variance = "fixedlarge"   # of p: beta; fixedsmall: beta~, that of q(x_{t-1} | x_t, x_0)
t_mean = 0.4              # training times t / T are sigmoid(N(t_mean, 1)); 1 is noise
t_uniform = 0.1           # probability of a uniform time instead
# -----------------------------------------------------------------------------
METHOD = "ddpm"
METHOD_LIMITS = {"n_steps": (2, math.inf), "t_mean": (-5, 5), "t_uniform": (0, 1)}  # (least, most)
METHOD_UNCHANGEABLE = ["n_steps", "schedule", "prediction"]      # on resume


def linear_beta(n_steps):
    """Ho et al., section 4, at 1000 steps; rescaled for others, so alpha_bar still ends near 0."""
    beta = torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64, device="cpu")
    return beta * 1000 / n_steps


def cosine_beta(n_steps):
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17: alpha_bar falls as a squared cosine."""
    fraction = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64, device="cpu")
    f = torch.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]


def log_snr_beta(n_steps):
    """Kingma et al. 2021 (arXiv 2107.00630): log(alpha_bar / (1 - alpha_bar)) falls linearly."""
    # at 13.3, as in the paper, the noise is a sixth of a grey level; the paper ends at -5, which
    # leaves more signal at T
    log_snr = torch.linspace(13.3, -10, n_steps, dtype=torch.float64, device="cpu")
    alpha_bar = torch.cat([torch.ones_like(log_snr[:1]), log_snr.sigmoid()])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


SCHEDULES = {"linear": linear_beta, "cosine": cosine_beta, "log_snr": log_snr_beta}

PREDICTIONS = ["eps", "x0", "v"]
WEIGHTINGS = ["simple", "min_snr"]
VARIANCES = ["fixedlarge", "fixedsmall"]
CHOICES = {"schedule": list(SCHEDULES), "prediction": PREDICTIONS, "weighting": WEIGHTINGS,
           "variance": VARIANCES}


class DenoiseDiffusion:
    """
    The forward process q, the reverse process p, and the loss that trains p.

    eps_model             called as eps_model(t=t, x=xt, y=y); returns a tensor shaped like xt
    n_steps               T, at least 2
    schedule, prediction  one of SCHEDULES, and of PREDICTIONS: see target()
    weighting             "simple", or "min_snr" of Hang et al. 2023 (arXiv 2303.09556)
    variance              of p: "fixedlarge" for beta, "fixedsmall" for beta~
    t_mean, t_uniform     the distribution of training times, see draw_times(); default uniform
    unit_time             eps_model takes t / T, as unet.py does, rather than t

    Throughout, x0, xt and eps are (B, *dim), with x0 in [-1, 1]. Times t are long (B,) in [0, T):
    t = 0 is the paper's t = 1. Labels y are long (B,), -1 for none, or None. The model is called in
    the dtype of the pictures or the noise; times and sums are in at least float32. These
    defaults are the paper's; the script's are not. Raises ValueError for unknown options.
    """
    straight = True       # z = tau x0 + (1 - tau) eps is a line, so velocity() determines both ends
    renewable = True      # noise and data are independent, so a sampler may draw fresh noise
    textbook = ["textbook", "ancestral"]             # the names by which sample.py calls sample()
    means = None          # mean pictures, by class: with them the first step needs no model

    def __init__(self, eps_model, n_steps=1000, device="cpu", schedule="linear",
                 prediction="eps", weighting="simple", variance="fixedlarge",
                 t_mean=0.0, t_uniform=1.0, unit_time=False):
        if n_steps < 2:
            raise ValueError(f"n_steps must be at least 2, not {n_steps}")
        for name, value, known in [("schedule", schedule, SCHEDULES),
                                   ("prediction", prediction, PREDICTIONS),
                                   ("weighting", weighting, WEIGHTINGS),
                                   ("variance", variance, VARIANCES)]:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        self.eps_model = eps_model
        self.n_steps = self.most_steps = n_steps
        self.prediction = prediction
        self.t_mean = t_mean
        self.t_uniform = t_uniform
        self.unit_time = unit_time

        # tables indexed by t, computed in float64 on the CPU
        def table(values):
            return values.float().to(device)

        beta = SCHEDULES[schedule](n_steps).clamp(max=0.999)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)                        # eq. 4
        alpha_bar_before = torch.cat([torch.ones_like(beta[:1]), alpha_bar[:-1]])
        self.beta = table(beta)
        self.alpha = table(alpha)
        self.alpha_bar = table(alpha_bar)
        self.one_minus_alpha_bar = table(1 - alpha_bar)     # in float32 it would be inexact

        # q(x_{t-1} | x_t, x_0), eq. 7: its variance, and coefficients of its mean, in x0 or in eps
        beta_tilde = beta * (1 - alpha_bar_before) / (1 - alpha_bar)
        beta_tilde[0] = beta_tilde[1]                       # not 0: L_0 divides by its square root
        self.beta_tilde = table(beta_tilde)
        self.x0_coef = table(alpha_bar_before.sqrt() * beta / (1 - alpha_bar))
        self.xt_coef = table(alpha.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar))
        self.eps_coef = table(beta / (1 - alpha_bar).sqrt())

        # p(x_{t-1} | x_t): its variance, section 3.2
        self.sigma2 = self.beta if variance == "fixedlarge" else self.beta_tilde

        # weights of the squared error; min_snr gives an error in x0 the weight min(snr, 5)
        weight = torch.ones_like(beta)
        if weighting == "min_snr":
            # as xt is known, an error of 1 in x0 comes with one of a / b in eps, and 1 / b in v
            snr = alpha_bar / (1 - alpha_bar)               # a^2 / b^2
            error = {"eps": snr, "x0": 1, "v": 1 / (1 - alpha_bar)}[prediction]
            weight = snr.clamp(max=5) / error
        self.weight = table(weight)

        # tau = a / (a + b) of velocity() at each t, falling from almost 1 to almost 0
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        tau = (a / (a + b)).float()
        self.tau = table(tau)
        self.taus = tau.tolist()

    # ---- q, from data to noise ----

    def q_xt_x0(self, x0, t):
        """Mean (B, *dim) and variance (B, 1, ...) of q(x_t | x_0), eq. 4: all steps in one."""
        mean = expand_like(self.alpha_bar[t], x0).sqrt() * x0
        return mean, expand_like(self.one_minus_alpha_bar[t], x0)

    def q_sample(self, x0, t, eps=None):
        """A draw from q(x_t | x_0), (B, *dim)."""
        eps = torch.randn_like(x0) if eps is None else eps
        mean, var = self.q_xt_x0(x0, t)
        return mean + var.sqrt() * eps

    def q_posterior_mean(self, xt, t, x0):
        """Mean of q(x_{t-1} | x_t, x_0), eq. 7."""
        return expand_like(self.x0_coef[t], xt) * x0 + expand_like(self.xt_coef[t], xt) * xt

    def q_posterior_mean_eps(self, xt, t, eps):
        """The same mean, from xt and the noise eps in it, eq. 11."""
        without = xt - expand_like(self.eps_coef[t], xt) * eps
        return without / expand_like(self.alpha[t], xt).sqrt()

    # ---- the model and its loss ----

    def scales(self, t, x):
        """The a and b of xt = a x0 + b eps, (B, 1, ...) each."""
        a = expand_like(self.alpha_bar[t], x).sqrt()
        b = expand_like(self.one_minus_alpha_bar[t], x).sqrt()
        return a, b

    @property
    def model(self):
        """The model, under a name that both methods share."""
        return self.eps_model

    def output(self, xt, t, y=None, guidance=1.0):
        """The model's output at xt, (B, *dim). Here t need not be an integer."""
        t = t / self.n_steps if self.unit_time else t
        return classifier_free_guidance(self.eps_model, t, xt, y, guidance)

    def target(self, x0, eps, a, b):
        """
        What the model should predict of xt = a x0 + b eps, (B, *dim).

        v (Salimans & Ho 2022, arXiv 2202.00512) is eps at the data end, and -x0 at the noise end.
        """
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        return a * eps - b * x0

    def predict(self, xt, t, a, b, y=None, guidance=1.0):
        """The x0 and eps in xt = a x0 + b eps as the model predicts them, (B, *dim) each."""
        out = self.output(xt, t, y, guidance)
        if self.prediction == "eps":
            return (xt - b * out) / a, out
        if self.prediction == "x0":
            return out, (xt - a * out) / b
        return a * xt - b * out, b * xt + a * out

    def loss(self, x0, y=None, noise=None, u=None):
        """Algorithm 1, eq. 14: E weight |target - output|^2, at times t = u T, u (B,) in [0, 1]."""
        u = draw_times(len(x0), self.t_mean, self.t_uniform, x0.device) if u is None else u
        t = (u * self.n_steps).long().clamp(max=self.n_steps - 1)
        eps = torch.randn_like(x0) if noise is None else noise
        output = self.output(self.q_sample(x0, t, eps).to(x0.dtype), t, y)
        target = self.target(x0, eps, *self.scales(t, x0))
        return (expand_like(self.weight[t], x0) * (output - target).square()).mean()

    # ---- p, from noise to data ----

    def p_mean(self, xt, t, y=None, guidance=1.0, clip=False, dtype=None):
        """Mean of p(x_{t-1} | x_t): q's posterior mean at the predicted x0, which clip clamps."""
        x0, eps = self.predict(xt.to(dtype=dtype), t, *self.scales(t, xt), y, guidance)
        if clip:
            return self.q_posterior_mean(xt, t, x0.clamp(-1, 1))
        return self.q_posterior_mean_eps(xt, t, eps)

    def p_sample(self, xt, t, y=None, guidance=1.0, clip=False, z=None, dtype=None):
        """A draw from p(x_{t-1} | x_t): Algorithm 2, lines 3 and 4. The last step adds no noise."""
        z = torch.randn_like(xt) if z is None else z
        var = torch.where(t > 0, self.sigma2[t], 0)
        mean = self.p_mean(xt, t, y, guidance, clip, dtype)
        return mean + expand_like(var, xt).sqrt() * z

    @torch.no_grad()
    def sample(self, noise, y=None, steps=None, guidance=1.0, clip=False, randn=torch.randn_like):
        """
        Algorithm 2: pictures from noise (B, *dim), one step per t. randn(x) draws noise like x.

        steps is unused: there are n_steps. cfm.py's sampler needs it.
        """
        xt = noise
        for t in reversed(range(self.n_steps)):
            t = torch.full((len(xt),), t, device=xt.device)
            xt = self.p_sample(xt, t, y, guidance, clip, randn(xt), noise.dtype)
        return xt

    # ---- the same model as a flow, for the samplers of sample.py ----

    def velocity(self, tau, z, y=None, guidance=1.0, clip=False):
        """
        E[x0 - eps | z] at z = tau x0 + (1 - tau) eps: dz / dtau of the flow from noise to data.

        With xt = a x0 + b eps, z (B, *dim) is xt / (a + b), and tau (B,) is a / (a + b). Between
        the tau of two steps, t is interpolated. clip keeps the predicted x0 in [-1, 1].
        """
        i = torch.searchsorted(-self.tau.to(tau.dtype), -tau).clamp(1, self.n_steps - 1)
        t = i - (tau - self.tau[i]) / (self.tau[i - 1] - self.tau[i])
        tau = expand_like(tau, z)
        scale = torch.hypot(tau, 1 - tau)                   # 1 / (a + b), as a^2 + b^2 = 1
        xt = (z / scale).to(z.dtype)
        x0, eps = self.predict(xt, t, tau / scale, (1 - tau) / scale, y, guidance)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (z - tau * x0) / (1 - tau)                # the noise that fits the clipped x0
        return x0 - eps

    def times(self, steps, even=False):
        """
        The times tau of a sampler of sample.py, from noise to data at tau = 1: at most T steps.

        Steps are shorter near the noise, where shapes are decided: s / (2 - s) for evenly spaced s
        (Esser et al. 2024, arXiv 2403.03206, section 5.3.2), rounded to the next noisier t, each t
        once. even=True spaces them evenly in t instead, for samplers that evaluate the model ahead:
        midpoint, heun, rk4. They then end at t = 0, the least noise that the model knows.
        """
        T, steps = self.n_steps, min(steps, self.n_steps)
        if even:
            fractions = [i / max(1, steps - 1) for i in range(steps)]
            return [self.taus[round((1 - fraction) * (T - 1))] for fraction in fractions]
        ts = []
        for i in range(steps):
            shifted = i / (2 * steps - i)                   # s / (2 - s) for s = i / steps
            noisier = sum(tau > shifted for tau in self.taus)
            most = ts[-1] - 1 if ts else T - 1              # each t once,
            least = steps - 1 - i                           # and one left for each later step
            ts.append(max(least, min(noisier, most)))
        return [self.taus[t] for t in ts] + [1.0]


def build(model, config, device="cpu"):
    """Wrap a model, called with t in [0, 1], in the method that the options of a run describe."""
    names = ["n_steps", "schedule", "prediction", "weighting", "variance", "t_mean", "t_uniform"]
    options = {name: config[name] for name in names}
    return DenoiseDiffusion(model, device=device, unit_time=True, **options)


# ==== the same in ddpm.py and cfm.py from here on, byte for byte: guidance, times, training ====

def expand_like(t, x):
    """t (B,), or a number, reshaped to (B, 1, ...) to broadcast against x (B, *dim)."""
    return t.reshape(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(t) else t


def classifier_free_guidance(model, t, x, y, scale):
    """
    out(no label) + scale (out(label) - out(no label)), (B, *dim), in one call of the model.

    Ho & Salimans 2022 (arXiv 2207.12598). At scale 1, or without labels, it is the plain model.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)     # in half precision errors would add up
    if t.is_floating_point():                               # in bfloat16 nearby times are the same
        t = t.to(torch.promote_types(t.dtype, dtype))
    guided = y is not None and scale != 1
    if guided:
        t, x, y = torch.cat([t, t]), torch.cat([x, x]), torch.cat([y, torch.full_like(y, -1)])
    out = model(t=t, x=x, y=y).to(dtype)
    if out.shape != x.shape:                                 # broadcasting would hide it
        raise ValueError(f"the model returned {tuple(out.shape)} for an x of {tuple(x.shape)}")
    if not guided:
        return out
    labelled, unlabelled = out.chunk(2)
    return unlabelled + scale * (labelled - unlabelled)


def draw_times(n, mean, uniform, device="cpu"):
    """
    n training times in [0, 1]: each is uniform with probability uniform, else sigmoid(N(mean, 1)).

    Esser et al. 2024 (arXiv 2403.03206), section 3.1. At both ends the best prediction is little
    more than a mean: most of what can be learned lies in between.
    """
    t = torch.rand(n, device=device)
    if uniform < 1:
        normal = mean + torch.randn(n, device=device)
        t = torch.where(torch.rand(n, device=device) < uniform, t, normal.sigmoid())
    return t


# -----------------------------------------------------------------------------
# output
eval_interval = 938       # iterations between evaluations, grids and checkpoints: an epoch of MNIST
log_interval = 100        # iterations between lines of the log
init_from = "scratch"     # or "resume": continue the run in out_dir with its options; or another
#                           run's folder: start from its averaged weights
overwrite = False         # replace the run in out_dir
# data
dataset = "mnist"         # or fashion_mnist, cifar10, faces, synthetic, a folder, an .npz file
data_dir = "data"         # for downloads, and for the cache of picture folders
image_size = 0            # centre-crop and resize pictures to this size; 0: leave them as they are
background = "white"      # for transparent pictures: a colour's name, or #rrggbb
changed_data = False      # allow resuming on changed data
offload = False           # keep the pictures in CPU memory: for data sets too large for the GPU
flip = False              # randomly mirror pictures: not for digits
conditional = True        # class-conditional, if the data has labels
label_dropout = 0.02      # fraction of labels dropped, which makes guidance possible
# model, see unet.py
channels = 24             # base width
channel_mults = (1, 2)    # width of each level, as a multiple; the resolution halves in between
n_res_blocks = 1          # residual blocks per level
attention_levels = (2,)   # levels with attention, from 0; one past the last is the middle block
dropout = 0.0             # inside the residual blocks
patch = 2                 # fold patch x patch pixels into channels: 2 halves the resolution
norm_groups = 8           # of channels, normalised separately; 1 keeps colours more exact
# training
batch_size = 64           # per process; with accumulation, the micro-batch size
gradient_accumulation_steps = 1  # micro-batches per optimizer step
max_iters = 9380          # optimizer steps: ten epochs of MNIST
minutes = 0.0             # if above 0, train for this long: each log line adjusts max_iters, and so
#                           the decay
muon = True               # Muon for convolution kernels, AdamW for the rest; false: AdamW for all
learning_rate = 6e-3      # peak, before the decay
warmup_iters = 100        # linear warm-up from 0
decay_lr = True           # linear decay to 0 over the whole run; false: constant after the warm-up
weight_decay = 0.01       # decoupled, as in AdamW
adam_beta2 = 0.99         # decay of AdamW's second moment; 0.999 is the usual value
grad_clip = 1.0           # clip the gradient's norm; 0: no clipping
ema_decay = 0.999         # of the averaged weights, which are used for sampling; ramps up from 0.1,
#                           to 0.999 at iteration 8,990: a higher one changes nothing before that
# grids
sampler = "dpm++"         # or textbook, for sample() above, or one of SAMPLERS in sample.py
sample_steps = 6          # with mean pictures the first takes no evaluation: five in all; midpoint
#                           and heun have two a step, rk4 four
guidance = 1.0            # guidance scale: 0 unconditional, 1 conditional, above 1 stronger
# machine
device = "auto"           # cuda, cuda:1, mps or cpu; auto: the first that is available
dtype = "auto"            # float32, bfloat16 or float16; auto: bfloat16 on CUDA, float16 on older
#                           GPUs, float32 elsewhere
compile = "auto"          # torch.compile: true or false; auto: on CUDA
seed = 1337               # every draw is a function of seed, iteration and micro-batch
# -----------------------------------------------------------------------------
LIMITS = METHOD_LIMITS | CHOICES | {                 # (least, most), or a list of choices
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "compile": ["auto", True, False],
    "seed": (0, 2**63 - 1),
    "image_size": (0, 10_000),
    "adam_beta2": (0, 0.999999),
    **dict.fromkeys(["label_dropout", "dropout", "ema_decay"], (0, 1)),
    **dict.fromkeys(["learning_rate", "warmup_iters", "weight_decay", "grad_clip"], (0, math.inf)),
    **dict.fromkeys(["minutes", "attention_levels", "guidance"], (0, math.inf)),
    **dict.fromkeys(["channels", "channel_mults", "n_res_blocks"], (1, math.inf)),
    **dict.fromkeys(["patch", "norm_groups"], (1, math.inf)),
    **dict.fromkeys(["batch_size", "gradient_accumulation_steps", "sample_steps"], (1, math.inf)),
    **dict.fromkeys(["max_iters", "eval_interval", "log_interval"], (1, math.inf)),
}
ARCHITECTURE = ["channels", "channel_mults", "n_res_blocks", "attention_levels", "dropout", "patch",
                "norm_groups"]
UNCHANGEABLE = [*METHOD_UNCHANGEABLE, *ARCHITECTURE,                    # on resume
                "image_size", "conditional", "muon", "adam_beta2"]


def check_options(config):
    """Calls fail() if options do not go together. Runs before any data are read."""
    from configurator import explained, fail
    from core.pictures import find_pictures
    from sample import check_guidance, check_sampler
    from unet import UNet

    with explained():
        architecture = {name: config[name] for name in ARCHITECTURE}
        UNet(in_channels=1, num_classes=int(conditional), **architecture)
        method = build(lambda t, x, y: x, config)    # a stand-in for the network
        check_sampler(sampler, method)
        check_guidance(guidance, conditional, label_dropout)
        method.loss(torch.zeros(2, 1))               # fails now if scipy is missing
    folder, pictures = Path(out_dir).resolve(), Path(dataset).resolve()
    if folder.is_dir() and folder.is_relative_to(pictures) and find_pictures(folder)[0]:
        fail(f"--out_dir={out_dir} holds pictures of --dataset={dataset}: choose another one")


def get_lr(it):
    """The learning rate at iteration it: linear warm-up times linear decay."""
    lr = learning_rate * min(1, (it + 1) / max(1, warmup_iters))
    return lr * (1 - it / max_iters) if decay_lr else lr


def get_batch(pictures, labels):
    """A random batch: x (B, C, H, W) in [-1, 1], and labels y (B,), some replaced by -1."""
    device = labels.device
    i = torch.randint(len(pictures), (batch_size,))
    x = pictures[i.to(pictures.device, non_blocking=True)]
    if x.device != device:                           # offloaded
        x = x.pin_memory()                           # so that the copy does not block the CPU
    x = x.to(device, non_blocking=True).float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    dropped = torch.rand(batch_size, device=device) < label_dropout
    y = torch.where(dropped, -1, labels[i.to(device, non_blocking=True)])
    return x, y


def make_optimizer(model):
    """Muon for convolution kernels and AdamW for the rest, or AdamW for all."""
    from core.muon import Muon

    if muon:
        return Muon(model.parameters(), betas=(0.9, adam_beta2))
    return torch.optim.AdamW(model.parameters(), betas=(0.9, adam_beta2), fused=True)


def update_weights(model, optimizer, scaler, lr):
    """An optimizer step at rate lr, with the gradients that backward() left in the model."""
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=weight_decay)   # a resumed run may change the latter
    scaler.unscale_(optimizer)                       # so that clipping sees the true gradients
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)                           # skipped if a float16 gradient overflowed
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def update_average(ema, model, it):
    """
    Moves the averaged weights towards the latest ones.

    Averaging smooths out the noise of single steps, and gives better samples. The decay starts low,
    so that the initial weights are soon forgotten. Buffers, such as BatchNorm's, follow the model.
    """
    decay = min(ema_decay, (1 + it) / (10 + it))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, latest in zip(ema.buffers(), model.buffers()):
        average.copy_(latest)


@torch.no_grad()
def evaluate(method, x, y, noise, offsets):
    """
    Mean loss on x (N, C, H, W) with labels y (N,): at uniform times, then in each quarter of them.

    offsets (N,) in [0, 1) place each picture's time within the quarter.
    """
    torch.manual_seed(seed)
    quarters = []
    for quarter in range(4):
        times = ((quarter + offsets) / 4).clamp(max=1 - 2**-24)    # (3 + offset) / 4 may round to 1
        batches = zip(*[v.split(batch_size) for v in (x, y, noise, times)])
        total = sum(len(batch[0]) * method.loss(*batch) for batch in batches)
        quarters.append(total.item() / len(x))
    return [sum(quarters) / 4, *quarters]


def sample_grid(method, noise, y):
    """Pictures drawn from noise (N, C, H, W), with labels y (N,), as the options say."""
    from sample import draw

    batches = zip(noise.split(batch_size), y.split(batch_size))
    return torch.cat([draw(method, *batch, sampler, sample_steps, guidance) for batch in batches])


if __name__ == "__main__":
    from configurator import configure, explained, say
    from core.checkpoint import (in_half, load_start, require_same_data, restore, resume,
                                 take_weights)
    from core.data import evaluation_batches, load_data
    from core.machine import choose_machine, describe, init_distributed, wrap
    from core.run import Run, survive
    from sample import check_guidance
    from unet import UNet

    # Options: the defaults, or the run's own when resuming, overridden by the command line.
    config = configure(globals(), LIMITS)
    start = load_start(init_from, METHOD, out_dir, overwrite)    # a checkpoint, None from scratch
    if init_from == "resume":
        config = resume(globals(), LIMITS, UNCHANGEABLE, start)
    check_options(config)
    resuming = init_from == "resume"

    # The machine, and the other processes if torchrun started some.
    device, dtype, compile = choose_machine(device, dtype, compile)
    processes = init_distributed(device)
    rank, world_size = processes.rank, processes.world_size

    # Mixed precision: weights stay in float32, the model computes in dtype. float16 gradients are
    # scaled up, or small ones would underflow.
    device_type = torch.device(device).type
    autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

    # Data: all on the device as uint8, so no DataLoader is needed.
    with processes.main_first(), explained(f"--dataset={dataset}: "):
        data = load_data(dataset, data_dir, image_size, conditional, background)
    data.to(device, offload)
    picture_shape = tuple(data.train[0].shape[1:])   # (C, H, W)
    num_classes = len(data.classes)
    with explained(f"{dataset}: "):
        check_guidance(guidance, num_classes, label_dropout)
    held_out_batch, grid_batch = evaluation_batches(*data.held_out, num_classes)

    # The model, the average of its weights, and the optimizer.
    torch.manual_seed(seed)
    model_args = {name: config[name] for name in ARCHITECTURE}
    model_args |= {"in_channels": picture_shape[0], "num_classes": num_classes}
    model = UNet(**model_args).to(device, memory_format=torch.channels_last)
    if start and not resuming:
        take_weights(model, start, init_from, config, UNCHANGEABLE, data.classes)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model)
    it, early = 0, {}                                # early: averaged weights, a quarter of the way
    losses = torch.zeros(2, device=device)           # sum and count since the last log line
    if resuming:
        require_same_data(start, dataset, data, model_args, changed_data)
        restore(start, model=model, ema=ema, optimizer=optimizer, scaler=scaler)
        it, early = start["iteration"], start["early"]
        losses += start["losses"].to(device)

    wrapped = wrap(model, compile, gradient_accumulation_steps, world_size)
    method, ema_method = build(wrapped, config, device), build(ema, config, device)
    means = ema_method.means = data.means(label_dropout, flip)

    # The run, and what it is about to do.
    pictures_per_iter = batch_size * gradient_accumulation_steps * world_size
    run = Run(out_dir, processes, max_iters, pictures_per_iter,
              start if resuming else None, overwrite)
    say(f"{METHOD} on {dataset}: {data.describe()}")
    say(describe(ema, held_out_batch, device, dtype, compile, world_size))
    run.announce(minutes)

    while it < max_iters and not run.stopping:
        for micro in range(gradient_accumulation_steps):
            # One seed per batch: resuming draws the same batches, and n processes draw what one
            # does with n micro-batches. Python does not randomise the hash of integers.
            torch.manual_seed(hash((seed, it, micro * world_size + rank)))
            x, y = get_batch(*data.train)
            if world_size > 1:                       # sync gradients on the last micro-batch only
                wrapped.require_backward_grad_sync = micro == gradient_accumulation_steps - 1
            with autocast:
                loss = method.loss(x, y)
            scaler.scale(loss / gradient_accumulation_steps).backward()
            losses += torch.stack([loss.detach(), torch.ones_like(loss)])
        lr = get_lr(it)
        update_weights(model, optimizer, scaler, lr)
        update_average(ema, model, it)
        it += 1

        logging = it % log_interval == 0 or it % eval_interval == 0 or it == max_iters
        if not (run.stop_requested() or logging):
            continue
        loss, speed = run.mean(losses), run.speed(it)    # waits for the GPU, so only now and then
        if minutes:                                      # in config too: resuming follows this plan
            max_iters = config["max_iters"] = run.iterations_in(minutes, it, speed)
        evaluating = it % eval_interval == 0 or it == max_iters
        with autocast:
            held_out = evaluate(ema_method, *held_out_batch) if evaluating else []
        run.require_finite(it, [loss, *held_out], model)
        if logging:
            run.log(it, loss, lr, speed, held_out, optimizer)
            losses.zero_()
        if evaluating and not early and max_iters / 4 <= it <= max_iters / 2:
            early = in_half(ema.state_dict())
        if evaluating or run.stopping:
            run.save(method=METHOD, config=config, iteration=it, losses=losses,
                     model_args=model_args, picture_shape=picture_shape, data=data.summary(),
                     means=means, early=early, model=model.state_dict(), ema=ema.state_dict(),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if evaluating:
            with autocast, survive(FloatingPointError, "draw a grid"):    # dopri5 may fail
                run.save_grid(it, sample_grid(ema_method, *grid_batch), held_out)
        run.start_clock(it)
    run.finish(it)
