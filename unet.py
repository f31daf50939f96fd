"""
A small UNet for diffusion models: model(t, x, y) -> a picture shaped like x.

Shapes, once and for all:  B pictures, C channels of H x W pixels.
    t  (B,)          float, the time: from 0 to 1
    x  (B, C, H, W)  float, any H and W
    y  (B,)          long: a class in [0, num_classes), or -1 for "no label"

The body is that of Ho et al. 2020 (arXiv 2006.11239, appendix B), parameter for parameter: residual blocks at
a few resolutions on the way down and again on the way up, where each is given what its counterpart on the way
down made. Two changes make it cheap: pixels may be folded into channels first (patch), and a convolution
comes before an upsampling, not after it. Below it is the optimizer that its kernels like.
"""
import math
from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adamw import adamw
from torch.utils.flop_counter import FlopCounterMode


def norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)


def zero(layer):
    """Zero the layer's parameters: what it is added to passes unchanged when training starts."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, dim, max_period=10_000):
    """
    Cosines and sines of 1000 t at frequencies from 1 down to 1 / max_period: (B,) -> (B, dim), dim even.
    Without the factor all times in [0, 1] would look alike: the frequencies were chosen for t = 1 ... 1000.
    """
    frequency = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * t[:, None] * frequency                                         # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    """(B, c_in, h, w), embedding (B, emb) -> (B, c_out, h, w)"""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shift = nn.Linear(emb, c_out)
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(emb)[:, :, None, None]    # time and class act here
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention among the h * w positions: (B, c, h, w) -> (B, c, h, w)"""

    def __init__(self, c, head_dim=64):
        super().__init__()
        self.heads = max(1, c // head_dim)
        if c % self.heads:
            raise ValueError(f"attention over {c} channels: they do not divide into {self.heads} heads")
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                               # (B, heads, h * w, c / heads)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(a.transpose(-1, -2).reshape(B, c, h, w))


class UNet(nn.Module):
    """
    in_channels       C
    channels          width of the first level, even; level i has channels * channel_mults[i]
    channel_mults     one entry a level; level i works at H / patch / 2^i by W / patch / 2^i
    n_res_blocks      residual blocks a level on the way down; on the way up it is one more
    attention_levels  levels whose blocks are each followed by attention, from 0; the middle is one more
    dropout           in [0, 1), inside the residual blocks
    patch             patch x patch pixels are folded into channels: 1 for none, 2 works at half resolution
    num_classes       0 for a model without labels
    Raises ValueError where channels is odd or attention_levels names a level that is not there.
    """

    def __init__(self, in_channels=1, channels=24, channel_mults=(1, 2), n_res_blocks=1,
                 attention_levels=(2,), dropout=0.0, patch=2, num_classes=0):
        super().__init__()
        widths = [channels * m for m in channel_mults]
        emb = 4 * channels
        self.channels, self.patch = channels, patch
        self.multiple = patch * 2 ** (len(widths) - 1)           # H and W are padded to a multiple of this
        if channels % 2:
            raise ValueError("channels must be even, as the time embedding uses cosine/sine pairs, "
                             f"but is {channels}")
        if not set(attention_levels) <= set(range(len(widths) + 1)):
            raise ValueError(f"attention_levels {attention_levels}: "
                             f"levels go from 0 to {len(widths)}, the middle")

        def block(c_in, c_out, attends):
            return nn.ModuleList([ResBlock(c_in, c_out, emb, dropout),
                                  Attention(c_out) if attends else nn.Identity()])

        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes + 1, emb) if num_classes else None            # row 0: no label
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        c, skips = channels, [channels]                         # the width so far; those the way up is handed
        for i, width in enumerate(widths):
            self.down.append(nn.ModuleList())
            for _ in range(n_res_blocks):
                self.down[i].append(block(c, width, i in attention_levels))
                skips.append(c := width)
            if i + 1 < len(widths):
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, len(widths) in attention_levels), block(c, c, False)])
        for i, width in reversed(list(enumerate(widths))):
            self.up.append(nn.ModuleList())
            for _ in range(n_res_blocks + 1):
                self.up[-1].append(block(c + skips.pop(), width, i in attention_levels))
                c = width
            if i > 0:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))

        self.norm_out = norm(c)
        self.conv_out = zero(nn.Conv2d(c, in_channels * patch**2, 3, padding=1))      # starts by predicting 0

    def forward(self, t, x, y=None):
        H, W = x.shape[-2:]
        emb = self.time(time_embedding(t, self.channels))                                   # (B, emb)
        if self.label is not None:
            emb = emb + self.label((y if y is not None else torch.full_like(t, -1, dtype=torch.long)) + 1)
        emb = F.silu(emb)

        h = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        h = self.conv_in(F.pixel_unshuffle(h, self.patch))                                  # (B, c, h, w)
        skips = [h]
        for i, blocks in enumerate(self.down):
            for block, attention in blocks:
                skips.append(h := attention(block(h, emb)))
            if i < len(self.shrink):
                skips.append(h := self.shrink[i](h))                                    # (B, c, h / 2, w / 2)
        for block, attention in self.middle:
            h = attention(block(h, emb))
        for i, blocks in enumerate(self.up):
            for block, attention in blocks:
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))               # (B, c', h, w)
            if i < len(self.grow):
                h = F.interpolate(self.grow[i](h), scale_factor=2)                          # (B, c', 2h, 2w)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)[:, :, :H, :W]

    @torch.no_grad()
    def flops(self, x):
        """Floating-point operations of a forward pass, two for each multiplication and addition."""
        with FlopCounterMode(display=False) as counter:
            self(t=torch.zeros(len(x), device=x.device), x=x)
        return counter.get_total_flops()


def orthogonal(g, steps=5):
    """
    About the nearest matrices to g (n, a, b) with all singular values 1, by a Newton-Schulz iteration. Its
    coefficients, Jordan's, bring small singular values up fast, and all of them to between 0.7 and 1.2.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """
    Steps of the same length in all directions: of the momentum of a convolution's kernel, seen as a matrix
    (c_out, the rest), only the singular vectors count (Jordan et al. 2024, "Muon"). They are scaled to the
    size of AdamW's usual steps (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning rate serves
    both: all that is no kernel goes by AdamW. torch.optim.Muon takes one matrix at a time; those of one shape
    together take a quarter of that on a CPU.
    """

    def __init__(self, params, lr=4e-3, betas=(0.9, 0.99), momentum=0.95, weight_decay=0.01):
        alike = defaultdict(list)
        for p in params:
            alike[p.shape if p.dim() == 4 else "no kernel"].append(p)
        super().__init__([{"params": group} for group in alike.values()],
                         {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay,
                          "fused": True})              # or load_state_dict() would leave the steps on the CPU

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                    if p.dim() != 4:
                        self.state[p].update(square=torch.zeros_like(p), step=torch.zeros((), device=p.device))
            grads, lr, weight_decay = [p.grad for p in params], group["lr"], group["weight_decay"]
            mean = [self.state[p]["mean"] for p in params]
            if params and params[0].dim() == 4:
                torch._foreach_lerp_(mean, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, mean, group["momentum"])             # Nesterov's
                direction = orthogonal(torch.stack([g.flatten(1) for g in ahead]))      # (n, c_out, c_in * 9)
                size = 0.2 * math.sqrt(max(direction.shape[1:]))
                torch._foreach_mul_(params, 1 - lr * weight_decay)
                torch._foreach_add_(params, direction.reshape(-1, *params[0].shape).unbind(), alpha=-lr * size)
            elif params:
                square, steps = ([self.state[p][name] for p in params] for name in ("square", "step"))
                beta1, beta2 = group["betas"]
                adamw(params, grads, mean, square, [], steps, fused=True, amsgrad=False, maximize=False,
                      lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=1e-8)
