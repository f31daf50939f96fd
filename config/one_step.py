"""
MNIST in a single evaluation of the model. It learns from pairs of noise and digit that a trained flow draws.
    python cfm.py                                       # not needed with --out_dir=assets/cfm, then --init_from=assets/cfm
    python sample.py --out_dir=out/cfm --n_samples=200000 --seed=1 --steps=6 --keep_noise --save=out/pairs.npz
    python cfm.py config/one_step.py
    python sample.py --out_dir=out/one-step             # in one step; with --steps=2 it is better
"""
dataset = "out/pairs.npz"
init_from = "out/cfm"
out_dir = "out/one-step"
spans = 0.75             # half of a batch spans the whole way, a quarter a part of it, a quarter is at single times
sampler = "meanflow"
sample_steps = 1
max_iters = 11_000
eval_interval = 2750
label_dropout = 0.0      # as there is no guidance
