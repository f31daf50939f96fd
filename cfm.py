"""
Conditional flow matching in one file: Lipman et al. 2022 (arXiv 2210.02747), Tong et al. 2023 (2302.00482).

    python cfm.py                                              # MNIST, ten epochs; watch out/cfm
    python cfm.py --sigma=0.1 --batch_size=128                 # any option below; --help lists them
    python cfm.py --dataset=path/to/pictures --image_size=64   # your own, labelled by their subfolders
    python cfm.py --init_from=resume                           # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 cfm.py            # on four GPUs

Noise x0 (at t = 0) flows to data x1 (at t = 1) along dx/dt = v(t, x). The path from one x0 to one x1 is ours
to choose: a straight line, of velocity x1 - x0. Regressed on that over all pairs, v(t, x) learns the mean
velocity of the lines that pass x at t, and the flow of that mean carries noise to the distribution of the data.
"""
import copy
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torchvision.utils import save_image

from configurator import (choose_machine, configure, explained, fail, first_process_first, holds_a_run,
                          if_the_disk_allows, join_processes, load_checkpoint, load_data, resume,
                          save_checkpoint, say, start_run, stop_signals, whole)
from unet import Muon, UNet

# ------------------------------------------------------------------------------------------------------------
# output
eval_interval = 938       # iterations between held-out losses, grids and checkpoints; 938 is an epoch of MNIST
log_interval = 100        # iterations between log lines
init_from = "scratch"     # or "resume": continue the run in out_dir, under its own options
overwrite = False         # let a run from scratch replace the one in out_dir
# data
dataset = "mnist"         # mnist, fashion_mnist, cifar10, synthetic, a folder of pictures, or an .npz file
data_dir = "data"         # where downloads are kept
image_size = 0            # side to bring pictures to; 0: as they are
flip = False              # mirror pictures at random: never for digits
conditional = True        # learn the labels, if there are any; false: unconditional
label_dropout = 0.02      # share of labels hidden during training: guidance also needs the unconditional model
# model (see unet.py)
channels = 24
channel_mults = (1, 2)
n_res_blocks = 1
attention_levels = (2,)
dropout = 0.0
patch = 2
# training
batch_size = 64           # pictures a process takes at a time
gradient_accumulation_steps = 1
max_iters = 9380          # as many pictures as ten epochs of MNIST
muon = True               # Muon for the kernels of convolutions, AdamW for the rest; false: AdamW for all
learning_rate = 6e-3
warmup_iters = 100
decay_lr = True           # in a straight line to 0 at max_iters; false: constant after the warm-up
weight_decay = 0.01
grad_clip = 1.0           # 0: off
ema_decay = 0.999         # decay of the averaged weights, the ones used for sampling; ramped up from 0.1
# machine
device = "auto"           # cuda, cuda:1, mps or cpu; auto: the first of them that is there
dtype = "auto"            # float32, bfloat16 or float16; auto: float32, on CUDA bfloat16 (old cards: float16)
compile = "auto"          # torch.compile: true, false; auto: on CUDA
seed = 1337               # every draw is a function of seed, iteration and micro-batch
# the method, and the grids drawn with it
out_dir = "out/cfm"
path = "icfm"             # from noise to data: icfm, ot, target, vp or sb, see the classes below
sigma = 0.0               # width of the path around its mean; sb needs one, such as 0.5
t_mean = -0.4             # times to train at: sigmoids of normal draws of this mean; below 0: nearer the noise
t_uniform = 0.0           # share of a batch's, in whole pictures, that are uniform instead
sampler = "dpm++"         # or ddim, for straight paths; for any euler, midpoint, heun, rk4, dopri5: sample.py
sample_steps = 5          # midpoint and heun take 2 evaluations of the model each, rk4 4
guidance = 1.0            # 1: the conditional model as is; 0: the unconditional; above 1: exaggerated labels
# ------------------------------------------------------------------------------------------------------------
METHOD = "cfm"
FIXED = "dataset image_size conditional channels channel_mults n_res_blocks attention_levels dropout patch " \
        "muon path sigma"
LIMITS = {"path": ["icfm", "ot", "target", "vp", "sb"], "sigma": (0, math.inf),
          "sampler": ["dpm++", "ddim", "euler", "midpoint", "heun", "rk4", "dopri5"]}


class ConditionalFlowMatcher:
    """
    I-CFM of Tong et al.: the path from x0 (noise) to x1 (data) is p_t(x | x0, x1) = N(x; mu_t, sigma_t^2). Its
    mean goes straight, mu_t = t x1 + (1 - t) x0, and sigma_t = sigma. A Gaussian path has the velocity
        u_t(x | x0, x1) = sigma_t' / sigma_t (x - mu_t) + mu_t'                     (Lipman et al., theorem 3)
    of which mu_t' = x1 - x0 is left here. x0, x1, xt, ut: (B, *dim), any rank; t: (B,) in [0, 1]; sigma >= 0.
    """
    margin = 0.0                 # how far training keeps from t = 0 and t = 1

    def __init__(self, sigma=0.0):
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, but is {sigma}")
        self.sigma = sigma

    def compute_mu_t(self, x0, x1, t):
        """Mean of the path at t: (B, *dim)."""
        t = wide(t, x0)
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t):
        """Standard deviation of the path at t: a number, or shaped like t."""
        return self.sigma

    def compute_lambda(self, t):
        """Weight of a score model's loss beside this one (Tong et al. 2023, arXiv 2307.03672), like sigma_t."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)

    def sample_noise_like(self, x):
        return torch.randn_like(x)

    def sample_xt(self, x0, x1, t, epsilon):
        """A point of the path at t: mu_t + sigma_t epsilon."""
        return self.compute_mu_t(x0, x1, t) + wide(self.compute_sigma_t(t), x0) * epsilon

    def compute_conditional_flow(self, x0, x1, t, xt):
        """Velocity u_t(xt | x0, x1) of the path: (B, *dim)."""
        return x1 - x0

    def pair(self, x0, x1, y=None):
        """x0 in the order in which it goes with x1: here as it comes, for both are drawn independently."""
        return x0

    def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False, y=None):
        """
        (t, xt, ut), and epsilon if return_noise: where to evaluate the model and what it should say. Uniform t,
        unless given. Draws rand(B), then randn like x0, even if sigma is 0: one seed gives what torchcfm gives.
        """
        x0 = self.pair(x0, x1, y)
        t = torch.rand(x0.shape[0]).type_as(x0) if t is None else t
        epsilon = self.sample_noise_like(x0)
        xt = self.sample_xt(x0, x1, t, epsilon)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, epsilon) if return_noise else (t, xt, ut)


class ExactOptimalTransportConditionalFlowMatcher(ConditionalFlowMatcher):
    """
    OT-CFM of Tong et al.: the same path, between pairs chosen so that the sum of their squared distances is
    smallest, which makes the flow straighter. x0 is reordered and x1 stays, so no picture is lost and labels
    stay true; with labels y, pairs are chosen within each class, or its noise would not be normal. Needs scipy.
    """

    def pair(self, x0, x1, y=None):
        from scipy.optimize import linear_sum_assignment

        y, order = torch.zeros(len(x0)) if y is None else y.cpu(), torch.arange(len(x0))
        for label in y.unique():
            own = (y == label).nonzero().flatten()
            cost = torch.cdist(x1[own].flatten(1).float(), x0[own].flatten(1).float()) ** 2
            order[own] = own[torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])]
        return x0[order]


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """Lipman et al., eq. 20 and 21: from N(0, I), whatever x0, to N(x1, sigma^2)."""
    def compute_mu_t(self, x0, x1, t): return wide(t, x1) * x1
    def compute_sigma_t(self, t): return 1 - (1 - self.sigma) * t
    def compute_conditional_flow(self, x0, x1, t, xt):
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * wide(t, x1))


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Albergo & Vanden-Eijnden 2022 (arXiv 2209.15571): along a quarter of a circle, constant in variance."""
    def compute_mu_t(self, x0, x1, t):
        angle = math.pi / 2 * wide(t, x0)
        return torch.cos(angle) * x0 + torch.sin(angle) * x1
    def compute_conditional_flow(self, x0, x1, t, xt):
        angle = math.pi / 2 * wide(t, x0)
        return math.pi / 2 * (torch.cos(angle) * x1 - torch.sin(angle) * x0)


class SchrodingerBridgeConditionalFlowMatcher(ExactOptimalTransportConditionalFlowMatcher):
    """SB-CFM of Tong et al.: Brownian bridges, of variance sigma^2 t (1 - t), between the pairs of OT-CFM."""
    margin = 1e-3                # the velocity grows without bound at both ends
    def __init__(self, sigma=1.0):
        if sigma <= 0:
            raise ValueError(f"a Schroedinger bridge needs a sigma above 0, such as 0.5, but it is {sigma}")
        super().__init__(sigma)
    def compute_sigma_t(self, t): return self.sigma * torch.sqrt(t * (1 - t))
    def compute_conditional_flow(self, x0, x1, t, xt):
        growth = (1 - 2 * wide(t, x0)) / (2 * wide(t, x0) * (1 - wide(t, x0)) + 1e-8)     # sigma_t' / sigma_t
        return growth * (xt - self.compute_mu_t(x0, x1, t)) + x1 - x0


PATHS = {"icfm": ConditionalFlowMatcher, "ot": ExactOptimalTransportConditionalFlowMatcher,
         "target": TargetConditionalFlowMatcher, "vp": VariancePreservingConditionalFlowMatcher,
         "sb": SchrodingerBridgeConditionalFlowMatcher}


class VelocityField:
    """v_model(t=t, x=x, y=y), trained on the velocities of a matcher's paths, followed from noise to data."""

    def __init__(self, v_model, matcher):
        self.v_model, self.matcher = v_model, matcher

    def loss(self, x1, noise=None, y=None, u=None):
        """E |v(t, xt) - ut|^2 for x1 (B, *dim), labels y (B,) or None. u (B,), in [0, 1), may fix the times."""
        x0 = self.matcher.sample_noise_like(x1) if noise is None else noise
        t = torch.rand(len(x1), device=x1.device) if u is None else u
        t = t.clamp(self.matcher.margin, 1 - self.matcher.margin)
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(x0, x1, t, y=y)
        return (self.v_model(t=t, x=xt, y=y).float() - ut).square().mean()

    def velocity(self, t, x, y=None, guidance=1.0):
        """dx/dt at x (B, *dim) and t (B,): the flow from noise, t = 0, to data, t = 1."""
        return guided(self.v_model, t, x, y, guidance)


def wide(t, x):
    """t (B,), or a number, shaped (B, 1, ...) to go with x (B, *dim)."""
    return t.reshape(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(t) else t


def build(model, config, device):
    """The method around a UNet. ValueError for options that do not go together."""
    from importlib.util import find_spec

    matcher = PATHS[config["path"]](config["sigma"])
    if config["path"] in ("vp", "sb") and config["sampler"] in ("ddim", "dpm++"):
        raise ValueError(f"--sampler={config['sampler']} is for straight paths, "
                         f"not for --path={config['path']}: add --sampler=euler")
    training = "task" not in config                              # sample.py has one, and needs no pairs
    if config["path"] in ("ot", "sb") and training and not find_spec("scipy"):
        raise ValueError(f"--path={config['path']} pairs noise and data with scipy: pip install scipy")
    return VelocityField(model, matcher)


# ---- the rest is the same in ddpm.py and cfm.py ----

def guided(model, t, x, y, scale):
    """Ho & Salimans 2022 (arXiv 2207.12598): out(no label) + scale (out(y) - out(no label)), in one call."""
    if y is None or scale == 1:
        return model(t=t, x=x, y=y).float()
    both = model(t=torch.cat([t, t]), x=torch.cat([x, x]), y=torch.cat([y, torch.full_like(y, -1)])).float()
    labelled, unlabelled = both.chunk(2)
    return unlabelled + scale * (labelled - unlabelled)


def draw_times(n, mean, uniform, device="cpu"):
    """n times in [0, 1], a share uniform, the rest logit-normal: Esser et al. 2024 (arXiv 2403.03206), 3.1."""
    k = round(uniform * n)
    return torch.cat([torch.rand(k, device=device), (mean + torch.randn(n - k, device=device)).sigmoid()])


LIMITS |= {
    "eval_interval log_interval batch_size gradient_accumulation_steps max_iters": (1, math.inf),
    "channels channel_mults n_res_blocks patch sample_steps": (1, math.inf),
    "learning_rate warmup_iters weight_decay grad_clip image_size attention_levels guidance": (0, math.inf),
    "seed": (0, 2**63 - 1), "label_dropout dropout ema_decay t_uniform": (0, 1), "t_mean": (-5, 5),
    "init_from": ["scratch", "resume"], "compile": ["auto", True, False],
    "dtype": ["auto", "float32", "bfloat16", "float16"]}

if __name__ == "__main__":
    from sample import draw

    config = configure(globals(), LIMITS)
    ckpt_path, log_path = Path(out_dir, "ckpt.pt"), Path(out_dir, "log.csv")
    if init_from == "resume":
        checkpoint = load_checkpoint(ckpt_path, METHOD)
        config = resume(globals(), LIMITS, checkpoint, FIXED)
    elif holds_a_run(out_dir) and not overwrite:
        fail(f"{out_dir} holds a run: go on by --init_from=resume, or add --overwrite or another --out_dir")
    shape = "channels", "channel_mults", "n_res_blocks", "attention_levels", "dropout", "patch"
    model_args = {k: config[k] for k in shape}
    with explained():                                                         # do the options go together?
        build(None, config, "cpu")
        with torch.device("meta"):
            UNet(**model_args)
    if guidance != 1 and not conditional:
        fail(f"--guidance={guidance}: without labels there is nothing to be guided by")
    if guidance != 1 and not label_dropout:
        fail(f"--guidance={guidance} needs the unconditional model too, so a --label_dropout above 0")

    # device, precision, processes
    device, dtype, compile = choose_machine(device, dtype, compile)
    autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")
    rank, world, cpu_group = join_processes(device)

    # data: all of it on the device, as uint8
    with first_process_first(rank, cpu_group), explained(f"--dataset={dataset}: "):
        splits = load_data(dataset, data_dir, image_size, conditional)
    (x_train, y_train), (x_val, y_val) = [(x.to(device), y.to(device)) for x, y in splits]
    num_classes = int(max(y_train.max(), y_val.max())) + 1
    if guidance != 1 and not num_classes:
        fail(f"--guidance={guidance}: {dataset} has no labels to be guided by")

    # model, its average, optimizer
    torch.manual_seed(seed)
    model_args |= {"in_channels": x_train.shape[1], "num_classes": num_classes}
    model = UNet(**model_args).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = (Muon(model.parameters(), betas=(0.9, 0.99)) if muon else
                 torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True))
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == "float16")
    it, losses = 0, torch.zeros(2, device=device)                          # sum and number since the last log
    if init_from == "resume":
        if checkpoint["model_args"] != model_args:
            fail(f"--dataset={dataset} has changed: the model of {out_dir} is for {checkpoint['model_args']}")
        with explained(f"{ckpt_path} is of another version of this program: "):
            for name, part in {"model": model, "ema": ema, "optimizer": optimizer}.items():
                part.load_state_dict(checkpoint[name])
            if scaler.is_enabled() and checkpoint["scaler"]:
                scaler.load_state_dict(checkpoint["scaler"])
            losses.copy_(checkpoint["losses"])
        it = checkpoint["iteration"]
    net = torch.compile(model) if compile else model
    net = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    trained, averaged = build(net, config, device), build(ema, config, device)

    # what is evaluated, always the same: held-out pictures in each quarter of t; a grid, a row for each class
    fixed = torch.Generator().manual_seed(0)
    x_val, y_val = x_val[:256].float() / 127.5 - 1, y_val[:256]
    noise_val = torch.randn(x_val.shape, generator=fixed).to(device)
    u_val = torch.rand(len(x_val), generator=fixed).to(device)
    parts_val = [v.split(batch_size) for v in (x_val, noise_val, y_val, u_val)]
    noise_grid = torch.randn(100, *x_val.shape[1:], generator=fixed).to(device)
    y_grid = (torch.arange(100) // 10 % num_classes if num_classes else torch.full((100,), -1)).to(device)

    asked, stop = stop_signals(), 0                                           # this process, all processes
    pictures_per_iter = batch_size * gradient_accumulation_steps * world
    if rank == 0:
        with explained(f"--out_dir={out_dir}: "):
            log, lock = start_run(ckpt_path, log_path, init_from, overwrite, it)  # the name keeps the lock
        say(f"{METHOD} on {dataset}: {len(x_train)} pictures of {tuple(x_val.shape[1:])}, "
            f"{num_classes} classes\n"
            f"{sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{ema.flops(x_val[:1]) / 1e6:.1f} MFLOP a picture in a forward pass\n"
            f"{device}, {dtype}, {'compiled' if compile else 'not compiled'}, "
            f"{world} process{'es' * (world > 1)}\n"
            f"iterations {it} to {max_iters}, of {pictures_per_iter} pictures each\n"
            f"samples, log.csv and ckpt.pt go to {Path(out_dir).resolve()}")

    saved, last, last_time = it, it, time.time()                             # the latest checkpoint, log line
    while it < max_iters and not stop:
        lr = learning_rate * min(1, (it + 1) / max(1, warmup_iters))
        if decay_lr:
            lr *= 1 - it / max_iters
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=weight_decay)
        for micro in range(gradient_accumulation_steps):
            torch.manual_seed(hash((seed, it, micro * world + rank)))  # resumed or not, the same draws follow
            i = torch.randint(len(x_train), (batch_size,)).to(device, non_blocking=True)
            x = x_train[i].float() / 127.5 - 1                                # (B, C, H, W) in [-1, 1]
            if flip:
                x = torch.where(torch.rand(batch_size, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            y = torch.where(torch.rand(batch_size, device=device) < label_dropout, -1, y_train[i])
            if world > 1:
                net.require_backward_grad_sync = micro == gradient_accumulation_steps - 1
            u = draw_times(batch_size, t_mean, t_uniform, device)
            with autocast:
                loss = trained.loss(x, y=y, u=u)
            scaler.scale(loss / gradient_accumulation_steps).backward()
            losses += torch.stack([loss.detach(), torch.ones_like(loss)])
        scaler.unscale_(optimizer)
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        decay = min(ema_decay, (1 + it) / (10 + it))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        it += 1

        stop = torch.tensor(max(asked, default=0))
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=cpu_group)      # all stop after the same iteration
        evaluating, logging = it % eval_interval == 0 or it == max_iters, it % log_interval == 0
        if rank > 0 or not (evaluating or logging or stop):
            continue
        mean = (losses[0] / losses[1]).item()                                 # only here is a GPU waited for
        speed = (it - last) * pictures_per_iter / (time.time() - last_time)
        held_out = []
        if evaluating:
            torch.manual_seed(seed)
            with autocast, torch.no_grad():
                quarters = [sum(len(x) * averaged.loss(x, noise, y, (q + u) / 4) for x, noise, y, u in
                                zip(*parts_val)).item() / len(x_val) for q in range(4)]
            held_out = [sum(quarters) / 4, *quarters]
        if not math.isfinite(mean + sum(held_out) + sum(p.detach().sum() for p in model.parameters())):
            fail(f"the loss or a weight is not finite at iteration {it}: try a smaller --learning_rate, or "
                 f"--dtype=float32; {ckpt_path}, if there is one, is from before that")
        steps = int(optimizer.state[model.conv_in.bias].get("step", 0))      # Muon counts them for biases only
        if evaluating or logging:
            row = [f"{it},{mean:.6f},{lr:.3e},{speed:.0f}", *([f"{v:.6f}" for v in held_out] or [""] * 5)]
            log.append(",".join(row))
            with if_the_disk_allows(log_path), whole(log_path) as f:
                f.write("\n".join([*log, ""]).encode())
            say(f"iteration {it} of {max_iters}: loss {mean:.4f}, {speed:.0f} pictures/s, "
                f"{(max_iters - it) * pictures_per_iter / speed / 60:.1f} min left"
                + f", {it - steps} steps skipped" * (it > steps))           # where float16 overflowed
            losses.zero_()
        if evaluating or stop:
            with if_the_disk_allows(ckpt_path):
                save_checkpoint(ckpt_path, method=METHOD, config=config, iteration=it, losses=losses,
                                model_args=model_args, picture_shape=tuple(x_val.shape[1:]),
                                model=model.state_dict(), ema=ema.state_dict(),
                                optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                saved = it
        if evaluating:
            with autocast:
                grid = torch.cat([draw(averaged, noise, y, sample_steps, sampler, guidance)[0] for noise, y in
                                  zip(noise_grid.split(batch_size), y_grid.split(batch_size))])
            png = Path(out_dir, f"sample-{it}.png")
            with if_the_disk_allows(png), whole(png) as f:
                save_image(grid, f, nrow=10, normalize=True, value_range=(-1, 1), format="png")
            say("held-out loss {:.4f}, by quarter of t {:.4f} {:.4f} {:.4f} {:.4f}; ".format(*held_out)
                + f"drew {png.name}")
        last, last_time = it, time.time()
    code = 128 + int(stop) if stop else 0
    if rank == 0 and saved < it:
        say(f"the end, iteration {it}, could not be saved: {ckpt_path}, if there, is older", file=sys.stderr)
        code = 1
    elif rank == 0 and it < max_iters:
        say(f"stopped, and saved at iteration {it}: go on by --init_from=resume --out_dir={out_dir}")
    if world > 1:
        dist.barrier(cpu_group)                                       # the first process may still be drawing
        os._exit(code)        # at once: taking gloo's threads down one by one now and then aborts the process
    raise SystemExit(code)
