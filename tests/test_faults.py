"""
Faults that really happen: a run is killed, its files are damaged, its disk is full, and so on.

Tests that take many seconds are marked slow, and run only with: python -m pytest --all
Tests that take several minutes are marked long, and run only with: python -m pytest -m long
"""

import csv
import functools
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

import core.data
from core.checkpoint import atomic_write, backup_path, load_checkpoint
from test_processes import TORCHRUN
from helpers import TINY, checkpoint, command, flat, here, refused, run, run_here, stop_after

RESUME = ["--init_from=resume", "--out_dir=x"]
STOPPING = "stopping when the work at hand is done; a second signal stops at once\n"


STARTED = []


@pytest.fixture(autouse=True)
def nothing_goes_on_after_a_test():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(script, *args, cwd, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)):
    """By default as if from a terminal, even if these tests run under nohup."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(script, *args), cwd=cwd, preexec_fn=preexec_fn, **pipes)
    STARTED.append(process)
    return process


def wait_for(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} never came: {process.stderr.read()}")


def log(folder):
    """The rows of log.csv, without the speed."""
    return [row[:3] + row[5:] for row in csv.reader((folder / "log.csv").open())]


def assert_same_run(a, b):
    one, other = flat(checkpoint(a)), flat(checkpoint(b))
    assert len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))
    assert log(a) == log(b)


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.long)]
)
def test_killed_at_random_moments_nothing_whole_is_lost(kills, tmp_path):
    """SIGKILL, mostly during writes: every file left is whole, and the end is as without kills."""
    args = [*TINY, "--max_iters=1000000", "--decay_lr=false",
            "--eval_interval=2", "--log_interval=3", "--out_dir=x"]
    ckpt, reached, in_writing, draw = tmp_path / "x" / "ckpt.pt", 0, 0, random.Random(kills)
    for kill in range(kills + 1):
        process = start("cfm", *(RESUME if ckpt.exists() else args), cwd=tmp_path)
        wait_for(process, "iteration ")
        time.sleep(draw.uniform(0, 0.5))
        last = kill == kills
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == (128 + signal.SIGTERM if last else -signal.SIGKILL), err
        if ckpt.exists():
            in_writing += any(ckpt.parent.glob("*.tmp"))
            assert load_checkpoint(ckpt)["iteration"] >= reached
            reached = load_checkpoint(ckpt)["iteration"]
        if backup_path(ckpt).exists():
            assert load_checkpoint(backup_path(ckpt))["iteration"] <= reached
    assert reached > kills and (kills < 100 or in_writing > 3)
    print(f"\n{kills} kills, {in_writing} while a file was being written, {reached} iterations")
    straight = [*args[:-1], "--out_dir=straight", f"--max_iters={reached}"]
    here("cfm", *straight, cwd=tmp_path)
    a, b = tmp_path / "straight", tmp_path / "x"
    one, other = (flat(checkpoint(folder) | {"losses": torch.zeros(2)}) for folder in (a, b))
    assert len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))
    at_end = str(reached)  # where the straight run evaluates, and the other one was stopped
    assert [r for r in log(a) if r[0] != at_end] == [r for r in log(b) if r[0] != at_end]


@pytest.fixture(scope="module", params=["ddpm", "cfm"])
def straight(request, tmp_path_factory):
    """(script, options, folder) of a run with everything random switched on, and accumulation."""
    args = [*TINY, "--max_iters=40", "--dropout=0.2", "--label_dropout=0.3", "--flip"]
    args += ["--gradient_accumulation_steps=2"]
    cwd = tmp_path_factory.mktemp(request.param)
    here(request.param, *args, "--out_dir=straight", cwd=cwd)
    return request.param, args, cwd / "straight"


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((1,), marks=pytest.mark.slow),
        (7, 8),
        pytest.param((19, 20, 21), marks=pytest.mark.slow),
        pytest.param((28, 39), marks=pytest.mark.slow),
    ],
)
def test_interrupted_anywhere_a_run_ends_as_if_it_had_not_been(
    straight, stops, tmp_path, monkeypatch
):
    """Stopped by SIGTERM after the given iterations, and resumed each time."""
    script, args, whole = straight
    stop_after(stops, monkeypatch)
    for n, stop in enumerate([*stops, 40]):
        options = RESUME if n else [*args, "--out_dir=x"]
        code, out, err = run_here(script, *options, cwd=tmp_path)
        assert code == (128 + signal.SIGTERM if stop < 40 else 0), out + err
        assert checkpoint(tmp_path / "x")["iteration"] == stop
    assert_same_run(whole, tmp_path / "x")


def test_another_max_iters_goes_on_by_the_schedule_of_that_run_and_says_so(tmp_path):
    here("cfm", *TINY, "--max_iters=20", "--out_dir=x", cwd=tmp_path)
    printed = here("cfm", *RESUME, "--max_iters=40", "--batch_size=8", cwd=tmp_path)
    assert "resuming with max_iters = 40, which was 20" in printed
    assert "batch_size = 8, which was 32" in printed
    rates = {int(row[0]): float(row[2]) for row in log(tmp_path / "x")[1:]}
    for it in (24, 32, 40):
        assert rates[it] == pytest.approx(6e-3 * (1 - (it - 1) / 40), rel=1e-3)
    other = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", other, np.arange(20) % 10)
    options = ["channels=16", "dataset=other.npz", "image_size=16", "sigma=1.0", "path=vp"]
    for option in (*options, "muon=false", "adam_beta2=0.999"):
        args, name = [*RESUME, "--max_iters=80", f"--{option}"], option.split("=")[0]
        refused("cfm", *args, cwd=tmp_path, message=f"--{name}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_while_a_grid_is_drawn(number, tmp_path):
    """The grid is one batch, which saves minutes."""
    args = [*TINY, "--sampler=ancestral", "--eval_interval=4", "--max_iters=100", "--out_dir=x"]
    args += ["--batch_size=100"]
    process = start("ddpm", *args, cwd=tmp_path)
    wait_for(process, "iteration 4 ")  # 1000 steps of drawing follow
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "drew sample-4.png" in out and err == STOPPING
    assert "stopped and saved at iteration 5" in out
    assert checkpoint(tmp_path / "x")["iteration"] == 5


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def bad_checkpoints(whole):
    """(what it is, bytes) of files that are not checkpoints, though some begin like one."""
    for share in (0.999, 0.5, 0.1, 0.001):
        yield f"cut to {share}", whole[: int(len(whole) * share)]
    yield "empty", b""
    yield "text", b"something else"
    yield "a pickle that would run code", pickle.dumps(Hostile())
    content = torch.load(io.BytesIO(whole), weights_only=True)
    for what, change in {
        "hostile": {"model": Hostile()},
        "hostile config": {"config": {**content["config"], "dataset": Hostile()}},
        "no config": {"config": None},
        "no iteration": {"iteration": "many"},
        "an option out of range": {"config": {**content["config"], "sample_steps": -3}},
        "an option of the wrong type": {"config": {**content["config"], "sample_steps": "x"}},
        "an option that is a global": {"config": {**content["config"], "UNet": 1}},
        "an option without a name": {"config": {**content["config"], 3: 1}},
        "another model": {"model_args": {**content["model_args"], "channels": 6}},
        "no model": {"model_args": {"channels": "x"}},
        "weights missing": {"model": {}, "ema": {}},
    }.items():
        yield what, saved({**content, **change})
    yield "a tensor", saved(torch.zeros(3))
    yield "another program's", saved({"model": {}, "epoch": 3})


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture(scope="module", params=["ddpm", "cfm"])
def ran(request, tmp_path_factory):
    """(script, folder) of a run of 40 iterations in x."""
    cwd = tmp_path_factory.mktemp(request.param)
    here(request.param, *TINY, "--max_iters=40", "--out_dir=x", cwd=cwd)
    return request.param, cwd


def test_what_is_no_checkpoint_is_refused_and_executes_nothing(ran, tmp_path):
    script, cwd = ran
    (tmp_path / "x").mkdir()
    for what, content in bad_checkpoints((cwd / "x" / "ckpt.pt").read_bytes()):
        (tmp_path / "x" / "ckpt.pt").write_bytes(content)
        print(what)
        refused(script, *RESUME, "--max_iters=80", cwd=tmp_path, message="")
        refused("sample", "--out_dir=x", "--n_samples=1", cwd=tmp_path, message="")
        refused(script, *TINY, "--out_dir=x", cwd=tmp_path, message="holds a run")
        assert (tmp_path / "x" / "ckpt.pt").read_bytes() == content


def test_what_holds_other_objects_is_refused_without_advice_to_unpickle_it(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "ckpt.pt").write_bytes(saved({"epoch": np.int64(3)}))
    refused("sample", "--out_dir=x", cwd=tmp_path,
            message="x/ckpt.pt (it is damaged, or holds more than tensors and plain values)\n")


def test_a_flipped_bit_is_noticed_or_makes_no_difference(ran, tmp_path, capsys):
    script, cwd = ran
    whole, draw = (cwd / "x" / "ckpt.pt").read_bytes(), random.Random(0)
    good, noticed = flat(checkpoint(cwd / "x")), 0
    for _ in range(100):
        content, at = bytearray(whole), draw.randrange(len(whole))
        content[at] ^= 1 << draw.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(content)
        try:
            found = flat(load_checkpoint(tmp_path / "ckpt.pt"))
            assert all(torch.equal(a, b) for a, b in zip(good, found))
        except SystemExit as e:
            err = capsys.readouterr().err
            assert e.code == 2 and err.count("\n") == 1 and str(tmp_path / "ckpt.pt") in err
            noticed += 1
    assert noticed > 50


def test_a_flipped_bit_that_hides_a_tensor_is_noticed(ran, tmp_path):
    """In the archive's directory, one that turns a tensor into a folder, which has no content."""
    script, cwd = ran
    content = bytearray((cwd / "x" / "ckpt.pt").read_bytes())
    entry = content.index(b"data/3", content.index(b"PK\1\2"))
    entry = content.rindex(b"PK\1\2", 0, entry)
    content[entry + 38] ^= 0x10  # MS-DOS's flag for a folder
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "ckpt.pt").write_bytes(content)
    args = [*RESUME, "--max_iters=80"]
    refused(script, *args, cwd=tmp_path, message="there is no valid checkpoint x/ckpt.pt")


def test_a_file_takes_its_place_when_it_is_whole_and_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "new" / "log.csv"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write(b"one")
        other.write(b"other")
        assert not path.exists()
        names = [p.name for p in path.parent.iterdir()]
        assert len(names) == 2 and all(re.fullmatch(r"log\.csv\.\w{8}\.tmp", n) for n in names)
    assert path.read_bytes() == b"one"  # it was closed last
    with pytest.raises(ZeroDivisionError), atomic_write(path) as f:
        f.write(b"half")
        1 / 0
    assert [p.name for p in path.parent.iterdir()] == ["log.csv"] and path.read_bytes() == b"one"


def test_what_a_killed_run_had_not_written_to_the_end_is_removed(ran, tmp_path):
    script, cwd = ran
    shutil.copytree(cwd / "x", tmp_path / "x")
    before = sorted(p.name for p in (tmp_path / "x").iterdir())
    halves = "ckpt.pt", "ckpt-previous.pt", "log.csv", "sample-20.png"
    for name in [*(f"{name}.0123abcd.tmp" for name in halves), "ckpt-previous.pt.tmp"]:
        (tmp_path / "x" / name).write_bytes(b"half")
    (tmp_path / "x" / "mine.tmp").write_text("not ours to remove")
    here(script, *RESUME, "--max_iters=44", cwd=tmp_path)
    after = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert after == sorted([*before, "mine.tmp", "sample-44.png"])


def test_the_checkpoint_before_the_newest_is_kept_and_can_take_its_place(ran, tmp_path):
    script, cwd = ran
    shutil.copytree(cwd / "x", tmp_path / "x")
    ckpt = tmp_path / "x" / "ckpt.pt"
    assert load_checkpoint(backup_path(ckpt))["iteration"] == 20
    content = bytearray(ckpt.read_bytes())
    half = len(content) // 2
    for at in range(half, half + 512):  # a bad disk block: larger than any padding
        content[at] ^= 1
    ckpt.write_bytes(content)
    refused(script, *RESUME, cwd=tmp_path,
            message="to use the previous one: mv x/ckpt-previous.pt x/ckpt.pt")
    backup_path(ckpt).rename(ckpt)
    assert "iterations 20 to 40" in here(script, *RESUME, cwd=tmp_path)
    assert_same_run(cwd / "x", tmp_path / "x")


def test_damaged_data_is_refused_by_name(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "good.npz", pictures, np.arange(30) % 3)
    whole = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    np.savez(tmp_path / "hostile.npz", np.array([Hostile()], dtype=object))
    bad = {"cut": whole[:-500], "empty": b"", "text": b"x", "flipped": bytes(flipped)}
    bad["pickle"] = pickle.dumps(Hostile())
    for name, content in (bad | {"hostile": (tmp_path / "hostile.npz").read_bytes()}).items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        dataset = f"--dataset={name}.npz"
        refused("cfm", dataset, *TINY[1:], cwd=tmp_path, message=f"{dataset}: ")
    args = ["--dataset=good.npz", "--image_size=0", *TINY[2:], "--max_iters=1", "--out_dir=x"]
    here("cfm", *args, cwd=tmp_path)


def test_a_step_that_overflows_float16_is_skipped_and_counted(tmp_path, monkeypatch):
    # halved until gradients are finite
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**28)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    args = ["--max_iters=40", "--log_interval=20", "--dtype=float16", "--out_dir=x"]
    printed = here("cfm", *TINY[:-4], "--eval_interval=40", "--device=cpu", *args, cwd=tmp_path)
    skipped = [int(line.split(" steps skipped")[0].split()[-1])
               for line in printed.splitlines() if "skipped" in line]
    assert len(skipped) == 2 and 0 < skipped[0] <= skipped[1] < 20
    assert checkpoint(tmp_path / "x")["scaler"]["scale"] < 2.0**28


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_lack_of_memory_is_told_in_a_line(tmp_path):
    """While training and while drawing, with 6 GiB of addresses."""
    here("cfm", *TINY, "--max_iters=1", "--out_dir=x", cwd=tmp_path)
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))}
    for args in (["cfm", *TINY, "--batch_size=1000000", "--channels=64", "--out_dir=y"],
                 ["sample", "--out_dir=x", "--n_samples=400000", "--batch_size=400000"]):
        process = start(*args, cwd=tmp_path, **few)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and err.count("\n") == 1 and "smaller --batch_size" in err, err


@pytest.mark.slow
def test_a_full_disk_is_told_and_does_not_end_the_run(tmp_path):
    """At first, no file may exceed 100 kB: the checkpoint does not fit, everything else does."""
    args = [*TINY, "--max_iters=1000000", "--decay_lr=false", "--out_dir=x"]
    process = start("cfm", *args, cwd=tmp_path, preexec_fn=limit(100_000))
    wait_for(process, "iteration 44 ")
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert names == [".lock", "log.csv", "sample-20.png", "sample-40.png"]
    no_limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, no_limit)
    wait_for(process, "iteration 84 ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped and saved" in out
    told = "could not write x/ckpt.pt (File too large), continuing"
    assert set(err.splitlines()) == {told, STOPPING.strip()}
    state, before = checkpoint(tmp_path / "x"), (tmp_path / "x" / "ckpt.pt").read_bytes()
    more = f"--max_iters={state['iteration'] + 20}"
    process = start("cfm", *RESUME, more, cwd=tmp_path, preexec_fn=limit(100_000))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not be saved: x/ckpt.pt, if it exists, is older" in err
    assert (tmp_path / "x" / "ckpt.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("in_its_place", ["nothing", "a file"])
def test_a_folder_that_vanishes(in_its_place, tmp_path):
    args = [*TINY, "--max_iters=1000000", "--decay_lr=false", "--out_dir=x"]
    process = start("ddpm", *args, cwd=tmp_path)
    wait_for(process, "iteration 24 ")
    (tmp_path / "x").rename(tmp_path / "moved")
    if in_its_place == "a file":
        (tmp_path / "x").write_text("in the way")
    wait_for(process, "iteration 64 ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    if in_its_place == "nothing":  # the folder is recreated, the log is complete
        assert process.returncode == 128 + signal.SIGTERM and err == STOPPING
        assert [row[0] for row in log(tmp_path / "x")][1:17] == [str(i) for i in range(4, 68, 4)]
        assert "resuming" in here("ddpm", *RESUME, "--max_iters=200", cwd=tmp_path)
    else:
        assert process.returncode == 1
        assert "could not write x/ckpt.pt" in err and "Traceback" not in err
        assert (tmp_path / "x").read_text() == "in the way"
        assert checkpoint(tmp_path / "moved")["iteration"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["full", "closed"])
def test_a_run_goes_on_where_nobody_can_hear_it(gone, tmp_path):
    """Output to a full disk or a closed pipe; also a closed terminal, under nohup."""
    args = [*TINY, "--max_iters=100000", "--decay_lr=false", "--out_dir=x"]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if gone == "full" else open(write, "w") as deaf:
        process = subprocess.Popen(
            command("cfm", *args),
            cwd=tmp_path,
            stdout=deaf,
            stderr=deaf,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
    for grid, number in ((20, signal.SIGHUP), (60, signal.SIGTERM)):
        while not (tmp_path / "x" / f"sample-{grid}.png").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
    process.wait(timeout=60)
    at = checkpoint(tmp_path / "x")["iteration"]
    assert at >= 60 and int(log(tmp_path / "x")[-1][0]) in range(at - 3, at + 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["scratch", "resume"])
def test_a_run_that_others_overtook_while_it_read_its_data_is_refused(first, tmp_path, monkeypatch):
    if first == "resume":
        here("cfm", *TINY, "--max_iters=8", "--out_dir=x", cwd=tmp_path)
    load_data = core.data.load_data
    begin = RESUME if first == "resume" else [*TINY, "--out_dir=x"]

    def slow(*args):
        max_iters = 12 if first == "resume" else 4
        run("cfm", *begin, f"--max_iters={max_iters}", cwd=tmp_path)
        return load_data(*args)

    monkeypatch.setattr(core.data, "load_data", slow)
    code, _, err = run_here("cfm", *begin, "--max_iters=20", cwd=tmp_path)
    assert code == 2 and "another run has written to x in the meantime" in err
    assert checkpoint(tmp_path / "x")["iteration"] == (12 if first == "resume" else 4)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for out_dir in ("file", "file/x", "/proc/x", 300 * "x"):
        option = f"--out_dir={out_dir}"
        refused("cfm", *TINY, option, cwd=tmp_path, message=f"{option}: ")
    Image.new("L", (8, 8)).save(tmp_path / "1.png")          # at once: before pictures are read
    refused("cfm", *TINY, "--dataset=.", "--out_dir=file/x", cwd=tmp_path, message="is not a folder that")
    assert not list(tmp_path.rglob("*.u8"))
    here("cfm", *TINY, "--max_iters=1", "--out_dir=x", cwd=tmp_path)
    (tmp_path / "folder.npz").mkdir()
    for save in ("file/x.npz", "folder.npz", "/proc/x.npz", 300 * "x"):
        args = ["--out_dir=x", "--n_samples=1", f"--save={save}"]
        refused("sample", *args, cwd=tmp_path, message=f"--save={save}: ")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    args = [*TINY, "--max_iters=1000000", "--out_dir=x"]
    process = start("cfm", *args, cwd=tmp_path)
    wait_for(process, "iteration 24 ")
    for more in ([*RESUME], [*args, "--overwrite"]):
        code, _, err = run_here("cfm", *more, cwd=tmp_path)
        assert code == 2 and "another run is writing to x" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "x")["iteration"] >= 24
    assert (tmp_path / "x" / "sample-20.png").exists()
    here("cfm", *args[:-2], "--max_iters=1", "--out_dir=x", "--overwrite", cwd=tmp_path)
    assert [p.name for p in (tmp_path / "x").glob("*.png")] == ["sample-1.png"]


@pytest.mark.slow
def test_four_processes_and_one_is_killed(tmp_path):
    """The others end at once and say why; two continue from what was saved."""
    args = [*TINY, "--max_iters=1000000", "--decay_lr=false", "--out_dir=x"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    four = [*TORCHRUN, "--nproc_per_node=4", *command("cfm", *args)[1:]]
    process = subprocess.Popen(four, cwd=tmp_path, **pipes)
    wait_for(process, "iteration 24 ")
    find = ["pgrep", "-P", str(process.pid)]
    children = subprocess.run(find, capture_output=True, text=True).stdout.split()
    assert len(children) == 4
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.time()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 30
    assert "another process of this run has ended" in err and "cfm.py FAILED" in err
    at = checkpoint(tmp_path / "x")["iteration"]
    assert at % 20 == 0
    two = [*TORCHRUN, "--nproc_per_node=2", *command("cfm", *RESUME, f"--max_iters={at + 4}")[1:]]
    done = subprocess.run(two, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"iterations {at} to {at + 4}, of 64 pictures" in done.stdout


def test_a_run_by_the_clock_that_was_stopped_can_be_resumed(tmp_path, monkeypatch):
    """Beyond max_iters, too: the checkpoint holds the number that the clock has set."""
    stop_after([10], monkeypatch)
    args = [*TINY, "--minutes=5", "--log_interval=2", "--max_iters=4"]
    code, out, _ = run_here("cfm", *args, cwd=tmp_path)
    assert code == 128 + signal.SIGTERM and "stopped and saved at iteration 10" in out
    stopped = checkpoint(tmp_path / "out" / "cfm")
    assert stopped["config"]["max_iters"] > stopped["iteration"] == 10
    code, _, err = run_here("cfm", *RESUME[:1], "--minutes=0.02", cwd=tmp_path)
    assert (code, err) == (0, "")
    done = checkpoint(tmp_path / "out" / "cfm")["iteration"]
    assert done > stopped["iteration"]
    # it is complete, so it goes on by another clock, or by a number that no clock overrides
    here("cfm", *RESUME[:1], "--minutes=0.01", cwd=tmp_path)
    more = checkpoint(tmp_path / "out" / "cfm")["iteration"]
    assert more > done
    here("cfm", *RESUME[:1], f"--max_iters={more + 3}", cwd=tmp_path)
    assert checkpoint(tmp_path / "out" / "cfm")["iteration"] == more + 3


@pytest.mark.slow
def test_drawing_can_be_stopped_and_what_was_drawn_is_kept(ran, tmp_path):
    script, cwd = ran
    args = [f"--out_dir={cwd / 'x'}", "--n_samples=50000", "--batch_size=100", "--steps=2"]
    for save in ("x.npz", "folder"):
        process = start("sample", *args, f"--save={save}", cwd=tmp_path)
        wait_for(process, "100 done, ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT and err == STOPPING
        n = int(out.split("stopped after ")[1].split()[0])
        file = tmp_path / save
        kept = np.load(file)["arr_0"] if save == "x.npz" else list(file.iterdir())
        assert len(kept) == n and 100 <= n < 50000 and n % 100 == 0
    args += ["--save=big.npz", "--n_samples=5000"]
    process = start("sample", *args, cwd=tmp_path, preexec_fn=limit(100_000))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "sample.py: --save=big.npz: [Errno 27] File too large\n"
    assert not list(tmp_path.glob("big*"))


def memory(pid):
    """Resident megabytes of a process."""
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.long
def test_memory_for_50000_pictures_does_not_grow_with_their_number(ran, tmp_path):
    """Apart from the pictures themselves, 8 x 8 bytes each. Progress is reported now and then."""
    script, cwd = ran
    peaks = []
    for n in (500, 50_000):
        args = [f"--out_dir={cwd / 'x'}", f"--n_samples={n}", "--steps=10", f"--save={n}.npz"]
        pipes = {"stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command("sample", *args), cwd=tmp_path, **pipes)
        out = process.stdout.read()
        _, code, usage = os.wait4(process.pid, 0)
        assert code == 0 and np.load(tmp_path / f"{n}.npz")["arr_0"].shape == (n, 8, 8, 1)
        peaks.append(usage.ru_maxrss / 1024)
    assert 1 <= out.count(" done, ") < 20 and peaks[1] - peaks[0] < 30, peaks
    print(f"\npeak memory {peaks[0]:.0f} MiB for 500 pictures, {peaks[1]:.0f} for 50,000")


@pytest.mark.long
def test_an_hour_of_training_neither_slows_down_nor_grows(tmp_path):
    """NANODIFFUSION_MINUTES shortens it, NANODIFFUSION_RUN gives the options of a run to keep."""
    minutes = float(os.environ.get("NANODIFFUSION_MINUTES", "60"))
    default = "--dataset=synthetic --max_iters=10000000 --eval_interval=300"
    args = os.environ.get("NANODIFFUSION_RUN", default).split()
    process, sizes = start("cfm", *args, "--out_dir=x", "--device=cpu", cwd=tmp_path), []
    begun = time.time()
    for line in process.stdout:
        if line.startswith("held-out"):
            sizes.append((time.time() - begun, memory(process.pid)))
        if time.time() - begun > 60 * minutes:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    # 0: NANODIFFUSION_RUN ran to its end
    assert (process.returncode, err) in [(0, ""), (128 + signal.SIGTERM, STOPPING)]
    speed = [float(row[3]) for row in list(csv.reader((tmp_path / "x" / "log.csv").open()))[1:]]
    third = len(speed) // 3
    first, last = sorted(speed[1 : third + 1])[third // 2], sorted(speed[-third:])[third // 2]
    print(f"\n{len(speed)} log lines, median speed {first:.0f} in the first third, "
          f"{last:.0f} in the last; memory {sizes[1][1]:.0f} MiB after {sizes[1][0]:.0f} s, "
          f"{sizes[-1][1]:.0f} after {sizes[-1][0]:.0f} s")
    assert last > 0.85 * first and sizes[-1][1] < sizes[1][1] + 50


@pytest.mark.parametrize("name, value", [
    ("picture_shape", (1, 8)),
    ("picture_shape", (3, 8, 8)),
    ("picture_shape", (1, 0, 8)),
    ("classes", list(range(10))),
    ("classes", ["0", "1"]),
])
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(name, value, tmp_path):
    here("cfm", *TINY, "--max_iters=1", "--out_dir=run", cwd=tmp_path)
    content = checkpoint(tmp_path / "run")
    (content["data"] if name == "classes" else content)[name] = value
    torch.save(content, tmp_path / "run" / "ckpt.pt")
    refused("sample", "--out_dir=run", cwd=tmp_path, message="is from another version of this program")
