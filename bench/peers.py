"""
The MNIST recipes of four other projects against cfm.py and ddpm.py: same time, machine and judge.

    pip install -r requirements.txt -r bench/requirements.txt
    pip install --no-deps torchcfm labml-nn denoising-diffusion-pytorch
    python bench/peers.py                               # about 80 minutes on two cores; out/peers
    python bench/peers.py --peers=torchcfm,cfm --minutes=3   # only these, and shorter

Each recipe is what its project documents; its docstring below says what had to change. The models
are trained one after another, then sampled with few evaluations: their own samplers take up to
1000, which would take hours here. The pictures stay in out_dir, for bench/quality.py. A row of the
table gives
    minutes       of the training loop. Imports and reading data do not count. All else does,
                  including the evaluations, grids and checkpoints of cfm and ddpm
    iterations    done in these minutes; s/step: seconds per iteration
    evaluations   of the model per picture drawn
    pictures      drawn: all that were asked for, or as many as sampling_minutes allow
    x floor       their distance to the test set, as a multiple of the floor, by judge A of
                  bench/quality.py. It grows as pictures get fewer: the row of training images shows
                  the best that n_samples can reach, and a row with fewer pictures is at a
                  disadvantage, in coverage too
    recognised    the share classified as the digit asked for; -: the recipe has no labels
    coverage      the share of test images with a drawn one nearby
Some of these models were meant to train for hours on GPUs. The table shows what you get on a small
machine in a short time, not how good they become in the end.
"""
import contextlib
import csv
import importlib
import io
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from cfm import ConditionalFlowMatcher, VelocityField
from classifiers import to_float
from configurator import configure, explained, fail
from core.machine import choose_machine
from ddpm import DenoiseDiffusion
from quality import covered_share, load_digits, load_judge, look, score
from sample import draw

# -----------------------------------------------------------------------------
peers = "torchcfm,labml,diffusers,ddpm-pytorch,cfm,ddpm"     # which, in this order
minutes = 10.0               # of training, each
sampling_minutes = 3.0       # after which a peer draws no further batch
n_samples = 2000             # pictures to draw
seed = 1337
data_dir = "data"            # holds MNIST
out_dir = "out/peers"
device = "cpu"               # on a GPU, cfm and ddpm compile and use bfloat16; the recipes do not
# -----------------------------------------------------------------------------
LIMITS = {
    "minutes": (0.01, math.inf),
    "sampling_minutes": (0.01, math.inf),
    "n_samples": (2, math.inf),
    "seed": (0, 2**63 - 1),
}
STEPS = 20                   # evaluations of a peer's model per picture
MARGIN = [2, 2, 2, 2]        # black pixels around a digit, for 32 x 32 recipes; cropped off again

# A recipe is (model, batch size, step(x, y), draw_peer(y), whether it uses labels). step takes
# pictures (B, 1, 28, 28) in [-1, 1] and returns its loss; draw_peer draws one for each label in y.


def stepper(optimizer, loss_of):
    """step(x, y) of a recipe: one step of the optimizer on the loss."""
    def step(x, y):
        loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torchcfm():
    """
    github.com/atong01/conditional-flow-matching, examples/images/conditional_mnist.ipynb; ten
    epochs there. Changed: drawn with DPM-Solver++, not dopri5, which takes more evaluations.
    """
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher as TheirMatcher
    from torchcfm.models.unet import UNetModel

    model = UNetModel(dim=(1, 28, 28), num_channels=32, num_res_blocks=1, num_classes=10,
                      class_cond=True)
    optimizer = torch.optim.Adam(model.to(device).parameters())
    matcher = TheirMatcher(sigma=0.0)

    def loss_of(x, y):
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (model(t, xt, y) - ut).square().mean()

    def draw_peer(y):
        ours = VelocityField(model, ConditionalFlowMatcher())            # with the same path
        noise = torch.randn(len(y), 1, 28, 28, device=device)
        return draw(ours, noise, y, "dpm++", STEPS)

    return model, 128, stepper(optimizer, loss_of), draw_peer, True


def labml():
    """
    github.com/labmlai/annotated_deep_learning_paper_implementations, with the settings for MNIST in
    labml_nn/diffusion/ddpm/experiment.py: five epochs, pictures in [0, 1], no labels. Changed:
    digits get a margin and are not enlarged; drawn with DPM-Solver++, not in 1000 steps, without
    dropout, which theirs leaves on.
    """
    from labml_nn.diffusion.ddpm import DenoiseDiffusion as Diffusion
    from labml_nn.diffusion.ddpm.unet import UNet

    model = UNet(image_channels=1, n_channels=64, ch_mults=[1, 2, 2, 4],
                 is_attn=[False, False, False, True])
    diffusion = Diffusion(model.to(device), n_steps=1000, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)

    def loss_of(x, y):
        return diffusion.loss(F.pad(x / 2 + 0.5, MARGIN))

    def draw_peer(y):
        ours = DenoiseDiffusion(lambda t, x, y: model(x, t), 1000, device)
        x = draw(ours, torch.randn(len(y), 1, 32, 32, device=device), None, "dpm++", STEPS)
        return 2 * x[..., 2:-2, 2:-2] - 1

    return model, 64, stepper(optimizer, loss_of), draw_peer, False


def diffusers():
    """
    github.com/huggingface/diffusion-models-class, class_conditioned_diffusion_model_example of unit
    2; ten epochs there, the label as four more channels, t from 0 to 998. Changed: drawn by
    DPM-Solver++, not in 1000 steps, and from t = 979 down, since above that x_t holds too little of
    the picture to recover it from eps.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    embedding = nn.Embedding(10, 4)
    unet = UNet2DModel(sample_size=28, in_channels=5, out_channels=1, layers_per_block=2,
                       block_out_channels=(32, 64, 64),
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    model = nn.ModuleList([embedding, unet]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def eps_model(t, x, y):
        label = embedding(y)[..., None, None].expand(-1, -1, 28, 28)
        return unet(torch.cat([x, label], 1), t).sample

    def loss_of(x, y):
        eps, t = torch.randn_like(x), torch.randint(999, (len(x),), device=device)
        return F.mse_loss(eps_model(t, schedule.add_noise(x, eps, t), y), eps)

    def draw_peer(y):
        ours = DenoiseDiffusion(eps_model, 1000, device, schedule="cosine")
        ours.n_steps, ours.tau, ours.taus = 980, ours.tau[:980], ours.taus[:980]
        return draw(ours, torch.randn(len(y), 1, 28, 28, device=device), y, "dpm++", STEPS)

    return model, 128, stepper(optimizer, loss_of), draw_peer, True


def ddpm_pytorch():
    """
    github.com/lucidrains/denoising-diffusion-pytorch, its README and the defaults of its Trainer;
    700,000 steps there, of two batches of 32. Changed: one channel, 32 x 32, no mirroring; full
    precision and no flash attention, for a CPU; drawn by its own DDIM in 20 steps, not 250.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    unet = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1)
    model = GaussianDiffusion(unet, image_size=32, timesteps=1000, sampling_timesteps=STEPS)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)

    def step(x, y):
        total = 0
        optimizer.zero_grad()
        for half in F.pad(x / 2 + 0.5, MARGIN).split(32):
            loss = model(half) / 2
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update()
        return total

    def draw_peer(y):
        with contextlib.redirect_stderr(io.StringIO()):              # where its progress bars go
            return 2 * ema.eval().sample(batch_size=len(y))[..., 2:-2, 2:-2] - 1

    return model, 64, step, draw_peer, False


# the recipe, what it imports, and what to install if that is missing
RECIPES = {
    "torchcfm": (torchcfm, "torchcfm.models.unet",
                 "-r bench/requirements.txt && pip install --no-deps torchcfm"),
    "labml": (labml, "labml_nn.diffusion.ddpm.unet", "--no-deps labml-nn"),
    "diffusers": (diffusers, "diffusers.models.unets.unet_2d", "diffusers"),
    "ddpm-pytorch": (ddpm_pytorch, "denoising_diffusion_pytorch",
                     "-r bench/requirements.txt && "
                     "pip install --no-deps denoising-diffusion-pytorch"),
}


def run_peer(name, x, y):
    """Train by the recipe, draw and save: (parameters, minutes, iterations, evaluations)."""
    torch.manual_seed(seed)
    recipe, _, _ = RECIPES[name]
    model, batch_size, step, draw_peer, labelled = recipe()
    model.train()
    losses, start = [], time.time()
    while time.time() - start < 60 * minutes:
        i = torch.randint(len(x), (batch_size,), device=device)
        losses.append(step(to_float(x[i]), y[i]))
    spent = time.time() - start
    print(f"{name}: loss from {losses[0]:.4f} to {np.mean(losses[-20:]):.4f}, drawing", flush=True)

    model.eval()
    labels = torch.arange(n_samples, device=device) % 10
    pictures, start = [], time.time()
    for part in labels.split(20):
        with torch.no_grad():
            drawn = (draw_peer(part) * 127.5 + 127.5).round().clip(0, 255).byte()
        pictures.append(drawn.permute(0, 2, 3, 1).cpu().numpy())
        if time.time() - start > 60 * sampling_minutes:
            break
    pictures = np.concatenate(pictures)
    labels = [labels[:len(pictures)].cpu().numpy()] if labelled else []
    np.savez(Path(out_dir, f"{name}.npz"), pictures, *labels)        # named arr_0, arr_1 by numpy
    return sum(p.numel() for p in model.parameters()), spent / 60, len(losses), STEPS


def run_script(file, *options):
    """(seconds since it printed where its files go, all its output) of a script, on this device."""
    start, said = time.time(), ""
    command = [sys.executable, ROOT / file, *options, f"--device={device}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            said += line
            if "ckpt.pt go to" in line:
                start = time.time()
    if process.returncode:
        fail(f"{file} ended with exit code {process.returncode}")
    return time.time() - start, said


def run_ours(name):
    """The same for cfm.py or ddpm.py, drawn by sample.py, with the default options."""
    def train(max_iters, folder):
        return run_script(f"{name}.py", f"--max_iters={max_iters}", f"--seed={seed}",
                          f"--out_dir={folder}", f"--data_dir={data_dir}", "--overwrite")

    # a short trial shows how many iterations there is time for
    default = importlib.import_module(name)
    trial, folder, file = [Path(out_dir, name + ending) for ending in ("-trial", "", ".npz")]
    spent, _ = train(3 * default.log_interval, trial)
    with open(trial / "log.csv") as f:
        steps = [default.batch_size / float(row["pictures_per_s"]) for row in csv.DictReader(f)]
    evaluation = max(0, spent - default.log_interval * sum(steps))   # at eval_interval and the end
    step = sum(steps[1:]) / len(steps[1:]) + evaluation / default.eval_interval
    iterations = max(1, round((60 * minutes - evaluation) / step))
    print(f"{name}: {iterations} iterations should take {minutes:g} minutes", flush=True)

    spent, said = train(iterations, folder)
    parameters = int(re.search(r"([\d,]+) parameters", said)[1].replace(",", ""))
    _, said = run_script("sample.py", f"--out_dir={folder}", f"--n_samples={n_samples}",
                         f"--save={file}")
    evaluations = int(re.search(r"(\d+) evaluations of the model: ", said)[1])
    return parameters, spent / 60, iterations, evaluations


if __name__ == "__main__":
    configure(globals(), LIMITS)
    for name in peers.split(","):
        if name not in [*RECIPES, "cfm", "ddpm"]:
            known = ",".join([*RECIPES, "cfm", "ddpm"])
            fail(f"--peers: there is no {name!r}, choose from {known}")
        if name in RECIPES:
            _, module, packages = RECIPES[name]
            try:
                importlib.import_module(module)
            except ImportError as e:
                fail(f"{name} is missing ({e}): leave it out of --peers, or pip install {packages}")
    device, *_ = choose_machine(device)
    with explained():
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        judge, references = load_judge(device=device)
        (x_train, y_train), (x_test, _) = load_digits(data_dir, device)
    real, _ = look(judge, x_test)

    def columns(x, y):
        """The last four columns, for pictures uint8 (N, 1, 28, 28) and labels or None."""
        _, times, recognised, _ = score(judge, references["test"], x, y)
        recognised = "-" if math.isnan(recognised) else f"{recognised:.1%}"
        covered = covered_share(real, look(judge, x)[0])
        return f"{len(x)} | {times:.2f} | {recognised} | {covered:.1%}"

    table = [
        "| | parameters | minutes | iterations | s/step | evaluations | pictures | x floor "
        "| recognised | coverage |",
        "|---" + 9 * "|---:" + "|",
        f"| training images | | | | | | {columns(x_train[:n_samples], y_train[:n_samples])} |",
    ]
    for name in peers.split(","):
        run = run_peer(name, x_train, y_train) if name in RECIPES else run_ours(name)
        parameters, took, iterations, evaluations = run
        arrays = np.load(Path(out_dir, f"{name}.npz"))
        x = torch.tensor(arrays["arr_0"], device=device).permute(0, 3, 1, 2)
        y = torch.tensor(arrays["arr_1"], device=device) if "arr_1" in arrays else None
        table.append(f"| {name} | {parameters:,} | {took:.1f} | {iterations} "
                     f"| {60 * took / iterations:.3g} | {evaluations} | {columns(x, y)} |")
        print(table[-1], flush=True)
    print("\n" + "\n".join(table))
