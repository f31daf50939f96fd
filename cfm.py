"""
Conditional flow matching in one file: Lipman et al. 2022 (arXiv 2210.02747) and Tong et al. 2023
(arXiv 2302.00482).

    python cfm.py                                              # MNIST, ten epochs, into out/cfm
    python cfm.py --sigma=0.1 --batch_size=128                 # any option below; --help lists them
    python cfm.py --dataset=path/to/pictures --image_size=64   # your own, labelled by subfolders
    python cfm.py --init_from=resume                           # continue a run that was stopped
    torchrun --standalone --nproc_per_node=4 cfm.py            # four processes, for as many GPUs

Noise x0, at t = 0, flows to data x1, at t = 1, along dx/dt = v(t, x). We choose the path from
one x0 to one x1: a straight line, of velocity x1 - x0. A model trained to predict that from x_t and
t alone learns the mean velocity of the lines through x_t, since the mean minimises the squared
error. The flow along it carries noise to the data distribution. docs/mathematics.md derives it all.
Sibling files are imported where they are used, so the classes here need only torch.
"""
import copy
import math
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
# the method; the options of training, the same in ddpm.py, are below
out_dir = "out/cfm"       # for checkpoints, grids and log.csv
path = "icfm"             # noise to data: icfm, ot, target, vp, sb or sb_exact; see the classes
sigma = 0.0               # standard deviation of the path; sb needs it above 0, such as 0.5
t_mean = -0.4             # training times are sigmoid(N(t_mean, 1)); t = 0 is noise
t_uniform = 0.02          # probability of a uniform time instead
# -----------------------------------------------------------------------------
METHOD = "cfm"
METHOD_LIMITS = {"sigma": (0, math.inf), "t_mean": (-5, 5), "t_uniform": (0, 1)}   # (least, most)
METHOD_UNCHANGEABLE = ["path", "sigma"]              # on resume


class ConditionalFlowMatcher:
    """
    I-CFM of Tong et al.: a path p_t(x | x0, x1) = N(x; mu_t, sigma_t^2) from noise x0 to data x1.

    Its mean is a straight line, mu_t = t x1 + (1 - t) x0, and sigma_t = sigma is constant. Any
    Gaussian path has the velocity
        u_t(x | x0, x1) = sigma_t' / sigma_t (x - mu_t) + mu_t'      (Lipman et al., theorem 3).
    Here sigma_t' = 0, so it is mu_t' = x1 - x0. Training takes place at xt = t x1 + (1 - t) x0 +
    sigma epsilon, with ut = x1 - x0 as the target. The other paths below override what differs.

    Throughout, x0, x1, xt and ut are (B, *dim), and t is (B,) in [0, 1]. Raises ValueError for a
    negative sigma.
    """
    straight = True              # without sigma, x1 = xt + (1 - t) ut and x0 = xt - t ut
    independent = True           # noise and data are drawn independently of each other
    margin = 0.0                 # training stays this far from t = 0 and t = 1

    def __init__(self, sigma=0.0):
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, but is {sigma}")
        self.sigma = sigma

    def compute_mu_t(self, x0, x1, t):
        """Mean of the path at t, (B, *dim)."""
        t = expand_like(t, x0)
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t):
        """Standard deviation of the path at t: a number, or (B,)."""
        return self.sigma

    def compute_lambda(self, t):
        """Weight of a score-matching loss (Tong et al. 2023, arXiv 2307.03672): not used here."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)

    def sample_noise_like(self, x):
        """Draws from N(0, I), (B, *dim)."""
        return torch.randn_like(x)

    def sample_xt(self, x0, x1, t, epsilon):
        """A point on the path at t, mu_t + sigma_t epsilon: (B, *dim)."""
        sigma_t = expand_like(self.compute_sigma_t(t), x0)
        return self.compute_mu_t(x0, x1, t) + sigma_t * epsilon

    def compute_conditional_flow(self, x0, x1, t, xt):
        """Velocity u_t(xt | x0, x1) of the path, (B, *dim)."""
        return x1 - x0

    def pair(self, x0, x1, y=None):
        """x0 reordered to match x1. Here, noise and data are independent: no pairing."""
        return x0

    def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False, y=None):
        """
        Where to evaluate the model, and its target there: (t, xt, ut), or (t, xt, ut, epsilon).

        Draws t uniformly unless it is given, then epsilon, even if sigma is 0: torchcfm's order, so
        the same seed gives the same numbers.
        """
        t = torch.rand(x0.shape[0]).type_as(x0) if t is None else t
        epsilon = self.sample_noise_like(x0)
        x0 = self.pair(x0, x1, y)
        xt = self.sample_xt(x0, x1, t, epsilon)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, epsilon) if return_noise else (t, xt, ut)


class ExactOptimalTransportConditionalFlowMatcher(ConditionalFlowMatcher):
    """
    OT-CFM of Tong et al.: the same path, with noise and data paired within each batch.

    The pairing minimises the total squared distance, which makes the flow straighter. Only x0 is
    reordered, so labels still match, and no picture is lost. With labels y, pairing is within each
    class; otherwise the noise of a class would not be Gaussian.
    """
    independent = False

    def pair(self, x0, x1, y=None):
        pictures = x1.detach().flatten(1).float().cpu()
        noise = x0.detach().flatten(1).float().cpu()
        cost = torch.cdist(pictures, noise) ** 2         # (B, B)
        if not cost.isfinite().all():
            raise ValueError("x0 or x1 is not finite, so they cannot be paired")
        if y is not None:
            y = y.cpu()
            cost = cost.masked_fill(y[:, None] != y, math.inf)
        return x0[self.match(cost).to(x0.device)]

    def match(self, cost):
        """The column (n,) matched to each row of cost (n, n), minimising the total cost."""
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise ImportError("optimal pairing of noise and data needs scipy: "
                              "pip install scipy") from None

        return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """Lipman et al., eq. 20 and 21: from N(0, I), epsilon and not x0, to N(x1, sigma^2)."""

    def compute_mu_t(self, x0, x1, t):
        return expand_like(t, x1) * x1

    def compute_sigma_t(self, t):
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(self, x0, x1, t, xt):
        sigma_t = self.compute_sigma_t(expand_like(t, x1))
        return (x1 - (1 - self.sigma) * xt) / sigma_t


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Albergo & Vanden-Eijnden 2022 (arXiv 2209.15571): x0 and x1 mixed by cosine and sine."""
    straight = False

    def compute_mu_t(self, x0, x1, t):
        angle = math.pi / 2 * expand_like(t, x0)
        return torch.cos(angle) * x0 + torch.sin(angle) * x1

    def compute_conditional_flow(self, x0, x1, t, xt):
        angle = math.pi / 2 * expand_like(t, x0)
        return math.pi / 2 * (torch.cos(angle) * x1 - torch.sin(angle) * x0)


class SchrodingerBridgeConditionalFlowMatcher(ExactOptimalTransportConditionalFlowMatcher):
    """
    SB-CFM of Tong et al.: Brownian bridges, of variance sigma^2 t (1 - t), between pairs.

    Each picture draws its noise from the entropic plan of the batch, as a Schroedinger bridge
    requires. ot_method="exact" takes the pairs of OT-CFM instead.
    """
    straight = False
    margin = 1e-3                # sigma_t' is infinite at both ends

    def __init__(self, sigma=1.0, ot_method="sinkhorn"):
        if sigma <= 0:
            raise ValueError("a Schroedinger bridge needs a sigma above 0, such as 0.5, "
                             f"but it is {sigma}")
        if ot_method not in ("sinkhorn", "exact"):
            raise ValueError(f"ot_method must be sinkhorn or exact, but is {ot_method}")
        super().__init__(sigma)
        self.ot_method = ot_method

    def match(self, cost):
        if self.ot_method == "exact":
            return super().match(cost)
        plan = sinkhorn(cost, 2 * self.sigma**2)
        return torch.multinomial(plan, 1).squeeze(1)

    def compute_sigma_t(self, t):
        return self.sigma * torch.sqrt(t * (1 - t))

    def compute_conditional_flow(self, x0, x1, t, xt):
        mu_t = self.compute_mu_t(x0, x1, t)
        t = expand_like(t, x0)
        growth = (1 - 2 * t) / (2 * t * (1 - t) + 1e-8)     # sigma_t' / sigma_t
        return growth * (xt - mu_t) + x1 - x0


def sinkhorn(cost, reg, tolerance=0.01, max_iters=1000):
    """
    The plan (n, n) that minimises <plan, cost> + reg <plan, log plan>, for a cost (n, n).

    Its rows and columns each sum to 1 / n, columns to within the tolerance (Cuturi 2013, arXiv
    1306.0895). Logarithms avoid underflow. reg is annealed from a large value, to converge fast.
    """
    cost = cost.double()
    temperature = 4 * max(reg, cost[cost.isfinite()].max().item())     # the loop begins at a fourth
    f = g = torch.zeros(len(cost), device="cpu", dtype=torch.float64)   # the dual potentials
    while temperature > reg:
        temperature = max(reg, temperature / 4)
        for _ in range(max_iters):
            g = -temperature * torch.logsumexp((f[:, None] - cost) / temperature, 0)
            rows = torch.logsumexp((f[:, None] + g - cost) / temperature, 1)
            f = f - temperature * rows
            if rows.abs().max() < tolerance:
                break
    plan = ((f[:, None] + g - cost) / temperature).exp()
    return plan / plan.sum()


PATHS = {
    "icfm": ConditionalFlowMatcher,
    "ot": ExactOptimalTransportConditionalFlowMatcher,
    "target": TargetConditionalFlowMatcher,
    "vp": VariancePreservingConditionalFlowMatcher,
    "sb": SchrodingerBridgeConditionalFlowMatcher,
    "sb_exact": lambda sigma: SchrodingerBridgeConditionalFlowMatcher(sigma, ot_method="exact"),
}
CHOICES = {"path": list(PATHS)}


class VelocityField:
    """
    A velocity model, its training loss, and its sampler.

    v_model            called as v_model(t=t, x=xt, y=y); returns a tensor shaped like xt
    matcher            a ConditionalFlowMatcher: the paths to train on
    t_mean, t_uniform  the distribution of training times, see draw_times(); by default uniform

    x0 and x1 are (B, *dim), t is (B,) in [0, 1]. Labels y are long (B,), -1 for none, or None. The
    model is called in the dtype of the pictures or the noise; times and sums stay in float32, or in
    float64.
    """
    textbook = ["textbook"]      # the names by which sample.py calls sample()
    most_steps = math.inf        # the most steps that a sampler may take
    means = None                 # mean pictures, by class: with them the first step needs no model

    def __init__(self, v_model, matcher, t_mean=0.0, t_uniform=1.0):
        self.v_model = v_model
        self.matcher = matcher
        self.t_mean = t_mean
        self.t_uniform = t_uniform
        self.straight = matcher.straight
        self.renewable = matcher.independent and matcher.sigma == 0    # a sampler may renew noise

    def loss(self, x1, y=None, noise=None, u=None):
        """E |v(t, xt) - ut|^2 for pictures x1. Noise x0, times u (B,): drawn unless given."""
        t = draw_times(len(x1), self.t_mean, self.t_uniform, x1.device) if u is None else u
        t = t.clamp(self.matcher.margin, 1 - self.matcher.margin)
        x0 = self.matcher.sample_noise_like(x1) if noise is None else noise
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(x0, x1, t, y=y)
        return (self.velocity(t, xt.to(x1.dtype), y) - ut).square().mean()

    def velocity(self, t, x, y=None, guidance=1.0, clip=False):
        """v(t, x) at t (B,) and x (B, *dim). clip is unused: ddpm.py's velocity needs it."""
        return classifier_free_guidance(self.v_model, t, x, y, guidance)

    @property
    def model(self):
        """The model, under a name that both methods share."""
        return self.v_model

    @torch.no_grad()
    def sample(self, noise, y=None, steps=100, guidance=1.0, clip=False, randn=None):
        """
        Euler's method along dx/dt = v(t, x): pictures from noise (B, *dim), in equal steps.

        clip and randn are unused: ddpm.py's sampler needs them.
        """
        x, dt = noise, 1 / steps
        for i in range(steps):
            t = x.new_full((len(x),), i * dt)
            x = x + dt * self.velocity(t, x.to(noise.dtype), y, guidance)
        return x

    def times(self, steps, even=False):
        """
        The steps + 1 times of a sampler of sample.py, from 0 (noise) to 1 (data).

        Steps are shorter near the noise, where shapes are decided: s / (2 - s) for evenly spaced s
        (Esser et al. 2024, arXiv 2403.03206, section 5.3.2). even=True spaces them evenly instead,
        for samplers that evaluate the model ahead: midpoint, heun, rk4.
        """
        if even:
            return [i / steps for i in range(steps + 1)]
        return [i / (2 * steps - i) for i in range(steps + 1)]


def build(model, config, device="cpu"):
    """Wrap a model, called with t in [0, 1], in the method that the options of a run describe."""
    matcher = PATHS[config["path"]](config["sigma"])
    return VelocityField(model, matcher, config["t_mean"], config["t_uniform"])


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
