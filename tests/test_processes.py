"""Several processes under torchrun, on the CPU, do what one does, and stop together."""

import signal
import subprocess
import sys

import pytest
import torch

from helpers import TINY, checkpoint, command, here

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.mark.parametrize("script, n", [("ddpm", 2), ("cfm", 2), ("cfm", 4)])
def test_several_processes_do_what_one_does_in_as_many_micro_batches(script, n, tmp_path):
    args = [*TINY, "--max_iters=5", "--out_dir"]
    together = [*TORCHRUN, f"--nproc_per_node={n}", *command(script, *args, "together")[1:]]
    done = subprocess.run(together, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("iteration 5 of 5") == 1  # only one process prints and writes
    assert f"of {32 * n} pictures" in done.stdout and f"{n} processes" in done.stdout
    here(script, *args, "one", f"--gradient_accumulation_steps={n}", cwd=tmp_path)
    here(script, *args, "part", cwd=tmp_path)  # what the first process would do alone
    together, one, part = (
        torch.cat([v.flatten() for v in checkpoint(tmp_path / d)["model"].values()])
        for d in ("together", "one", "part")
    )
    gap = (together - part).norm()
    assert (together - one).norm() < 1e-2 * gap and gap > 1e-3 * one.norm()


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """SIGTERM to torchrun: the state is saved whole, and a single process can continue it."""
    args = [*TINY, "--max_iters=100000", "--out_dir=x"]
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", *command("cfm", *args)[1:]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("iteration 40 "):
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped and saved at iteration" in out
    stopped_at = checkpoint(tmp_path / "x")["iteration"]
    more = f"--max_iters={stopped_at + 1}"
    printed = here("cfm", "--init_from=resume", "--out_dir=x", more, cwd=tmp_path)
    assert "resuming with max_iters" in printed and f"iteration {stopped_at + 1} of" in printed
