"""Faults that users met: networks, data sets and machines of other kinds than the scripts' own."""

import copy
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import nn

import cfm
import core.data
import core.pictures
import ddpm
import unet
from core.checkpoint import save_checkpoint
from core.data import draw_flowers, load_data
from core.pictures import Data, find_pictures
from core.run import catch_stop_signals
from helpers import ROOT, TINY, checkpoint, here, refused, run_here
from sample import draw
from test_processes import TORCHRUN

ONE = [*TINY, "--max_iters=2", "--eval_interval=2", "--out_dir=x"]


# ---- networks ----

class Other(nn.Module):
    """Called as the UNet is, with normalisation that keeps running averages."""

    def __init__(self, in_channels, num_classes, channels, **options):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, t, x, y=None):
        return self.last(self.norm(self.first(x)).relu() + t.reshape(-1, 1, 1, 1))


class OfOneSize(Other):
    """As a transformer is, by its embedding of positions."""

    def __init__(self, **options):
        super().__init__(**options)
        self.position = nn.Parameter(torch.zeros(1, 8, 8))

    def forward(self, t, x, y=None):
        return super().forward(t, x + self.position, y)


class Labelled(Other):
    """It has no embedding of the lack of a label, and requires labels."""

    def __init__(self, num_classes, **options):
        super().__init__(num_classes=num_classes, **options)
        assert num_classes > 0
        self.label = nn.Embedding(num_classes, 1)

    def forward(self, t, x, y):
        return super().forward(t, x, y) + self.label(y)[:, :, None, None]


@pytest.mark.parametrize("method", [cfm, ddpm])
def test_buffers_follow_the_model(method):
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for it in range(3):
        model(torch.randn(8, 1, 8, 8))
        with torch.no_grad():
            model[1].weight += 1
        method.update_average(ema, model, it)
    assert len(list(model.buffers())) == 5 and model[1].num_batches_tracked == 3
    for mean, latest in zip(ema.buffers(), model.buffers()):
        assert torch.equal(mean, latest)
    assert 1 < ema[1].weight.min() and ema[1].weight.max() < 4


@pytest.mark.parametrize("script", ["cfm", "ddpm"])
@pytest.mark.parametrize("network, options", [
    (Other, []), (OfOneSize, []), (OfOneSize, ["--image_size=0"]), (Labelled, ["--label_dropout=0"]),
])
def test_any_network_that_fits_the_data_trains_and_draws(script, network, options, tmp_path, monkeypatch):
    """Nothing is asked of it before the data are known. It is drawn with its own running averages."""
    monkeypatch.setattr(unet, "UNet", network)
    if "--image_size=0" in options:
        with pytest.raises(RuntimeError, match="must match the size"):     # 28 x 28, once it is trained
            here(script, *ONE, *options, cwd=tmp_path)
        return
    here(script, *ONE, *options, cwd=tmp_path)
    state = checkpoint(tmp_path / "x")
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(state["ema"][name], state["model"][name])
    here("sample", "--out_dir=x", "--n_samples=2", "--save=x.npz", cwd=tmp_path)


class Stateful(Other):
    """It accepts only keywords, and holds text and a number too large for float16."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("large", torch.tensor(1e6))

    def get_extra_state(self):
        return "text"

    def set_extra_state(self, state):
        assert state == "text"

    def forward(self, *, x, t, y):
        return super().forward(t, x, y) * self.large / 1e6


@pytest.mark.parametrize("script", ["cfm", "ddpm"])
def test_early_weights_of_any_network_are_kept(script, tmp_path, monkeypatch):
    monkeypatch.setattr(unet, "UNet", Stateful)
    here(script, *ONE, "--eval_interval=1", cwd=tmp_path)
    early = checkpoint(tmp_path / "x")["early"]
    assert early["large"] == 1e6 and early["first.weight"].dtype == torch.float16
    assert "text" in early.values()
    here("sample", "--out_dir=x", "--n_samples=2", cwd=tmp_path)


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("wrong", [
    lambda x: x[:, 0], lambda x: x.permute(0, 2, 3, 1), lambda x: torch.cat([x, x], 1), torch.mean,
])
def test_what_a_network_returns_in_another_shape_is_not_broadcast(wrong, guidance):
    """As if it had learned, the loss fell: towards the mean of all pictures and places."""
    x, y = torch.randn(4, 1, 8, 6), torch.arange(4)
    for method in (cfm.VelocityField(lambda t, x, y: wrong(x), cfm.ConditionalFlowMatcher()),
                   ddpm.DenoiseDiffusion(lambda t, x, y: wrong(x), 10)):
        with pytest.raises(ValueError, match=r"the model returned \(.*\) for an x of "):
            method.loss(x, y)
        with pytest.raises(ValueError, match=r"the model returned \(.*\) for an x of "):
            method.sample(x, y, guidance=guidance)


# ---- precision ----

class Plain(nn.Module):
    """A convolution, which takes x only in its own dtype, and an embedding of the time."""

    def __init__(self, integer=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.table = nn.Embedding(1000, 1) if integer else None
        self.times = []

    def forward(self, t, x, y=None):
        self.times.append(t)
        if self.table is not None:
            emb = self.table(t)
        else:
            emb = unet.time_embedding(t, 2).to(x.dtype).sum(1)
        return self.conv(x) + emb.reshape(-1, 1, 1, 1)


def methods(dtype=torch.float32):
    """A flow and three of DDPM's predictions, of the same weights in this dtype."""
    yield cfm.VelocityField(Plain().to(dtype), cfm.ConditionalFlowMatcher())
    for prediction in ddpm.PREDICTIONS:
        yield ddpm.DenoiseDiffusion(Plain().to(dtype), 50, prediction=prediction, unit_time=True)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_network_of_any_precision_trains_with_pictures_of_that(dtype):
    x = torch.rand(64, 1, 8, 8) * 2 - 1
    noise, u = torch.randn(64, 1, 8, 8), torch.rand(64)
    for method, reference in zip(methods(dtype), methods()):
        loss = method.loss(x.to(dtype), noise=noise.to(dtype), u=u)
        expected = reference.loss(x, noise=noise, u=u)
        least = torch.float64 if dtype == torch.float64 else torch.float32
        assert loss.dtype == least and method.model.times[0].dtype == least
        assert loss.item() == pytest.approx(expected.item(), rel=2e-2 if dtype in HALVES else 1e-5)
        loss.backward()
        assert method.model.conv.weight.grad.dtype == dtype


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk4", "ddim", "dpm++", "textbook"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_network_of_any_precision_draws_from_noise_of_that(sampler, dtype):
    noise, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    for method, reference in zip(methods(dtype), methods()):
        torch.manual_seed(0)
        x = draw(method, noise.to(dtype), y, sampler, 8, guidance=2)
        torch.manual_seed(0)
        expected = draw(reference, noise, y, sampler, 8, guidance=2)
        least = torch.float64 if dtype == torch.float64 else torch.float32
        assert x.dtype == least and {t.dtype for t in method.model.times} == {least}
        if sampler != "textbook":                              # whose noise differs
            assert torch.allclose(x.float(), expected, atol=0.1 if dtype in HALVES else 1e-2)


def test_times_a_thousandth_apart_differ_in_bfloat16():
    x, t = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([0.9, 0.901])
    for method in methods(torch.bfloat16):
        a, b = method.velocity(t, x)
        assert not torch.allclose(a, b, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_a_network_that_embeds_whole_numbers_gets_whole_times(dtype):
    method = ddpm.DenoiseDiffusion(Plain(integer=True).to(dtype), 30, prediction="x0")
    assert method.loss(torch.zeros(4, 1, 8, 8, dtype=dtype)).isfinite()
    assert method.sample(torch.randn(2, 1, 8, 8).to(dtype)).isfinite().all()
    assert {t.dtype for t in method.model.times} == {torch.long}


def test_a_thousand_steps_in_bfloat16_do_not_round_the_sum():
    """The noise of the last steps, a hundredth, is little more than what bfloat16 would round away."""
    def nothing(t, x, y):
        assert x.dtype == torch.bfloat16
        return torch.zeros_like(x)

    method = ddpm.DenoiseDiffusion(nothing, 1000)
    noise = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    x = method.sample(noise, randn=torch.zeros_like)
    assert x.item() == pytest.approx(method.alpha_bar[-1].item() ** -0.5, rel=1e-3)


# ---- pictures ----

def picture(path, colour=(9, 90, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, **options)


def first_pixels(data):
    """{first pixel: class name} of all pictures, however they are split."""
    x, y = (torch.cat(parts) for parts in zip(data.train, data.held_out))
    return {tuple(p[:, 0, 0].tolist()): data.classes[label] for p, label in zip(x, y.tolist())}


def test_folders_that_are_all_linked_to_one_another_are_read_once(tmp_path):
    """Each under its own name. Two more links, to a folder elsewhere, add its picture once."""
    for i in range(6):
        picture(tmp_path / "p" / str(i) / "1.png", (i, 0, 0))
        for j in range(6):
            (tmp_path / "p" / str(i) / f"link{j}").symlink_to(tmp_path / "p" / str(j))
    picture(tmp_path / "elsewhere" / "1.png", (99, 0, 0))
    for name in "ab":
        (tmp_path / "p" / name).symlink_to(tmp_path / "elsewhere")
    files, _ = find_pictures(tmp_path / "p")
    assert [str(f.relative_to(tmp_path / "p")) for f in files] == [*(f"{i}/1.png" for i in range(6)), "a/1.png"]
    data = load_data(str(tmp_path / "p"), str(tmp_path / "kept"))
    assert first_pixels(data) == {(i, 0, 0): str(i) for i in range(6)} | {(99, 0, 0): "a"}


def test_each_class_keeps_a_picture_to_train_on(tmp_path, monkeypatch):
    """By their checksums alone, several of 60 classes of one picture would be held out."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (160, 8, 8, 1), dtype=np.uint8)
    labels = [*range(60), *100 * [60]]
    alone = sum(zlib.crc32(p.transpose(2, 0, 1).tobytes()) % 10 == 0 for p in x[:60])
    np.savez("x.npz", x, labels)
    for i, label in enumerate(labels):
        Path("p", str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i, ..., 0]).save(f"p/{label}/{i}.png")
    assert alone >= 3
    for dataset in ("x.npz", "p", "p"):                      # the folder is read, then cached
        data = load_data(dataset)
        assert set(data.train[1].tolist()) == set(range(61))
        assert set(data.held_out[1].tolist()) == {60} and "none to train on" not in data.counts()
        found = [torch.cat(parts) for parts in zip(data.train, data.held_out)]
        pairs = {(p.numpy().tobytes(), data.classes[y]) for p, y in zip(*found)}
        assert pairs == {(x[i].tobytes(), str(label)) for i, label in enumerate(labels)}


def test_classes_without_a_picture_to_train_on_are_named():
    y = torch.arange(30)
    data = Data((torch.zeros(29, 1, 1, 1), y[:29]), (torch.zeros(1, 1, 1, 1), y[29:]), list(map(str, y.tolist())), 0)
    assert data.counts().endswith(", 19: 1, ..., none to train on: 29")


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_pictures_that_say_much_about_themselves_are_read(kind, tmp_path):
    (tmp_path / "p").mkdir()
    notes = PngImagePlugin.PngInfo()
    notes.add_text("history", 2_000_000 * "x", zip=True)
    more = {"text": {"pnginfo": notes}, "profile": {"icc_profile": os.urandom(1_500_000)}}[kind]
    picture(tmp_path / "p" / "1.png", (1, 2, 3), **more)
    x, _ = load_data(str(tmp_path / "p"), str(tmp_path / "kept")).train
    assert x[0, :, 0, 0].tolist() == [1, 2, 3]


def adobe_rgb(name=b"a wide gamut"):
    """A colour profile: primaries in XYZ under D50, a gamma of 2.2."""
    def xyz(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))

    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79),
            b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1, 0.8249),
            b"rXYZ": xyz(0.60974, 0.31111, 0.01947), b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
            b"bXYZ": xyz(0.14919, 0.06322, 0.74457)}
    tags |= dict.fromkeys([b"rTRC", b"gTRC", b"bTRC"], b"curv\0\0\0\0" + struct.pack(">IHxx", 1, 563))
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4xI", size, 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
@pytest.mark.parametrize("profile, seen", [
    (adobe_rgb(), (20, 200, 60)), (adobe_rgb(b"sRGB IEC61966-2.1"), (114, 199, 75)), (b"damaged", (114, 199, 75)),
])
def test_colours_are_those_of_the_embedded_profile(mode, profile, seen, tmp_path):
    """Grey pictures stay grey; so do those by sRGB as they are, by whatever rounding."""
    (tmp_path / "p").mkdir()
    image = Image.new("RGB", (8, 8), (114, 199, 75) if mode != "L" else (99, 99, 99))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "p" / "1.png", icc_profile=profile)
    x, _ = load_data(str(tmp_path / "p"), str(tmp_path / "kept")).train
    assert len(x[0]) == (1 if mode == "L" else 3)
    seen = (99,) if mode == "L" else seen
    assert np.allclose(x[0, :, 0, 0], seen, atol=2 if profile == adobe_rgb() else 0)


@pytest.mark.parametrize("bands, shown", [(2, 1), (5, 3)])
def test_pictures_of_any_number_of_bands_train_and_draw(bands, shown, tmp_path, monkeypatch):
    """Grids, PNGs and GIFs show the first three, or of two the first; an .npz holds them all."""
    x, y = torch.randint(256, (20, bands, 8, 8), dtype=torch.uint8), torch.arange(20) % 2
    data = Data((x, y), (x, y), ["a", "b"], 0)
    monkeypatch.setitem(core.data.LOADERS, "bands", lambda *_: data)
    printed = here("cfm", *ONE, "--dataset=bands", cwd=tmp_path)
    assert f"of the {bands} bands, grids and PNGs show the first {shown}\n" in printed
    for name in ("x.npz", "x.png", "x.gif", "folder"):
        here("sample", "--out_dir=x", "--n_samples=3", f"--save={name}", cwd=tmp_path)
    whole = np.load(tmp_path / "x.npz")["arr_0"]
    assert whole.shape == (3, 8, 8, bands)
    one = np.asarray(Image.open(tmp_path / "folder" / "000001.png")).reshape(8, 8, -1)
    assert np.array_equal(one, whole[1, ..., :shown])
    grid = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert np.array_equal(grid[2:10, 12:20, :shown], whole[1, ..., :shown])
    assert Image.open(tmp_path / "x" / "sample-2.png").mode == "RGB"
    here("cfm", "--init_from=resume", "--out_dir=x", "--max_iters=4", cwd=tmp_path)


@pytest.mark.parametrize("name", ["synthetic", "mnist"])
def test_a_folder_with_the_name_of_a_data_set_is_named(name, tmp_path, monkeypatch, capsys):
    picture(tmp_path / name / "1.png", (1, 2, 3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(core.data.LOADERS, name, lambda *_: "the data set")
    assert load_data(name) == "the data set"
    assert capsys.readouterr().out == f"--dataset={name} is the data set of that name: ./{name} is the folder\n"
    assert load_data(f"./{name}").train[0][0, :, 0, 0].tolist() == [1, 2, 3]
    (tmp_path / name).rename("other")
    load_data(name)
    assert "is the folder" not in capsys.readouterr().out


def test_flowers_are_drawn_in_parts(monkeypatch):
    """At 128 x 128, intermediate numbers would take twenty times the memory of the pictures."""
    sizes, atan2 = [], torch.atan2
    monkeypatch.setattr(torch, "atan2", lambda *v: (sizes.append(len(v[0])), atan2(*v))[1])
    x, y = draw_flowers(1050, 8)
    assert max(sizes) < 300 and sum(sizes) == len(x) == 1050 and len(x.flatten(1).unique(dim=0)) > 1000
    assert y.tolist() == [i % 10 for i in range(1050)]


# ---- where pictures are kept ----

@pytest.mark.parametrize("dataset, needed", [
    ("p", "0 are needed"), ("mnist", "80 are needed"), ("fashion_mnist", "90 are"), ("cifar10", "550 are"),
])
def test_a_full_disk_is_told_as_a_fault_of_data_dir(dataset, needed, tmp_path, monkeypatch):
    picture(tmp_path / "p" / "1.png")
    full = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    code, _, err = run_here("cfm", *ONE, f"--dataset={dataset}", "--data_dir=kept", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--dataset" not in err
    assert f"--data_dir: {tmp_path}/kept" in err and "has 0 MB free, but " in err and needed in err


@pytest.mark.parametrize("dataset", ["p", "mnist", "fashion_mnist", "cifar10"])
def test_a_folder_for_data_that_cannot_be_written_is_named(dataset, tmp_path):
    picture(tmp_path / "p" / "1.png")
    code, _, err = run_here("cfm", *ONE, f"--dataset={dataset}", "--data_dir=/proc/x", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "cfm.py: --data_dir" in err and "/proc/x" in err


def test_a_disk_that_fills_while_pictures_are_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "p" / "1.png")

    def fills(*args):
        yield 0, np.zeros((3, 8, 8), np.uint8)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(core.pictures, "decode_all", fills)
    code, _, err = run_here("cfm", *ONE, "--dataset=p", "--data_dir=kept", cwd=tmp_path)
    assert code == 2 and err == "cfm.py: --data_dir=kept: [Errno 122] Disk quota exceeded\n"
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


# ---- classes ----

def npz(path, names):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=x, arr_1=np.arange(40) % len(names), classes=np.array(names))


def labels(folder):
    state = checkpoint(folder)
    return dict(zip([None, *state["data"]["classes"]], state["model"]["label.weight"]))


def test_classes_keep_their_embeddings_by_name(tmp_path):
    npz(tmp_path / "first.npz", ["ant", "bee", "cat"])
    still = [*ONE[:-1], "--learning_rate=0"]
    here("cfm", *ONE, "--dataset=first.npz", cwd=tmp_path)
    before = {name: row.clone() for name, row in zip(
        [None, "ant", "bee", "cat"], checkpoint(tmp_path / "x")["ema"]["label.weight"])}
    told = {("bee", "cat", "dog"): "; classes it knows: bee, cat; new ones: dog\n",
            ("cat", "ant", "bee"): "; classes it knows: cat, ant, bee; new ones: none\n",
            ("cow",): "; classes it knows: none; new ones: cow\n",
            ("ant", "bee", "cat", "dog"): "; classes it knows: ant, bee, cat; new ones: dog\n",
            ("ant", "bee", "cat"): "\n"}
    for names, message in told.items():
        npz(tmp_path / "second.npz", names)
        printed = here("cfm", *still, "--dataset=second.npz", "--init_from=x", "--out_dir=y", "--overwrite",
                       cwd=tmp_path)
        assert f"starting from the weights of x{message}" in printed
        for name, row in labels(tmp_path / "y").items():
            assert name not in before or torch.equal(row, before[name])
            assert name in before or not any(torch.equal(row, other) for other in before.values())
    printed = here("cfm", *still, "--dataset=second.npz", "--init_from=x", "--out_dir=bare",
                   "--conditional=false", cwd=tmp_path)
    assert "starting from the weights of x; it was trained with --conditional=True\n" in printed


def test_a_run_is_not_resumed_with_other_classes(tmp_path):
    """Not even with --changed_data: its optimizer has a row of the embedding for each."""
    npz(tmp_path / "first.npz", ["ant", "bee", "cat"])
    here("cfm", *ONE, "--dataset=first.npz", cwd=tmp_path)
    for names in (["bee", "cat", "dog"], ["cat", "bee", "ant"], ["ant", "bee"]):
        npz(tmp_path / "second.npz", names)
        refused("cfm", "--init_from=resume", "--out_dir=x", "--max_iters=9", "--dataset=second.npz",
                "--changed_data", cwd=tmp_path, message="does not fit the run's model (")


# ---- machines ----

def test_of_torchruns_processes_one_draws(tmp_path, monkeypatch):
    here("cfm", *ONE, cwd=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        here("sample", "--out_dir=x", "--n_samples=2", "--save=x.png", cwd=tmp_path)
        assert (tmp_path / "x.png").exists() == (rank == 0)


def test_a_warning_of_slurm_stops_and_saves(tmp_path, monkeypatch):
    step = torch.nn.utils.clip_grad_norm_

    def warned(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", warned)
    code, out, _ = run_here("cfm", *ONE, "--max_iters=90", cwd=tmp_path)
    assert code == 128 + signal.SIGUSR1 and "stopped and saved at iteration 1" in out
    assert checkpoint(tmp_path / "x")["iteration"] == 1


def test_a_thread_catches_no_signals_and_goes_on():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(catch_stop_signals).result() == []


def test_weights_are_saved_as_other_programs_expect_them(tmp_path):
    """safetensors refuses tensors that are not contiguous, as those in channels-last order are."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state = {"weight": model.weight.detach(), "_extra_state": "text"}
    save_checkpoint(tmp_path / "ckpt.pt", model=state, ema=state, iteration=3)
    saved = checkpoint(tmp_path)
    assert not state["weight"].is_contiguous() and saved["iteration"] == 3
    for name in ("model", "ema"):
        assert saved[name]["weight"].is_contiguous() and saved[name]["_extra_state"] == "text"
        assert torch.equal(saved[name]["weight"], state["weight"])


@pytest.mark.slow
def test_a_parameter_that_is_not_used_is_told_in_a_line(tmp_path):
    """One process trains such a network."""
    for name in ("cfm.py", "sample.py", "configurator.py", "unet.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "core", tmp_path / "core")
    with open(tmp_path / "unet.py", "a") as file:
        file.write("\n\nclass UNet(UNet):\n    def __init__(self, **options):\n"
                   "        super().__init__(**options)\n        self.unused = nn.Linear(1, 1)\n")
    script = [str(tmp_path / "cfm.py"), *ONE, "--max_iters=4"]
    for command, code in ([sys.executable, *script], 0), ([*TORCHRUN, "--nproc_per_node=2", *script], 1):
        done = subprocess.run([*command, f"--out_dir={code}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ("cfm.py: a parameter of the network was not used" in done.stderr) == (code == 1)
        assert "Parameter indices" not in done.stderr
