"""
A folder of pictures: found, decoded on all cores, cached in one file, and split.

Pictures are uint8 (N, C, H, W), labels are int64 (N,), the number of a class or -1 for none.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin
from torchvision.transforms.functional import pil_to_tensor

from configurator import explained, fail, say
from core.checkpoint import atomic_write, require_room

Image.MAX_IMAGE_PIXELS = None            # a user's own pictures may be as large as they like,
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = sys.maxsize    # and their notes


class Data:
    """
    Pictures and labels, (x, y) to train on and (x, y) held out, and the names of the classes.

    The checksum of all pictures and labels does not depend on their order.
    """

    def __init__(self, train, held_out, classes, checksum):
        self.train, self.held_out = train, held_out
        self.classes = classes           # names, of those that occur, in natural order
        self.checksum = checksum

    def summary(self):
        """What a checkpoint records about the data: plain values."""
        return {"pictures": len(self.train[0]) + len(self.held_out[0]),
                "shape": tuple(self.train[0].shape[1:]), "classes": list(self.classes),
                "checksum": self.checksum}

    def means(self, label_dropout=0.0, flip=False):
        """
        Mean training pictures (1 + classes, C, H, W) in [-1, 1]: without a label, then by class.

        Without a label are those that have none, and label_dropout of the others. None if there are
        fewer than 100 of a class: their mean would tell little of others, and much of themselves.
        """
        x, y = self.train
        rows, y = 1 + len(self.classes), y.to(x.device)
        counts = torch.bincount(y + 1, minlength=rows)
        if counts.sum() < 100 or rows > 1 and counts[1:].min() < 100:
            return None
        sums = torch.zeros(rows, *x.shape[1:], dtype=torch.long, device=x.device)
        for pictures, labels in zip(x.split(100), y.split(100)):     # saves memory
            sums.index_add_(0, labels + 1, pictures.long())
        weights = torch.full((rows,), max(label_dropout, 1e-9), dtype=torch.double)
        weights[0] = 1                                       # those without a label
        sums, counts = sums.cpu().double(), counts.cpu().double()    # MPS has no float64
        sums[0], counts[0] = torch.tensordot(weights, sums, 1), weights @ counts
        means = (sums / counts[:, None, None, None] / 127.5 - 1).float()
        means = (means + means.flip(3)) / 2 if flip else means
        return means.to(self.train[1].device)

    def differences(self, before):
        """In words, how the data differ from those with the summary before; "" if they do not."""
        now, found = self.summary(), []
        for name in ("pictures", "shape"):
            if now[name] != before.get(name):
                found.append(f"{name} {before.get(name)} before, {now[name]} now")
        classes = before.get("classes", [])
        if now["classes"] != classes:
            gone = ", ".join(c for c in classes if c not in self.classes) or "none"
            new = ", ".join(c for c in self.classes if c not in classes) or "none"
            found.append(f"classes missing: {gone}, new: {new}")
        if not found and now["checksum"] != before.get("checksum"):
            found.append("as many pictures, but other pictures or labels")
        return "; ".join(found)

    def to(self, device, offload=False):
        """
        Move all pictures and labels to the device, but with offload not the training pictures.

        Calls fail() if the device has too little memory.
        """
        if "cuda" in device:
            moving = [*self.train[offload:], *self.held_out]
            free, _ = torch.cuda.mem_get_info(device)
            missing = sum(v.nbytes for v in moving) - free
            if missing > 0:
                fail(f"the pictures do not fit on {device}, which lacks {missing / 2**30:.1f} GiB: "
                     "--offload keeps them in CPU memory, --image_size makes them smaller")
        x, y = self.train
        self.train = x if offload else x.to(device), y.to(device)
        self.held_out = tuple(v.to(device) for v in self.held_out)
        return self

    def describe(self):
        """A line with its size, and another one with its classes, if any."""
        x, _ = self.train
        line = f"{len(x)} pictures of {tuple(x.shape[1:])}, {len(self.classes)} classes"
        if (shown := len(visible(x[0]))) < x.shape[1]:
            line += f"; of the {x.shape[1]} bands, grids and PNGs show the first {shown}"
        return f"{line}\nclasses: {self.counts()}" if self.classes else line

    def counts(self):
        """A line with the number of training pictures of each class, and of those without one."""
        y = self.train[1]
        counts = y[y >= 0].bincount(minlength=len(self.classes)).tolist()
        parts = [f"{name}: {n}" for name, n in list(zip(self.classes, counts))[:20]]
        if len(self.classes) > 20:
            parts.append("...")
        if missing := [name for name, n in zip(self.classes, counts) if not n]:
            parts.append(f"none to train on: {', '.join(missing)}")
        if unlabelled := int((y < 0).sum()):
            parts.append(f"without a label: {unlabelled}")
        return ", ".join(parts)


def visible(x, dim=0):
    """The bands of pictures x along dim that a picture file can hold: all, or the first 3 or 1."""
    bands = x.shape[dim]
    return x if bands in (1, 3, 4) else x.narrow(dim, 0, 3 if bands > 4 else 1)


class Splitter:
    """
    Training pictures fill an array for n of them from the front, held-out ones from the back.
    A picture's own checksum decides, so that adding or removing others never moves it.
    """

    def __init__(self, n):
        self.n, self.front, self.back = n, 0, n
        self.labels = np.empty(n, np.int64)
        self.checksum = 0

    def place(self, picture, label, name):
        """Where to write the picture, (C, H, W): its index."""
        crc = zlib.crc32(picture.tobytes())
        self.checksum += zlib.crc32(os.fsencode(f"{crc} {name}"))
        if crc % 10 == 0:
            self.back -= 1
            i = self.back
        else:
            i = self.front
            self.front += 1
        self.labels[i] = label
        return i


def split(x, labels, n_train, classes, checksum):
    """The Data of pictures x, the first n_train of which are to train on."""
    # one picture of each class is, even if by their checksums all are held out
    for label in np.setdiff1d(labels[n_train:], np.append(labels[:n_train], -1)):
        swap = [n_train, n_train + np.flatnonzero(labels[n_train:] == label)[0]]
        x[swap], labels[swap] = x[swap[::-1]], labels[swap[::-1]]
        n_train += 1
    if len(x) < 10 or n_train in (0, len(x)):
        say("too few pictures to hold any out: evaluating on the training pictures")
        train = held_out = slice(None)
    else:
        train, held_out = slice(n_train), slice(n_train, None)
    x, y = torch.from_numpy(x), torch.from_numpy(labels)
    return Data((x[train], y[train]), (x[held_out], y[held_out]), classes, checksum)


# ---- folders of pictures ----

def natural(name):
    """A key by which 2 sorts before 10, and 01 before 1."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def find_pictures(folder):
    """Files that may be pictures, in natural order, and a Counter of what else there is."""
    known = {ending for ending, kind in Image.registered_extensions().items()
             if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG")}    # stubs
    files, skipped = [], Counter()
    waiting, links, read = [folder], [], set()
    while waiting or links:
        place = (waiting or links).pop(0)                    # a folder's own place gives its class
        real = os.path.realpath(place)
        if real in read:                                     # folders may be linked to one another
            continue
        read.add(real)
        with os.scandir(place) as entries:
            entries = sorted(entries, key=lambda entry: natural(entry.name))
        if any(re.fullmatch(r"ckpt.*\.pt", entry.name) for entry in entries):
            skipped["folder of a run"] += 1
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                skipped["hidden"] += 1
            elif os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not os.path.isfile(entry.path):
                skipped["broken link"] += 1
            elif Path(entry.name).suffix.lower() in known:
                files.append(Path(entry.path))
            else:
                skipped[Path(entry.name).suffix.lower() or "file without an ending"] += 1
        waiting = folders + waiting
    return files, skipped


def to_srgb(picture):
    """The picture, RGB, RGBA or CMYK, with the colours that its embedded profile means, if any."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged one, or for other modes
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info.get("icc_profile", b"")))
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            mode = "RGBA" if picture.mode == "RGBA" else "RGB"
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, profile, srgb, outputMode=mode)
    return picture


def decode(path, size, background, shift=None):
    """
    The picture as uint8 (3, H, W), centre-cropped and resized to size unless that is 0.

    Values of more than 8 bits are shifted right by shift bits. If shift is None, only the largest
    value is returned.
    """
    with Image.open(path) as picture:
        if size:
            picture.draft("RGB", (2 * size, 2 * size))       # decodes JPEGs no larger than needed
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range: "
                             "convert it to 8 or 16 bits")
        if picture.mode.startswith("I"):
            values = np.asarray(picture)
            if values.min() < 0:
                raise ValueError(f"its pixels have values down to {values.min()}: "
                                 "convert it to 8 or 16 bits")
            if shift is None:
                return int(values.max())
            transparent = picture.info.get("transparency")
            picture = Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8))
            if transparent is not None:
                picture.putalpha(Image.fromarray(255 * (values != transparent).astype(np.uint8)))
        modes = {picture.mode, picture.palette.mode if picture.palette else None}
        if modes & {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in picture.info:
            picture = to_srgb(picture.convert("RGBA"))
            behind = Image.new("RGBA", picture.size, ImageColor.getrgb(background))
            picture = Image.alpha_composite(behind, picture)
        elif picture.mode != "L":
            picture = to_srgb(picture if picture.mode == "CMYK" else picture.convert("RGB"))
        picture = picture.convert("RGB")
        if size:
            picture = ImageOps.fit(picture, (size, size))
        return np.asarray(picture).transpose(2, 0, 1)


def decode_all(files, size, background, shift=None):
    """
    Yields (index, picture) for each file, decoded on all cores. Reports progress from time to time.

    Those of more than 8 bits come last: their depth is known when all have been read once. Raises a
    ValueError that names the files that cannot be read.
    """
    def attempt(path):
        try:
            return decode(path, size, background, shift)
        except Exception as e:                               # PIL raises many kinds
            return e

    ahead = 8 * os.cpu_count()                               # few, to limit the memory used
    unreadable, deep, start = [], {}, time.monotonic()
    reported = start
    with ThreadPoolExecutor(os.cpu_count()) as pool:         # threads suffice: PIL releases the GIL
        pending = deque(pool.submit(attempt, path) for path in files[:ahead])
        for i in range(len(files)):
            found = pending.popleft().result()
            if i + ahead < len(files):
                pending.append(pool.submit(attempt, files[i + ahead]))
            if isinstance(found, Exception):
                unreadable.append(f"{files[i]} ({found})")
            elif isinstance(found, int):
                deep[i] = found
            elif not unreadable:                             # else only look for more such files
                yield i, found
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                left = (reported - start) / (i + 1) * (len(files) - i - 1)
                say(f"read {i + 1} of {len(files)} pictures, {left / 60:.1f} min left")
    if unreadable:
        names = "; ".join(unreadable[:10]) + ("; ..." if len(unreadable) > 10 else "")
        raise ValueError(f"{len(unreadable)} of {len(files)} pictures cannot be read: "
                         f"repair or remove {names}")
    if deep:
        again, shift = list(deep), excess_bits(deep.values())
        for i, picture in decode_all([files[i] for i in again], size, background, shift):
            yield again[i], picture


def excess_bits(values):
    """How far to shift values of more than 8 bits, given the largest of each picture."""
    most = max(values)
    depth = next((depth for depth in (8, 10, 12, 14, 16) if most < 2**depth), None)
    if depth is None:
        raise ValueError(f"pixels have values up to {most}: convert them to 8 or 16 bits")
    say(f"pixels have values up to {most}: read as {depth} bits")
    return depth - 8


def load_picture(path, shape, background="black", invert=False, means=None):
    """
    The picture in a file, uint8 (1, C, H, W), brought to shape (C, H, W); calls fail() if unfit.

    background is behind a transparent one. means, as of Data.means(), are those of a run: of grey
    pictures, a hint is printed if this one is as bright as a negative of them.
    """
    C, H, W = shape
    with explained(f"--picture={path}: "):
        pixels = decode(path, 0, background)                 # (3, h, w)
        if isinstance(pixels, int):                          # the largest, of more than 8 bits
            pixels = decode(path, 0, background, excess_bits([pixels]))
        grey = ", and from colour to grey" if C == 1 and (pixels != pixels[:1]).any() else ""
        first = ""
        with Image.open(path) as file, contextlib.suppress(Exception):   # those after it may be cut
            first = ", of the first picture in it" if file.n_frames > 1 else ""
        found = Image.fromarray(pixels.transpose(1, 2, 0).copy())
        middle = ", cropped to its middle" if found.width * H != found.height * W else ""
        say(f"{path}: from {found.width} x {found.height} pixels to {W} x {H}{first}{middle}{grey}")
        x = pil_to_tensor(ImageOps.fit(found, (W, H)).convert("L" if C == 1 else "RGB"))[None]
        if x.min() == x.max():
            raise ValueError("all of its pixels are alike: if it is transparent, choose another "
                             "--background")
    x = 255 - x if invert else x
    if C == 1 and means is not None and means[0].mean() * (x.float().mean() / 127.5 - 1) < -0.2:
        hint = "without" if invert else "with"
        say(f"it is as bright as a negative of the run's pictures: try it {hint} --invert")
    return x


def say_if_one_level_off(folder, files):
    """A hint if the classes seem to be one level down, as in train/cat, train/dog and test/cat."""
    below, sizes = defaultdict(set), Counter()               # the subfolders of each class
    for path in files:
        top, inner, *_ = *path.relative_to(folder).parts[:-1], "", ""
        below[top].add(inner)
        sizes[top] += 1
    inner, *others = below.values()
    if len(inner) > 1 and "" not in inner and all(names == inner for names in others):
        names = ", ".join(sorted(inner, key=natural)[:5])
        largest = max(sizes, key=sizes.get)                  # of train and test, it is train
        say(f"the classes are {', '.join(below)}: if you mean {names}, "
            f"use --dataset={folder / largest}")


def load_folder(folder, data_dir, size, background):
    """The Data below a folder, grey if all of it is, labelled by subfolders; cached in data_dir."""
    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(f"--background={background} is not a colour: "
                         "use a name such as white, or #rrggbb") from None
    files, skipped = find_pictures(folder)
    if skipped:
        say("skipped: " + ", ".join(f"{n} {what}" for what, n in sorted(skipped.items())))
    if not files:
        raise ValueError("there are no pictures in it, such as .png or .jpg")
    stamps = [(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns, s.st_ctime_ns)
              for p in files for s in [p.stat()]]
    stamp = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    what = str(folder.resolve()), size, background
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    about = Path(data_dir, "pictures", f"{key}.json")
    if about.exists():
        facts = json.loads(about.read_text())
        if facts["stamp"] == stamp and about.with_name(facts["file"]).exists():
            return open_cache(about)
        say(f"{folder} has changed since it was read: reading it again")
    say_if_one_level_off(folder, files)
    with explained(f"--data_dir={data_dir}: ", OSError):     # decoding raises ValueErrors
        write_cache(folder, files, size, background, about, stamp)
    return open_cache(about)


def write_cache(folder, files, size, background, about, stamp):
    """Read the files of a folder into one array on disk, described by the JSON file about."""
    files = sorted(files, key=lambda p: zlib.crc32(os.fsencode(p.relative_to(folder))))   # shuffle
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in files]
    classes = sorted({*names} - {""}, key=natural)
    number = {"": -1} | {name: i for i, name in enumerate(classes)}
    splitter, shape, grey = Splitter(len(files)), None, True
    about.parent.mkdir(parents=True, exist_ok=True)
    array = about.with_name(f"{about.stem}-{stamp}.u8")
    with atomic_write(array) as f:
        for i, picture in decode_all(files, size, background):
            if shape not in (None, picture.shape):
                raise ValueError("its pictures differ in size: choose one, such as --image_size=64")
            if shape is None:
                require_room(about.parent, len(files) * picture.nbytes)
            shape, grey = picture.shape, grey and bool((picture == picture[:1]).all())
            f.seek(splitter.place(picture, number[names[i]], names[i]) * picture.nbytes)
            f.write(picture.tobytes())
        if grey:                                             # in place: writing trails reading
            f.flush()
            colour = np.memmap(f.name, np.uint8, "r", shape=(len(files), *shape))
            shape = 1, *shape[1:]
            f.seek(0)
            for start in range(0, len(files), 1000):
                f.write(colour[start:start + 1000, :1].tobytes())
            del colour
            f.truncate()
    facts = {"stamp": stamp, "file": array.name, "shape": [len(files), *shape],
             "classes": classes, "labels": splitter.labels.tolist(),
             "n_train": splitter.front, "checksum": splitter.checksum}
    for old in about.parent.glob(f"{about.stem}-*.u8"):
        if old != array:
            old.unlink(missing_ok=True)
    with atomic_write(about) as f:
        f.write(json.dumps(facts).encode())


def open_cache(about):
    """The Data that write_cache() wrote, mapped into memory, which all processes share."""
    facts = json.loads(about.read_text())
    x = np.memmap(about.with_name(facts["file"]), np.uint8, "c", shape=tuple(facts["shape"]))
    labels = np.array(facts["labels"], np.int64)
    return split(x, labels, facts["n_train"], facts["classes"], facts["checksum"])
