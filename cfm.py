"""
Conditional flow matching in one file: Lipman et al. 2022 (arXiv 2210.02747), Tong et al. 2023 (2302.00482).

    python cfm.py                                              # MNIST, ten epochs; watch out/cfm
    python cfm.py --sigma=0.1 --batch_size=128                 # any option below; --help lists them
    python cfm.py --dataset=path/to/pictures --image_size=64   # your own, labelled by their subfolders
    python cfm.py --init_from=resume                           # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 cfm.py            # on four GPUs

Noise x0, at t = 0, flows to data x1, at t = 1, along dx/dt = v(t, x). The path from one x0 to one x1 is
ours to choose: a straight line, of velocity x1 - x0. A model trained to predict that, for all pairs,
learns the mean velocity of the lines that pass through x at t, since a mean is what has the smallest
squared error. The flow of that mean carries noise to the distribution of the data.
docs/mathematics.md derives all of it.
"""
import copy
import math
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
# output
eval_interval = 938       # iterations between evaluations, each with a grid and a checkpoint; an epoch of MNIST
log_interval = 100        # iterations between log lines
init_from = "scratch"     # or "resume": continue the run in out_dir, under its own options
overwrite = False         # let a run from scratch replace the one in out_dir
# data
dataset = "mnist"         # mnist, fashion_mnist, cifar10, synthetic, a folder of pictures, or an .npz file
data_dir = "data"         # where downloads are kept
image_size = 0            # side to bring pictures to; 0: as they are
flip = False              # mirror pictures at random: never for digits
conditional = True        # learn the labels, if there are any; false: unconditional
label_dropout = 0.02      # share of labels hidden in training: guidance needs the unconditional model too
# model, see unet.py
channels = 24             # width of the first level
channel_mults = (1, 2)    # width of each level, in multiples of channels; every level halves the resolution
n_res_blocks = 1          # residual blocks a level
attention_levels = (2,)   # levels with attention, from 0; the one after the last is the middle
dropout = 0.0             # inside the residual blocks
patch = 2                 # patch x patch pixels become channels first: 2 works at half the resolution
# training
batch_size = 64           # pictures a process takes at a time
gradient_accumulation_steps = 1  # batches a process takes for one step of the optimizer
max_iters = 9380          # steps of the optimizer: ten epochs of MNIST
muon = True               # Muon for the kernels of convolutions, AdamW for the rest; false: AdamW for all
learning_rate = 6e-3      # the largest, after the warm-up
warmup_iters = 100        # the rate rises from 0 in a straight line
decay_lr = True           # and falls to 0 in a straight line until max_iters; false: stays
weight_decay = 0.01       # decoupled, as in AdamW
adam_beta2 = 0.99         # decay of AdamW's second moment; 0.999 in Kingma & Ba
grad_clip = 1.0           # largest norm of the gradient; 0: any
ema_decay = 0.999         # of the averaged weights, which are used for sampling; rises to this from 0.1
# machine
device = "auto"           # cuda, cuda:1, mps or cpu; auto: the first of them that is there
dtype = "auto"            # float32, bfloat16, float16; auto: float32, on CUDA bfloat16 (old cards: float16)
compile = "auto"          # torch.compile: true, false; auto: on CUDA
seed = 1337               # every draw is a function of seed, iteration and micro-batch
# the method, and the grids drawn with it
out_dir = "out/cfm"       # for checkpoints, grids and log.csv
path = "icfm"             # from noise to data: icfm, ot, target, vp or sb, see the classes below
sigma = 0.0               # width of the path around its mean; sb needs one, such as 0.5
t_mean = -0.4             # times to train at are sigmoids of normal draws of this mean; below 0: more noise
t_uniform = 0.0           # but this share of a batch has uniform ones
sampler = "dpm++"         # or ddim, for straight paths; euler, midpoint, heun, rk4, dopri5 for any: see sample.py
sample_steps = 5          # midpoint and heun take 2 evaluations of the model each, rk4 takes 4
guidance = 1.0            # 1: the conditional model as it is; 0: the unconditional; above 1: exaggerated labels
# -----------------------------------------------------------------------------
METHOD = "cfm"


class ConditionalFlowMatcher:
    """
    I-CFM of Tong et al.: a path from x0 (noise) to x1 (data), p_t(x | x0, x1) = N(x; mu_t, sigma_t^2).

    Its mean goes straight, mu_t = t x1 + (1 - t) x0, and its width is constant, sigma_t = sigma. A Gaussian
    path has the velocity
        u_t(x | x0, x1) = sigma_t' / sigma_t (x - mu_t) + mu_t'            (Lipman et al., theorem 3),
    of which mu_t' = x1 - x0 is left here.

    Throughout, x0, x1, xt and ut are (B, *dim), and t is (B,) in [0, 1]. Raises ValueError for a sigma below 0.
    """
    straight = True              # the path is a line, so that x_t and its velocity give data and noise
    margin = 0.0                 # how far training keeps away from t = 0 and t = 1

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
        """Weight of a score model's loss beside this one (Tong et al. 2023, arXiv 2307.03672), like sigma_t."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)

    def sample_noise_like(self, x):
        """Draws from N(0, I), (B, *dim)."""
        return torch.randn_like(x)

    def sample_xt(self, x0, x1, t, epsilon):
        """A point of the path at t, mu_t + sigma_t epsilon: (B, *dim)."""
        return self.compute_mu_t(x0, x1, t) + expand_like(self.compute_sigma_t(t), x0) * epsilon

    def compute_conditional_flow(self, x0, x1, t, xt):
        """Velocity u_t(xt | x0, x1) of the path, (B, *dim)."""
        return x1 - x0

    def pair(self, x0, x1, y=None):
        """x0 in the order in which it goes with x1: here as it comes, since both are independent."""
        return x0

    def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False, y=None):
        """
        Where to evaluate the model and what it should say: (t, xt, ut), and epsilon if return_noise.

        Without t, times are uniform. Draws rand(B), then randn like x0 even if sigma is 0, so that one seed
        gives what it gives in torchcfm.
        """
        x0 = self.pair(x0, x1, y)
        t = torch.rand(x0.shape[0]).type_as(x0) if t is None else t
        epsilon = self.sample_noise_like(x0)
        xt = self.sample_xt(x0, x1, t, epsilon)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, epsilon) if return_noise else (t, xt, ut)


class ExactOptimalTransportConditionalFlowMatcher(ConditionalFlowMatcher):
    """
    OT-CFM of Tong et al.: the same path, between pairs of the smallest sum of squared distances.

    The flow becomes straighter. x0 is reordered and x1 stays, so that no picture is lost and labels stay
    true. With labels y, pairs are formed within each class, or its noise would not be normal.
    """

    def pair(self, x0, x1, y=None):
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise ImportError("optimal pairing of noise and data needs scipy: pip install scipy") from None

        y = torch.zeros(len(x0)) if y is None else y.cpu()
        order = torch.arange(len(x0))
        for label in y.unique():
            own = (y == label).nonzero().flatten()
            cost = torch.cdist(x1[own].flatten(1).float(), x0[own].flatten(1).float()) ** 2
            _, column = linear_sum_assignment(cost.cpu().numpy())
            order[own] = own[torch.from_numpy(column)]
        return x0[order]


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """Lipman et al., eq. 20 and 21: from N(0, I), whatever x0 is, to N(x1, sigma^2)."""

    def compute_mu_t(self, x0, x1, t):
        return expand_like(t, x1) * x1

    def compute_sigma_t(self, t):
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(self, x0, x1, t, xt):
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * expand_like(t, x1))


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Albergo & Vanden-Eijnden 2022 (arXiv 2209.15571): a quarter of a circle, on which variance stays 1."""
    straight = False

    def compute_mu_t(self, x0, x1, t):
        angle = math.pi / 2 * expand_like(t, x0)
        return torch.cos(angle) * x0 + torch.sin(angle) * x1

    def compute_conditional_flow(self, x0, x1, t, xt):
        angle = math.pi / 2 * expand_like(t, x0)
        return math.pi / 2 * (torch.cos(angle) * x1 - torch.sin(angle) * x0)


class SchrodingerBridgeConditionalFlowMatcher(ExactOptimalTransportConditionalFlowMatcher):
    """
    SB-CFM of Tong et al.: Brownian bridges, of variance sigma^2 t (1 - t), between optimal pairs.

    Pairs are those of OT-CFM. Tong et al. draw them from an entropic plan, which for small sigma is nearly that.
    """
    straight = False
    margin = 1e-3                # sigma_t' is infinite at both ends

    def __init__(self, sigma=1.0):
        if sigma <= 0:
            raise ValueError(f"a Schroedinger bridge needs a sigma above 0, such as 0.5, but it is {sigma}")
        super().__init__(sigma)

    def compute_sigma_t(self, t):
        return self.sigma * torch.sqrt(t * (1 - t))

    def compute_conditional_flow(self, x0, x1, t, xt):
        t_ = expand_like(t, x0)
        growth = (1 - 2 * t_) / (2 * t_ * (1 - t_) + 1e-8)             # sigma_t' / sigma_t
        return growth * (xt - self.compute_mu_t(x0, x1, t)) + x1 - x0


PATHS = {
    "icfm": ConditionalFlowMatcher,
    "ot": ExactOptimalTransportConditionalFlowMatcher,
    "target": TargetConditionalFlowMatcher,
    "vp": VariancePreservingConditionalFlowMatcher,
    "sb": SchrodingerBridgeConditionalFlowMatcher,
}


class VelocityField:
    """
    The model of a velocity, the loss that trains it, and the flow along it from noise to data.

    v_model          is called as v_model(t=t, x=xt, y=y) and answers with a tensor like xt
    matcher          a ConditionalFlowMatcher: the paths
    t_mean, t_uniform  the times to train at, see draw_times(); by default uniform

    x, x0 and x1 are (B, *dim); t is (B,) in [0, 1]; labels y are long (B,), -1 for none, or None.
    """

    def __init__(self, v_model, matcher, t_mean=0.0, t_uniform=1.0):
        self.v_model = v_model
        self.matcher = matcher
        self.straight = matcher.straight
        self.t_mean, self.t_uniform = t_mean, t_uniform

    def loss(self, x1, y=None, noise=None, u=None):
        """E |v(t, xt) - ut|^2, a scalar, for pictures x1. u (B,) in [0, 1) sets the times t = u."""
        t = draw_times(len(x1), self.t_mean, self.t_uniform, x1.device) if u is None else u
        t = t.clamp(self.matcher.margin, 1 - self.matcher.margin)
        x0 = self.matcher.sample_noise_like(x1) if noise is None else noise
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(x0, x1, t, y=y)
        return (self.velocity(t, xt, y) - ut).square().mean()

    def velocity(self, tau, z, y=None, guidance=1.0, clip=False):
        """dz / dtau at z (B, *dim) and tau (B,), which are the x and t of above. There is nothing to clip."""
        return classifier_free_guidance(self.v_model, tau, z, y, guidance)

    @torch.no_grad()
    def sample(self, noise, y=None, steps=100, guidance=1.0):
        """Euler's method along dx/dt = v(t, x): pictures from noise (B, *dim), in steps of equal length."""
        x, dt = noise, 1 / steps
        for i in range(steps):
            t = torch.full((len(x),), i * dt, device=x.device)
            x = x + dt * self.velocity(t, x, y, guidance)
        return x

    def times(self, steps, even=False):
        """
        The tau, in rising order, between which a sampler makes its steps, from 0 to 1.

        They are u / (2 - u) for even u: steps are shorter at the noise, where shapes are decided (Esser et al.
        2024, arXiv 2403.03206, section 5.3.2). With even they are even, for samplers that look ahead.
        """
        if even:
            return [i / steps for i in range(steps + 1)]
        return [i / (2 * steps - i) for i in range(steps + 1)]


def build(model, config, device="cpu"):
    """The method around a model of t in [0, 1], under the options of a run."""
    matcher = PATHS[config["path"]](config["sigma"])
    return VelocityField(model, matcher, config["t_mean"], config["t_uniform"])


# the options that a run keeps for good, and what options may be: from the least to the most, or one of a list
FIXED = ["path", "sigma"]
LIMITS = {
    "path": list(PATHS),
    "sigma": (0, math.inf),
    "sampler": ["dpm++", "ddim", "euler", "midpoint", "heun", "rk4", "dopri5"],
}


# ---- the rest is the same in ddpm.py and cfm.py; the options are globals ----

def expand_like(t, x):
    """t (B,), or a number, shaped (B, 1, ...) to go with x (B, *dim)."""
    return t.reshape(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(t) else t


def classifier_free_guidance(model, t, x, y, scale):
    """
    out(no label) + scale (out(label) - out(no label)), (B, *dim), in one call of the model.

    Ho & Salimans 2022 (arXiv 2207.12598). At scale 1, or without labels, this is the model as it is.
    """
    if y is None or scale == 1:
        return model(t=t, x=x, y=y).float()
    t, x, y = torch.cat([t, t]), torch.cat([x, x]), torch.cat([y, torch.full_like(y, -1)])
    labelled, unlabelled = model(t=t, x=x, y=y).float().chunk(2)
    return unlabelled + scale * (labelled - unlabelled)


def draw_times(n, mean, uniform, device="cpu"):
    """
    n times in [0, 1]: a share of uniform ones, the others sigmoids of draws from N(mean, 1).

    Esser et al. 2024 (arXiv 2403.03206), section 3.1: the middle of the way is the hardest to learn.
    """
    k = round(uniform * n)
    even = torch.rand(k, device=device)
    normal = mean + torch.randn(n - k, device=device)
    return torch.cat([even, normal.sigmoid()])


def get_lr(it):
    """The learning rate of iteration it: a warm-up from 0, then a straight line to 0 at max_iters."""
    lr = learning_rate * min(1, (it + 1) / max(1, warmup_iters))
    return lr * (1 - it / max_iters) if decay_lr else lr


def get_batch(pictures, labels):
    """A random batch: x (B, C, H, W) in [-1, 1], and y (B,), of which a share is hidden, -1."""
    device = pictures.device
    i = torch.randint(len(pictures), (batch_size,)).to(device, non_blocking=True)
    x = pictures[i].float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    hidden = torch.rand(batch_size, device=device) < label_dropout
    return x, torch.where(hidden, -1, labels[i])


def update_average(ema, model, it):
    """Bring the averaged weights nearer to the latest. The average is short at first, or it would hold noise."""
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    decay = min(ema_decay, (1 + it) / (10 + it))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), it)


@torch.no_grad()
def evaluate(method, x, y, noise, u):
    """
    Mean loss on x (N, C, H, W) with labels y (N,): over all times, then in each quarter of them.

    The same noise (N, C, H, W) and u (N,), the place within the quarter, make evaluations comparable.
    """
    torch.manual_seed(seed)
    quarters = []
    for quarter in range(4):
        batches = zip(*[v.split(batch_size) for v in (x, y, noise, (quarter + u) / 4)])
        total = sum(len(batch[0]) * method.loss(*batch) for batch in batches)
        quarters.append(total.item() / len(x))
    return [sum(quarters) / 4, *quarters]


def sample_grid(method, noise, y):
    """Pictures like noise (N, C, H, W), of labels y (N,), drawn as the options say."""
    from sample import draw

    batches = zip(noise.split(batch_size), y.split(batch_size))
    return torch.cat([draw(method, *batch, sampler, sample_steps, guidance) for batch in batches])


def check_options(config):
    """Calls fail() where options do not go together: before any data are read."""
    from configurator import explained, fail
    from sample import check_sampler
    from unet import UNet

    with explained():
        trial = build(UNet(**{name: config[name] for name in ARCHITECTURE}), config)
        check_sampler(sampler, trial)
        trial.loss(torch.zeros(2, 1, 8, 8))          # of two grey pictures
    if guidance != 1 and not conditional:
        fail(f"--guidance={guidance}: without labels there is nothing to be guided by")
    if guidance != 1 and not label_dropout:
        fail(f"--guidance={guidance} needs the unconditional model too, so a --label_dropout above 0")


ARCHITECTURE = ["channels", "channel_mults", "n_res_blocks", "attention_levels", "dropout", "patch"]
FIXED += ["dataset", "image_size", "conditional", "muon", "adam_beta2", *ARCHITECTURE]

if __name__ == "__main__":
    from configurator import TRAINING, configure, explained, fail, resume
    from core.data import load_data
    from core.machine import choose_machine, describe_model, init_distributed
    from core.run import Run, load_checkpoint, require_no_run
    from unet import Muon, UNet

    # The options are the defaults, or those of the run that goes on, and over them the command line.
    config, checkpoint = configure(globals(), TRAINING | LIMITS), None
    if init_from == "resume":
        checkpoint = load_checkpoint(Path(out_dir, "ckpt.pt"), METHOD)
        config = resume(globals(), TRAINING | LIMITS, FIXED, checkpoint)
    elif not overwrite:
        require_no_run(out_dir)
    check_options(config)

    # The machine, and the other processes if torchrun started some. Weights stay float32 under autocast.
    device, dtype, compile = choose_machine(device, dtype, compile)
    autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")
    processes = init_distributed(device)
    rank, world_size = processes.rank, processes.world_size

    # The data are all on the device, a byte a value, which spares a loader and its workers.
    with processes.main_first(), explained(f"--dataset={dataset}: "):
        splits = load_data(dataset, data_dir, image_size, conditional)
    (x_train, y_train), (x_val, y_val) = [(x.to(device), y.to(device)) for x, y in splits]
    picture_shape = tuple(x_train.shape[1:])         # (C, H, W)
    num_classes = int(max(y_train.max(), y_val.max())) + 1
    if guidance != 1 and not num_classes:
        fail(f"--guidance={guidance}: {dataset} has no labels to be guided by")

    # The model, the average of its weights, and the optimizer. float16 gradients are scaled, or they vanish.
    torch.manual_seed(seed)
    model_args = {name: config[name] for name in ARCHITECTURE}
    model_args |= {"in_channels": picture_shape[0], "num_classes": num_classes}
    model = UNet(**model_args).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if muon:
        optimizer = Muon(model.parameters(), betas=(0.9, adam_beta2))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, adam_beta2), fused=True)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == "float16")
    losses = torch.zeros(2, device=device)           # their sum and number since the last log line
    it = 0
    if checkpoint:
        if checkpoint["model_args"] != model_args:
            fail(f"--dataset={dataset} has changed: the model of {out_dir} is for {checkpoint['model_args']}")
        with explained(f"{out_dir}/ckpt.pt is of another version of this program: "):
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:                 # empty but for float16
                scaler.load_state_dict(checkpoint["scaler"])
            losses += checkpoint["losses"].to(device) / world_size
        it = checkpoint["iteration"]
    net = torch.compile(model) if compile else model
    if world_size > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    trained, averaged = build(net, config, device), build(ema, config, device)

    # What is evaluated, always with the same noise: held-out pictures, and a grid with a row for each class.
    fixed = torch.Generator().manual_seed(0)
    x_val, y_val = x_val[:256].float() / 127.5 - 1, y_val[:256]
    noise = torch.randn(x_val.shape, generator=fixed).to(device)
    u = torch.rand(len(x_val), generator=fixed).to(device)
    grid_noise = torch.randn(100, *picture_shape, generator=fixed).to(device)
    grid_labels = (torch.arange(100) // 10 % num_classes if num_classes else torch.full((100,), -1)).to(device)

    pictures_per_iter = batch_size * gradient_accumulation_steps * world_size
    run = Run(out_dir, processes, it, max_iters, pictures_per_iter, resumed=bool(checkpoint), overwrite=overwrite)
    run.say(f"{METHOD} on {dataset}: {len(x_train)} pictures of {picture_shape}, {num_classes} classes")
    run.say(describe_model(ema, t=u[:1], x=x_val[:1], y=y_val[:1]))
    run.say(f"{device}, {dtype}, {'compiled' if compile else 'not compiled'}, "
            f"{world_size} process{'es' if world_size > 1 else ''}")
    run.say(f"iterations {it} to {max_iters}, of {pictures_per_iter} pictures each")
    run.say(f"samples, log.csv and ckpt.pt go to {Path(out_dir).resolve()}")

    while it < max_iters and not run.stopping:
        lr = get_lr(it)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=weight_decay)
        for micro in range(gradient_accumulation_steps):
            # A seed for each batch: a resumed run draws what it would have drawn without a stop.
            torch.manual_seed(hash((seed, it, micro * world_size + rank)))
            x, y = get_batch(x_train, y_train)
            if world_size > 1:                       # gradients are exchanged once, with the last batch
                net.require_backward_grad_sync = micro == gradient_accumulation_steps - 1
            with autocast:
                loss = trained.loss(x, y)
            scaler.scale(loss / gradient_accumulation_steps).backward()
            losses += torch.stack([loss.detach(), torch.ones_like(loss)])
        scaler.unscale_(optimizer)                   # what is clipped is the true gradient
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)                       # does nothing if a float16 gradient overflowed
        scaler.update()
        optimizer.zero_grad()
        update_average(ema, model, it)
        it += 1

        evaluating = it % eval_interval == 0 or it == max_iters
        logging = it % log_interval == 0 or evaluating
        if not (run.stop_requested() or logging):
            continue
        processes.average(losses)                    # only here is a GPU waited for
        loss, speed = (losses[0] / losses[1]).item(), run.speed(it)
        with autocast:
            held_out = evaluate(averaged, x_val, y_val, noise, u) if evaluating else []
        run.require_finite(it, [loss, *held_out], model)
        if logging:
            run.log(it, loss, lr, speed, held_out, optimizer)
            losses.zero_()
        if evaluating or run.stopping:
            run.save_checkpoint(method=METHOD, config=config, iteration=it, losses=losses,
                                model_args=model_args, picture_shape=picture_shape,
                                model=model.state_dict(), ema=ema.state_dict(),
                                optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if evaluating:
            with autocast:
                grid = sample_grid(averaged, grid_noise, grid_labels)
            run.save_grid(it, grid, held_out)
        run.start_clock(it)
    run.finish(it)
