"""
Where the time of a training step goes, and of sampling, beside what this machine could do at best.

    python bench/speed.py cfm                                   # the default run of cfm.py
    python bench/speed.py ddpm config/cifar10.py --batch_size=32    # any options of the script after its name

The step is that of the script, on random pictures of the data set's shape; times are medians. The ceiling is
the best of some large convolutions and matrix products, measured in the same run: what a network of this kind
could reach if nothing but arithmetic took time. A step counts as three forward passes. On CUDA everything is
measured with and without torch.compile, and in bfloat16 and float32; utilisation is of the ceiling in the
same precision.
"""
import copy
import importlib
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import choose_machine, configure, explained, fail
from sample import draw
from unet import Muon, UNet

SHAPES = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "synthetic": (1, 28, 28)}
SIZES = "channels", "channel_mults", "n_res_blocks", "attention_levels", "dropout", "patch"


def seconds(f, device, least=3.0):
    """Median time of a call of f, of as many as least seconds hold, after two that do not count."""
    def call():
        start = time.perf_counter()
        f()
        if "cuda" in device:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    call(), call()
    times, end = [call(), call(), call()], time.perf_counter() + least
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
        x = torch.randn(b, c, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(c, c, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * 9 * c * c * b * 28 * 28
        best = max(best, flops / seconds(lambda: F.conv2d(x, w, padding=1), device, 1))
    return best / 1e9


def measure(script, config, device, dtype, compiled):
    """Prints the figures of one setting."""
    kind, top = getattr(torch, dtype), ceiling(device, getattr(torch, dtype))
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()      # without the ceiling's matrices
    (C, *sides), B = SHAPES[config["dataset"]], config["batch_size"]
    shape = C, *([config["image_size"]] * 2 if config["image_size"] else sides)
    torch.manual_seed(0)
    model = UNet(shape[0], num_classes=10 if config["conditional"] else 0, **{k: config[k] for k in SIZES})
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = (Muon(model.parameters(), lr=1e-5) if config["muon"] else
                 torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    autocast = torch.autocast(torch.device(device).type, kind, enabled=dtype != "float32")
    trained = script.build(torch.compile(model) if compiled else model, config, device)
    averaged = script.build(ema, config, device)
    pictures = torch.randint(256, (10_000, *shape), dtype=torch.uint8, device=device)
    y, noise = torch.arange(B, device=device) % 10, torch.randn(100, *shape, device=device)
    spent = {}                                                              # seconds of each part of the step

    def part(name, f):
        start = time.perf_counter()
        out = f()
        if "cuda" in device:
            torch.cuda.synchronize()
        spent.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def forward(x):
        with autocast:
            return trained.loss(x, y=y)

    def step():
        x = part("batch", lambda: pictures[torch.randint(10_000, (B,)).to(device)].float() / 127.5 - 1)
        loss = part("forward", lambda: forward(x))
        part("backward", loss.backward)
        if config["grad_clip"]:
            part("clip", lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"]))
        part("optimizer", lambda: (optimizer.step(), optimizer.zero_grad()))
        part("average", lambda: torch._foreach_lerp_(list(ema.parameters()),
                                                     [p.detach() for p in model.parameters()], 0.001))

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    took = seconds(step, device, 10)
    flops = 3 * B * ema.flops(torch.zeros(1, *shape, device=device))
    print(f"\n{config['dataset']}, batch {B}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"on {device}, {dtype}, {'compiled' if compiled else 'not compiled'}")
    print(f"  a step: {flops / 1e9:.1f} GFLOP, {1e3 * took:.1f} ms (the first: {first:.1f} s), "
          f"{B / took:.0f} pictures/s, {flops / took / 1e9:.0f} GFLOP/s, "
          f"{flops / took / 1e9 / top:.0%} of the ceiling of {top:.0f}")
    print("  of a step: " + ", ".join(f"{name} {1e3 * statistics.median(s):.1f} ms"
                                      for name, s in spent.items()))

    cuda = "cuda" in device
    with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            step()
    ops = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiled.key_averages()}
    total = sum(ops.values())
    largest = sorted(ops.items(), key=lambda op: -op[1])[:8]
    print("  by operation: " + ", ".join(f"{name[:40].removeprefix('aten::')} {t / total:.0%}"
                                         for name, t in largest))

    def grid():
        with autocast:
            draw(averaged, noise, y=torch.arange(100, device=device) % 10 if config["conditional"] else None,
                 steps=config["sample_steps"], sampler=config["sampler"])

    took = seconds(grid, device)
    memory = (f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device" if cuda else
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB, torch included")
    print(f"  100 pictures by {config['sampler']}, {config['sample_steps']} steps: {took:.2f} s; "
          f"peak memory {memory}", flush=True)


if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["cfm"]
    if name not in ("cfm", "ddpm"):
        fail(f"{name}: the first word is the script to measure, cfm or ddpm, and then come its options")
    script = importlib.import_module(name)
    config = configure(vars(script), script.LIMITS, argv)
    if config["dataset"] not in SHAPES:
        fail(f"--dataset={config['dataset']}: choose {' or '.join(SHAPES)}")
    device, dtype, compiled = choose_machine(config["device"], config["dtype"], config["compile"])
    with explained():                                                       # do the options go together?
        script.build(None, config, "cpu")
        with torch.device("meta"):
            UNet(**{k: config[k] for k in SIZES})
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "cuda" in device:
        for dtype in ("bfloat16", "float32"):
            for compiled in (True, False):
                measure(script, config, device, dtype, compiled)
    else:
        measure(script, config, device, dtype, compiled)
