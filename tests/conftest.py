"""
The scripts under test are one folder up. Slow tests run only on request:

    python -m pytest            # without the tests marked slow or long
    python -m pytest --all      # also the slow ones: seconds each
    python -m pytest -m long    # only the long ones: minutes each
"""

import functools
import os
import shutil
import sys
from pathlib import Path

import pytest

# must precede the import of torch: a second thread does not speed up models this small, and on a
# busy machine, threads that wait for each other can take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds, runs only with --all")
    config.addinivalue_line("markers", "long: takes minutes, runs only with -m long")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --all"))
        if "long" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="long: python -m pytest -m long"))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """run_of(script) -> (working directory, what was printed) of its run, which nobody changes."""
    from helpers import TINY, here

    @functools.cache
    def train(script):
        cwd = tmp_path_factory.mktemp(script)
        args = [*TINY, "--batch_size=16", "--max_iters=40", "--learning_rate=2e-2"]
        return cwd, here(script, *args, cwd=cwd)

    return train


@pytest.fixture(params=["ddpm", "cfm"])
def trained(request, run_of, tmp_path):
    """(script, working directory) with a copy of a run of 40 iterations in the default out_dir."""
    shutil.copytree(run_of(request.param)[0], tmp_path, dirs_exist_ok=True)
    return request.param, tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that no command may change: a tiny run of each script, files that are no configs."""
    from helpers import TINY, here

    cwd = tmp_path_factory.mktemp("commands")
    for script in ("ddpm", "cfm"):
        here(script, *TINY, "--max_iters=1", f"--out_dir={script}", cwd=cwd)
    (cwd / "binary.py").write_bytes(bytes(range(256)))
    (cwd / "code.py").write_text("import os\nos.mkdir('executed')\n")
    (cwd / "misspelt.py").write_text("max_iters = 3\nbatchsize = 3\n")
    (cwd / "wrong.py").write_text("batch_size = 'x'\n")
    (cwd / "text.npz").write_text("no pictures")
    for name in ("full", "full.gif", "full.png"):
        (cwd / name).mkdir()
        (cwd / name / "file").write_text("")
    return cwd
