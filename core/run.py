"""The folder of a training run: its lock, checkpoints, log and pictures. Signals that end a run."""
import contextlib
import io
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from torchvision.utils import save_image

from configurator import explained, fail, say

COLUMNS = "iteration,loss,learning_rate,pictures_per_s,held_out,quarter1,quarter2,quarter3,quarter4"
WRITTEN = r"ckpt\.pt|ckpt-previous\.pt|log\.csv|sample-\d+\.png"   # what a run leaves in its folder
CONTENT = {"method": str, "config": dict, "model_args": dict, "picture_shape": tuple,
           "data": dict, "iteration": int, "losses": torch.Tensor, "model": dict, "ema": dict,
           "optimizer": dict, "scaler": dict}


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that replaces path once it is completely written, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")   # each writer's own
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def survive(kind, task):
    """An exception of this kind does not end a run, but is reported in a line."""
    try:
        yield
    except kind as e:
        say(f"could not {task} ({getattr(e, 'strerror', None) or e}), continuing", file=sys.stderr)


def backup_path(path):
    """Where the checkpoint before the one at path is kept."""
    return path.with_stem(f"{path.stem}-previous")


def holds_a_run(folder):
    """Is there a checkpoint in the folder?"""
    return any(Path(folder).glob("ckpt*.pt"))


def require_free_folder(folder, overwrite=False):
    """Calls fail() if a run in the folder would replace another one, or files that no run wrote."""
    with explained(f"--out_dir={folder}: "):
        existing = next(p for p in (Path(folder), *Path(folder).absolute().parents) if p.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            fail(f"--out_dir={folder}: {existing} is not a folder that can be written to")
        log, runs = Path(folder, "log.csv"), holds_a_run(folder)
        if runs and not overwrite:
            fail(f"{folder} holds a run: continue it with --init_from=resume, "
                 "or add --overwrite or another --out_dir")
        if runs or log.is_file() and log.read_text(errors="replace").startswith(COLUMNS):
            return
        others = [path.name for path in Path(folder).glob("*") if re.fullmatch(WRITTEN, path.name)]
        if others:
            fail(f"{folder} holds files that a run would replace, such as {min(others)}: "
                 "choose another --out_dir")


def save_checkpoint(path, **content):
    """Write tensors and plain values, whole or not at all; the older file goes to backup_path()."""
    buffer = io.BytesIO()                            # on a full disk torch.save() may abort the run
    torch.save(content, buffer)
    with atomic_write(path) as f:
        f.write(buffer.getbuffer())
        f.flush()
        os.fsync(f.fileno())                         # only now may the older one be replaced
        if path.exists():
            kept = Path(f"{backup_path(path)}.tmp")
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)                  # not moved: path must exist at all times
            except OSError:                          # a file system without hard links
                shutil.copyfile(path, kept)
            os.replace(kept, backup_path(path))


def load_checkpoint(path, method=None):
    """
    What save_checkpoint() wrote, on the CPU. Nothing in the file is executed.

    Calls fail() if it is not a whole checkpoint, or one of another method.
    """
    try:
        with zipfile.ZipFile(path) as file:              # torch.load() verifies no checksums,
            folders = [entry.filename for entry in file.infolist() if entry.external_attr & 0x10]
            if damaged := folders or file.testzip():     # and reads entries marked folders as empty
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if type(checkpoint) is not dict or not all(isinstance(checkpoint.get(name), kind)
                                                   for name, kind in CONTENT.items()):
            raise ValueError("it was not written by this program")
    except Exception as e:                           # a damaged file raises almost anything
        message = f"there is no valid checkpoint {path} ({' '.join(str(e).split())[:100]})"
        backup = backup_path(path)
        if backup.exists():
            message = f"{message}; to use the previous one: mv {backup} {path}"
        fail(message)
    if method and not checkpoint["model"]:
        fail(f"{path} holds only averaged weights: it can be sampled, not resumed")
    if checkpoint["method"] != (method or checkpoint["method"]):
        fail(f"{path} is a run of {checkpoint['method']}.py: resume it with that, "
             "or choose another --out_dir")
    return checkpoint


def require_pairs_kept(config, dataset):
    """Calls fail() if an option would separate pictures from the noise they are paired with."""
    wrong = {"flip": config["flip"], "sigma": config.get("sigma", 0),
             "path": config.get("path", "icfm") != "icfm",
             "sampler": config["sampler"] == "ancestral"}
    for name in wrong:
        if wrong[name]:
            fail(f"--{name}={config[name]} does not go with {dataset}, which has paired noise")


def require_same_data(checkpoint, dataset, data, model_args, changed_data):
    """Calls fail() if the data do not fit the run's model, or differ without changed_data."""
    changed = data.differences(checkpoint["data"])
    if checkpoint["model_args"] != model_args:
        fail(f"--dataset={dataset} does not fit the run's model ({changed or 'other options'}): "
             "give the run's own data, or start a new run in another --out_dir")
    if changed and not changed_data:
        fail(f"--dataset={dataset} is not the data that the run was trained on ({changed}): "
             "give the path to those, or add --changed_data to use these")


def restore(checkpoint, **parts):
    """Load the state of each part, such as model=model, from the checkpoint entry of that name."""
    with explained("the checkpoint is from another version of this program: "):
        for name, part in parts.items():
            if name != "scaler" or checkpoint[name]:  # a scaler's is empty without float16
                part.load_state_dict(checkpoint[name])


def load_weights(folder, method, out_dir):
    """
    The checkpoint of a run of the method in the folder.

    Calls fail() if there is none, or if the new run would overwrite it.
    """
    if not holds_a_run(folder):
        fail(f"--init_from={folder} is neither scratch nor resume, nor the folder of a run")
    if Path(folder).resolve() == Path(out_dir).resolve():
        fail(f"--init_from={folder} is also the --out_dir: choose another --out_dir")
    checkpoint = load_checkpoint(Path(folder, "ckpt.pt"))
    if checkpoint["method"] != method:
        fail(f"--init_from={folder} is a run of {checkpoint['method']}.py, not of {method}.py")
    return checkpoint


def take_weights(model, start, folder, options):
    """
    Start from the averaged weights of the run in folder, given its checkpoint.

    Layers it lacks are left alone, and listed; so are those options {name: value} that it had set
    otherwise.
    """
    old = {name: start["config"].get(name, value) for name, value in options.items()}
    other = [f"--{name}={old[name]}" for name in options if old[name] != options[name]]
    trained = f"; it was trained with {' '.join(other)}" if other else ""
    own = model.state_dict()
    for name, weight in start["ema"].items():
        if name not in own or own[name].shape != weight.shape:
            here = tuple(own[name].shape) if name in own else "not there"
            fail(f"--init_from={folder} has another architecture or other classes: "
                 f"its {name} is {tuple(weight.shape)}, here it is {here}{trained}")
    new = model.load_state_dict(start["ema"], strict=False).missing_keys
    text = f"starting from the weights of {folder}"
    if new:
        text += f", except {', '.join(new)}"
    text += trained
    if os.environ.get("RANK", "0") == "0":
        say(text)


def catch_stop_signals():
    """
    A list to which, from now on, Ctrl-C, SIGTERM and a closed terminal append their signal numbers.

    The second signal of a kind ends the process. Under nohup a closed terminal does not count.
    """
    def ask(number, frame):
        signal.signal(number, signal.SIG_DFL)
        requested.append(number)
        if sys.stderr and os.environ.get("RANK", "0") == "0":
            message = b"stopping when the work at hand is done; a second signal stops at once\n"
            with contextlib.suppress(OSError):       # not print(), which this may interrupt
                os.write(2, message)

    requested = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)         # Windows has no SIGHUP
        if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
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

    It starts, or is resumed, at an iteration. A run from scratch removes what an older one left.
    Calls fail() if another run is writing to the folder, or has written to it in the meantime.
    """

    def __init__(self, out_dir, processes, iteration, max_iters, pictures_per_iter,
                 resumed, overwrite):
        self.folder = Path(out_dir)
        self.checkpoint = self.folder / "ckpt.pt"
        self.processes = processes
        self.max_iters, self.pictures_per_iter = max_iters, pictures_per_iter
        self.saved = iteration                       # of the newest checkpoint
        self.signals = catch_stop_signals()
        self.started = time.monotonic()
        self.stopping = 0                            # the signal that some process received
        if processes.is_main:
            with explained(f"--out_dir={out_dir}: "):
                self.open_folder(iteration, resumed, overwrite)
        self.start_clock(iteration)

    def open_folder(self, iteration, resumed, overwrite):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        if resumed:
            changed = load_checkpoint(self.checkpoint)["iteration"] != iteration
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
        self.rows = [COLUMNS, *self.rows_until(iteration)] if resumed else [COLUMNS]
        self.write_log()

    def rows_until(self, iteration):
        """The rows of an older log.csv, without those past the iteration, which will come again."""
        if not (self.folder / "log.csv").exists():
            return []
        rows = (self.folder / "log.csv").read_text(errors="replace").splitlines()
        numbers = [row.split(",")[0] for row in rows]
        return [row for row, n in zip(rows, numbers) if n.isdecimal() and int(n) <= iteration]

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

    def say(self, text):
        if self.processes.is_main:
            say(text)

    def start_clock(self, iteration):
        """Measure the next speed() from here, so that evaluations do not count."""
        self.clock, self.cpu_clock, self.clocked = time.monotonic(), time.process_time(), iteration

    def speed(self, iteration):
        """Pictures per second."""
        pictures = (iteration - self.clocked) * self.pictures_per_iter
        return pictures / max(1e-9, time.monotonic() - self.clock)

    def iterations_in(self, minutes, iteration, speed):
        """The iteration at which so many minutes of this run are over, at a speed in pictures/s."""
        left = max(0, 60 * minutes - (time.monotonic() - self.started))
        more = int(left * speed / self.pictures_per_iter)
        self.max_iters = iteration + self.processes.maximum(more)
        return self.max_iters

    def notice_other_programs(self):
        """Warn once if other programs use the CPU: this one's threads then wait for each other."""
        ran = time.process_time() - self.cpu_clock
        threads = torch.get_num_threads()
        if threads > 1 and ran < 0.85 * threads * (time.monotonic() - self.clock):
            say("another program uses the CPU, which slows this one down a lot: it is faster to "
                "stop and resume with OMP_NUM_THREADS=1 in the environment", file=sys.stderr)
            self.notice_other_programs = lambda: None

    def log(self, iteration, loss, rate, speed, held_out, optimizer):
        """Print a line and add a row to log.csv. rate: learning rate; held_out: 5 losses or []."""
        if not self.processes.is_main:
            return
        row = [str(iteration), f"{loss:.6f}", f"{rate:.3e}", f"{speed:.0f}"]
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

    def save_checkpoint(self, **content):
        if not self.processes.is_main:
            return
        with survive(OSError, f"write {self.checkpoint}"):
            save_checkpoint(self.checkpoint, **content)
            self.saved = content["iteration"]

    def save_grid(self, iteration, pictures, held_out):
        """Save pictures (N, C, H, W) in [-1, 1], ten to a row, and print the 5 held-out losses."""
        if not self.processes.is_main:
            return
        png = self.folder / f"sample-{iteration}.png"
        with survive(OSError, f"write {png}"), atomic_write(png) as f:
            save_image(pictures, f, nrow=10, normalize=True, value_range=(-1, 1), format="png")
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
            self.say(f"stopped and saved at iteration {iteration}: "
                     f"continue with --init_from=resume --out_dir={self.folder}")
        self.processes.exit(code)


def steps_taken(optimizer, default):
    """AdamW's own count of its steps, which excludes those skipped because float16 overflowed."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=default)
