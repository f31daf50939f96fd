"""
The two classifiers that judge digits in quality.py, and their training.

The first also learns from drawn digits, with --teach. Both take pictures (B, 1, 28, 28) in [-1, 1]
and give logits (B, 10) of the ten classes. features() is the layer before.
"""
import torch
import torch.nn.functional as F
from torch import nn


def conv(a, b, stride, size=3):
    return [nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b)]


class Plain(nn.Module):
    """
    Logits (B, 10) of the ten classes, for pictures (B, 1, 28, 28) in [-1, 1].

    features() is the layer before, (B, 128).
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *conv(1, 32, 1), nn.ReLU(),
            *conv(32, 64, 2), nn.ReLU(),
            nn.MaxPool2d(2),
            *conv(64, 128, 1), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 9, 128),
            nn.ReLU(),
        )
        self.classes = nn.Linear(128, 10)

    def forward(self, x):
        return self.classes(self.features(x))


class Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, a, b, stride):
        super().__init__()
        self.path = nn.Sequential(*conv(a, b, stride), nn.ReLU(), *conv(b, b, 1))
        self.around = nn.Sequential(*conv(a, b, stride, size=1))

    def forward(self, x):
        return F.relu(self.path(x) + self.around(x))


class Residual(Plain):
    """The same from residual blocks and an average over the picture: features() is (B, 96)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *conv(1, 48, 2), nn.ReLU(),
            Block(48, 48, 1),
            Block(48, 96, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classes = nn.Linear(96, 10)


ARCHITECTURES = {"plain": Plain, "residual": Residual}


def to_float(x):
    return x.float() / 127.5 - 1


def jitter(x):
    """Each of the pictures (B, 1, H, W) turned, scaled and shifted a little."""
    turn = 0.2 * (2 * torch.rand(len(x)) - 1)
    scale = 1 + 0.15 * (2 * torch.rand(len(x)) - 1)
    shift = 0.15 * (2 * torch.rand(len(x), 2) - 1)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta.to(x.device), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train(x, y, seed, epochs, architecture="plain", batch_size=256, lr=5e-3, name="the judge"):
    """A classifier trained on digits x uint8 (N, 1, 28, 28) of classes y (N,)."""
    torch.manual_seed(seed)
    network = ARCHITECTURES[architecture]().to(x.device, memory_format=torch.channels_last)
    batch_size = min(batch_size, len(x))
    batches = len(x) // batch_size                # full ones per epoch
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    for epoch in range(epochs):
        for i in torch.randperm(len(x)).to(x.device).split(batch_size)[:batches]:
            loss = F.cross_entropy(network(jitter(to_float(x[i]))), y[i], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"training {name}: epoch {epoch + 1} of {epochs}, loss {loss.item():.4f}",
              flush=True)
    return network.eval()
