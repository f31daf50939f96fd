"""
MNIST in a single evaluation of the model. It learns from pairs that a trained flow draws: the mean velocity over the whole of it.
    python cfm.py
    python sample.py --out_dir=out/cfm --n_samples=100000 --steps=6 --keep_noise --save=out/pairs.npz
    python cfm.py config/one_step.py
    python sample.py --out_dir=out/one-step             # in one step; with --steps=2 it is better
"""
dataset = "out/pairs.npz"
out_dir = "out/one-step"
spans = 0.75             # half of a batch spans the whole flow, a quarter a part of it, a quarter is at a time
sampler = "meanflow"
sample_steps = 1
max_iters = 8500         # 12 minutes on two CPU cores, after 11 for the flow and 2 for the pairs
eval_interval = 1700
label_dropout = 0.0      # as there is no guidance
