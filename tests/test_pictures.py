"""The user's own pictures: what a folder or an .npz may hold, and how it is read."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import core.pictures
from core.data import load_data
from core.pictures import Splitter, natural
from core.save import labels_to_save
from helpers import ROOT, TINY, checkpoint, here, refused, run_here, sample

T = [a for a in TINY if "dataset" not in a and "eval" not in a] + ["--max_iters=2", "--eval_interval=2"]


def picture(path, colour=(9, 90, 200), size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """pets/cat and pets/dog, 30 pictures each, all different; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        kind = ("cat", "dog")[i % 2]
        picture(tmp_path / "pets" / kind / f"{i}.png", (3 * i, 255 * (i % 2), 7))
    return tmp_path / "pets"


def load(folder, **options):
    return load_data(str(folder), "kept", **options)


def all_of(data):
    """{first pixel: class name} of all pictures."""
    x = torch.cat([data.train[0], data.held_out[0]])
    y = torch.cat([data.train[1], data.held_out[1]])
    return {tuple(p[:, 0, 0].tolist()): data.classes[label] if label >= 0 else None
            for p, label in zip(x, y.tolist())}


# ---- what is found ----

def test_classes_are_named_and_counted(pets):
    data = load(pets)
    assert data.classes == ["cat", "dog"]
    assert sum(int(part.split(": ")[1]) for part in data.counts().split(", ")) == len(data.train[0])
    assert {(3 * i, 255 * (i % 2), 7): ("cat", "dog")[i % 2] for i in range(60)} == all_of(data)


def test_classes_are_in_natural_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("10", "2", "b10", "b9", "a"):
        picture(tmp_path / "p" / name / "1.png", (ord(name[-1]), len(name), 0))
    assert load("p").classes == ["2", "10", "a", "b9", "b10"]
    assert sorted(["x10y2", "x9", "x10y1", "x"], key=natural) == ["x", "x9", "x10y1", "x10y2"]


def test_hidden_folders_and_files_are_skipped_and_counted(pets, capsys):
    before = all_of(load(pets))
    picture(pets / ".ipynb_checkpoints" / "1.png", (1, 1, 1))
    picture(pets / "__MACOSX" / "cat" / "1.png", (1, 1, 1))
    (pets / "cat" / "._1.png").write_bytes(b"no picture")
    (pets / "cat" / ".DS_Store").write_bytes(b"")
    (pets / "cat" / "notes.txt").write_text("")
    (pets / "Thumbs.db").write_text("")
    capsys.readouterr()
    assert all_of(load(pets)) == before
    assert "skipped: 1 .db, 1 .txt, 4 hidden" in capsys.readouterr().out


def test_the_folder_of_a_run_is_skipped(pets, capsys):
    before = all_of(load(pets))
    picture(pets / "out" / "cfm" / "sample-938.png", (1, 1, 1))
    (pets / "out" / "cfm" / "ckpt.pt").write_bytes(b"")
    assert all_of(load(pets)) == before
    assert "1 folder of a run" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["gif", "jfif", "webp", "bmp", "ppm", "TIFF"])
def test_every_kind_that_pillow_reads_is_a_picture(ending, pets):
    picture(pets / "owl" / f"1.{ending}", (255, 255, 255))
    data = load(pets)
    assert data.classes == ["cat", "dog", "owl"] and "owl" in all_of(data).values()


def test_avif_too_where_pillow_reads_it(pets):
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    picture(pets / "owl" / "1.avif", (255, 255, 255))
    assert load(pets).classes == ["cat", "dog", "owl"]


def test_links_are_followed_and_loops_end(pets, tmp_path, capsys):
    picture(tmp_path / "elsewhere" / "1.png", (255, 255, 255))
    (pets / "owl").symlink_to(tmp_path / "elsewhere")
    (pets / "cat" / "loop").symlink_to(pets)
    (pets / "dog" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    data = load(pets)
    assert data.classes == ["cat", "dog", "owl"] and len(all_of(data)) == 61
    assert "1 broken link" in capsys.readouterr().out


def test_an_empty_class_is_none(pets):
    (pets / "empty").mkdir()
    assert load(pets).classes == ["cat", "dog"]


@pytest.mark.parametrize("tops", [["wrapper"], ["train", "test"]])
def test_a_folder_level_too_many_is_noticed(tops, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for top in tops:
        for kind in ("cat", "dog"):
            picture(tmp_path / "p" / top / kind / "1.png")
    picture(tmp_path / "p" / tops[0] / "cat" / "2.png")      # train has more than test
    load("p")
    said = capsys.readouterr().out
    assert f"the classes are {', '.join(sorted(tops))}" in said or tops[0] in said
    assert f"if you mean cat, dog, use --dataset=p/{tops[0]}\n" in said


def test_nothing_is_said_where_the_level_is_right(pets, capsys):
    load(pets)
    assert "if you mean" not in capsys.readouterr().out
    picture(pets / "cat" / "tabby" / "1.png", (255, 255, 255))
    load(pets)
    assert "if you mean" not in capsys.readouterr().out


# ---- how pictures are read ----

def test_all_that_cannot_be_read_are_named_at_once(pets):
    for i in range(0, 60, 5):
        path = pets / ("cat", "dog")[i % 2] / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="12 of 60 pictures cannot be read") as error:
        load(pets)
    message = str(error.value)
    assert message.count(".png (") == 10 and message.endswith("; ...")


def test_a_size_that_is_missing_is_noticed_at_the_second_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(200):
        picture(tmp_path / "p" / f"{i}.png", size=(8 + i, 8))
    opened, decode = [], core.pictures.decode
    monkeypatch.setattr(core.pictures, "decode", lambda *a: (opened.append(a), decode(*a))[1])
    with pytest.raises(ValueError, match="--image_size"):
        load("p")
    assert len(opened) <= 2 + 8 * os.cpu_count() + os.cpu_count()


def grey16(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


@pytest.mark.parametrize("most, shift", [(255, 0), (1023, 2), (4095, 4), (65535, 8)])
def test_pictures_of_16_bits_that_hold_fewer_are_not_black(most, shift, tmp_path, monkeypatch):
    """The largest value in the set tells how many bits are used. Dark pictures stay dark."""
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, most, 64).round().reshape(8, 8)
    grey16(tmp_path / "p" / "bright.png", ramp)
    grey16(tmp_path / "p" / "dark.png", ramp // 4)
    x, _ = load("p").train
    brightest = sorted(x.flatten(1).max(1).values.tolist())
    assert brightest[1] == 255 and 60 <= brightest[0] <= 64
    [bright] = [p for p in x if p.max() == 255]
    assert np.array_equal(bright[0].numpy(), ramp.astype(int) >> shift)


def test_32_bits_are_read_by_their_values_and_refused_where_they_are_too_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ramp = np.arange(64, dtype=np.int32).reshape(8, 8)
    (tmp_path / "p").mkdir()
    Image.fromarray(ramp * 4).save(tmp_path / "p" / "a.tif")
    assert load("p").train[0].max() == 252
    Image.fromarray(ramp * 100_000).save(tmp_path / "p" / "b.tif")
    with pytest.raises(ValueError, match="values up to 6300000"):
        load("p")


@pytest.mark.parametrize("background, seen", [("white", 255), ("black", 0), ("#7f7f7f", 127)])
def test_transparent_pictures_lie_on_a_ground_that_an_option_names(background, seen, tmp_path, monkeypatch):
    """Colours hidden under full transparency are not learned; half-transparent ones are blended."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 4))
    clear.save(tmp_path / "p" / "a.png")
    palette = clear.convert("RGB").quantize(4)
    palette.save(tmp_path / "p" / "b.png", transparency=palette.getpixel((0, 7)))
    # Pillow reads palettes with alpha, but does not write them: a TGA of 8 x 8 and two BGRA colours
    header = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 8, 8, 8, 0x28)
    pixels = bytes(32 * [0] + 32 * [1])
    (tmp_path / "p" / "c.tga").write_bytes(header + bytes([255, 0, 0, 255, 0, 0, 255, 0]) + pixels)
    train = load("p", background=background).train[0]
    assert len(train) == 3
    for p in train:
        assert (p[:, 7, 0] == seen).all() and p[:, 0, 0].tolist() == [0, 0, 255]


def test_a_ground_that_is_no_colour_is_refused_in_one_line(pets):
    refused("cfm", *T, "--dataset=pets", "--background=plaid", cwd=pets.parent, message="plaid")


def test_large_photos_are_decoded_no_larger_than_needed_and_look_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    y, x = np.mgrid[:1200, :1600] / 200
    photo = (127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "p" / "a.jpg", quality=95)
    Image.fromarray(photo).save(tmp_path / "p" / "b.png")
    a, b = load("p", image_size=32).train[0].float()
    assert (a - b).abs().mean() < 2 and a.shape == (3, 32, 32)


# ---- what is kept ----

def test_what_was_read_is_kept_and_opened_at_once(pets, monkeypatch):
    first = load(pets)

    def decode(*args):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(core.pictures, "decode", decode)
        again = load(pets)
    assert all(torch.equal(a, b) for a, b in zip((*first.train, *first.held_out),
                                                 (*again.train, *again.held_out)))
    assert (first.classes, first.checksum) == (again.classes, again.checksum)
    assert not again.train[0].numpy().flags.owndata                     # it is mapped, not read
    assert len(list((pets.parent / "kept" / "pictures").glob("*"))) == 2


def test_another_size_or_ground_is_kept_beside_it(pets):
    load(pets), load(pets, image_size=4), load(pets, image_size=4, background="black")
    assert len(list((pets.parent / "kept" / "pictures").glob("*.u8"))) == 3


@pytest.mark.parametrize("change", ["added", "removed", "touched", "moved"])
def test_a_changed_folder_is_read_again_and_said_so(change, pets, capsys):
    first = load(pets)
    one = pets / "cat" / "0.png"
    if change == "added":
        picture(pets / "cat" / "new.png", (255, 255, 255))
    elif change == "removed":
        one.unlink()
    elif change == "touched":
        picture(one, (255, 255, 255))
    else:
        (pets / "cat").rename(pets / "zebra")
    again = load(pets)
    assert "has changed since it was read: reading it again" in capsys.readouterr().out
    assert all_of(again) != all_of(first) and again.checksum != first.checksum
    assert len(list((pets.parent / "kept" / "pictures").glob("*.u8"))) == 1


def test_nothing_half_read_is_left_or_used(pets):
    bad = pets / "dog" / "59.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    with pytest.raises(ValueError):
        load(pets)
    assert not [p for p in (pets.parent / "kept").rglob("*") if p.is_file()]
    bad.write_bytes(whole)
    assert len(all_of(load(pets))) == 60


def test_ctrl_c_while_reading_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    greys(tmp_path / "p", 200)
    opened, decode = [], core.pictures.decode

    def interrupted(*args):
        opened.append(args)
        if len(opened) == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        return decode(*args)

    monkeypatch.setattr(core.pictures, "decode", interrupted)
    # a shell makes background jobs ignore Ctrl-C, and they pass that on
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as end:
        load("p")
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and 20 <= len(opened) < 200
    assert capsys.readouterr().err == "stopped while reading p\n"
    assert not [p for p in (tmp_path / "kept").rglob("*") if p.is_file()]


# ---- how they are split ----

def test_a_picture_that_comes_or_goes_moves_no_other(pets):
    before = load(pets)
    held_out = {tuple(p[:, 0, 0].tolist()) for p in before.held_out[0]}
    assert 0 < len(held_out) < 20
    for i in range(20):
        picture(pets / "owl" / f"{i}.png", (255, 255, i))
    (pets / "cat" / "0.png").unlink()
    after = load(pets)
    again = {tuple(p[:, 0, 0].tolist()) for p in after.held_out[0]}
    old = {p for p in again if p[:2] != (255, 255)}
    assert old == held_out - {(0, 0, 7)}


def test_about_a_tenth_is_held_out():
    rng, splitter = np.random.default_rng(0), Splitter(5000)
    for p in rng.integers(0, 256, (5000, 1, 4, 4), dtype=np.uint8):
        splitter.place(p, 0, "")
    assert 420 < 5000 - splitter.front < 580 and splitter.front == splitter.back


# ---- labels ----

def test_the_classes_of_an_npz_are_those_that_occur(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x, np.where(np.arange(40) % 2, 3, 7))
    printed = here("cfm", *T, "--dataset=x.npz", "--out_dir=run", cwd=tmp_path)
    assert "2 classes" in printed and "classes: 3: " in printed
    assert checkpoint(tmp_path / "run")["model_args"]["num_classes"] == 2
    assert checkpoint(tmp_path / "run")["data"]["classes"] == ["3", "7"]
    sample("--out_dir=run", "--n_samples=4", "--save=all.npz", cwd=tmp_path)
    assert np.load(tmp_path / "all.npz")["arr_1"].tolist() == [3, 7, 3, 7]
    sample("--out_dir=run", "--n_samples=4", "--labels=7", "--save=seven.npz", cwd=tmp_path)
    assert np.load(tmp_path / "seven.npz")["arr_1"].tolist() == [7] * 4
    y = torch.tensor([0, -1, 1])                                 # -1 is no label, not the last class
    assert labels_to_save(["3", "7"], y)["arr_1"].tolist() == [3, -1, 7]
    for label in ("0", "1", "3,8", "seven"):
        refused("sample", "--out_dir=run", f"--labels={label}", cwd=tmp_path,
                message=f"there is no class {label.split(',')[-1]}, the model has 3, 7")


@pytest.mark.parametrize("labels, classes", [
    (np.arange(1, 11).repeat(2), [str(i) for i in range(1, 11)]),
    (np.array([10**9, 5] * 10), ["5", "1000000000"]),
    (np.array([2**63 + 5, 1] * 10, np.uint64), ["1", str(2**63 + 5)]),
    (np.array([-1, 4] * 10), ["4"]),
])
def test_odd_labels(labels, classes, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x, labels)
    data = load_data(str(tmp_path / "x.npz"))
    assert data.classes == classes
    y = torch.cat([data.train[1], data.held_out[1]])
    assert set(y.tolist()) == set(range(len(classes))) | ({-1} if -1 in labels.tolist() else set())


def test_classes_are_asked_for_by_name_and_come_back_by_name(pets):
    here("ddpm", *T, "--dataset=pets", "--out_dir=run", cwd=pets.parent)
    sample("--out_dir=run", "--n_samples=3", "--labels=dog,cat", "--save=x.npz", cwd=pets.parent)
    saved = np.load(pets.parent / "x.npz")
    assert saved["classes"][saved["arr_1"]].tolist() == ["dog", "cat", "dog"]
    assert load_data("x.npz").classes == ["cat", "dog"]                 # and can be read back
    sample("--out_dir=run", "--n_samples=3", "--labels=1", "--save=y.npz", cwd=pets.parent)
    assert np.load(pets.parent / "y.npz")["arr_1"].tolist() == [1, 1, 1]
    refused("sample", "--out_dir=run", "--labels=cow", cwd=pets.parent,
            message="there is no class cow, the model has cat, dog")


# ---- .npz files ----

def test_an_npz_is_cut_to_its_middle_as_folders_are(tmp_path):
    x = np.zeros((20, 8, 16, 1), np.uint8)
    x[:, :, 4:12] = 255
    np.savez(tmp_path / "x.npz", x)
    data = load_data(str(tmp_path / "x.npz"), image_size=4)
    assert data.train[0].shape[1:] == (1, 4, 4) and data.train[0].min() == 255


def test_an_npz_may_be_written_in_capitals_and_other_keys_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((20, 4, 4, 1), np.uint8))
    (tmp_path / "x.npz").rename(tmp_path / "OK.NPZ")
    assert load_data(str(tmp_path / "OK.NPZ")).train[0].shape == (20, 1, 4, 4)
    np.savez(tmp_path / "y.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(ValueError, match="it must hold pictures as arr_0, but holds images, labels"):
        load_data(str(tmp_path / "y.npz"))


# ---- the data of a run ----

def spellings(pets):
    yield "pets/"
    yield str(pets)
    yield "./pets"
    yield os.path.join("..", pets.parent.name, "pets")


def test_a_moved_set_is_accepted_and_a_changed_one_is_named(pets):
    cwd = pets.parent
    here("cfm", *T, "--dataset=pets", "--out_dir=run", cwd=cwd)
    resume = ["--init_from=resume", "--out_dir=run"]
    for n, spelling in enumerate(spellings(pets), 2):
        here("cfm", *resume, f"--dataset={spelling}", f"--max_iters={2 * n}", cwd=cwd)
    pets.rename(cwd / "animals")
    refused("cfm", *resume, "--max_iters=20", cwd=cwd, message="--dataset=")
    here("cfm", *resume, "--dataset=animals", "--max_iters=20", cwd=cwd)
    (cwd / "animals").rename(cwd / "again")

    picture(cwd / "again" / "cat" / "new.png", (255, 255, 255))
    moved = [*resume, "--dataset=again", "--max_iters=30"]
    code, _, err = run_here("cfm", *moved, cwd=cwd)
    assert code == 2 and "pictures 60 before, 61 now" in err and "--changed_data" in err
    here("cfm", *moved, "--changed_data", cwd=cwd)
    assert checkpoint(cwd / "run")["data"]["pictures"] == 61
    picture(cwd / "again" / "cat" / "newer.png", (255, 255, 255))        # allowed once, not for good
    code, _, err = run_here("cfm", *moved[:-1], "--max_iters=40", cwd=cwd)
    assert code == 2 and "pictures 61 before, 62 now" in err and "--changed_data" in err


def test_classes_that_were_renamed_are_named(pets):
    cwd = pets.parent
    here("cfm", *T, "--dataset=pets", "--out_dir=run", cwd=cwd)
    (pets / "cat").rename(pets / "zebra")
    code, _, err = run_here("cfm", "--init_from=resume", "--out_dir=run", "--max_iters=9", cwd=cwd)
    assert code == 2 and "classes missing: cat, new: zebra" in err


def test_labels_that_were_swapped_are_noticed(pets):
    cwd = pets.parent
    here("cfm", *T, "--dataset=pets", "--out_dir=run", cwd=cwd)
    for a, b in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (pets / a).rename(pets / b)
    code, _, err = run_here("cfm", "--init_from=resume", "--out_dir=run", "--max_iters=9", cwd=cwd)
    assert code == 2 and "as many pictures, but other pictures or labels" in err


# ---- speed, memory ----

@pytest.mark.long
def test_60000_small_pictures_and_3000_photos(tmp_path, monkeypatch):
    """At most 15 s to read each, and 2 to open it; memory stays below 1.3 times the array."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) // 2 + 60 for _ in range(50)]
    for i in range(60_000):
        path = tmp_path / "small" / str(i % 100) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(small[i % 50], i, axis=1)).save(path, compress_level=1)
    y, x = np.mgrid[:2000, :3000] / 300
    photo = (127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    for i in range(3000):
        os.link(tmp_path / "photo.jpg", tmp_path / "photos" / f"{i}.jpg")
    code = ("import resource, sys, time; from core.data import load_data\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "base, start = peak(), time.time()\n"
            "data = load_data(sys.argv[1], 'kept', 64)\n"
            "size = sum(x.numel() for x in (data.train[0], data.held_out[0])) / 2**20\n"
            "print(time.time() - start, (peak() - base) / size)")
    for folder in ("small", "photos"):
        for limit in (15, 2):
            command = [sys.executable, "-c", code, folder]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            seconds, share = map(float, out.stdout.splitlines()[-1].split())
            print(f"\n{folder}: {seconds:.1f} s, peak {share:.2f} times the finished array")
            assert seconds < limit and share < 1.3


# ---- what a stranger tried ----

def greys(folder, n=40):
    for i in range(n):
        picture(folder / f"{i}.png", (i, i, i))


def test_a_second_reader_of_a_grey_folder_that_is_killed_leaves_the_first_ones_pictures(
    tmp_path, monkeypatch
):
    """The RGB values of grey pictures were once written over the finished array."""
    monkeypatch.chdir(tmp_path)
    greys(tmp_path / "p")
    load("p")
    about = next((tmp_path / "kept" / "pictures").glob("*.json"))
    stamp = json.loads(about.read_text())["stamp"]
    files, _ = core.pictures.find_pictures(tmp_path / "p")
    whole = core.pictures.atomic_write

    @contextlib.contextmanager
    def killed_before_the_description(path):
        if path.suffix == ".json":
            raise SystemExit
        with whole(path) as f:
            yield f

    monkeypatch.setattr(core.pictures, "atomic_write", killed_before_the_description)
    with pytest.raises(SystemExit):
        core.pictures.write_cache(tmp_path / "p", files, 0, "white", about, stamp)
    monkeypatch.setattr(core.pictures, "atomic_write", whole)
    data = load("p")
    assert {key[0] for key in all_of(data)} == set(range(40)) and data.train[0].shape[1] == 1


def test_several_readers_of_a_grey_folder_get_it_whole(tmp_path, monkeypatch):
    """None has read any of it when the last one begins."""
    monkeypatch.chdir(tmp_path)
    greys(tmp_path / "p", 200)
    barrier, write_cache, begun = threading.Barrier(3), core.pictures.write_cache, []

    def together(*args):
        barrier.wait(timeout=60)
        begun.append(args)
        write_cache(*args)

    monkeypatch.setattr(core.pictures, "write_cache", together)
    with ThreadPoolExecutor(3) as readers:
        found = list(readers.map(load, 3 * ["p"]))
    assert len(begun) == 3
    for data in found:
        whole = torch.cat([data.train[0], data.held_out[0]])
        assert whole.shape == (200, 1, 8, 8) and whole[:, 0, 0, 0].double().sum() == 19900


@pytest.mark.parametrize("out_dir", ["pics", "pics/", "./pics"])
def test_the_pictures_folder_is_no_folder_for_a_run(out_dir, tmp_path):
    for i in range(12):
        picture(tmp_path / "pics" / f"{i}.png", (i, 0, 0))
    refused("cfm", "--dataset=pics", f"--out_dir={out_dir}", *T, cwd=tmp_path,
            message="holds pictures of --dataset=pics")


def test_a_run_may_not_hide_a_class(tmp_path):
    """A folder with a checkpoint is skipped as one of a run, so the pictures in it would be lost."""
    for kind in ("cat", "dog"):
        for i in range(12):
            picture(tmp_path / "pics" / kind / f"{i}.png", (i, 0, 0))
    refused("cfm", "--dataset=pics", "--out_dir=pics/cat", *T, cwd=tmp_path,
            message="--out_dir=pics/cat holds pictures of --dataset=pics")
    for _ in range(2):                       # a new folder there may well be the run's own
        here("cfm", "--dataset=pics", "--out_dir=pics/run", "--overwrite", *T, cwd=tmp_path)


def test_pictures_without_a_label_are_counted(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "1.png", "2.png"):
        picture(tmp_path / "pics" / name, (len(name), 0, 0))
    said = here("cfm", "--dataset=pics", *T, cwd=tmp_path)
    assert "classes: cat: 2, dog: 1, without a label: 2\n" in said


def test_huge_pictures_are_read_without_a_warning(tmp_path):
    """Pillow's limits of 89 and 179 million pixels are for files from strangers."""
    for i, side in enumerate((9_500, 13_500)):
        (tmp_path / "pics").mkdir(exist_ok=True)
        Image.new("L", (side, side), i).save(tmp_path / "pics" / f"{i}.jpg")
    code, _, err = run_here("cfm", "--dataset=pics", "--image_size=8", *T, cwd=tmp_path)
    assert (code, err) == (0, "")
    refused("cfm", "--dataset=pics", "--image_size=10001", *T, cwd=tmp_path, message="not between 0 and 10000")


def test_two_classes_of_one_name_are_both_drawn(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8)
    names = np.array([b"crane", b"dog", b"crane"])           # bytes, as h5py gives them
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=np.arange(20) % 3, classes=names)
    here("cfm", "--dataset=x.npz", "--out_dir=r", *T, cwd=tmp_path)
    assert checkpoint(tmp_path / "r")["data"]["classes"] == ["crane 0", "dog", "crane 2"]
    sample("--out_dir=r", "--n_samples=6", "--save=s.npz", cwd=tmp_path)
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("names", [np.array("cat"), np.array([["cat", "dog"]]), np.arange(2)])
def test_classes_that_are_no_list_of_names_are_refused(names, tmp_path):
    x = np.zeros((20, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=np.arange(20) % 2, classes=names)
    refused("cfm", "--dataset=x.npz", *T, cwd=tmp_path, message="classes must be names (K,)")


def test_labels_beyond_64_bits_are_saved_by_name(tmp_path):
    labels = np.array([2**63 + 5, 1] * 10, np.uint64)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8), arr_1=labels)
    here("cfm", "--dataset=x.npz", "--out_dir=r", *T, cwd=tmp_path)
    sample("--out_dir=r", "--n_samples=4", "--save=s.npz", cwd=tmp_path)
    saved = np.load(tmp_path / "s.npz")
    assert saved["classes"][saved["arr_1"]].tolist() == ["1", str(2**63 + 5)] * 2


def test_classes_that_are_one_number_stay_apart_and_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["01", "1", "001", "2"]):
        picture(tmp_path / "p" / name / "1.png", (i, 0, 0))
    names = [zeros + str(i) for i in range(3, 9) for zeros in ("00", "0", "")]
    for name in names:                       # more of them than a set would keep in order by chance
        picture(tmp_path / "many" / name / "1.png")
    assert load("many").classes == names and load("p").classes == ["001", "01", "1", "2"]
    here("cfm", "--dataset=p", "--out_dir=r", *T, cwd=tmp_path)
    sample("--out_dir=r", "--n_samples=4", "--save=s.npz", cwd=tmp_path)
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems have no such names")
@pytest.mark.parametrize("name", [b"cat/caf\xe9.png", b"caf\xe9/1.png"])
def test_names_that_are_not_utf8_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    greys(tmp_path / "p" / "cat", 3)
    target = os.path.join(os.fsencode(tmp_path / "p"), name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(tmp_path / "p" / "cat" / "0.png", target)
    for _ in range(2):                                       # read, then cached
        assert len(load("p").train[0]) == 3
    here("cfm", "--dataset=p", "--out_dir=r", *T, cwd=tmp_path)
    sample("--out_dir=r", "--n_samples=2", "--save=s.npz", cwd=tmp_path)


def test_pixels_below_zero_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    values = np.linspace(-1000, -100, 64).astype(np.int32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "p" / "a.tif")
    with pytest.raises(ValueError, match="a.tif.*values down to -1000"):
        load("p")


def test_transparent_pixels_of_16_bits_show_the_background(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    values = np.full((8, 8), 60000, np.uint16)
    values[:4] = 0
    Image.fromarray(values).save(tmp_path / "p" / "a.png", transparency=0)
    x = load("p").train[0]
    assert (x[0, 0, :4] == 255).all() and (x[0, 0, 4:] == 60000 >> 8).all()


def test_a_link_to_itself_is_skipped(pets, capsys):
    before = all_of(load(pets))
    (pets / "cat" / "self.png").symlink_to("self.png")
    assert all_of(load(pets)) == before and "1 broken link" in capsys.readouterr().out


def test_files_pillow_only_knows_the_names_of_are_skipped(pets):
    before = all_of(load(pets))
    (pets / "labels.h5").write_bytes(b"x")
    (pets / "clip.mpg").write_bytes(b"x")
    assert all_of(load(pets)) == before


def test_files_replaced_under_their_old_size_and_time_are_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for colour in (10, 20):
        picture(tmp_path / "p" / "a.bmp", (colour, 0, 0))
        os.utime(tmp_path / "p" / "a.bmp", (0, 0))           # as from a reproducible archive
        found.append(load("p").train[0][0, 0, 0, 0].item())
    assert found == [10, 20]


@pytest.mark.parametrize("asked", ["Crab, king", "dog", "dog ", "caf\u00e9"])
def test_classes_of_any_name_can_be_asked_for(asked, tmp_path):
    classes = ["7", "Crab, king", "cafe\u0301", "dog "]
    x = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=np.arange(20) % 4, classes=np.array(classes))
    here("cfm", "--dataset=x.npz", "--out_dir=r", *T, cwd=tmp_path)
    sample("--out_dir=r", f"--labels={asked}", "--n_samples=2", "--save=s.npz", cwd=tmp_path)
    expected = {"Crab, king": 1, "caf\u00e9": 2}.get(asked, 3)
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [expected] * 2


@pytest.mark.parametrize("content", ["npy", "git-lfs"])
def test_what_is_no_npz_is_refused_without_advice_to_unpickle(content, tmp_path):
    if content == "npy":
        np.save(tmp_path / "x.npy", np.zeros(3))
        (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    else:
        (tmp_path / "x.npz").write_text("version https://git-lfs.github.com/spec/v1")
    refused("cfm", "--dataset=x.npz", *T, cwd=tmp_path, message="it is not an .npz archive")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((9, 8, 8, 1), np.uint8), arr_1=np.array([None] * 9))
    refused("cfm", "--dataset=x.npz", *T, cwd=tmp_path, message="not Python objects")
