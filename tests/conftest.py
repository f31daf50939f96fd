"""
The scripts under test are files one folder up. Tests that take long run only if asked for:

    python -m pytest            # without the tests marked slow or long
    python -m pytest --all      # with the slow ones, of seconds each
    python -m pytest -m long    # the long ones, of minutes each
"""

import os
import sys
from pathlib import Path

import pytest

# before torch is imported: models as small as here gain nothing by a second thread, and beside
# other programs threads that wait for each other take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds, runs only with --all")
    config.addinivalue_line("markers", "long: takes minutes, runs only if asked for")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --all"))
        if "long" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="long: python -m pytest -m long"))
