"""examples/own_network.py: a network of diffusers, a DataLoader, and cfm.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_diffusers_learns_two_pictures_and_draws_the_one_asked_for(dtype):
    """Class 0 is black, class 1 white."""
    pytest.importorskip("diffusers", reason="bench/requirements.txt is not installed")
    from own_network import DiffusersUNet, learn

    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = (2.0 * y - 1)[:, None, None, None].expand(64, 1, 8, 8)
    model = DiffusersUNet(in_channels=1, out_channels=1, num_class_embeds=3, layers_per_block=1,
                          block_out_channels=(8, 8), norm_num_groups=4,
                          down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
    batches = DataLoader(TensorDataset(x.repeat(40, 1, 1, 1), y.repeat(40)), 32, shuffle=True)
    field = learn(model, batches, dtype=dtype)
    drawn = field.sample(torch.randn(8, 1, 8, 8), torch.arange(8) % 2, steps=20)
    means = drawn.mean((1, 2, 3))
    assert drawn.dtype == torch.float32
    assert means[::2].max() < -0.5 and means[1::2].min() > 0.5


def test_labels_and_times_reach_the_network_in_its_own_terms():
    """Times 0 to 1000, and classes from 1, as 0 is no label."""
    pytest.importorskip("diffusers", reason="bench/requirements.txt is not installed")
    from diffusers import UNet2DModel
    from own_network import DiffusersUNet

    small = dict(in_channels=1, out_channels=1, num_class_embeds=3, layers_per_block=1,
                 block_out_channels=(8,), norm_num_groups=4, down_block_types=["DownBlock2D"],
                 up_block_types=["UpBlock2D"])
    torch.manual_seed(0)
    ours, theirs = DiffusersUNet(**small).eval(), UNet2DModel(**small).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.25, 1.0])
    expected = theirs(x, torch.tensor([250.0, 1000.0]), torch.tensor([0, 2])).sample
    assert torch.equal(ours(t=t, x=x, y=torch.tensor([-1, 1])), expected)
