"""ddpm.py and cfm.py differ in the method and in nothing else; importing them does nothing."""

import ast
import difflib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BEGIN, END = (
    "# the method, and the grids drawn with it",
    "# ---- the rest is the same in ddpm.py and cfm.py ----",
)


def parts(name):
    """(docstring, imports and shared options, the method with its options, the rest)"""
    text = (ROOT / f"{name}.py").read_text()
    doc = text[: text.index('"""\n', 3) + 4]
    shared, method = text[len(doc) :].split(BEGIN)
    return doc, shared, *method.split(END)


def test_the_diff_is_the_mathematics():
    ddpm, cfm = parts("ddpm"), parts("cfm")
    for i, what in ((1, "imports and shared options"), (3, "everything after the method")):
        diff = list(
            difflib.unified_diff(ddpm[i].splitlines(), cfm[i].splitlines(), "ddpm.py", "cfm.py", lineterm="")
        )
        assert not diff, f"{what} differ:\n" + "\n".join(diff)
    assert len(ddpm[3].splitlines()) > 150 and ddpm[2] != cfm[2]


def test_importing_parses_nothing_prints_nothing_and_writes_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']; "
        "import configurator, unet, ddpm, cfm, sample"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


@pytest.mark.parametrize("name", ["ddpm", "cfm", "sample"])
def test_options_are_written_down_not_computed(name):
    """A default derived from another one would go stale when that is overridden."""
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id.islower():
            ast.literal_eval(node.value)
