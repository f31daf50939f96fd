"""The scripts under test are files one folder up. Tests marked long run only if asked for: pytest -m long"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes, runs only if asked for")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "long" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="long: python -m pytest -m long"))
