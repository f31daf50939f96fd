"""The trunk, the files of the card and core/, does without the pages of examples/."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

TRUNK = ["ddpm.py", "cfm.py", "unet.py", "sample.py", "configurator.py",
         *(f"core/{path.name}" for path in (ROOT / "core").glob("*.py"))]
PAGES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
# of the trunk, and quick: what is left out tests documents, bench/, or the examples themselves
TESTS = ["test_cfm", "test_configurator", "test_data", "test_ddpm", "test_old_checkpoints",
         "test_runs", "test_sample", "test_siblings", "test_unet"]


def test_only_the_table_of_retired_options_names_pages():
    for name in TRUNK:
        text = (ROOT / name).read_text()
        if name == "configurator.py":
            before, after = text.split("RETIRED = {")
            text = before + after.split("\n}\n", 1)[1]
        found = re.findall(r"examples/\w*|(?:import|from) examples", text)
        assert not found, f"{name} names {found}"


def test_no_page_imports_another_one():
    for page in PAGES:
        text = (ROOT / "examples" / f"{page}.py").read_text()
        others = [other for other in PAGES if re.search(rf"(?m)^\s*(import|from) {other}\b", text)]
        assert not others, f"{page}.py imports {others}"


def test_a_page_that_takes_a_run_takes_one_that_comes_with_the_project():
    """So that it can be tried at once, without training."""
    takes = [page for page in PAGES
             if "load_run" in (ROOT / "examples" / f"{page}.py").read_text()]
    assert len(takes) > 7
    for page in takes:
        text = (ROOT / "examples" / f"{page}.py").read_text()
        folder, = re.findall(r'(?m)^(?:out_dir|init_from) = "(assets/\w+)"', text)
        assert (ROOT / folder / "ckpt.pt").is_file(), page


@pytest.mark.slow
def test_without_examples_the_trunks_quick_tests_pass(tmp_path):
    for name in ("tests", "core", "config", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert not (tmp_path / "examples").exists()
    tests = ["test_smoke.py", *(f"tests/{name}.py" for name in TESTS)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
