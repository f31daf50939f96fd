"""
Draw pictures with a checkpoint of ddpm.py or cfm.py.

    python sample.py --out_dir=out/cfm                                # a grid: out/cfm/samples.png
    python sample.py --out_dir=out/cfm --labels=3,1,4 --guidance=2    # threes, ones, fours in turn
    python sample.py --out_dir=out/ddpm --sampler=ddim --eta=1 --steps=50 --save=digits    # PNGs
    python sample.py --out_dir=out/cfm --n_samples=30 --steps=40 --save=digits.gif  # an animation
    python sample.py --out_dir=out/cfm --n_samples=10000 --save=samples.npz         # for FID tools

A sampler is a function of a velocity v(tau, z), of noise z, and of the times taus between which it
steps. On the straight path z = tau data + (1 - tau) noise, the velocity is v = E[data - noise | z].
cfm.py learns it; ddpm.py computes it from its prediction. v yields predictions of the data,
z + (1 - tau) v, and of the noise, z - tau v. This does not hold on cfm.py's curved paths, so ddim
and dpm++ cannot be used there.

The same seed gives the same pictures, whatever the batch_size, up to rounding.
"""
import importlib
import math
import os
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
out_dir = "out/cfm"       # folder of the run, with its ckpt.pt
n_samples = 100           # pictures to draw
save = "auto"             # x.png: a grid; x.gif: how they form; x.npz: arr_0, uint8
#                           (N, H, W, C), and arr_1, labels (N,); x: a folder of PNGs;
#                           auto: a grid in out_dir
sampler = "auto"          # one of SAMPLERS below, or textbook, the method's own sample(), which
#                           ddpm.py also calls ancestral; auto: the run's
steps = 0                 # 0: the run's sample_steps. ddpm's textbook takes all its n_steps,
#                           dopri5 as many as it needs
eta = 0.0                 # noise in each step of ddim: 0 none, 1 as in ancestral with fixedsmall
clip = True               # clip predicted data to [-1, 1]; with cfm, only ddim and dpm++ do
guidance = 1.0            # guidance scale: 0 unconditional, 1 conditional, above 1 stronger
guidance_interval = (0.0, 1.0)  # times at which guidance acts: 0 is noise, 1 is data
labels = ""               # the classes to draw, in turn: 3 or 3,1,4 or cat,dog; "": all of them
seed = 0                  # of the noise
ema = True                # the averaged weights; false: the latest
batch_size = 0            # pictures at a time; 0: 100 on a CPU, 250 elsewhere
device = "auto"           # cuda, cuda:1, mps or cpu
# -----------------------------------------------------------------------------
LIMITS = {
    "eta": (0, 1),
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
            "ddim": ddim, "dpm++": dpm_solver}
STRAIGHT = ["ddim", "dpm++"]                                 # need predictions, so a straight path
LOOK_AHEAD = ["midpoint", "heun", "rk4", "dopri5"]           # prefer evenly spaced times
START = 1e-3                                                 # until then z is taken for all noise


# ---- drawing with a method, a VelocityField or a DenoiseDiffusion ----

def check_sampler(sampler, method):
    """ValueError if the method has no such sampler, or if its path is not straight enough."""
    if sampler not in [*SAMPLERS, *method.textbook]:
        known = ", ".join([*SAMPLERS, *method.textbook])
        raise ValueError(f"--sampler={sampler} is not one of {known}")
    if sampler in STRAIGHT and not method.straight:
        raise ValueError(f"--sampler={sampler} is for straight paths, and this one is curved: "
                         "use --sampler=euler")


def check_guidance(guidance, labelled, label_dropout):
    """ValueError if guidance needs labels, or a label_dropout, that training did not have."""
    if guidance != 1 and not labelled:
        raise ValueError(f"--guidance={guidance}: without labels there is nothing to be guided by")
    if guidance != 1 and not label_dropout:
        raise ValueError(f"--guidance={guidance} needs the unconditional model: a --label_dropout "
                         "above 0 in training")


def times(method, sampler, steps):
    """The method's times between which the sampler steps. dopri5 uses only the first and last."""
    steps = 2 if sampler == "dopri5" else steps
    return method.times(steps, even=sampler in LOOK_AHEAD)


def has_known_start(method):
    """Can mean pictures stand in for the model at the method's first time?"""
    independent = method.straight and method.renewable       # noise and data, on a straight path
    return method.means is not None and independent and method.times(2)[0] < START


def mean_picture(means, y=None, guidance=1.0):
    """
    E[data | noise] at tau = 0, where z is all noise: the mean picture of each label, (B, C, H, W).

    Without labels y it is (1, C, H, W). means (1 + classes, C, H, W): of all pictures, for no
    label, then of each class.
    """
    return means[:1] if y is None else torch.lerp(means[:1], means[y + 1], guidance)


def flow(method, y=None, guidance=1.0, clip=False, interval=(0.0, 1.0), watch=None, dtype=None):
    """
    The method's velocity as a function v(tau, z), tau a number or (B,), for labels y (B,) or None.

    Guidance acts while tau is in the interval (Kynkaanniemi et al. 2024, arXiv 2404.07724): tau is
    a number then. At tau = 0 the data are independent of z, so their mean is the best prediction:
    if has_known_start(method), and tau is a number, the model is not called there. watch(tau, z),
    if given, is called each time. dtype is the model's; None: that of z.
    """
    low, high = interval
    known = has_known_start(method)

    def v(tau, z):
        if watch:
            watch(tau, z)
        acts = (low, high) == (0, 1) or low <= tau <= high
        if known and not torch.is_tensor(tau) and tau < START:
            data = mean_picture(method.means, y, guidance if acts else 1.0)
            return (data.clamp(-1, 1) if clip else data) - z
        exact = torch.promote_types(z.dtype, torch.float32)
        tau = torch.as_tensor(tau, dtype=exact, device=z.device).expand(len(z))
        return method.velocity(tau, z.to(dtype=dtype), y, guidance if acts else 1.0, clip)

    return v


@torch.no_grad()
def draw(method, noise, y=None, sampler="dpm++", steps=6, guidance=1.0, clip=True,
         interval=(0.0, 1.0), watch=None, **options):
    """
    Pictures (B, *dim), in about [-1, 1], from noise (B, *dim) and labels y (B,) or None.

    Model evaluations per step: 2 for midpoint and heun, 4 for rk4, 6 for dopri5, 1 for the others.
    With mean pictures, all but dopri5 and textbook may skip the first: see flow(). options are
    the sampler's own: eta, randn, atol, rtol. ValueError if sampler or interval does not fit. The
    model is called in the noise's dtype; sums are in float32, or in float64 if the noise is.
    """
    check_sampler(sampler, method)
    if tuple(interval) != (0, 1) and (sampler in method.textbook or sampler == "dopri5"):
        raise ValueError(f"a guidance interval does not go with {sampler}")
    if sampler in method.textbook:
        return method.sample(noise, y, steps, guidance, clip, **options)
    if sampler in STRAIGHT:
        options["clip"] = clip
    v = flow(method, y, guidance, clip, interval, watch, noise.dtype)
    taus = times(method, sampler, steps)
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    z = z * math.hypot(taus[0], 1 - taus[0])                 # z = x_T / (a + b), as a^2 + b^2 = 1
    z = SAMPLERS[sampler](v, z, taus, **options)
    return euler(v, z, [taus[-1], 1.0]) if taus[-1] < 1 else z       # the rest is one step


# ---- runs ----

def load_run(folder, ema=True, device="cpu"):
    """
    (method, config, checkpoint) of the run in a folder, with its averaged or its latest weights.

    method is its VelocityField or DenoiseDiffusion, config all its options, and checkpoint what
    core.checkpoint.load_checkpoint() returns. Calls fail() if there is none, or if it does not fit.
    """
    from configurator import Options, explained, fail
    from core.checkpoint import load_checkpoint
    from unet import UNet

    path = Path(folder, "ckpt.pt")
    checkpoint = load_checkpoint(path)
    if checkpoint["method"] not in ("ddpm", "cfm"):
        fail(f"{path} is from another method: {checkpoint['method']}")
    if not ema and not checkpoint["model"]:
        fail(f"{path} holds only the averaged weights")
    script = importlib.import_module(checkpoint["method"])
    config = Options(vars(script), script.LIMITS).restored(checkpoint["config"])
    with explained(f"{path} is from another version of this program: "):
        model = UNet(**checkpoint["model_args"]).eval().requires_grad_(False)
        model = model.to(device, memory_format=torch.channels_last)
        model.load_state_dict(checkpoint["ema" if ema else "model"])
        args, names = checkpoint["model_args"], checkpoint["data"]["classes"]
        if args["num_classes"] != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{args['num_classes']} classes, but these names: {names}")
        C, H, W = checkpoint["picture_shape"]
        if C != args["in_channels"] or min(H, W) < 1:
            raise ValueError(f"pictures of {C, H, W}")
        method = script.build(model, config, device)
        if checkpoint["means"] is not None:
            method.means = checkpoint["means"].to(device, torch.float32)
        return method, config, checkpoint


def wanted_classes(labels, classes):
    """Indices of the classes that labels names, or of all; calls fail() for an unknown one."""
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


def check_request(method, classes, label_dropout):
    """Calls fail() if options, which are globals, do not fit the run or each other."""
    from configurator import explained, fail

    with explained():
        check_sampler(sampler, method)
        check_guidance(guidance, classes, label_dropout)
    if steps > method.most_steps:
        fail(f"--steps={steps}: the run has only {method.most_steps}")
    if sampler in method.textbook and 0 < steps < method.most_steps < math.inf:
        fail(f"--steps={steps}: ancestral sampling takes all {method.most_steps} steps, "
             "--sampler=ddim any number")
    if sampler == "dopri5" and steps:
        fail(f"--steps={steps}: dopri5 takes as many as it needs")
    if eta and sampler != "ddim":
        fail(f"--eta={eta} goes with --sampler=ddim, not with {sampler}")
    if eta and not method.renewable:
        fail(f"--eta={eta}: noise can be renewed only if it is independent of the data, as with "
             "--path=icfm or target and --sigma=0")
    in_one_go = sampler == "dopri5" or sampler in method.textbook
    if len(guidance_interval) != 2 or guidance_interval[0] > guidance_interval[1]:
        fail(f"--guidance_interval={guidance_interval}: must be two times, such as 0.2,0.8")
    if guidance_interval != (0, 1) and (guidance == 1 or in_one_go):
        fail("--guidance_interval goes with a --guidance other than 1, and not with dopri5 or the "
             "textbook's sampler")
    if Path(save).suffix == ".gif" and in_one_go:
        fail(f"--save={save}: a .gif has a frame per evaluation, so it does not go with dopri5 or "
             "the textbook's sampler")


def describe_sampler(method):
    """What the options ask for, for the first line of output."""
    if sampler == "dopri5":
        return sampler
    if sampler in method.textbook and method.most_steps < math.inf:
        return f"{sampler}, all {method.most_steps} steps"
    return f"{sampler}, {steps} steps"


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

    def __init__(self, numbers, shape, device, seed=0):
        self.shape, self.device = shape, device
        self.sources = [torch.Generator().manual_seed(hash((seed, n))) for n in numbers]

    def randn(self, like=None):
        """Normal draws (B, *shape). Samplers call it with a tensor of this shape."""
        draws = [torch.randn(self.shape, generator=source) for source in self.sources]
        return torch.stack(draws).to(self.device)


if __name__ == "__main__":
    import numpy as np

    from configurator import Options, configure, explained, say
    from core.machine import choose_machine
    from core.run import catch_stop_signals
    from core.save import claim, labels_to_save, save_pictures, save_pngs, to_bytes

    configure(globals(), LIMITS)
    if os.environ.get("RANK", "0") != "0":                   # of torchrun's processes, one draws
        raise SystemExit(0)
    device, _, _ = choose_machine(device)
    method, config, checkpoint = load_run(out_dir, ema, device)
    classes = checkpoint["data"]["classes"]
    C, H, W = checkpoint["picture_shape"]

    # the request, and whether it can be met
    sampler = config["sampler"] if sampler == "auto" else sampler
    own = Options(globals(), checkpoint["limits"])           # a run may have limits of its own
    for name in checkpoint["limits"]:
        own.checked(f"{out_dir}: --{name}", name, globals()[name])
    check_request(method, classes, config["label_dropout"])
    wanted = wanted_classes(labels, classes)
    steps = steps or min(method.most_steps, config["sample_steps"])
    batch_size = batch_size or (100 if device == "cpu" else 250)
    if sampler == "dopri5":                                  # its errors are smaller than TF32's
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    save = Path(out_dir, "samples.png") if save == "auto" else Path(save)
    with explained(f"--n_samples={n_samples}: "):
        pictures = np.empty((n_samples, H, W, C), np.uint8)
        y = torch.tensor(wanted or [-1]).repeat(math.ceil(n_samples / max(1, len(wanted))))
        y = y[:n_samples]
    claimed = claim(save)

    evaluations = Evaluations(method.model)
    say(f"{n_samples} pictures, {checkpoint['method']} at iteration {checkpoint['iteration']}: "
        f"{describe_sampler(method)}, guidance {guidance}, on {device}")
    stop_signals, start = catch_stop_signals(), time.monotonic()
    frames, cost, reported = [], 0, -math.inf
    for i in range(0, n_samples, batch_size):
        label = y[i:i + batch_size].to(device)
        draws = Draws(range(i, i + len(label)), (C, H, W), device, seed)
        noise = draws.randn()
        options = {"eta": eta} if sampler == "ddim" else {}
        if sampler == "ddim" or sampler in method.textbook:
            options["randn"] = draws.randn
        seen = []
        watch = (lambda tau, z: seen.append(z.cpu())) if save.suffix == ".gif" else None
        evaluations.restart()
        with explained(kind=FloatingPointError):             # dopri5 may fail
            x = draw(method, noise, label, sampler, steps, guidance, clip, guidance_interval,
                     watch, **options)
        if watch:
            frames.append([*seen, x.cpu()])
        pictures[i:i + batch_size] = to_bytes(x)
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

    if save.suffix:                                          # a folder has them already
        with explained(f"--save={save}: ", OSError):
            arrays = labels_to_save(classes, y[:n_samples])
            save_pictures(save, pictures[:n_samples], frames, arrays)
    elif claimed:
        Path(claimed.name).unlink(missing_ok=True)
    say(f"{time.monotonic() - start:.1f} s, {cost} evaluations of the model: {save}")
    raise SystemExit(128 + stop_signals[0] if stop_signals else 0)
