"""
What the tests share: the scripts run as a user runs them, a tiny configuration, and what runs leave.
"""

import contextlib
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import core.data

ROOT = Path(__file__).parent.parent
TINY = (
    "--dataset=synthetic --image_size=8 --channels=8 --batch_size=32 --warmup_iters=4 "
    "--sample_steps=2 --log_interval=4 --eval_interval=20 --device=cpu"
).split()


def command(script, *args):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]


def run(script, *args, cwd, ok=True):
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run(command(script, *args), cwd=cwd, timeout=300, **pipes)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(script, *args, cwd):
    """(exit code, stdout, stderr) of a script run in this process, to skip the imports."""
    out, err, argv, here = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    caught = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    handlers = {s: signal.getsignal(s) for s in caught}
    sys.argv, code = [str(ROOT / f"{script}.py"), *map(str, args)], 0
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
        os.chdir(here)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        gc.collect()  # frees the script, and with it its lock on the folder
        gc.freeze()  # torch and the like stay loaded: scanning them again takes 0.3 s
    return code, out.getvalue(), err.getvalue()


def here(script, *args, cwd):
    code, out, err = run_here(script, *args, cwd=cwd)
    assert code == 0, out + err
    return out


def sample(*args, cwd):
    return here("sample", *args, cwd=cwd)


def refused(script, *args, cwd, message):
    """Exit code 2, one line on stderr that says why, nothing written."""
    before = sorted(cwd.rglob("*"))
    code, out, err = run_here(script, *args, cwd=cwd)
    assert code == 2 and err.count("\n") == 1 and message in err, out + err
    assert sorted(cwd.rglob("*")) == before


def stop_after(iterations, monkeypatch):
    """SIGTERM comes in each of these iterations of a run in this process."""
    clip, iteration = torch.nn.utils.clip_grad_norm_, [0]

    def stopping(*a):  # called once an iteration
        iteration[0] += 1
        if iteration[0] in iterations:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*a)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stopping)


def lines(table):
    """The columns of a table of wrong commands: a row each, divided by |."""
    return [[part.strip() for part in line.split("|")] for line in table.splitlines() if line]


def wrong(script, args, message, cwd, monkeypatch):
    """Within a second, before data are read: exit code 2, a short line, nothing written."""
    def read(*args, **kwargs):
        raise AssertionError("data were read")

    for name in ("fetch_mnist", "draw_flowers", "load_folder", "load_npz"):
        monkeypatch.setattr(core.data, name, read)
    before, start = sorted(cwd.rglob("*")), time.time()
    code, out, err = run_here(script, *args.split(), cwd=cwd)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err, (code, out, err)
    assert time.time() - start < 1 and len(err) < 300
    assert sorted(cwd.rglob("*")) == before


def checkpoint(path):
    return torch.load(path / "ckpt.pt", weights_only=True)


def flat(ckpt):
    """Everything that training changes, as one list of tensors."""
    state = ckpt["optimizer"]["state"]
    return [*ckpt["model"].values(), *ckpt["ema"].values(), ckpt["losses"]] + [
        torch.as_tensor(v) for p in state for v in state[p].values()
    ]
