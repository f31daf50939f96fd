"""
Where the time of training and sampling goes, compared with the best that this machine could do.

    python bench/speed.py cfm                                        # the default run of cfm.py
    python bench/speed.py ddpm config/cifar10.py --batch_size=32     # any options of the script
    python bench/speed.py ddpm --help                                # lists them
    python bench/speed.py torchcfm config/cifar10.py                 # another project's step,
    python bench/speed.py diffusers config/cifar10.py                # if it is installed

The script's own step runs on random pictures of the data set's shape; times are medians. The
ceiling is the best of some large convolutions and matrix products, measured in the same run: what a
network of this kind could reach if nothing but arithmetic took time. A step counts as three forward
passes. On CUDA everything is measured with and without torch.compile, and in bfloat16 and float32,
unless --compile or --dtype chooses; utilisation is relative to the ceiling in that precision.

A peer's step comes from its own example: its UNet, loss, optimizer and weight average, without the
learning rate schedule and logging. Options set the batch, the precision, compilation, clipping, and
the UNet's width, blocks per level and dropout. The rest is as in config/cifar10.py.
"""
import copy
import importlib
import importlib.metadata
import itertools
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, fail
from core.machine import choose_machine, count_flops
from core.muon import Muon
from sample import draw
from unet import UNet

SHAPES = {
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "synthetic": (1, 28, 28),
}


def seconds(f, device, least=3.0):
    """Median time of a call of f, over at least this many seconds, after two warm-up calls."""
    def call():
        start = time.perf_counter()
        f()
        if "cuda" in device:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    call()
    call()
    times = [call(), call(), call()]
    end = time.perf_counter() + least
    while time.perf_counter() < end:
        times.append(call())
    return statistics.median(times)


@torch.no_grad()
def ceiling(device, dtype):
    """GFLOP/s of the best of large convolutions and matrix products."""
    n, b = (8192, 256) if "cuda" in device else (2048, 32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 2 * n**3 / seconds(lambda: a @ a, device, 1)
    for c in (128, 256):
        x = torch.randn(b, c, 28, 28, device=device, dtype=dtype)
        w = torch.randn(c, c, 3, 3, device=device, dtype=dtype)
        x, w = [v.to(memory_format=torch.channels_last) for v in (x, w)]
        flops = 2 * 9 * c * c * b * 28 * 28
        best = max(best, flops / seconds(lambda: F.conv2d(x, w, padding=1), device, 1))
    return best / 1e9


class Step:
    """
    Each call is a training step of the script, on random pictures of a shape (C, H, W).

    With by_part, spent lists the seconds of each part of it, with an entry for each call. On CUDA
    the CPU then waits for each part to end, which makes the whole slower.
    """
    by_part = True
    inputs = "t", "x"                    # the model's names for a time and a picture

    def __init__(self, script, config, shape, num_classes, device, dtype, compiled):
        torch.manual_seed(0)
        self.script, self.device, self.compiled = script, device, compiled
        self.grad_clip = config["grad_clip"]
        self.autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype),
                                       enabled=dtype != "float32")
        self.build(config, shape, num_classes)
        self.pictures = torch.randint(256, (10_000, *shape), dtype=torch.uint8, device=device)
        labels = torch.arange(10_000) % num_classes if num_classes else torch.full((10_000,), -1)
        self.labels = labels.to(device)
        self.iteration = 0
        self.spent = {}

    def build(self, config, shape, num_classes):
        sizes = {name: config[name] for name in self.script.ARCHITECTURE}
        model = UNet(shape[0], num_classes=num_classes, **sizes)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        betas = 0.9, config["adam_beta2"]
        if config["muon"]:
            self.optimizer = Muon(model.parameters(), lr=1e-5, betas=betas)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=betas, fused=True)
        self.method = self.script.build(self.compile(self.model), config, self.device)

    def compile(self, model):
        return torch.compile(model, mode="reduce-overhead") if self.compiled else model

    def loss(self, x, y):
        return self.method.loss(x, y)

    def average(self):
        self.script.update_average(self.ema, self.model, self.iteration)

    def part(self, name, f):
        """f(), timed as the part of this name."""
        if not self.by_part:
            return f()
        start = time.perf_counter()
        out = f()
        if "cuda" in self.device:
            torch.cuda.synchronize()
        self.spent.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def forward(self, x, y):
        with self.autocast:
            return self.loss(x, y)

    def clip(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)

    def optimize(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self):
        x, y = self.part("batch", lambda: self.script.get_batch(self.pictures, self.labels))
        loss = self.part("forward", lambda: self.forward(x, y))
        self.part("backward", loss.backward)
        if self.grad_clip:
            self.part("clip", self.clip)
        self.part("optimizer", self.optimize)
        self.part("average", self.average)
        self.iteration += 1


class Torchcfm(Step):
    """
    A step of github.com/atong01/conditional-flow-matching, examples/images/cifar10/train_cifar10.py
    with --model=icfm.
    """
    def build(self, config, shape, num_classes):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
        from torchcfm.models.unet.unet import UNetModelWrapper

        model = UNetModelWrapper(dim=shape, num_channels=config["channels"],
                                 num_res_blocks=config["n_res_blocks"],
                                 channel_mult=config["channel_mults"], num_heads=4,
                                 num_head_channels=64, attention_resolutions="16",
                                 dropout=config["dropout"])
        self.model = model.to(self.device)
        self.ema = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
        self.matcher = ConditionalFlowMatcher(sigma=0.0)
        self.net = self.compile(self.model)

    def loss(self, x, y):
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (self.net(t, xt) - ut).square().mean()

    @torch.no_grad()
    def average(self):
        for mean, latest in zip(self.ema.parameters(), self.model.parameters()):
            mean.copy_(0.9999 * mean + 0.0001 * latest)


class Diffusers(Step):
    """
    A step of github.com/huggingface/diffusers,
    examples/unconditional_image_generation/train_unconditional.py, with the UNet of
    google/ddpm-cifar10-32, and the dropout that Ho et al. trained it with.
    """
    inputs = "timestep", "sample"

    def build(self, config, shape, num_classes):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        widths = [config["channels"] * mult for mult in config["channel_mults"]]
        model = UNet2DModel(sample_size=shape[-1], in_channels=shape[0], out_channels=shape[0],
                            layers_per_block=config["n_res_blocks"], block_out_channels=widths,
                            down_block_types=["DownBlock2D", "AttnDownBlock2D",
                                              "DownBlock2D", "DownBlock2D"],
                            up_block_types=["UpBlock2D", "UpBlock2D",
                                            "AttnUpBlock2D", "UpBlock2D"],
                            attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
                            freq_shift=1, norm_eps=1e-6, dropout=config["dropout"])
        self.model = model.to(self.device)
        self.ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=3 / 4)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                           weight_decay=1e-6)
        self.schedule = DDPMScheduler(num_train_timesteps=1000)
        self.net = self.compile(self.model)

    def loss(self, x, y):
        eps, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=self.device)
        return F.mse_loss(self.net(self.schedule.add_noise(x, eps, t), t).sample, eps)

    def average(self):
        self.ema.step(self.model.parameters())


PEERS = {"torchcfm": Torchcfm, "diffusers": Diffusers}
PEER_OPTIONS = {                         # what their UNets are built for
    "dataset": "cifar10",
    "image_size": 0,
    "conditional": False,
    "channel_mults": (1, 2, 2, 2),
    "attention_levels": (1, 4),
    "patch": 1,
}


def time_drawing(step, script, config, shape, device):
    """A few words on how long 100 pictures take."""
    averaged = script.build(step.ema, config, device)
    noise = torch.randn(100, *shape, device=device)
    y = torch.arange(100, device=device) % 10 if config["conditional"] else None

    def grid():
        with step.autocast:
            draw(averaged, noise, y, config["sampler"], config["sample_steps"])

    return (f"100 pictures by {config['sampler']}, {config['sample_steps']} steps: "
            f"{seconds(grid, device):.2f} s; ")


def measure(kind, script, config, device, dtype, compiled):
    """Prints the figures of one setting, for a step of this kind."""
    cuda = "cuda" in device
    top = ceiling(device, getattr(torch, dtype))
    if cuda:
        torch.cuda.reset_peak_memory_stats()         # without the ceiling's matrices
    (C, *sides), B = SHAPES[config["dataset"]], config["batch_size"]
    shape = C, *([config["image_size"]] * 2 if config["image_size"] else sides)
    num_classes = 10 if config["conditional"] else 0
    step = kind(script, config, shape, num_classes, device, dtype, compiled)

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    if cuda:                                         # a script's loop does not wait for each step
        step.by_part = False
        took = seconds(lambda: [step() for _ in range(10)], device) / 10
        step.by_part = True
        seconds(step, device, 1)
    else:
        took = seconds(step, device, 5)
    one = torch.zeros(1, device=device), torch.zeros(1, *shape, device=device)
    flops = 3 * B * count_flops(step.model, **dict(zip(step.inputs, one)))
    parameters = sum(p.numel() for p in step.model.parameters())
    print(f"\n{config['dataset']}, batch {B}, {parameters:,} parameters, "
          f"on {device}, {dtype}, {'compiled' if compiled else 'not compiled'}")
    print(f"  a step: {flops / 1e9:.1f} GFLOP, {1e3 * took:.1f} ms (the first: {first:.1f} s), "
          f"{B / took:.0f} pictures/s, {flops / took / 1e9:.0f} GFLOP/s, "
          f"{flops / took / 1e9 / top:.0%} of the ceiling of {top:.0f}")
    print("  of a step: " + ", ".join(f"{name} {1e3 * statistics.median(times):.1f} ms"
                                      for name, times in step.spent.items()))

    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            step()
    events = profiled.key_averages()
    if cuda:
        launches = sum(e.count for e in events if "LaunchKernel" in e.key) / 3
        print(f"  launches of kernels: {launches:.0f} a step")
    ops = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    total = sum(ops.values()) or 1                   # 0 if the driver forbids profiling
    largest = sorted(ops.items(), key=lambda op: -op[1])[:8]
    print("  by operation: " + ", ".join(f"{name[:40].removeprefix('aten::')} {t / total:.0%}"
                                         for name, t in largest))

    drawing = time_drawing(step, script, config, shape, device) if kind is Step else ""
    if cuda:
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = f"{peak / 2**10:.0f} MiB, torch included"
    print(f"  {drawing}peak memory {memory}", flush=True)


if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["cfm"]
    if name in ("-h", "--help"):
        print(__doc__)
        sys.exit()
    if name not in ("cfm", "ddpm", *PEERS):
        fail(f"{name}: the first word is the script to measure, cfm or ddpm, "
             f"or a peer, {' or '.join(PEERS)}; its options follow")
    script = importlib.import_module("cfm" if name in PEERS else name)
    config = configure(vars(script), script.LIMITS, argv)
    if config["dataset"] not in SHAPES:
        fail(f"--dataset={config['dataset']}: choose {' or '.join(SHAPES)}")
    script.check_options(config)
    kind = PEERS.get(name, Step)
    if name in PEERS:
        for option, value in PEER_OPTIONS.items():
            if config[option] != value:
                fail(f"--{option}={config[option]}: {name} needs {value}, as in config/cifar10.py")
        if config["channels"] % 32:
            fail(f"--channels={config['channels']}: {name} needs a multiple of 32")
        try:
            importlib.import_module(name)
        except ImportError as e:
            fail(f"{name} is missing ({e}): bench/peers.py says how to install it")
        print(name, importlib.metadata.version(name))
    device, dtype, compiled = choose_machine(config["device"], config["dtype"], config["compile"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "cuda" in device:
        dtypes = ("bfloat16", "float32") if config["dtype"] == "auto" else (dtype,)
        # what takes longer comes last, as a time limit may cut it off
        ways = (False, True) if compiled and config["compile"] == "auto" else (compiled,)
        for dtype, compiled in itertools.product(dtypes, ways):
            measure(kind, script, config, device, dtype, compiled)
    else:
        measure(kind, script, config, device, dtype, compiled)
