"""
A contender's row for the tables of records in bench/README.md: runs that differ in their seed only.

    python cfm.py --seed=1 --out_dir=out/cfm-1        # and so on, for three seeds
    python bench/record.py out/cfm out/cfm-1 out/cfm-2
    python bench/record.py out/cfm out/cfm-1 out/cfm-2 --draw="--steps=4" --teach=4

It draws 10,000 digits of each run by sample.py, with the options in --draw, and judges them as
bench/quality.py does. They stay in the run's folder, as record.npz. With --teach=4 it draws 50,000,
judges the first 10,000, and trains three classifiers on all of them, which needs MNIST. The minutes
are those of training, from the runs' log.csv. The track is the first whose bounds all runs keep:
    one evaluation   of the model for each picture; the minutes include all that came before
    three minutes    of training
    the default      at most twelve minutes
"""
import csv
import math
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.checkpoint import load_checkpoint
from quality import FOLDER, load_digits, load_judge, read_pictures, score, teach_pupils

ROOT = Path(__file__).resolve().parent.parent
# -----------------------------------------------------------------------------
draw = ""                    # options for sample.py
n_samples = 10_000           # to judge, and a fifth of those that teach; fewer only as a trial
teach = 0                    # epochs of the classifiers that learn from the digits; 0: none
minutes_before = 0.0         # spent before a run: on training a flow, on drawing pairs
machine = ""                 # where the runs were trained; "": here
data_dir = "data"            # holds MNIST, for --teach
# -----------------------------------------------------------------------------
LIMITS = {"n_samples": (2, 10_000), "teach": (0, math.inf), "minutes_before": (0, math.inf)}
MAY_DIFFER = {"seed", "out_dir", "data_dir", "dataset", "init_from", "overwrite",
              "max_iters"}           # the clock sets it, with --minutes
TRACKS = {"three minutes": 3, "the default": 12}     # and the minutes they allow
COLUMNS = ["track", "seeds", "minutes", "machine", "evaluations", "x floor by A", "by B",
           "recognised by A", "by B", "teaches"]


def minutes_of(run):
    """Minutes that a run has trained, from its log.csv; calls fail() if it does not say."""
    with explained(f"{run}: "), open(Path(run, "log.csv")) as f:
        last = list(csv.DictReader(f))[-1:]
    if not last or not last[0].get("seconds"):
        fail(f"{run}/log.csv has no seconds: train the run again with this version")
    return float(last[0]["seconds"]) / 60


def settings_of(run):
    """The options of a run, whether or not they may differ between the runs of a contender."""
    checkpoint = load_checkpoint(Path(run, "ckpt.pt"))
    if checkpoint["picture_shape"] != (1, 28, 28) or checkpoint["model_args"]["num_classes"] != 10:
        fail(f"{run} is not a run of MNIST with labels, which the judges need")
    return checkpoint["config"] | {"method": checkpoint["method"]}


def require_one_contender(settings):
    """Calls fail() if the runs, {folder: options}, differ in more than they may."""
    first, *others = settings
    for run in others:
        for name, value in settings[run].items():
            if name not in MAY_DIFFER and value != settings[first].get(name):
                fail(f"{run} has {name} = {value}, {first} has {settings[first].get(name)}: "
                     "a contender's runs differ in their seed only")


def draw_digits(run, count):
    """(pictures uint8 (count, 1, 28, 28), labels (count,), evaluations for each), by sample.py."""
    file = Path(run, "record.npz")
    command = [sys.executable, ROOT / "sample.py", f"--out_dir={run}", f"--n_samples={count}",
               f"--save={file}", *shlex.split(draw)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"sample.py ended with exit code {done.returncode} for {run}")
    evaluations = int(re.search(r"(\d+) evaluations of the model: ", done.stdout)[1])
    return *read_pictures(file), evaluations


def track_of(minutes, evaluations):
    """The name of the track for runs of at most these minutes and evaluations."""
    if evaluations == 1:
        return "one evaluation"
    return next((track for track, most in TRACKS.items() if minutes <= most), "none")


def this_machine():
    """Its processor, the threads that torch uses, and torch's version."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:                                  # not Linux
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, threads: {torch.get_num_threads()}, torch {torch.__version__.split('+')[0]}"


def listed(values, form):
    return ", ".join(format(value, form) for value in values)


if __name__ == "__main__":
    runs = [a for a in sys.argv[1:] if not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in sys.argv[1:] if a not in runs])
    if not runs:
        fail("whose row? Name at least one folder of a run")
    settings = {run: settings_of(run) for run in runs}
    require_one_contender(settings)
    minutes = [minutes_before + minutes_of(run) for run in runs]
    judges = [load_judge(FOLDER / file) for file in ("a.pt", "b.pt")]
    with explained():
        real = load_digits(data_dir)[1] if teach else None

    evaluations, times, recognised, taught = [], [[], []], [[], []], []
    for run in runs:
        x, y, cost = draw_digits(run, 5 * n_samples if teach else n_samples)
        evaluations.append(cost)
        for i, (network, references) in enumerate(judges):
            _, multiple, share, _ = score(network, references["test"], x[:n_samples], y[:n_samples])
            times[i].append(multiple)
            recognised[i].append(share)
        if teach:
            taught.append(np.mean(teach_pupils(x, y, *real, teach)))

    seeds = [settings[run]["seed"] for run in runs]
    row = [track_of(max(minutes), max(evaluations)), listed(seeds, "d"),
           listed(minutes, ".1f"), machine or this_machine(), str(max(evaluations)),
           listed(times[0], ".2f"), listed(times[1], ".2f"),
           listed(recognised[0], ".2%"), listed(recognised[1], ".2%"), listed(taught, ".2%")]
    print("| " + " | ".join(COLUMNS) + " |\n" + len(COLUMNS) * "|---" + "|")
    print("| " + " | ".join(row) + " |")
