"""
MNIST in a single evaluation of the model: mean velocities, by MeanFlow (Geng et al. 2025, arXiv 2505.13447).
    python cfm.py config/one_step.py
    python sample.py --out_dir=out/one-step             # in one step; --steps=2 is better
"""
out_dir = "out/one-step"
spans = 0.35             # of the shares tried, a half was best for one step, a quarter for two and four
sampler = "meanflow"
sample_steps = 1
max_iters = 16_000
eval_interval = 4000
label_dropout = 0.0      # as there is no guidance
