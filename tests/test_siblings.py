"""
ddpm.py and cfm.py differ in the method and in nothing else. Importing them does nothing, and each
works on its own.
"""

import ast
import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = "# ----" + 73 * "-"
TRAINING = ("# ==== the same in ddpm.py and cfm.py from here on, byte for byte: "
            "guidance, times, training ====\n")


def parts(name):
    """(imports, the method with its options, training)"""
    text = (ROOT / f"{name}.py").read_text()
    text = text[text.index('"""\n', 3) + 4 :]
    method, training = text.split(TRAINING)
    imports, method = method.split(METHOD, 1)
    return imports, method, training


def test_the_diff_is_the_mathematics():
    ddpm, cfm = parts("ddpm"), parts("cfm")
    for i, what in ((0, "imports"), (2, "training")):
        one, other = ddpm[i].splitlines(), cfm[i].splitlines()
        diff = difflib.unified_diff(one, other, "ddpm.py", "cfm.py", lineterm="")
        assert one == other, f"{what} differ:\n" + "\n".join(diff)
    assert ddpm[2] == cfm[2]
    assert len(ddpm[2].splitlines()) > 250 and ddpm[1] != cfm[1]


def test_importing_parses_nothing_prints_nothing_and_writes_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']; "
        "import configurator, core.data, core.machine, core.run, unet, ddpm, cfm, sample"
    )
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **pipes)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ddpm", "cfm", "sample"])
def test_options_are_written_down_not_computed(name):
    """A default derived from another one would go stale when the other is overridden."""
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id.islower():
            ast.literal_eval(node.value)


def imported(nodes):
    """The top-level names that importing a module with these nodes would import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]
        elif isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            yield from imported(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imported(ast.iter_child_nodes(node))


@pytest.mark.parametrize("name", ["ddpm", "cfm", "sample"])
def test_a_module_imports_only_torch_and_the_standard_library(name):
    found = set(imported(ast.parse((ROOT / f"{name}.py").read_text()).body))
    assert "torch" in found and found <= {"torch", *sys.stdlib_module_names}


ABSENT = ["torchvision", "PIL", "configurator", "core", "unet", "sample", "scipy"]
USES = {
    "ddpm": """
from {module} import DenoiseDiffusion
def model(t, x, y):
    return weight * x * (1 + t.reshape(-1, 1, 1, 1) / 10)
method = DenoiseDiffusion(model, n_steps=10)
""",
    "cfm": """
from {module} import ConditionalFlowMatcher, VelocityField
matcher = ConditionalFlowMatcher(sigma=0.1)
t, xt, ut = matcher.sample_location_and_conditional_flow(noise, x)
assert t.shape == (4,) and xt.shape == ut.shape == x.shape and torch.equal(ut, x - noise)
def model(t, x, y):
    return weight * x * (1 + t.reshape(-1, 1, 1, 1))
method = VelocityField(model, matcher)
""",
}
BOTH = """
loss = method.loss(x, y)
loss.backward()
assert loss > 0 and weight.grad.abs() > 0
drawn = method.sample(noise, y, {steps}guidance=2.0)
assert drawn.shape == x.shape and drawn.isfinite().all() and not drawn.equal(noise)
print("used", {module!r})
"""


def test_one_file_alone_is_of_use_in_a_folder_and_in_a_package(tmp_path):
    """All else is absent, even packages that are installed, and the other file."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\nimport torch\n"
    for name, steps in (("ddpm", ""), ("cfm", "steps=3, ")):
        alone, project = tmp_path / name / "alone", tmp_path / name / "project"
        for folder in (alone, project / "mypackage"):
            folder.mkdir(parents=True)
            shutil.copy(ROOT / f"{name}.py", folder)
        for folder, module in ((alone, name), (project, f"mypackage.{name}")):
            code += f"sys.path[0] = {str(folder)!r}\n"
            code += "noise, x = torch.randn(2, 4, 1, 8, 8)\ny = torch.tensor([0, 1, 2, -1])\n"
            code += "weight = torch.ones((), requires_grad=True)\n"
            code += (USES[name] + BOTH).format(module=module, steps=steps)
        code += f"del sys.modules[{name!r}], sys.modules['mypackage.{name}'], sys.modules['mypackage']\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipes = {"capture_output": True, "text": True}
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, **pipes)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == "used ddpm\nused mypackage.ddpm\nused cfm\nused mypackage.cfm\n"
    for name in ("ddpm", "cfm"):
        assert [p.name for p in (tmp_path / name / "alone").iterdir()] == [f"{name}.py"]
    assert not list((tmp_path / "empty").iterdir())
