"""
The scripts under test are one folder up. Slow tests run only on request:

    python -m pytest            # without the tests marked slow or long
    python -m pytest --all      # also the slow ones: seconds each
    python -m pytest -m long    # only the long ones: minutes each
"""

import os
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
