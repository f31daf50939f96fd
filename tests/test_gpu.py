"""
What can be proven about the GPU path without a GPU.

The code of a training step and of the samplers runs unchanged on torch's fake tensors, which have a
shape, a type and the device "cuda", but no values. A tensor on the wrong device raises an error, as
does reading a value back, which would make the CPU wait. Autograd does not work on them, so the
tests supply the gradients. Kernel launches are counted, too.
"""
import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

import core.data
import core.machine
import sample
from core.muon import Muon, newton_schulz, orthogonalize, orthogonalize_at_once
from helpers import ROOT, TINY, checkpoint, command, here
from unet import UNet


def untouched(name):
    """The script as a separate module: other tests change the globals of the usual one."""
    spec = importlib.util.spec_from_file_location(f"untouched_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cfm, ddpm = untouched("cfm"), untouched("ddpm")
SCRIPTS = {"ddpm": ddpm, "cfm": cfm}
DEFAULT = {"num_classes": 10}
CIFAR10 = {"in_channels": 3, "channels": 128, "channel_mults": (1, 2), "n_res_blocks": 2,
           "attention_levels": (1, 2), "patch": 1, "dropout": 0.1}     # with fewer levels
NO_LAUNCH = ("view", "_unsafe_view", "expand", "transpose", "permute", "unbind", "split", "slice",
             "select", "detach", "alias", "empty", "empty_like", "empty_strided", "device", "chunk",
             "unsqueeze", "squeeze", "t", "as_strided", "split_with_sizes", "_reshape_alias")


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel; refuses those that make the CPU wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        on_gpu = [a.device.type == "cuda" for a in args if isinstance(a, torch.Tensor)]
        if name in ("_to_copy", "copy_") and on_gpu and on_gpu[-1] and out.device.type == "cpu":
            raise AssertionError("waits for the GPU: a copy to the CPU")
        self.count += name not in NO_LAUNCH
        return out


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def cast(dtype):
    """Autocast as on a GPU; torch.autocast would notice that there is none."""
    torch.set_autocast_enabled("cuda", dtype != "float32")
    torch.set_autocast_dtype("cuda", getattr(torch, dtype))


@pytest.fixture(autouse=True)
def no_autocast_afterwards():
    yield
    cast("float32")


def on_cuda(script, shape, build_options=()):
    """A model on the fake device and its method."""
    config = vars(script) | dict(build_options)
    with torch.device("cuda"):
        model = UNet(**shape)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    with unset_fake_temporarily():                   # ddpm's tables need real values
        method = script.build(model, config)
    for name, value in vars(method).items():
        if torch.is_tensor(value):
            setattr(method, name, value.to("cuda"))
    return model, method


def gradients(model):
    for p in model.parameters():
        p.grad = torch.empty_like(p)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("shape", [DEFAULT, CIFAR10], ids=["default", "cifar10"])
def test_two_steps_of_training_mix_no_devices_and_wait_for_nothing(
    script, dtype, muon, shape, fake, monkeypatch
):
    script = SCRIPTS[script]
    monkeypatch.setattr(script, "flip", True)
    model, method = on_cuda(script, shape)
    ema = copy.deepcopy(model)
    if muon:
        optimizer = Muon(model.parameters())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    side = 32 if shape is CIFAR10 else 28
    pictures = torch.empty(1000, shape.get("in_channels", 1), side, side, dtype=torch.uint8,
                           device="cuda")
    labels = torch.zeros(1000, dtype=torch.long, device="cuda")
    seen, attention = set(), torch.nn.functional.scaled_dot_product_attention

    def recording(q, k, v):
        seen.add(q.dtype)
        return attention(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    with Launches():
        for it in range(2):
            batch = script.get_batch(pictures, labels)
            cast(dtype)
            loss = method.loss(*batch)
            cast("float32")
            gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            script.update_average(ema, model, it)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert seen == {getattr(torch, dtype)}
    for state in optimizer.state.values():
        assert {v.device.type for v in state.values()} == {"cuda"}


def test_the_proof_notices_what_it_is_to_notice(fake):
    x = torch.empty(3, device="cuda")
    with Launches() as launches, pytest.raises(AssertionError, match="waits"):
        x.cpu()
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(Exception, match="device"):
        x + torch.empty(3)
    with launches:
        before = launches.count
        x.view(3, 1).add(1)
    assert launches.count == before + 1


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", [*sample.SAMPLERS, "textbook", "ancestral", "ddim eta"])
def test_samplers_mix_no_devices_and_wait_for_nothing(script, guidance, sampler, fake):
    if (script, sampler) == ("cfm", "ancestral"):
        pytest.skip("not in this script")
    _, method = on_cuda(SCRIPTS[script], DEFAULT, {"n_steps": 6})
    noise = torch.empty(4, 1, 28, 28, device="cuda")
    y = torch.zeros(4, dtype=torch.long, device="cuda")
    options = {"eta": 1.0} if sampler == "ddim eta" else {}
    with Launches():
        try:
            x = sample.draw(method, noise, y, sampler.split()[0], 4, guidance, **options)
        except DataDependentOutputException:
            assert sampler == "dopri5"               # its steps depend on its errors: it has to wait
            return
    assert x.shape == noise.shape and x.device.type == "cuda" and sampler != "dopri5"


# ---- launches ----

def kernels(shapes):
    torch.manual_seed(0)
    return [torch.randn(s).to(memory_format=torch.channels_last) for s in shapes]


def test_all_kernels_at_once_are_orthogonalised_as_each_alone():
    some = kernels([(24, 4, 3, 3), (48, 24, 3, 3), (144, 48, 1, 1), (24, 96, 3, 3), (4, 24, 3, 3)])
    for a, b, kernel in zip(orthogonalize(some), orthogonalize_at_once(some), some):
        alone = newton_schulz(kernel.flatten(1)[None])[0].reshape(kernel.shape)
        assert torch.allclose(a, alone, atol=1e-5) and torch.allclose(b, alone, atol=1e-5)
        assert b.stride() == kernel.stride()         # or adding each to its weights takes a launch


def test_the_optimizer_and_the_average_take_few_launches(fake):
    """
    Muon took 390 launches before it handled all kernels at once. Clipping uses foreach, the default
    on a real GPU.
    """
    model, _ = on_cuda(cfm, DEFAULT)
    ema, optimizer = copy.deepcopy(model), Muon(model.parameters())
    counts = []
    for it in range(2):
        gradients(model)
        with Launches() as launches:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            cfm.update_average(ema, model, it)
        counts.append(launches.count)
    assert counts[1] <= 50


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_takes_at_most_300_launches():
    """
    Kernel calls of the model, compiled for the CPU here, plus the counted launches of the rest.

    On a GPU, fusion differs: an H200 launched 604, and 78 with CUDA graphs, see bench/README.md.
    """
    code = """
import re, torch, cfm
from torch._inductor.utils import run_and_get_code
from unet import UNet
from tests.test_gpu import Launches, gradients, on_cuda, DEFAULT
model = UNet(**DEFAULT).to(memory_format=torch.channels_last)
method = cfm.build(torch.compile(model), vars(cfm))
x, y = torch.rand(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
_, codes = run_and_get_code(lambda: method.loss(x, y).backward())
print(len(codes), *[code[code.index("def call("):] for code in codes], sep="\\n=====\\n")
"""
    env_path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": env_path})
    number, *graphs = done.stdout.split("\n=====\n")
    assert number.strip() == "2", done.stderr        # forward and backward: no graph breaks
    compiled = 0
    for graph in graphs:
        compiled += len(re.findall(r"(?m)^ +cpp_fused\w*\(", graph))
        compiled += len(re.findall(r"= extern_kernels\.|^ +extern_kernels\.", graph, re.M))
        for call in re.findall(r"= torch\.ops\.aten\.(\w+)", graph):
            compiled += 3 if call == "convolution_backward" else 1   # of x, weights and bias
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, method = on_cuda(cfm, DEFAULT)
        method.v_model = lambda t, x, y: x
        pictures = torch.empty(1000, 1, 28, 28, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(1000, dtype=torch.long, device="cuda")
        ema, optimizer = copy.deepcopy(model), Muon(model.parameters())
        for it in range(2):
            gradients(model)
            with Launches() as launches:
                method.loss(*cfm.get_batch(pictures, labels))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                optimizer.step()
                cfm.update_average(ema, model, it)
    print(f"{compiled} compiled, {launches.count} others")
    assert 100 < compiled and compiled + launches.count <= 300


# ---- torch.compile ----

@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_one_graph_and_compiled_once(script):
    """Evaluating the averaged weights in between, in batches of other sizes, compiles nothing."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    script, counter, alone = SCRIPTS[script], CompileCounter(), CompileCounter()
    torch.manual_seed(0)
    model = UNet(num_classes=10, channels=8)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    net = torch.compile(model, backend=counter, fullgraph=True)
    trained, averaged = script.build(net, vars(script)), script.build(ema, vars(script))
    x, y, u = torch.rand(20, 1, 28, 28), torch.arange(20) % 10, torch.rand(20)
    for _ in range(2):
        trained.loss(x, y).backward()
        script.evaluate(averaged, x, y, torch.randn_like(x), u)
        script.sample_grid(averaged, torch.randn_like(x), y)
        trained.loss(x, y).backward()
    assert counter.frame_count == 1
    whole = torch.compile(trained.loss, backend=alone, fullgraph=True)
    whole(x, y).backward()
    assert alone.frame_count == 1


NO_COMPILER = {"PATH": "/nowhere", "CXX": "", "CC": ""}


def test_without_a_compiler_a_run_goes_on_or_says_why_not(tmp_path):
    """--compile=true requires one, --compile=auto does not."""
    code = ("from core.machine import try_to_compile\n"
            "print(try_to_compile('cpu', required=False), flush=True)\n"
            "print(try_to_compile('cpu', required=True))")
    env = os.environ | NO_COMPILER | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                          cwd=ROOT)
    said = [line for line in done.stderr.splitlines() if "torch.compile does not work" in line]
    assert len(said) == 2 and "Traceback" not in done.stderr
    assert "continuing without it" in said[0] and "--compile=true: torch.compile does" in said[1]
    assert (done.stdout, done.returncode) == ("False\n", 2)


@pytest.mark.slow
def test_compile_true_without_a_compiler_is_refused_in_a_line(tmp_path):
    env = os.environ | NO_COMPILER | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command("cfm", *TINY, "--compile=true"), capture_output=True, text=True,
                          env=env, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--compile=true: torch.compile does not work here" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_processes_save_what_a_single_one_can_load(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [*TINY, "--channel_mults=1", "--attention_levels=()", "--max_iters=2", "--out_dir=x"]
    done = subprocess.run([*torchrun, *command("cfm", *args, "--compile=true")[1:]], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and ", compiled, 2 processes" in done.stdout, done.stderr
    names = checkpoint(tmp_path / "x")["model"].keys()
    assert not [name for name in names if "_orig_mod" in name or "module." in name]
    here("cfm", "--init_from=resume", "--out_dir=x", "--compile=false", "--max_iters=3",
         cwd=tmp_path)


# ---- pictures that do not fit, and the clock ----

def test_pictures_that_do_not_fit_are_refused_with_what_to_do(monkeypatch, capsys):
    pictures = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(1000, dtype=torch.long)
    data = core.data.Data((pictures, labels), (pictures[:10], labels[:10]), [], 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    with pytest.raises(SystemExit) as e:
        data.to("cuda:0")
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and "--offload" in said and "GiB" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_offloaded_pictures_are_the_same_batches(script, fake, monkeypatch):
    """They come to the labels' device from pinned memory."""
    script, pinned = SCRIPTS[script], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    pictures = torch.empty(1000, 1, 28, 28, dtype=torch.uint8)
    labels = torch.zeros(1000, dtype=torch.long, device="cuda")
    with Launches():
        x, y = script.get_batch(pictures, labels)
    assert x.device.type == y.device.type == "cuda" and pinned == [(64, 1, 28, 28)]


def test_offload_changes_nothing_on_a_cpu(tmp_path):
    for name in ("true", "false"):
        here("cfm", *TINY, "--max_iters=4", f"--offload={name}", f"--out_dir={name}", cwd=tmp_path)
    a, b = (checkpoint(tmp_path / name)["model"] for name in ("true", "false"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_ends_by_the_clock_its_rate_near_zero(script, tmp_path):
    args = ["--minutes=0.04", "--log_interval=2", "--eval_interval=1000000", "--out_dir=x"]
    start = time.monotonic()
    here(script, *TINY, *args, "--max_iters=1000000", cwd=tmp_path)
    assert 2 < time.monotonic() - start < 30
    rows = [row.split(",") for row in (tmp_path / "x" / "log.csv").read_text().splitlines()[1:]]
    rates = [float(row[2]) for row in rows]
    assert max(rates) > 1e-3 and rates[-1] < 0.1 * max(rates) and len(rows) > 5
    last = int(rows[-1][0])
    assert rows[-1][5] and (tmp_path / "x" / f"sample-{last}.png").exists()
    assert checkpoint(tmp_path / "x")["iteration"] == last


def test_minutes_outlast_max_iters(tmp_path):
    said = here("cfm", *TINY, "--minutes=0.03", "--log_interval=2", "--max_iters=4", "--out_dir=x",
                cwd=tmp_path)
    assert "iteration 2 of 4:" not in said and "iterations 0 for 0.03 minutes" in said
    end = checkpoint(tmp_path / "x")
    assert end["iteration"] == end["config"]["max_iters"] > 4


@pytest.mark.parametrize("resumed_on", ["cpu", "auto"])
def test_a_run_is_resumed_on_another_device_string(resumed_on, tmp_path):
    """Nothing in a checkpoint says where it was made: cuda and cuda:0 are the same."""
    here("cfm", *TINY, "--max_iters=2", "--out_dir=x", cwd=tmp_path)
    args = ["--init_from=resume", f"--device={resumed_on}", "--out_dir=x", "--max_iters=3"]
    here("cfm", *args, cwd=tmp_path)
    tensors = [v for v in checkpoint(tmp_path / "x")["ema"].values()]
    assert {v.device.type for v in tensors} == {"cpu"} or torch.cuda.is_available()


def test_float32_matrices_use_tf32_on_cuda_and_not_where_errors_are_small(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with FakeTensorMode():
        assert core.machine.choose_machine("cuda:0") == ("cuda:0", "float16", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with FakeTensorMode():
        assert core.machine.choose_machine("cuda:0")[1] == "bfloat16"
    core.machine.choose_machine("cpu")
    assert asked == ["high", "high"]
