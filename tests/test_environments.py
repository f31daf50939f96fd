"""Environments: other writers, terminals, variables; and the scripts as part of other projects."""

import copy
import datetime
import gzip
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import core.data
import core.machine
import core.run
from cfm import PATHS
from core.checkpoint import atomic_write
from core.muon import Muon
from ddpm import DenoiseDiffusion
from helpers import ROOT, TINY, command, here, refused, run_here, sample


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("ran")
    here("cfm", *TINY, "--max_iters=1", "--out_dir=x", cwd=cwd)
    return cwd


# ---- a shared machine ----

@pytest.mark.parametrize("threads, ran, noticed", [
    (2, 1.99, False),  # measured alone
    (2, 1.30, True),  # measured beside one busy loop
    (1, 0.50, False),  # nothing waits for a single thread
])
def test_a_run_notices_programs_that_slow_its_threads_down(
    threads, ran, noticed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(core.run, "catch_stop_signals", lambda: [])
    monkeypatch.setattr(core.run.time, "monotonic", lambda: 0)
    monkeypatch.setattr(core.run.time, "process_time", lambda: 0)
    run = core.run.Run(tmp_path, core.machine.Processes(), 9, 1)
    monkeypatch.setattr(core.run.time, "monotonic", lambda: 10)
    monkeypatch.setattr(core.run.time, "process_time", lambda: 10 * ran)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    optimizer = Muon([torch.nn.Parameter(torch.zeros(1))])
    for it in (1, 2):
        run.log(it, 0.0, 0.0, 1.0, [], optimizer)
    assert capsys.readouterr().err.count("OMP_NUM_THREADS=1") == noticed


# ---- files that several programs write ----

def test_of_several_writers_of_a_file_the_last_one_wins_whole(tmp_path):
    path, barrier = tmp_path / "x", threading.Barrier(8)

    def write(n):
        with atomic_write(path) as f:
            barrier.wait()
            for _ in range(200):
                f.write(bytes([n]) * 1000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    content = path.read_bytes()
    assert len(content) == 200_000 and len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("mine", ["sample-1.png", "log.csv"])
def test_files_that_a_run_would_replace_are_spared_where_no_run_was(mine, overwrite, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / mine).write_text("my,own")
    args = [*TINY, "--max_iters=1", "--out_dir=x", f"--overwrite={overwrite}"]
    refused("cfm", *args, cwd=tmp_path, message=f"a run would replace, such as {mine}")
    assert (tmp_path / "x" / mine).read_text() == "my,own"
    (tmp_path / "x" / mine).rename(tmp_path / "x" / "mine.txt")
    (tmp_path / "x" / "log.csv").write_text(core.run.COLUMNS + "\n")    # a run killed early
    here("cfm", *args, cwd=tmp_path)


def test_overwriting_takes_away_only_what_a_run_wrote(tmp_path):
    here("cfm", *TINY, "--max_iters=1", "--out_dir=x", cwd=tmp_path)
    mine = ["sample-mine.png", "notes.txt", "ckpt-best.pt", "my.tmp"]
    for name in mine:
        (tmp_path / "x" / name).write_text("mine")
    for name in ("ckpt.pt.0a1b2c3d.tmp", "sample-5.png.0a1b2c3d.tmp"):
        (tmp_path / "x" / name).write_text("half written when a run was killed")
    here("cfm", *TINY, "--max_iters=2", "--out_dir=x", "--overwrite", cwd=tmp_path)
    left = {p.name for p in (tmp_path / "x").iterdir()}
    assert left == {*mine, ".lock", "ckpt.pt", "log.csv", "sample-2.png"}
    assert all((tmp_path / "x" / name).read_text() == "mine" for name in mine)


def test_a_folder_that_another_program_draws_into_is_refused(ran):
    from core.run import lock

    (ran / "pictures").mkdir()
    held = lock(ran / "pictures")
    refused("sample", "--out_dir=x", "--save=pictures", "--n_samples=2", cwd=ran, message="another run")
    held.close()
    sample("--out_dir=x", "--save=pictures", "--n_samples=2", cwd=ran)
    names = sorted(p.name for p in (ran / "pictures").iterdir())
    assert names == ["000000.png", "000001.png"]


# ---- text, variables ----

class Ascii(io.TextIOWrapper):
    """The output of a terminal that knows no other characters."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def getvalue(self):
        return self.buffer.getvalue().decode("ascii")


def test_names_that_a_terminal_cannot_show_end_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "StringIO", Ascii)               # what here() redirects to
    for script, *args in (["cfm", *TINY, "--max_iters=1", "--out_dir=o/été", "--overwrite"],
                          ["sample", "--out_dir=o/été", "--n_samples=2"]):
        assert r"\xe9t\xe9" in here(script, *args, cwd=tmp_path)
    assert (tmp_path / "o" / "été" / "samples.png").exists()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"RANK": "0"},
                                       {"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                                        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}])
def test_half_an_environment_of_torchrun_is_explained(variables, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", sys.exit)               # how one process of several ends
    refused("cfm", *TINY, cwd=tmp_path, message="torchrun")
    assert list(tmp_path.iterdir()) == []


def test_processes_wait_for_data_that_take_hours(monkeypatch):
    asked = {}
    monkeypatch.setattr(core.machine.dist, "init_process_group", lambda *args: None)
    monkeypatch.setattr(core.machine.dist, "new_group", lambda **options: asked.update(options))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert core.machine.init_distributed("cpu").world_size == 2
    assert asked["timeout"] >= datetime.timedelta(days=1)


# ---- downloads ----

@pytest.mark.parametrize("name, kind, message", [
    ("fashion_mnist", "FashionMNIST", "could not get FashionMNIST .timed out"),
    ("cifar10", "CIFAR10", "could not get CIFAR-10 .*torchvision: timed out"),
    ("mnist", "MNIST", "could not get MNIST .*torchvision: timed out"),
])
def test_a_network_that_swallows_packets_ends_in_a_line(
    name, kind, message, monkeypatch, tmp_path
):
    waits = []

    class Silent:
        def __init__(self, *args, **options):
            waits.append(socket.getdefaulttimeout())
            raise OSError("timed out")

    Silent.__name__ = kind
    monkeypatch.setattr(core.data.datasets, kind, Silent)
    monkeypatch.setenv("PATH", "")                           # without npm
    with pytest.raises(RuntimeError, match=message):
        core.data.load_data(name, str(tmp_path))
    assert waits == [30] and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("spelling", ["{}.gz", "{}", "kaggle/{}", "{0}/{0}"])
def test_mnist_laid_down_by_hand_is_used(spelling, tmp_path, monkeypatch):
    """As .gz, or under Kaggle's names, in data_dir or below it."""
    sums = {}
    for name in core.data.MNIST_MD5:
        n, shape = (20 if name.startswith("train") else 10), (28, 28) if "images" in name else ()
        x = np.random.default_rng(n).integers(0, 10, (n, *shape), dtype=np.uint8)
        content = bytes([0, 0, 8, x.ndim]) + b"".join(s.to_bytes(4, "big") for s in x.shape) + x.tobytes()
        sums[name] = hashlib.md5(content).hexdigest()
        name = name if "gz" in spelling else name.replace("-idx", ".idx")
        path = tmp_path / "data" / spelling.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if "gz" in spelling else content)
    monkeypatch.setattr(core.data, "MNIST_MD5", sums)
    monkeypatch.setenv("PATH", "")
    assert core.data.load_data("mnist", str(tmp_path / "data")).train[0].shape == (20, 1, 28, 28)


# ---- sizes ----

@pytest.mark.slow
@pytest.mark.parametrize("script", ["ddpm", "cfm"])
@pytest.mark.parametrize("options", [["--channel_mults=2,1,3"], ["--image_size=4"], ["--patch=16"],
                                     ["--image_size=1", "--batch_size=1"]])
def test_a_picture_may_shrink_to_one_value(script, options, tmp_path):
    here(script, *TINY, "--max_iters=2", *options, "--out_dir=x", cwd=tmp_path)
    sample("--out_dir=x", "--n_samples=1", cwd=tmp_path)


def test_a_large_grid_takes_little_more_memory_than_its_pictures(ran):
    """20,000 pictures: a float copy of them would take four times as much."""
    code = ("import resource, runpy, sys; import torch, torchvision\n"
            "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "sys.argv = ['sample.py', '--out_dir=x', '--n_samples=20000', '--steps=1', '--save=g.png']\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"try: runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\n"
            "except SystemExit as e: print(e.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ran, capture_output=True, text=True, timeout=300)
    code, kilobytes = map(int, done.stdout.split()[-2:])
    assert code == 0 and Image.open(ran / "g.png").size == (10 * 10 + 2, 2000 * 10 + 2)
    assert kilobytes < 100_000, done.stderr


def test_a_grid_that_a_sampler_cannot_draw_does_not_end_a_run(tmp_path, monkeypatch):
    import sample as module

    def stuck(*args, **options):
        raise FloatingPointError("dopri5 cannot go on")

    monkeypatch.setattr(module, "draw", stuck)
    args = [*TINY, "--max_iters=40", "--sampler=dopri5", "--out_dir=x"]
    code, out, err = run_here("cfm", *args, cwd=tmp_path)
    assert code == 0 and err.count("could not draw a grid (dopri5 cannot go on), continuing") == 2
    assert "iteration 40 of 40" in out and (tmp_path / "x" / "ckpt.pt").exists()


# ---- as a library ----

def test_a_default_device_makes_no_difference():
    """The meta device stands in for a GPU: a tensor that lands there by mistake has no values."""
    x0, x1 = torch.randn(6, 4), torch.randn(6, 4)
    expected = DenoiseDiffusion(None).times(7), DenoiseDiffusion(None).beta
    torch.set_default_device("meta")
    try:
        method = DenoiseDiffusion(None)
        assert method.times(7) == expected[0] and torch.equal(method.beta, expected[1])
        if "scipy" in sys.modules or pytest.importorskip("scipy"):
            assert PATHS["ot"]().pair(x0, x1).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_pairing_of_what_has_gradients_and_of_what_is_not_finite():
    pytest.importorskip("scipy")
    x0, x1 = torch.randn(6, 4), torch.randn(6, 4, requires_grad=True)
    paired = PATHS["ot"]().pair(x0.requires_grad_(), x1)
    assert paired.requires_grad and torch.equal(paired, PATHS["ot"]().pair(x0.detach(), x1.detach()))
    with pytest.raises(ValueError, match="not finite"):
        PATHS["ot"]().pair(x0 * float("nan"), x1)


def test_muon_takes_parameter_groups_and_a_closure():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 3))
    twin, x = copy.deepcopy(model), torch.randn(3, 2, 8, 8)
    first, last = model[0], model[2]
    optimizer = Muon([{"params": first.parameters(), "lr": 1e-2},
                      {"params": list(last.parameters()), "lr": 0.0}], lr=5e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 0.0}
    alone = Muon(twin[0].parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        expected = twin(x).square().mean()
        alone.zero_grad()
        expected.backward()
        assert optimizer.step(closure).item() == pytest.approx(expected.item(), rel=1e-5)
        alone.step()
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_the_processes_of_a_run_average_their_losses(tmp_path):
    """Two processes log the same loss as one with the same number of micro-batches."""
    args = [*TINY, "--max_iters=4", "--learning_rate=0", "--out_dir"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*together, *command("cfm", *args, "two")[1:]], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here("cfm", *args, "one", "--gradient_accumulation_steps=2", cwd=tmp_path)
    two, one = ((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[1] for name in ("two", "one"))
    assert float(two) == pytest.approx(float(one), abs=2e-6)
