"""
A small UNet for diffusion models: model(t, x, y) -> a tensor like x.

Shapes, used throughout:  B pictures, C channels of H x W pixels.
    t  (B,)          float, the time: from 0 to 1; or a span of time, (B, 2)
    x  (B, C, H, W)  float, any H and W
    y  (B,)          long: a class in [0, num_classes), or -1 for no label

It is the UNet of Ho et al. 2020 (arXiv 2006.11239, appendix B): residual blocks at several
resolutions, down and up again. Each block on the way up also gets the output of its counterpart.
At their size it has as many parameters as theirs, but norms have 8 groups, and attention heads 64
channels. Two changes make it cheap: pixels may be folded into channels first (patch), and
convolutions come before upsampling, not after it. Muon, the optimizer, is at the end.
"""
import math
from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adamw import adamw


class Norm(nn.GroupNorm):
    """Group normalisation, in at most 8 groups."""

    def __init__(self, channels):
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, x):
        # not F.group_norm(), which rejects groups of one value: pictures may be of any size
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def zero_init(layer):
    """Zero the layer's parameters, so that it adds nothing when training starts."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, dim, highest=1000, max_period=10_000):
    """
    Cosines and sines of t: (B,) -> (B, dim)

    Frequencies fall geometrically from highest towards highest / max_period. dim is even. The usual
    ones are meant for t = 1 ... 1000: without the factor of highest, all t in [0, 1] would look
    alike.
    """
    i = torch.arange(dim // 2, device=t.device)
    frequency = torch.exp(-math.log(max_period) * i / (dim // 2))
    angle = highest * t[:, None] * frequency                    # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    """(B, c_in, h, w) and an embedding (B, emb) -> (B, c_out, h, w)"""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shift = nn.Linear(emb, c_out)
        self.norm2 = Norm(c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(emb)[:, :, None, None]               # time and class enter here
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention among the h * w positions: (B, c, h, w) -> (B, c, h, w)"""

    def __init__(self, c, head_dim=64):
        super().__init__()
        self.heads = max(1, c // head_dim)
        if c % self.heads:
            raise ValueError(f"attention over {c} channels: "
                             f"they do not divide into {self.heads} heads")
        self.norm = Norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero_init(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)               # (B, heads, h * w, c / heads)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(a.transpose(-1, -2).reshape(B, c, h, w))


class Block(nn.ModuleList):
    """A residual block, then attention if attends: (B, c_in, h, w) -> (B, c_out, h, w)"""

    def __init__(self, c_in, c_out, emb, dropout, attends):
        super().__init__([
            ResBlock(c_in, c_out, emb, dropout),
            Attention(c_out) if attends else nn.Identity(),
        ])

    def forward(self, x, emb):
        residual, attention = self
        return attention(residual(x, emb))


class UNet(nn.Module):
    """
    in_channels       C
    channels          base width, even; level i has channels * channel_mults[i]
    channel_mults     one entry per level; level i works at H / patch / 2^i by W / patch / 2^i
    n_res_blocks      blocks per level on the way down; one more on the way up
    attention_levels  levels with attention, from 0; the number after the last is the middle
    dropout           in [0, 1], inside the residual blocks
    patch             patch x patch pixels are folded into channels: 2 works at half resolution
    num_classes       0 for a model without labels
    spans             whether t may be a span of time, from t[:, 0] to t[:, 1]; then the time
                      embedding is smooth enough to differentiate

    Raises ValueError if channels is odd or attention_levels names a level that does not exist.
    """

    def __init__(self, in_channels=1, channels=24, channel_mults=(1, 2), n_res_blocks=1,
                 attention_levels=(2,), dropout=0.0, patch=2, num_classes=0, spans=False):
        super().__init__()
        levels = len(channel_mults)
        if channels % 2:
            raise ValueError("channels must be even, for the time embedding's pairs, "
                             f"but is {channels}")
        if not set(attention_levels) <= set(range(levels + 1)):
            raise ValueError(f"attention_levels {attention_levels}: "
                             f"levels go from 0 to {levels}, the middle")
        self.channels = channels
        self.patch = patch
        self.multiple = patch * 2 ** (levels - 1)               # H and W are padded to multiples
        widths = [channels * m for m in channel_mults]
        emb = 4 * channels

        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.span = None
        if spans:
            last = zero_init(nn.Linear(emb, emb))
            self.span = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), last)
        self.label = nn.Embedding(1 + num_classes, emb) if num_classes else None    # 0: no label
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)

        c = channels                                            # the width so far
        skips = [c]                                             # widths of the skip connections
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(nn.ModuleList())
            for _ in range(n_res_blocks):
                self.down[i].append(Block(c, width, emb, dropout, i in attention_levels))
                c = width
                skips.append(c)
            if i < levels - 1:
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)

        self.middle = nn.ModuleList([
            Block(c, c, emb, dropout, levels in attention_levels),
            Block(c, c, emb, dropout, False),
        ])

        for i, width in reversed(list(enumerate(widths))):
            self.up.append(nn.ModuleList())
            for _ in range(n_res_blocks + 1):
                c += skips.pop()
                self.up[-1].append(Block(c, width, emb, dropout, i in attention_levels))
                c = width
            if i > 0:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))

        self.norm_out = Norm(c)
        self.conv_out = zero_init(nn.Conv2d(c, in_channels * patch**2, 3, padding=1))

    def forward(self, t, x, y=None):
        H, W = x.shape[-2:]
        dtype = self.conv_in.weight.dtype
        if self.span is None:
            emb = self.time(time_embedding(t, self.channels).to(dtype))             # (B, emb)
        else:
            t, s = t.unbind(1) if t.dim() == 2 else (t, t)
            # the loss needs d/dt of this model: with frequencies up to 1000 it would explode
            of_t, of_span = [time_embedding(v, self.channels, highest=30, max_period=300).to(dtype)
                             for v in (t, s - t)]
            emb = self.time(of_t) + self.span(of_span)
        if self.label is not None:
            if y is None:
                y = torch.full_like(t, -1, dtype=torch.long)
            emb = emb + self.label(y + 1)
        emb = F.silu(emb)

        h = F.pad(x.to(dtype), (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        h = self.conv_in(F.pixel_unshuffle(h, self.patch))      # (B, c, h, w)
        skips = [h]
        for i, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)                           # (B, c, h / 2, w / 2)
                skips.append(h)

        for block in self.middle:
            h = block(h, emb)

        for i, blocks in enumerate(self.up):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.grow):
                h = self.grow[i](h)
                h = F.interpolate(h, scale_factor=2)            # (B, c, 2h, 2w)

        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)[:, :, :H, :W]


# -----------------------------------------------------------------------------

def newton_schulz(g, steps=5):
    """
    Approximately the nearest matrices to g (n, rows, columns) with all singular values 1.

    Jordan's coefficients raise small singular values fast, and bring all between 0.7 and 1.2.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)   # -4.775 a + 2.0315 a^2
        x = torch.baddbmm(x, b, x, beta=3.4445)                 # 3.4445 x + b x
    return x if g.shape[1] <= g.shape[2] else x.mT


def orthogonalize(kernels):
    """newton_schulz() of kernels [(c_out, c_in, h, w)], each as a matrix (c_out, the rest)."""
    shapes = defaultdict(list)
    for i, kernel in enumerate(kernels):
        shapes[kernel.shape].append(i)
    directions = list(kernels)
    for shape, same in shapes.items():
        batch = newton_schulz(torch.stack([kernels[i].flatten(1) for i in same]))
        for i, direction in zip(same, batch):
            directions[i] = direction.reshape(shape)
    return directions


def orthogonalize_at_once(kernels):
    """
    The same in one zero-padded batch; the padding stays zero.

    For GPUs, where launching many small operations takes longer than their arithmetic.
    """
    last = [kernel.permute(0, 2, 3, 1) for kernel in kernels]   # as stored: channels last
    flat = torch.cat([kernel.flatten() for kernel in last])
    place, shape = padded_layout(tuple((len(k), k[0].numel()) for k in last), flat.device)
    padded = flat.new_zeros(math.prod(shape))
    padded[place] = flat
    flat = newton_schulz(padded.view(shape)).flatten()[place]
    directions = flat.split([kernel.numel() for kernel in last])
    return [d.view(k.shape).permute(0, 3, 1, 2) for d, k in zip(directions, last)]


@lru_cache(maxsize=4)
def padded_layout(shapes, device):
    """
    Flat indices of the entries of matrices of these shapes in one padded batch, and its shape.

    The batch is (n, rows, columns), large enough for each; tall matrices are transposed.
    """
    rows = max(min(shape) for shape in shapes)
    columns = max(max(shape) for shape in shapes)
    batch = torch.arange(len(shapes) * rows * columns, device=device)
    batch = batch.view(len(shapes), rows, columns)
    parts = [page[:r, :c] if r <= c else page[:c, :r].T for page, (r, c) in zip(batch, shapes)]
    return torch.cat([part.flatten() for part in parts]), batch.shape


class Muon(torch.optim.Optimizer):
    """
    Steps of the same length in all directions: Jordan et al. 2024, "Muon".

    The momentum of a convolution kernel is taken as a matrix (c_out, the rest). Its singular values
    become about 1. Steps are scaled to AdamW's usual size (Liu et al. 2025, arXiv 2502.16982,
    eq. 4), so one learning rate serves both. All other parameters use AdamW. torch.optim.Muon takes
    one matrix at a time; batching those of one shape takes a quarter of the time on a CPU.
    """

    def __init__(self, params, lr=4e-3, betas=(0.9, 0.99), momentum=0.95, weight_decay=0.01):
        defaults = dict(lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay)
        defaults["fused"] = True        # makes load_state_dict() move "step" to the device, too
        super().__init__(params, defaults)

    def add_param_group(self, group):
        """Put convolution kernels in a group of their own. __init__() calls this, too."""
        def is_kernel(p):
            return (p[1] if isinstance(p, tuple) else p).dim() == 4     # p may be a (name, p) pair

        params = group["params"]
        params = [params] if torch.is_tensor(params) else list(params)
        for kernels in (True, False):
            same = [p for p in params if is_kernel(p) == kernels]
            if same:
                super().add_param_group(group | {"params": same})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
            if params and params[0].dim() == 4:
                self.muon(params, group)
            elif params:
                self.adamw(params, group)
        return loss

    def muon(self, params, group):
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)     # Nesterov momentum
        directions = (orthogonalize_at_once if params[0].is_cuda else orthogonalize)(ahead)
        sizes = [0.2 * math.sqrt(max(len(p), p[0].numel())) for p in params]
        torch._foreach_mul_(directions, sizes)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-lr)

    def adamw(self, params, group):
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["square"] = torch.zeros_like(p)
                self.state[p]["step"] = torch.zeros((), device=p.device)
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        squares = [self.state[p]["square"] for p in params]
        steps = [self.state[p]["step"] for p in params]
        beta1, beta2 = group["betas"]
        adamw(params, grads, means, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
              weight_decay=group["weight_decay"], eps=1e-8,
              fused=True, amsgrad=False, maximize=False)
