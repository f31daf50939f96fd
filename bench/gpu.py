"""
The Python part of bench/gpu.sh: what the card can do, and what the logs say.

    python bench/gpu.py card cuda                     # the card and its ceilings, as JSON
    python bench/gpu.py report SCRATCH FOLDER cuda    # results, from gpu.sh's SCRATCH to FOLDER
"""
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

# The same figures on two CPU cores, from README.md, bench/README.md and, for speed, bench/LOG.md.
CPU = {
    ("cfm", "seconds in all"): 480,
    ("cfm", "seconds to the first grid"): 51,
    ("cfm", "pictures/s"): 1271,
    ("ddpm", "seconds in all"): 513,
    ("ddpm", "seconds to the first grid"): 54,
    ("quality", "cfm-digits, judge A: x floor"): 2.11,
    ("quality", "cfm-digits, judge A: recognised"): "97.69%",
    ("quality", "cfm-digits, judge B: x floor"): 3.52,
    ("quality", "cfm-digits, judge B: recognised"): "97.58%",
    ("quality", "ddpm-digits, judge A: x floor"): 2.17,
    ("quality", "ddpm-digits, judge A: recognised"): "97.91%",
    ("quality", "ddpm-digits, judge B: x floor"): 3.50,
    ("quality", "ddpm-digits, judge B: recognised"): "97.67%",
    ("speed-default", "ms a step"): 74,
    ("speed-default", "pictures/s"): 863,
    ("speed-default", "% of the ceiling"): 30,
}
ENDS = {"0": "done", "124": "stopped: out of time", "137": "killed", "143": "stopped by a signal"}


def card(device):
    """{figure: value} of the machine: names, versions and peak speeds."""
    import torch
    import torchvision

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from core.machine import choose_machine
    from speed import seconds

    device, *_ = choose_machine(device)
    cuda = "cuda" in device
    found = {"torch": torch.__version__, "torchvision": torchvision.__version__,
             "python": sys.version.split()[0], "threads": torch.get_num_threads()}
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "GiB": round(properties.total_memory / 2**30, 1),
                  "compute capability": f"{properties.major}.{properties.minor}",
                  "CUDA of torch": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
            found["driver"] = driver.splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            found["driver"] = "unknown"              # nvidia-smi is missing
    n, size = (8192, 2**30) if cuda else (512, 2**24)
    for dtype in ("bfloat16", "float16", "float32"):
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        took = seconds(lambda: a @ a, device, 1 if cuda else 0.2)
        name = "TF32" if cuda and dtype == "float32" else dtype
        found[f"matrix product {name}, TFLOP/s"] = round(2 * n**3 / took / 1e12, 2)
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    took = seconds(lambda: b.copy_(a), device, 1 if cuda else 0.2)
    found["copy, GB/s read and written"] = round(2 * size / took / 1e9, 1)
    a = torch.zeros(1, device=device)
    took = seconds(lambda: [a.add_(1) for _ in range(1000)], device, 1 if cuda else 0.2) / 1000
    found["a small operation, microseconds"] = round(1e6 * took, 2)
    return found


# ---- what a log says: {figure: value}, from a stage's log, its run's folder and its start ----

def read_card(log, run, start):
    return json.loads(log.splitlines()[-1])


def read_tests(log, run, start):
    return {"tests": log.splitlines()[-1].strip("= ")}


def read_training(log, run, start):
    with open(run / "log.csv") as f:
        rows = list(csv.DictReader(f))
    speeds = [float(row["pictures_per_s"]) for row in rows]
    found = {"settings": re.search(r"^\S+, \w+, (not )?compiled", log, re.M)[0],
             "iterations": int(rows[-1]["iteration"]),
             "loss": float(rows[-1]["loss"]),
             "pictures/s": statistics.median(speeds[1:] or speeds)}      # the first compiles
    grids = [path.stat().st_mtime for path in run.glob("sample-*.png")]
    if grids:
        found["seconds to the first grid"] = round(min(grids) - start, 1)
    held_out = [row["held_out"] for row in rows if row["held_out"]]
    if held_out:
        found["held-out loss"] = float(held_out[-1])
    return found


def read_page(log, run, start):
    *_, (iterations, loss) = re.findall(r"^iteration (\d+) of .* loss ([\d.]+)", log, re.M)
    return {"iterations": int(iterations), "loss": float(loss)}


def read_drawing(log, run, start):
    asked, settings = re.search(r"^(\d+) pictures, .*: (.*), on", log, re.M).groups()
    stopped = re.search(r"stopped after (\d+) of", log)
    took, evaluations = re.search(r"([\d.]+) s, (\d+) evaluations", log).groups()
    n = int(stopped[1] if stopped else asked)
    return {"settings": settings, "evaluations": int(evaluations), "pictures": n,
            "pictures/s": round(n / max(0.1, float(took)))}


def read_quality(log, run, start):
    found = {}
    row = r"^(\S.*?) +([AB]) +\d+ +[\d.]+ +([\d.]+) +(nan%|[\d.]+%) "
    for name, judge, times, recognised in re.findall(row, log, re.M):
        name = f"{Path(name).stem}, judge {judge}"   # its front may be cut off
        found |= {f"{name}: x floor": float(times), f"{name}: recognised": recognised}
    return found


def read_speed(log, run, start):
    found, settings = {}, re.findall(r"on (\S+), (\w+), (compiled|not compiled)$", log, re.M)
    blocks = re.split(r"^\w+, batch .*$", log, flags=re.M)[1:]
    patterns = {"ms a step": r"GFLOP, ([\d.]+) ms", "seconds of the first": r"the first: ([\d.]+)",
                "pictures/s": r"(\d+) pictures/s", "GFLOP/s": r"(\d+) GFLOP/s",
                "% of the ceiling": r"(\d+)% of the ceiling",
                "ceiling, GFLOP/s": r"of the ceiling of (\d+)",
                "launches a step": r"launches of kernels: (\d+)",
                "seconds for 100 pictures": r"steps: ([\d.]+) s;",
                "MiB": r"peak memory (\d+)"}
    for (device, dtype, compiled), block in zip(settings, blocks):
        prefix = f"{dtype}, {compiled}: " if "cuda" in device else ""
        for figure, pattern in patterns.items():
            value = re.search(pattern, block)
            if value:
                found[prefix + figure] = float(value[1])
    return found


def reader(name):
    kinds = {"card": read_card, "smoke": read_tests, "quality": read_quality,
             "one_step": read_page, r"speed-.*": read_speed,
             r".*-digits|cifar10-\d": read_drawing}
    return next((read for kind, read in kinds.items() if re.fullmatch(kind, name)), read_training)


# ---- the results ----

def read_stages(scratch):
    """{name: {"ended": how, "seconds": s, "figures": {figure: value}, "cpu": the same}}, so far."""
    stages = {}
    for line in (scratch / "stages.tsv").read_text().splitlines():
        name, start, seconds, code, why = line.split("\t")
        if code == "skipped":
            stages[name] = {"ended": f"skipped: {why}", "seconds": 0, "figures": {},
                            "cpu": {}}
            continue
        log = (scratch / "logs" / f"{name}.log").read_text(errors="replace")
        try:
            figures = reader(name)(log, scratch / "run" / name, float(start))
        except Exception:                            # a failed stage may have printed anything
            figures = {}
        if code == "0" and reader(name) in (read_training, read_page):
            figures["seconds in all"] = int(seconds)
        last = log.strip().rpartition("\n")[2][:200]
        ended = ENDS.get(code, f"failed, exit code {code}: {last}")
        cpu = {figure: CPU[name, plain] for figure in figures
               if (name, plain := figure.removeprefix("bfloat16, compiled: ")) in CPU}
        stages[name] = {"ended": ended, "seconds": int(seconds), "figures": figures, "cpu": cpu}
    return stages


def table(stages, rehearsed):
    """Two tables in Markdown: how the stages ended, and all figures beside those of a CPU."""
    lines = ["| stage | seconds | how it ended |", "|---|---:|---|"]
    for name, stage in stages.items():
        lines.append(f"| {name} | {stage['seconds']} | {stage['ended'].replace('|', '/')} |")
    source = "Two CPU cores: from README.md, bench/README.md and, for speed, bench/LOG.md."
    if rehearsed:
        source = "A rehearsal on a CPU with tiny models: its figures mean nothing."
    lines += ["", source, "", "| stage | figure | here | two CPU cores |", "|---|---|---:|---:|"]
    for name, stage in stages.items():
        for figure, value in stage["figures"].items():
            cpu = "" if rehearsed else stage["cpu"].get(figure, "")
            value = f"{value:,.10g}" if isinstance(value, (int, float)) else value
            lines.append(f"| {name} | {figure} | {value} | {cpu} |")
    return "\n".join(lines) + "\n"


def report(scratch, folder, rehearsed):
    stages = read_stages(scratch)
    found = {"rehearsal": rehearsed, "stages": stages}
    logs, run = scratch / "logs", scratch / "run"
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (logs / "table.md").write_text(table(stages, rehearsed))
    for log in run.glob("*/log.csv"):
        shutil.copy(log, logs / f"{log.parent.name}.csv")
    with tarfile.open(folder / "logs.tgz", "w:gz") as tar:
        tar.add(logs, "logs")
    for name in ("cfm", "ddpm", "cifar10"):
        grids = sorted((run / name).glob("sample-*.png"), key=lambda path: path.stat().st_mtime)
        if grids:
            shutil.copy(grids[-1], folder / f"{name}.png")
    for npz in run.glob("cifar10-?.npz"):
        if not (folder / npz.name).exists():
            shutil.copy(npz, folder)


if __name__ == "__main__":
    command, *args = sys.argv[1:] or ["--help"]
    if command == "card":
        print(json.dumps(card(*args)))
    elif command == "report":
        scratch, folder, device = args
        report(Path(scratch), Path(folder), rehearsed=device == "cpu")
    else:
        print(__doc__)
