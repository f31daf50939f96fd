"""
Denoising diffusion probabilistic models in one file: Ho et al. 2020 (arXiv 2006.11239).

    python ddpm.py                                             # MNIST, ten epochs; watch out/ddpm
    python ddpm.py --n_steps=1000 --batch_size=128             # any option below; --help lists them
    python ddpm.py --dataset=path/to/pictures --image_size=64  # your own, labelled by their subfolders
    python ddpm.py --init_from=resume                          # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 ddpm.py           # on four GPUs

q adds noise to data in n_steps small steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, until little else
is left; p, which is learned, undoes them one by one. The bound on -log p(x0) is, but for its ends, a sum of
    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),
each between two Gaussians of fixed variance, hence a squared distance between their means. Up to a weight that
training drops, that is the squared distance between the noise eps in x_t and the model's prediction of it.
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
out_dir = "out/ddpm"
n_steps = 1000            # T, the number of noising steps
schedule = "cosine"       # of alpha_bar, as Nichol & Dhariwal; linear: of beta, as Ho et al.
prediction = "v"          # what the model is asked for: eps, as by Ho et al., x0, or v, which is a bit of both
weighting = "simple"      # mean square error of that; min_snr: the error in x0 counts min(snr, 5)
variance = "fixedlarge"   # of an ancestral step: beta; fixedsmall: beta~, that of q(x_{t-1} | x_t, x_0)
t_mean = 0.4              # times to train at: sigmoids of normal draws of this mean; above 0: nearer the noise
t_uniform = 0.1           # share of a batch's, in whole pictures, that are uniform instead
sampler = "dpm++"         # or ancestral, ddim, euler, midpoint, heun, rk4, dopri5: see sample.py
sample_steps = 5          # at most n_steps; ancestral takes all, dopri5 as many as it needs
guidance = 1.0            # 1: the conditional model as is; 0: the unconditional; above 1: exaggerated labels
# ------------------------------------------------------------------------------------------------------------
METHOD = "ddpm"
FIXED = "dataset image_size conditional channels channel_mults n_res_blocks attention_levels dropout patch " \
        "muon n_steps schedule prediction"
LIMITS = {"n_steps": (2, math.inf), "schedule": ["linear", "cosine"], "prediction": ["eps", "x0", "v"],
          "weighting": ["simple", "min_snr"], "variance": ["fixedlarge", "fixedsmall"],
          "sampler": ["dpm++", "ancestral", "ddim", "euler", "midpoint", "heun", "rk4", "dopri5"]}


class DenoiseDiffusion:
    """
    The noising process q, its reversal p, and the loss that trains p. eps_model(t=t, x=xt, y=y) predicts the
    noise in xt, or what else prediction says. x0, xt, eps: (B, *dim), x0 in [-1, 1]; t: long (B,) in [0, T), so
    that t = 0 is the paper's t = 1. The linear beta of 1000 steps is scaled to T = n_steps, so that alpha_bar
    ends near zero all the same. ValueError for an option that there is not.
    """

    def __init__(self, eps_model, n_steps=1000, device="cpu", schedule="linear", prediction="eps",
                 weighting="simple", variance="fixedlarge"):
        if n_steps < 2:
            raise ValueError(f"n_steps must be at least 2, but is {n_steps}")
        options = {"schedule": schedule, "prediction": prediction, "weighting": weighting, "variance": variance}
        for name, choice in options.items():
            if choice not in LIMITS[name]:
                raise ValueError(f"{name} must be one of {LIMITS[name]}, not {choice!r}")
        self.eps_model, self.n_steps, self.prediction = eps_model, n_steps, prediction
        if schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64) * 1000 / n_steps
        else:                                              # Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17
            share = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
            f = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        beta = beta.clamp(max=0.999)
        alpha, alpha_bar = 1 - beta, (1 - beta).cumprod(0)
        prev = torch.cat([torch.ones(1), alpha_bar[:-1]])  # alpha_bar of the step before: at first, no noise
        beta_tilde = beta * (1 - prev) / (1 - alpha_bar)   # variance of q(x_{t-1} | x_t, x_0), eq. 7
        beta_tilde[0] = beta_tilde[1]                      # not 0, which the decoder in the bound cannot have
        snr = alpha_bar / (1 - alpha_bar)
        weight = torch.ones_like(snr)
        if weighting == "min_snr":   # Hang et al. 2023 (arXiv 2303.09556): the error of x0 weighs min(snr, 5)
            weight = snr.clamp(max=5) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
        self.sigma2 = beta if variance == "fixedlarge" else beta_tilde
        self.beta, self.alpha, self.alpha_bar, self.one_minus_alpha_bar = beta, alpha, alpha_bar, 1 - alpha_bar
        self.beta_tilde, self.weight, self.eps_share = beta_tilde, weight, beta / (1 - alpha_bar).sqrt()
        self.x0_share = prev.sqrt() * beta / (1 - alpha_bar)
        self.xt_share = alpha.sqrt() * (1 - prev) / (1 - alpha_bar)
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                setattr(self, name, table.float().to(device))

    def q_xt_x0(self, x0, t):
        """Mean (B, *dim) and variance (B, 1, ...) of q(x_t | x_0), eq. 4: t steps of noise in one."""
        return at(self.alpha_bar, t, x0).sqrt() * x0, at(self.one_minus_alpha_bar, t, x0)

    def q_sample(self, x0, t, eps=None):
        """A draw from q(x_t | x_0)."""
        mean, var = self.q_xt_x0(x0, t)
        return mean + var.sqrt() * (torch.randn_like(x0) if eps is None else eps)

    def q_posterior_mean(self, xt, t, x0):
        """Mean of q(x_{t-1} | x_t, x_0), eq. 7."""
        return at(self.x0_share, t, xt) * x0 + at(self.xt_share, t, xt) * xt

    def q_posterior_mean_eps(self, xt, t, eps):
        """The same through the noise eps that led from x0 to xt, eq. 11."""
        return (xt - at(self.eps_share, t, xt) * eps) / at(self.alpha, t, xt).sqrt()

    def alpha_sigma(self, t, x):
        """The shares, (B, 1, ...) each, in xt = alpha x0 + sigma eps: roots of alpha_bar and of one less it."""
        return at(self.alpha_bar, t, x).sqrt(), at(self.one_minus_alpha_bar, t, x).sqrt()

    def predict(self, xt, t, alpha, sigma, y=None, guidance=1.0):
        """(x0, eps): as xt is known, each gives the other. v: Salimans & Ho 2022 (arXiv 2202.00512)."""
        out = guided(self.eps_model, t, xt, y, guidance)
        if self.prediction == "eps":
            return (xt - sigma * out) / alpha, out
        if self.prediction == "x0":
            return out, (xt - alpha * out) / sigma
        return alpha * xt - sigma * out, sigma * xt + alpha * out

    def p_mean(self, xt, t, y=None, guidance=1.0, clip=False):
        """Mean of p(x_{t-1} | x_t): that of q at the predicted x0, which clip keeps to where pictures are."""
        x0, eps = self.predict(xt, t, *self.alpha_sigma(t, xt), y, guidance)
        return self.q_posterior_mean(xt, t, x0.clamp(-1, 1)) if clip else self.q_posterior_mean_eps(xt, t, eps)

    def p_sample(self, xt, t, y=None, guidance=1.0, clip=False, z=None):
        """A draw from p(x_{t-1} | x_t): Algorithm 2, lines 3 and 4. No noise where t is 0, the last step."""
        z = torch.randn_like(xt) if z is None else z
        sigma = torch.where(t > 0, self.sigma2[t], 0).sqrt()
        return self.p_mean(xt, t, y, guidance, clip) + sigma.reshape(-1, *[1] * (xt.dim() - 1)) * z

    def loss(self, x0, noise=None, y=None, u=None):
        """E weight |eps - eps_model(xt)|^2: Algorithm 1, eq. 14. u, in [0, 1), may fix the times, t = u T."""
        t = (torch.randint(self.n_steps, (len(x0),), device=x0.device) if u is None else
             (u * self.n_steps).long())
        eps = torch.randn_like(x0) if noise is None else noise
        alpha, sigma = self.alpha_sigma(t, x0)
        target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]
        out = self.eps_model(t=t, x=self.q_sample(x0, t, eps), y=y).float()
        return (at(self.weight, t, x0) * (out - target).square()).mean()

    @torch.no_grad()
    def bound(self, x0, y=None, randn=torch.randn_like):
        """
        The terms of the bound on -log2 p(x0), eq. 5, in bits/dim, (B,) each, for x0 of 256 levels from -1 to 1:
        L_T, what is left of x0 at the end; the sum over t of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),
        at a draw of x_t each; and L_0, the discretised decoder of section 3.3. T evaluations of the model.
        """
        mean, var = self.q_xt_x0(x0, torch.full((len(x0),), self.n_steps - 1, device=x0.device))
        prior, between = (mean.square() + var - 1 - var.log()) / 2, 0
        for t in reversed(range(self.n_steps)):
            t = torch.full((len(x0),), t, device=x0.device)
            xt = self.q_sample(x0, t, randn(x0))
            mean = self.p_mean(xt, t, y, clip=True)
            var, var_q = at(self.sigma2, t, x0), at(self.beta_tilde, t, x0)
            if t[0] > 0:
                gap = self.q_posterior_mean(xt, t, x0) - mean
                between = between + (var_q / var + gap.square() / var - 1 + (var / var_q).log()) / 2
        x0, mean, std = (v.cpu().double() for v in (x0, mean, var.sqrt()))
        edges = [(x0 + side / 255 - mean) / std for side in (-1, 1)]                      # of the level of x0
        low, high = edges[0].masked_fill(x0 < -0.999, -math.inf), edges[1].masked_fill(x0 > 0.999, math.inf)
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # precise in that tail
        low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        decoder = -(high + torch.log1p(-torch.exp(low - high)))                   # -log(Phi(high) - Phi(low))
        return [nats.flatten(1).mean(1).float().cpu() / math.log(2) for nats in (prior, between, decoder)]


def at(table, t, x):
    """table[t], shaped (B, 1, ...) to go with x (B, *dim)."""
    return table[t].reshape(-1, *[1] * (x.dim() - 1))


def build(model, config, device):
    """The method around a UNet, to which t runs from 0 to 1. ValueError if the options do not go together."""
    options = {name: config[name] for name in ("n_steps", "schedule", "prediction", "weighting", "variance")}
    return DenoiseDiffusion(lambda t, x, y: model(t=t / options["n_steps"], x=x, y=y), device=device, **options)


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
