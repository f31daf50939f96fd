"""
A network from another library, a DataLoader, and one file of this repository, cfm.py.

    pip install diffusers && python examples/own_network.py          # an epoch, out/own_network.png

Any network called as model(t=, x=, y=) will do, with t (B,) in [0, 1] and y (B,), -1 for none.
"""
import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from cfm import ConditionalFlowMatcher, VelocityField


class DiffusersUNet(UNet2DModel):
    def forward(self, t, x, y):
        return super().forward(x, 1000 * t, class_labels=y + 1).sample       # class 0: no label


def learn(model, loader, device="cpu", dtype=torch.float32):
    """The flow, a VelocityField, learned in an epoch of batches: x (B, C, H, W) and y (B,)."""
    field = VelocityField(model.to(device), ConditionalFlowMatcher())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in loader:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = field.loss(x.to(device), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return field


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="where MNIST is, or is put")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    digits = datasets.MNIST(args.data_dir, download=True, transform=scale)
    model = DiffusersUNet(in_channels=1, out_channels=1, num_class_embeds=11, layers_per_block=1,
                          block_out_channels=(8, 32, 64), norm_num_groups=8,
                          down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
                          up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"])
    loader = DataLoader(digits, batch_size=64, shuffle=True, num_workers=1)
    field = learn(model, loader, args.device, getattr(torch, args.dtype))
    noise, y = torch.randn(100, 1, 28, 28), torch.arange(100) % 10
    x = field.sample(noise.to(args.device), y.to(args.device), steps=20)
    Path("out").mkdir(exist_ok=True)
    save_image(x / 2 + 0.5, "out/own_network.png", nrow=10)
