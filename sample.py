"""
Draw pictures with a checkpoint of ddpm.py or of cfm.py, or measure how likely real ones are under it.

    python sample.py --out_dir=out/cfm                                          # a grid: out/cfm/samples.png
    python sample.py --out_dir=out/cfm --labels=3,1,4 --guidance=2              # threes, ones, fours in turn
    python sample.py --out_dir=out/ddpm --sampler=ddim --eta=1 --steps=50 --save=pictures  # a folder of PNGs
    python sample.py --out_dir=out/cfm --n_samples=10000 --save=samples.npz     # for FID tools, or to train on
    python sample.py --out_dir=out/ddpm --task=likelihood --n_samples=200       # bits/dim of held-out pictures

Both kinds of model are read as one. A point on the way from noise to data is x_t = alpha_t data + sigma_t
noise; divided by alpha_t + sigma_t it is z = tau data + (1 - tau) noise, on a straight line, at tau =
alpha_t / (alpha_t + sigma_t), and the flow from noise to data is dz/dtau = E[data - noise | z]. That is what
cfm.py learns, and ddpm.py's model knows in other words. So there is one of each sampler, and all it asks for
is the velocity v(tau, z). In that are predictions of the data, z + (1 - tau) v, and of the noise, z - tau v.

The same seed gives the same pictures, whatever the batch_size, up to rounding.
"""
import importlib
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import save_image

from configurator import (choose_machine, configure, explained, fail, load_checkpoint, load_data, say,
                          stop_signals, whole)
from unet import UNet

# ------------------------------------------------------------------------------------------------------------
out_dir = "out/cfm"       # of the run whose ckpt.pt is used
task = "draw"             # interpolate: from one noise to another in each row; reconstruct: held-out pictures
                          # to noise and back; likelihood: bits/dim of held-out pictures, ddpm's by the bound
n_samples = 100
save = "auto"             # .png: a grid; .npz: arr_0 uint8 (N, H, W, C), arr_1 labels (N,); else a folder
sampler = "auto"          # euler, midpoint, heun, rk4, dopri5, ddim, dpm++ or ancestral; auto: as the run
                          # drew its grids, but rk4 to reconstruct and dopri5 for a likelihood
steps = 0                 # 0: as many as the run drew its grids with, but 20 to reconstruct; ancestral takes
                          # all, dopri5 as many as it needs
eta = 0.0                 # noise in a ddim step: from 0, none, to 1, as in ancestral sampling with fixedsmall
clip = True               # keep predicted pictures within [-1, 1]; with cfm only ddim and dpm++ make any
atol = 1e-4               # error that dopri5 allows in a step, absolute
rtol = 1e-4               # and relative
exact = False             # likelihood of cfm: exact divergence, for pictures of few pixels; false: estimated
guidance = 1.0            # 1: the conditional model as is; 0: the unconditional; above 1: exaggerated labels
labels = ()               # the classes to draw, in turn: 3 or 3,1,4; (): all of them
seed = 0
ema = True                # the averaged weights; false: the latest
batch_size = 250          # pictures at a time
device = "auto"           # cuda, cuda:1, mps or cpu
# ------------------------------------------------------------------------------------------------------------
# explicit Runge-Kutta: a stage looks a fraction c of the step ahead along the one before; b weighs the stages
TABLEAUS = {"euler": ([0], [1]), "midpoint": ([0, 1/2], [0, 1]), "heun": ([0, 1], [1/2, 1/2]),
            "rk4": ([0, 1/2, 1/2, 1], [1/6, 1/3, 1/3, 1/6])}
# Dormand & Prince 1980: a stage looks ahead along all before; the last is the step, and the next one's first
DOPRI5 = [(1/5, [1/5]), (3/10, [3/40, 9/40]), (4/5, [44/45, -56/15, 32/9]),
          (8/9, [19372/6561, -25360/2187, 64448/6561, -212/729]),
          (1, [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656]),
          (1, [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84])]
DOPRI5_ERROR = [71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40]            # 5th order less 4th


def wide(t, x):
    """t (B,), shaped (B, 1, ...) to go with x (B, *dim)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def solve(f, x, times, sampler, atol=1e-4, rtol=1e-4):
    """
    Solves dx/dt = f(t, x), t (B,), from x (B, *dim) at times[0] to times[-1], forwards or backwards: in a step
    from each of times to the next, or in as many as dopri5 needs, which looks at the two ends only.
    """
    if sampler == "dopri5":
        return dopri5(f, x, times[0], times[-1], atol, rtol)
    for t, s in zip(times, times[1:]):
        k, dx, h = 0, 0, s - t
        for c, b in zip(*TABLEAUS[sampler]):
            k = f(torch.full((len(x),), t + c * h, device=x.device), x + c * h * k)
            dx = dx + b * k
        x = x + h * dx
    return x


def dopri5(f, x, start, end, atol, rtol):
    """
    Adaptive steps, of each picture's own length, so that it does not matter which others are in the batch. A
    step's error is estimated from two orders; if its mean square is too large the step is taken again,
    shorter. FloatingPointError if that does not help.
    """
    h = torch.full((len(x),), (end - start) / 20, device=x.device, dtype=x.dtype)
    t = torch.full_like(h, start)
    first = f(t, x)
    while (t != end).any():
        last = (t + h - end) * (end - start) >= 0
        h = torch.where(last, end - t, h)
        k = [first]
        for c, a in DOPRI5:
            ts = torch.where(last, end - (1 - c) * h, t + c * h)            # exactly the end, never beyond it
            xs = x + wide(h, x) * sum(w * ki for w, ki in zip(a, k))
            k.append(f(ts, xs))
        error = wide(h, x) * sum(w * ki for w, ki in zip(DOPRI5_ERROR, k))
        error = (error / (atol + rtol * torch.maximum(x.abs(), xs.abs()))).flatten(1).square().mean(1).sqrt()
        good = error <= 1
        x, first = torch.where(wide(good, x), xs, x), torch.where(wide(good, x), k[-1], first)
        t, h = torch.where(good, ts, t), h * (0.9 * error ** -0.2).clamp(0.2, 5).nan_to_num(0.2)
        if (h[t != end].abs() < 1e-6 * abs(end - start)).any():
            raise FloatingPointError("dopri5 cannot go on: the model is not finite, "
                                     "or atol and rtol are too small")
    return x


def predictions(tau, z, v, clip):
    """The data and noise in z, as velocity v predicts them, (B, *dim) each; the noise fits clipped data."""
    data = z + (1 - tau) * v
    data = data.clamp(-1, 1) if clip else data
    return data, (z - tau * data) / (1 - tau)


def ddim(v, z, taus, eta=0.0, clip=True, randn=torch.randn_like):
    """
    Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16, from each of taus to the next: mixes the predictions
    anew. On the straight line that is Euler's method, but for clipping, and for eta, which renews a part of
    the noise.
    """
    for t, s in zip(taus, taus[1:]):
        data, noise = predictions(t, z, v(t, z), clip)
        var = eta**2 * ((1 - s) ** 2 - (t / s * (1 - s) ** 2 / (1 - t)) ** 2)
        z = s * data + math.sqrt((1 - s) ** 2 - var) * noise
        z = z + math.sqrt(var) * randn(z) if var else z
    return z


def dpm_solver(v, z, taus, clip=True):
    """
    DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: as ddim, but with the data prediction
    extrapolated to the middle of the step, linearly in lambda = log(tau / (1 - tau)). Where lambda is
    infinite, at both ends, it is ddim.
    """
    before, h_before = None, math.inf
    for t, s in zip(taus, taus[1:]):
        data, _ = predictions(t, z, v(t, z), clip)
        h = math.log(s / (1 - s) / t * (1 - t)) if t > 0 and s < 1 else math.inf
        d = data + (data - before) * h / h_before / 2 if h < math.inf and h_before < math.inf else data
        z = (1 - s) / (1 - t) * z + (s - t * (1 - s) / (1 - t)) * d
        before, h_before = data, h
    return z


class Flow:
    """
    A method of either script as v(tau, z), tau (B,) or a number, under fixed labels y (B,) or None, and
    guidance. clip keeps the data that DenoiseDiffusion predicts within [-1, 1], and fits the noise to it:
    where there is much noise, it would else be far off. It counts its evaluations of the model, and tells of
    them at times.
    """

    def __init__(self, method, y=None, guidance=1.0, clip=False):
        self.method, self.y, self.guidance, self.clip = method, y, guidance, clip
        self.evaluations, self.told = 0, time.time()
        self.taus = None
        if hasattr(method, "alpha_bar"):                                     # DenoiseDiffusion: tau at each t
            self.taus = 1 / (1 + (method.one_minus_alpha_bar / method.alpha_bar).sqrt())

    def times(self, steps, sampler="heun"):
        """
        The tau at which steps start, and for cfm the last one ends. For euler, ddim and dpm++ they are shorter
        at the noise, where shapes are decided: u / (u + 2 (1 - u)) of even u, from half as long as even ones to
        twice (Esser et al. 2024, arXiv 2403.03206, section 5.3.2); DenoiseDiffusion has the t of as much noise
        or just more, or where t are too few the next below. It has never seen data without noise, so its last
        step is ddim's, straight to the data; samplers that look ahead go down to the least noise there is,
        t = 0, before, evenly in t.
        """
        ahead = sampler not in ("euler", "ddim", "dpm++")
        if self.taus is None:
            return [i / (steps if ahead else 2 * steps - i) for i in range(steps + 1)]
        taus, n = self.taus.cpu(), len(self.taus)
        steps = min(steps, n) if sampler != "dopri5" else 2
        if ahead:
            return taus[torch.linspace(n - 1, 0, steps).round().long()].tolist()
        i = torch.arange(steps)
        t = torch.searchsorted(-taus, -i / (2 * steps - i))
        return taus[(t + i).cummin(0).values.clamp(steps - 1, n - 1) - i].tolist()  # each t below the last

    def count(self):
        self.evaluations += 1
        if time.time() - self.told > 10:
            say(f"{self.evaluations} evaluations of the model so far")
            self.told = time.time()

    def __call__(self, tau, z):
        tau = tau.float() if torch.is_tensor(tau) else torch.full((len(z),), float(tau), device=z.device)
        self.count()
        if self.taus is None:
            return self.method.velocity(tau, z, self.y, self.guidance)
        i = torch.searchsorted(-self.taus, -tau).clamp(1, len(self.taus) - 1)
        t = i - (tau - self.taus[i]) / (self.taus[i - 1] - self.taus[i])  # between its steps, t is a fraction
        norm = wide(torch.hypot(tau, 1 - tau), z)                             # 1 / (alpha + sigma)
        alpha, sigma = wide(tau, z) / norm, wide(1 - tau, z) / norm
        data, noise = self.method.predict(z / norm, t, alpha, sigma, self.y, self.guidance)
        if self.clip:
            data, noise = predictions(wide(tau, z), z, data - noise, clip=True)
        return data - noise


@torch.no_grad()
def draw(method, noise, y=None, steps=20, sampler="euler", guidance=1.0, eta=0.0, clip=True, atol=1e-4,
         rtol=1e-4, randn=torch.randn_like):
    """
    From noise (B, *dim) to (pictures (B, *dim) in about [-1, 1], number of evaluations of the model). y:
    labels (B,) or None. randn(x) draws the noise that ancestral sampling and eta add. Evaluations a step:
    midpoint and heun 2, rk4 4, all others 1, and so has the last step of DenoiseDiffusion, see Flow.times().
    """
    v = Flow(method, y, guidance, clip)
    if sampler == "ancestral":                                                # Ho et al., Algorithm 2
        x = noise
        for t in reversed(range(method.n_steps)):
            v.count()
            x = method.p_sample(x, torch.full((len(x),), t, device=x.device), y, guidance, clip, randn(x))
        return x, v.evaluations
    taus = v.times(steps, sampler)
    z = noise * math.hypot(taus[0], 1 - taus[0])
    end = [1.0] if taus[-1] < 1 else []
    if sampler == "ddim":
        return ddim(v, z, taus + end, eta, clip, randn), v.evaluations
    if sampler == "dpm++":
        return dpm_solver(v, z, taus + end, clip), v.evaluations
    z = solve(v, z, taus, sampler, atol, rtol)
    return solve(v, z, taus[-1:] + end, "euler"), v.evaluations


@torch.no_grad()
def encode(method, x, y=None, steps=10, sampler="heun", atol=1e-4, rtol=1e-4):
    """The noise that draw(), with the same arguments, makes the pictures x of: the flow run backwards."""
    v = Flow(method, y)
    taus = v.times(steps, sampler)[::-1]
    z = x - (1 - taus[0]) * v(taus[0], x) if taus[0] < 1 else x
    return solve(v, z, taus, sampler, atol, rtol) / math.hypot(taus[-1], 1 - taus[-1])


def log_likelihood(method, x, y=None, steps=10, sampler="dopri5", atol=1e-4, rtol=1e-4, probe=None):
    """
    (log p(x) in nats (B,), number of evaluations) for pictures x (B, *dim) under cfm's flow, which starts from
    N(0, I) at tau = 0; along it d log p / dtau = -div v (Chen et al. 2018, arXiv 1806.07366, theorem 1).
    The divergence is exact, at the cost of *dim gradients, or with a probe like x, of entries 1 and -1,
    Hutchinson's estimate probe . (dv / dz probe), the probe being the same all along (Grathwohl et al. 2018,
    arXiv 1810.01367, section 3.1).
    """
    v = Flow(method, y)
    if v.taus is not None:
        raise ValueError("this is for a VelocityField: a DenoiseDiffusion has its bound()")

    def f(tau, state):                                                  # (B, 1 + D): divergence so far, and z
        with torch.enable_grad():
            z = state[:, 1:].detach().reshape(x.shape).requires_grad_()
            dz = v(tau, z)
            if probe is not None:
                div = (torch.autograd.grad((dz * probe).sum(), z)[0] * probe).flatten(1).sum(1)
            else:
                rows = [torch.autograd.grad(d, z, retain_graph=True)[0] for d in dz.flatten(1).sum(0)]
                div = sum(row.flatten(1)[:, i] for i, row in enumerate(rows))
        return torch.cat([div[:, None], dz.flatten(1)], 1).detach()

    state = solve(f, F.pad(x.flatten(1), (1, 0)), v.times(steps, sampler)[::-1], sampler, atol, rtol)
    return -(state[:, 1:].square() + math.log(2 * math.pi)).sum(1) / 2 + state[:, 0], v.evaluations


def slerp(a, b, share):
    """A point on the arc from noise a to noise b: unlike one on the chord, it is as long as noise is."""
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


if __name__ == "__main__":
    configure(globals(), {"n_samples batch_size": (1, math.inf), "steps guidance labels": (0, math.inf),
                          "atol rtol": (1e-7, 1), "eta": (0, 1), "seed": (0, 2**63 - 1),
                          "task": ["draw", "interpolate", "reconstruct", "likelihood"]})
    checkpoint = load_checkpoint(Path(out_dir, "ckpt.pt"))
    if checkpoint["method"] not in ("ddpm", "cfm"):
        fail(f"{Path(out_dir, 'ckpt.pt')} is of another method: {checkpoint['method']}")
    script, is_ddpm = importlib.import_module(checkpoint["method"]), checkpoint["method"] == "ddpm"
    config = configure(dict(vars(script)), script.LIMITS, [], checkpoint["config"])  # newer options: defaults
    with explained(f"{Path(out_dir, 'ckpt.pt')} is of another version of this program: "):
        model = UNet(**checkpoint["model_args"]).eval().requires_grad_(False)
        model = model.to(memory_format=torch.channels_last)
        model.load_state_dict(checkpoint["ema" if ema else "model"])
        num_classes, (C, H, W) = checkpoint["model_args"]["num_classes"], checkpoint["picture_shape"]

    auto, real = sampler == "auto", task in ("reconstruct", "likelihood")
    if auto:
        sampler = {"reconstruct": "rk4", "likelihood": "dopri5"}.get(task, config["sampler"])
    if sampler not in script.LIMITS["sampler"]:
        fail(f"--sampler={sampler} is not for {script.METHOD}, choose {' or '.join(script.LIMITS['sampler'])}")
    if real and sampler not in [*TABLEAUS, "dopri5"]:
        fail(f"--sampler={sampler} cannot be run backwards, choose {' or '.join([*TABLEAUS, 'dopri5'])}")
    if sampler == "ancestral" and steps not in (0, config["n_steps"]):
        fail(f"--steps={steps}: ancestral sampling takes all {config['n_steps']} steps, "
             "--sampler=ddim any number")
    if is_ddpm and steps > config["n_steps"]:
        fail(f"--steps={steps}: the run has only {config['n_steps']}")
    if eta and sampler != "ddim":
        fail(f"--eta={eta} goes with --sampler=ddim, not with {sampler}")
    if eta and not is_ddpm and (config["path"] != "icfm" or config["sigma"]):
        fail(f"--eta={eta}: the noise to renew is independent of the data only for --path=icfm and --sigma=0")
    if task == "likelihood" and is_ddpm and (not auto or steps):
        fail("--task=likelihood of ddpm is the bound, over all its steps: leave out --sampler and --steps")
    if sampler == "dopri5" and steps:
        fail(f"--steps={steps}: dopri5 takes as many as --atol and --rtol need")
    if exact and (task != "likelihood" or is_ddpm):
        fail("--exact goes with --task=likelihood of cfm")
    if task == "likelihood" and save != "auto":
        fail(f"--save={save}: a likelihood is printed, not saved")
    if labels and real:
        fail(f"--labels: to {task} held-out pictures, their own labels are used")
    if labels and max(labels) >= num_classes:
        known = f"0 to {num_classes - 1}" if num_classes else "none"
        fail(f"--labels: there is no {max(labels)}, the model has {known}")
    if guidance != 1 and (real or not num_classes or not config["label_dropout"]):
        fail(f"--guidance={guidance}: " + ("the flow is that of the model as it is" if real else
             "the model was trained without labels, so it has nothing to be guided by" if not num_classes else
             "the model was trained with --label_dropout=0, so it knows no picture without a label"))
    config |= {"sampler": sampler, "task": task}
    with explained():
        script.build(None, config, "cpu")
    steps = steps or (20 if real else min(config["sample_steps"], config.get("n_steps", math.inf)))
    device, _, _ = choose_machine(device)
    if real or sampler == "dopri5":                                     # their errors are smaller than TF32's
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    save = Path(out_dir, f"{'samples' if task == 'draw' else task}.png") if save == "auto" else Path(save)
    with explained(f"--save={save}: "):
        if save.suffix not in (".png", ".npz", "") or save.is_dir() and (save.suffix or any(save.iterdir())):
            fail(f"--save={save}: must end in .png or .npz, or else be a new or empty folder without a dot")
    with explained(f"--n_samples={n_samples}: "):
        pictures = np.empty((n_samples, H, W, C), np.uint8)                   # before hours of drawing, too
    if real:
        with explained(f"the data of the run, {config['dataset']}: "):
            _, (x_val, y_val) = load_data(config["dataset"], config["data_dir"], config["image_size"])
        if tuple(x_val.shape[1:]) != (C, H, W) or num_classes and y_val.max() >= num_classes:
            fail(f"the data of the run, {config['dataset']}, has changed: its model is for {C, H, W} and "
                 f"{num_classes} classes")
        if n_samples > len(x_val):
            fail(f"--n_samples={n_samples}: only {len(x_val)} pictures are held out")
        y = y_val[:n_samples] if num_classes else torch.full((n_samples,), -1)
    else:
        per_label = 10 if task == "interpolate" else 1
        y = torch.tensor((labels or range(num_classes)) if num_classes else [-1])
        y = y.repeat_interleave(per_label).repeat(-(-n_samples // (len(y) * per_label)))[:n_samples]
    if task != "likelihood":
        with explained(f"--save={save}: "):
            folder = save.parent if save.suffix else save
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()                        # before hours of drawing
    method = script.build(model.to(device), config, device)
    bound = task == "likelihood" and is_ddpm
    how = ("the bound, all steps" if bound else "ancestral, all steps" if sampler == "ancestral" else
           f"dopri5, atol {atol}, rtol {rtol}" if sampler == "dopri5" else f"{sampler}, {steps} steps")
    say(f"{task} {n_samples} pictures by {script.METHOD}, iteration {checkpoint['iteration']}: {how}, "
        f"guidance {guidance}, on {device}")

    asked = stop_signals()
    bits, spent, start = [], [], time.time()
    for i in range(0, n_samples, batch_size):
        numbers, label = range(n_samples)[i:i + batch_size], y[i:i + batch_size].to(device)
        sources = [torch.Generator().manual_seed(hash((seed, n))) for n in numbers]     # one for each picture

        def randn(x):
            return torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources]).to(device)

        x = (x_val[i:i + len(label)].float() if real else torch.empty(len(label), C, H, W)).to(device)
        with explained(kind=FloatingPointError):                              # dopri5 that cannot go on
            if bound:
                bits.append(torch.stack(method.bound(x / 127.5 - 1, label, randn)))
                spent.append(method.n_steps)
            elif task == "likelihood":
                u = torch.stack([torch.rand(C, H, W, generator=source) for source in sources]).to(device)
                probe = None if exact else randn(x).sign()
                nats, evaluations = log_likelihood(method, (x + u - 0.5) / 127.5 - 1, label, steps, sampler,
                                                   atol, rtol, probe)
                # a level is 1 / 127.5 wide: its log-probability is at least its mean log-density - log(127.5)
                bits.append(math.log2(127.5) - nats[None].cpu() / (C * H * W * math.log(2)))
                spent.append(evaluations)
            else:
                noise = randn(x)
                if task == "reconstruct":
                    noise = encode(method, x / 127.5 - 1, label, steps, sampler, atol, rtol)
                if task == "interpolate":                               # ten pictures from an end to the next
                    seeds = [[hash((seed, n // 10, end)) for end in (0, 1)] for n in numbers]
                    ends = [[torch.randn(C, H, W, generator=torch.Generator().manual_seed(s)) for s in pair]
                            for pair in seeds]
                    noise = [slerp(a, b, n % 10 / 9) for n, (a, b) in zip(numbers, ends)]
                    noise = torch.stack(noise).to(device)
                x, evaluations = draw(method, noise, label, steps, sampler, guidance, eta, clip and not real,
                                      atol, rtol, randn)
                spent.append(evaluations)
                x = (x * 127.5 + 127.5).round().clip(0, 255).byte()
                pictures[i:i + batch_size] = x.permute(0, 2, 3, 1).cpu().numpy()
                for n, picture in zip(numbers, pictures[i:i + batch_size] if save.suffix == "" else []):
                    with explained(f"--save={save}: ", OSError):
                        Image.fromarray(picture.squeeze(2) if C == 1 else picture).save(save / f"{n:06d}.png")
        done = i + len(label)
        if asked and done < n_samples:
            say(f"stopped after {done} of {n_samples}")
            n_samples = done
            break
        if done < n_samples:
            left = (time.time() - start) / done * (n_samples - done) / 60
            say(f"{done} done, {left:.1f} min left")
    pictures, y = pictures[:n_samples], y[:n_samples]
    took = f"{time.time() - start:.1f} s, {max(spent)} evaluations of the model"

    if task == "likelihood":
        bits = torch.cat(bits, 1)                                             # (terms, n_samples)
        names = "L_T", "KL of the steps between", "L_0"
        terms = [f"{name} {term:.4f}" for name, term in zip(names, bits.mean(1))]
        error = f" +- {bits.sum(0).std() / math.sqrt(n_samples):.4f}" if n_samples > 1 else ""
        print(f"at most {bits.sum(0).mean():.4f}{error} bits/dim (mean of {n_samples} held-out pictures, "
              "and its error)" + (f", of {' + '.join(terms)}" if bound else "") + f"; {took}")
        raise SystemExit(128 + asked[0] if asked else 0)
    if task == "reconstruct":
        gap = pictures - x_val[:n_samples].permute(0, 2, 3, 1).numpy().astype(float)
        print(f"restored to {np.sqrt((gap**2).mean()):.3f} of 255 grey levels (rms), "
              f"{abs(gap).max():.0f} at worst")
    if save.suffix:                                                           # else they are there already
        with explained(f"--save={save}: ", OSError), whole(save) as f:
            if save.suffix == ".png":
                save_image(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, f, nrow=10, format="png")
            else:
                np.savez(f, pictures, *([y.numpy()] if num_classes else []))     # named arr_0, arr_1 by numpy
    print(f"{took}: {save}")
    raise SystemExit(128 + asked[0] if asked else 0)
