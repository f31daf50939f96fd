"""The documents: links lead somewhere, and whatever they name exists."""

import ast
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from helpers import sample

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/mathematics.md", "bench/README.md", "tests/README.md",
             "examples/README.md"]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(document):
    """(text, file) of each link to a file in the project, pictures included."""
    text = (ROOT / document).read_text()
    found = [(words, target.split("#")[0]) for words, target in LINK.findall(text)]
    return [(words, target) for words, target in found if target and "://" not in target]


def names_in(path):
    """Names of functions and classes in a Python file, and of methods, as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_every_function_named_in_one_is_there(document):
    found = links(document)
    assert len(found) > 3
    for words, target in found:
        path = (ROOT / document).parent / target
        assert path.exists(), f"{document}: {target} does not exist"
        code = re.fullmatch(r"`([\w.]+)`", words)
        if code and path.suffix == ".py" and not code[1].endswith(".py"):
            assert code[1] in names_in(path), f"{document}: no {code[1]} in {target}"


def test_the_theory_names_what_it_is_about():
    """The functions that a student should find beside the formulas."""
    named = {words.strip("`") for words, target in links("docs/mathematics.md")}
    expected = """bound DenoiseDiffusion.q_xt_x0 DenoiseDiffusion.q_sample
        DenoiseDiffusion.q_posterior_mean DenoiseDiffusion.q_posterior_mean_eps
        DenoiseDiffusion.loss DenoiseDiffusion.p_sample DenoiseDiffusion.sample
        VelocityField.loss VelocityField.sample VelocityField.velocity log_likelihood
        ConditionalFlowMatcher.compute_conditional_flow classifier_free_guidance ddim euler"""
    assert set(expected.split()) <= named


def without_docstring(file, name):
    """The lines of the method Class.name in a file, without docstring and indentation."""
    of_class, name = name.split(".")
    text = (ROOT / file).read_text()
    (methods,) = (n.body for n in ast.parse(text).body if getattr(n, "name", "") == of_class)
    (method,) = (n for n in methods if getattr(n, "name", "") == name)
    lines, doc = text.splitlines(), method.body[0]
    code = lines[method.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : method.end_lineno]
    return textwrap.dedent("\n".join(code))


def test_the_front_page_shows_the_losses_and_samplers_as_they_are():
    """All of them, as they stand in the files, but for the docstrings."""
    readme, shown = (ROOT / "README.md").read_text(), []
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "def " in b)
    for part in re.split(r"(?m)^# (?=\w+\.py, )", block)[1:]:
        header, methods = part.split("\n", 1)
        file, of_class = header.split(", ")
        for method in re.split(r"\n\n(?=def )", methods.strip()):
            name = f"{of_class}.{re.match('def (.*?)[(]', method)[1]}"
            assert method.strip() == without_docstring(file, name).strip()
            shown.append(name)
    assert shown == [
        "DenoiseDiffusion.q_sample", "DenoiseDiffusion.loss",
        "DenoiseDiffusion.p_sample", "DenoiseDiffusion.sample",
        "ConditionalFlowMatcher.compute_mu_t", "ConditionalFlowMatcher.compute_conditional_flow",
        "VelocityField.loss", "VelocityField.sample",
    ]


def test_the_algorithms_quote_the_code():
    """Each line of Algorithms 1 and 2 beside the line of ddpm.py that implements it."""
    code, rows = (ROOT / "ddpm.py").read_text(), 0
    for row in (ROOT / "docs" / "mathematics.md").read_text().splitlines():
        if re.match(r"\| [12]\.\d \|", row):
            rows += 1
            for quoted in re.findall(r"(?<!\[)`([^`]+)`", row):
                assert quoted in code, quoted
    assert rows == 8


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document):
    text = (ROOT / document).read_text()
    tests = set()
    for path in [ROOT / "test_smoke.py", *(ROOT / "tests").glob("test_*.py")]:
        tests |= names_in(path)
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named <= tests, named - tests
    assert document != "tests/README.md" or len(named) > 40


def test_every_option_on_the_front_page_exists():
    options = set()
    for script in ("ddpm", "cfm", "sample"):
        for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
            if isinstance(node, ast.Assign):
                options |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    named = set(re.findall(r"--([a-z_]+)", (ROOT / "README.md").read_text()))
    others = {"standalone", "nproc_per_node", "no", "help", "all"}
    assert named - others <= options, named - others - options


def test_the_front_page_is_for_a_visitor_of_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1700


def test_what_comes_with_the_project_is_small():
    for path in (ROOT / "assets").rglob("*"):
        assert not path.is_file() or path.stat().st_size < 2_000_000, path
    assert (ROOT / "assets" / "digits.gif").stat().st_size < 600_000


def test_the_weights_that_come_with_the_project_draw_digits(tmp_path):
    """Mostly black, alike within a class, and similar for both methods from the same noise."""
    drawn = {}
    for method in ("cfm", "ddpm"):
        where = f"--out_dir={ROOT / 'assets' / method}"
        assert f"--out_dir=assets/{method}" in (ROOT / "README.md").read_text()
        sample(where, "--save=x.npz", cwd=tmp_path)
        arrays = np.load(tmp_path / "x.npz")
        assert arrays["arr_1"].tolist() == list(range(10)) * 10
        drawn[method] = arrays["arr_0"][..., 0].astype(float)
        (tmp_path / "x.npz").unlink()
    for x in drawn.values():
        assert 20 < x.mean() < 50 and (x < 10).mean() > 0.7 and (x > 245).mean() > 0.03
        means = x.reshape(10, 10, -1).mean(0)                           # of each class
        own = np.square(x.reshape(10, 10, 1, -1) - means).mean(-1).argmin(-1) == np.arange(10)
        assert own.mean() > 0.8
    a, b = (x.reshape(100, -1) - x.mean() for x in drawn.values())
    assert (a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean()) > 0.6
