"""What a run computes on: device, precision, torch.compile, and the processes of torchrun."""
import contextlib
import ctypes
import os
import re
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from configurator import fail, say


def choose_machine(device="auto", dtype="auto", compile=False):
    """
    (device, dtype, compile) with "auto" resolved; calls fail() if something is not available.

    Under torchrun each process gets its own GPU. On CUDA, what stays float32 may use TF32.
    """
    if device == "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = next((name for name, there in available.items() if there), "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = str(torch.zeros(1, device=device).device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device={device} cannot be used here ({str(e).splitlines()[0]})")
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if dtype == "auto":
        native_bfloat16 = cuda and torch.cuda.get_device_capability()[0] >= 8
        dtype = "bfloat16" if native_bfloat16 else "float16" if cuda else "float32"
    sys.excepthook = explain_lack_of_memory
    wanted = cuda if compile == "auto" else compile
    return device, dtype, wanted and try_to_compile(device, required=compile is True)


def explain_lack_of_memory(kind, error, traceback):
    """An excepthook: a program that runs out of memory ends with a line, not with a traceback."""
    on_cpu = re.search("can't allocate memory|bad_alloc", str(error))    # torch's RuntimeErrors
    if on_cpu or issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
        fail("out of memory: try a smaller --batch_size; in training, "
             "--gradient_accumulation_steps makes up for it")
    sys.__excepthook__(kind, error, traceback)


def try_to_compile(device, required=False):
    """Does torch.compile work on the device? If not, says why, or calls fail() if required."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as e:               # no C compiler, Python.h or Triton, or too old a GPU
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    if required:
        fail(f"--compile=true: torch.compile does not work here ({reason})")
    say(f"torch.compile does not work here ({reason}): continuing without it, which is slower",
        file=sys.stderr)
    return False


def keep_freed_memory():
    """Have glibc keep large freed blocks: giving them back takes a fifth of a training step."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError):      # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):    # old glibc
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Processes:
    """The processes of a run: this one's rank, their number, and what they do together."""

    def __init__(self, rank=0, world_size=1, group=None):
        self.rank, self.world_size = rank, world_size
        self.group = group               # for tensors on the CPU
        self.is_main = rank == 0         # the one that writes and prints

    @contextlib.contextmanager
    def main_first(self):
        """The main process runs the block first, say a download; the others then find it done."""
        if not self.is_main:
            dist.barrier(self.group)
        yield
        if self.is_main and self.world_size > 1:
            dist.barrier(self.group)

    def maximum(self, number):
        """The largest of all processes' integers."""
        if self.world_size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return number.item()

    def average(self, tensor):
        """Replace the tensor by its mean over all processes."""
        if self.world_size > 1:
            mean = tensor.cpu() / self.world_size
            dist.all_reduce(mean, group=self.group)
            tensor.copy_(mean)

    def exit(self, code):
        """End the process when all processes are done."""
        if self.world_size > 1:
            dist.barrier(self.group)     # the main process may still be drawing
            os._exit(code)               # shutting down gloo's threads one by one may abort
        sys.exit(code)


def init_distributed(device):
    """
    The Processes that torchrun started, or this one alone.

    From then on, a process that loses another one says so in one line and exits.
    """
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return Processes()
    if len(given) < len(names) or not (given["RANK"] + given["WORLD_SIZE"]).isdecimal():
        fail(f"of {', '.join(names)} only {', '.join(given)} are set in the environment, or not to "
             "numbers: use torchrun for several processes, or unset them all for one")
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if world_size == 1:
        return Processes()

    def hook(kind, e, trace):
        if issubclass(kind, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e)):
            say(f"another process of this run has ended, so process {rank} ends, too; "
                f"saved files are intact ({str(e).splitlines()[0][:100]})", file=sys.stderr)
            os._exit(1)                  # without waiting for the other one
        if "find_unused_parameters" in str(e):
            fail("a parameter of the network was not used by its forward(): remove it, or train in "
                 "one process; several wait for the gradient of each")
        explain_lack_of_memory(kind, e, trace)

    dist.init_process_group("nccl" if "cuda" in device else "gloo")
    sys.excepthook = hook                # replaces the one that init_process_group() sets
    # The others may wait for hours while one reads data. A dead process is noticed in any case.
    return Processes(rank, world_size, dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def wrap(model, compile, accumulation_steps, world_size):
    """
    The model as it is trained: compiled, and sharing its gradients with the other processes.

    "reduce-overhead" is CUDA graphs, which launch all kernels of a pass at once. The next pass
    reuses their memory, so gradients cannot accumulate over several.
    """
    if compile:
        one_pass = world_size == accumulation_steps == 1
        model = torch.compile(model, mode="reduce-overhead" if one_pass else None)
    return torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model


@torch.no_grad()
def count_flops(model, **inputs):
    """Floating-point operations of model(**inputs), two per multiply-add; None if unknown."""
    try:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    except Exception:                    # a model may do what the counter cannot follow
        return None
    return counter.get_total_flops() or None


def describe(model, batch, device, dtype, compile, world_size):
    """Lines about the model's size and what it runs on; batch is (x, y, noise, t), any size."""
    x, y, _, t = (v[:1] for v in batch)
    flops = count_flops(model, t=t, x=x, y=y)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    size += f", {flops / 1e6:.1f} MFLOP a picture in a forward pass" if flops else ""
    compiled = "compiled" if compile else "not compiled"
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    return f"{size}\n{device}, {dtype}, {compiled}, {processes}"
