"""The folder of a training run: its lock, log and pictures. Signals that end a run."""
import contextlib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from torchvision.utils import save_image

from configurator import explained, fail, say
from core.checkpoint import (WRITTEN, atomic_write, holds_a_run, load_checkpoint,
                             require_free_folder, save_checkpoint)
from core.pictures import visible

COLUMNS = ("iteration,loss,learning_rate,pictures_per_s,seconds,"
           "held_out,quarter1,quarter2,quarter3,quarter4")


@contextlib.contextmanager
def survive(kind, task):
    """An exception of this kind does not end a run, but is reported in a line."""
    try:
        yield
    except kind as e:
        say(f"could not {task} ({getattr(e, 'strerror', None) or e}), continuing", file=sys.stderr)


def catch_stop_signals():
    """
    A list to which, from now on, Ctrl-C, SIGTERM and a closed terminal append their signal numbers.

    So does SIGUSR1, by which SLURM can warn of its time limit. The second signal of a kind ends the
    process. Under nohup a closed terminal does not count. In a thread Python catches no signals.
    """
    def ask(number, frame):
        signal.signal(number, signal.SIG_DFL)
        requested.append(number)
        if sys.stderr and os.environ.get("RANK", "0") == "0":
            message = b"stopping when the work at hand is done; a second signal stops at once\n"
            with contextlib.suppress(OSError):       # not print(), which this may interrupt
                os.write(2, message)

    requested = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)         # Windows lacks some of them
        if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            with contextlib.suppress(ValueError):    # in a thread
                signal.signal(number, ask)
    return requested


def lock(folder, option="--out_dir"):
    """A file that is locked while it is open; calls fail() if another program has locked it."""
    file = open(Path(folder, ".lock"), "w")
    with contextlib.suppress(ImportError, OSError):  # Windows, and network folders without locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {folder}: wait for it, or choose another {option}")
    return file


class Run:
    """
    A training run and its folder. Every process has a Run; only the main process's writes.

    It starts from scratch, or goes on from resumed, a checkpoint. A run from scratch removes what
    an older one left. Calls fail() if another run is writing to the folder, or has written to it in
    the meantime.
    """

    def __init__(self, out_dir, processes, max_iters, pictures_per_iter, resumed=None,
                 overwrite=False):
        self.folder = Path(out_dir)
        self.checkpoint = self.folder / "ckpt.pt"
        self.processes = processes
        self.max_iters, self.pictures_per_iter = max_iters, pictures_per_iter
        self.first = resumed["iteration"] if resumed else 0
        self.seconds_before = resumed["seconds"] if resumed else 0.0
        self.saved = self.first                      # the iteration of the newest checkpoint
        self.signals = catch_stop_signals()
        self.started = time.monotonic()
        self.stopping = 0                            # the signal that some process received
        self.noticed = False                         # that other programs use the CPU
        if processes.is_main:
            with explained(f"--out_dir={out_dir}: "):
                self.open_folder(bool(resumed), overwrite)
        self.start_clock(self.first)

    def open_folder(self, resumed, overwrite):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        if resumed:
            changed = load_checkpoint(self.checkpoint)["iteration"] != self.first
        else:
            changed = holds_a_run(self.folder) and not overwrite
        if changed:
            fail(f"another run has written to {self.folder} in the meantime: start again")
        old = r"(ckpt.*|log\.csv.*|sample-\d+.*)\.tmp"      # left when a run is killed
        if not resumed:
            require_free_folder(self.folder, overwrite)
            old += "|" + WRITTEN
        for path in self.folder.iterdir():
            if re.fullmatch(old, path.name):
                path.unlink(missing_ok=True)
        self.rows = [COLUMNS, *self.rows_until(self.first)] if resumed else [COLUMNS]
        self.write_log()

    def announce(self, minutes):
        """Say how far the run goes, and where its files go."""
        until = f"for {minutes:g} minutes" if minutes else f"to {self.max_iters}"
        say(f"iterations {self.first} {until}, of {self.pictures_per_iter} pictures each")
        say(f"samples, log.csv and ckpt.pt go to {self.folder.resolve()}")

    def seconds(self):
        """How long the run has taken so far, evaluations included, over all its resumptions."""
        return self.seconds_before + time.monotonic() - self.started

    def rows_until(self, iteration):
        """The rows of an older log.csv up to the iteration: the later ones will come again."""
        if not (self.folder / "log.csv").exists():
            return []
        lines = (self.folder / "log.csv").read_text(errors="replace").splitlines()
        rows = [line.split(",") for line in lines]
        rows = [row for row in rows if row[0].isdecimal() and int(row[0]) <= iteration]
        seconds = COLUMNS.split(",").index("seconds")
        for row in rows:
            if len(row) == 9:                        # older logs had no seconds
                row.insert(seconds, "")
        return [",".join(row) for row in rows]

    def write_log(self):
        with atomic_write(self.folder / "log.csv") as f:
            f.write("\n".join([*self.rows, ""]).encode())

    def mean(self, losses):
        """The mean loss of all processes, from each one's sum and count (2,), averaged in place."""
        self.processes.average(losses)
        return (losses[0] / losses[1]).item()

    def stop_requested(self):
        """Was any process asked to stop? All of them get the same answer, so they stop together."""
        self.stopping = self.processes.maximum(max(self.signals, default=0))
        return bool(self.stopping)

    def require_finite(self, iteration, losses, model):
        """If a loss or a weight is not finite, end the run without saving a checkpoint."""
        weights = sum(p.detach().sum() for p in model.parameters())
        if not math.isfinite(sum(losses) + weights):
            fail(f"the loss or a weight is not finite at iteration {iteration}: "
                 "try a smaller --learning_rate, or --dtype=float32; "
                 f"{self.checkpoint}, if there is one, is from before that")

    def start_clock(self, iteration):
        """Measure the next speed() from here, so that evaluations do not count."""
        self.clock, self.cpu_clock, self.clocked = time.monotonic(), time.process_time(), iteration

    def speed(self, iteration):
        """Pictures per second."""
        pictures = (iteration - self.clocked) * self.pictures_per_iter
        return pictures / max(1e-9, time.monotonic() - self.clock)

    def iterations_in(self, minutes, iteration, speed):
        """The iteration at which this run's minutes will be up, at a speed in pictures/s."""
        left = max(0, 60 * minutes - (time.monotonic() - self.started))
        more = int(left * speed / self.pictures_per_iter)
        self.max_iters = iteration + self.processes.maximum(more)
        return self.max_iters

    def notice_other_programs(self):
        """Warn once if other programs use the CPU: this one's threads then wait for each other."""
        if self.noticed:
            return
        ran = time.process_time() - self.cpu_clock
        threads = torch.get_num_threads()
        if threads > 1 and ran < 0.85 * threads * (time.monotonic() - self.clock):
            say("another program uses the CPU, which slows this one down a lot: it is faster to "
                "stop and resume with OMP_NUM_THREADS=1 in the environment", file=sys.stderr)
            self.noticed = True

    def log(self, iteration, loss, rate, speed, held_out, optimizer):
        """Print a line and add a row to log.csv. rate: learning rate; held_out: 5 losses or []."""
        if not self.processes.is_main:
            return
        row = [str(iteration), f"{loss:.6f}", f"{rate:.3e}", f"{speed:.0f}",
               f"{self.seconds():.1f}"]
        row += [f"{value:.6f}" for value in held_out] or [""] * 5
        self.rows.append(",".join(row))
        with survive(OSError, f"write {self.folder / 'log.csv'}"):
            self.write_log()
        minutes = (self.max_iters - iteration) * self.pictures_per_iter / speed / 60
        skipped = iteration - steps_taken(optimizer, iteration)
        say(f"iteration {iteration} of {self.max_iters}: loss {loss:.4f}, {speed:.0f} pictures/s, "
            f"{minutes:.1f} min left{f', {skipped} steps skipped' if skipped else ''}")
        if optimizer.param_groups[0]["params"][0].device.type == "cpu":
            self.notice_other_programs()

    def save(self, **content):
        """Write a checkpoint."""
        if not self.processes.is_main:
            return
        with survive(OSError, f"write {self.checkpoint}"):
            save_checkpoint(self.checkpoint, seconds=self.seconds(), **content)
            self.saved = content["iteration"]

    def save_grid(self, iteration, pictures, held_out):
        """Save pictures (N, C, H, W) in [-1, 1], ten to a row, and print the 5 held-out losses."""
        if not self.processes.is_main:
            return
        png = self.folder / f"sample-{iteration}.png"
        x = visible(pictures, 1)
        with survive(OSError, f"write {png}"), atomic_write(png) as f:
            save_image(x, f, nrow=10, normalize=True, value_range=(-1, 1), format="png")
        say("held-out loss {:.4f}, by quarter of t {:.4f} {:.4f} {:.4f} {:.4f}; ".format(*held_out)
            + f"drew {png.name}")

    def finish(self, iteration):
        """Exit with code 0, 128 plus a signal's number, or 1 if the last step was not saved."""
        code = 128 + self.stopping if self.stopping else 0
        if self.processes.is_main and self.saved < iteration:
            say(f"the last iteration, {iteration}, could not be saved: "
                f"{self.checkpoint}, if it exists, is older", file=sys.stderr)
            code = 1
        elif iteration < self.max_iters:
            say(f"stopped and saved at iteration {iteration}: "
                f"continue with --init_from=resume --out_dir={self.folder}")
        self.processes.exit(code)


def steps_taken(optimizer, default):
    """AdamW's own count of its steps, which excludes those skipped because float16 overflowed."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=default)
