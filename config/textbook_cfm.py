"""
Flow matching as in the papers, scaled to MNIST: five epochs at uniform times, plain Adam.
    python cfm.py config/textbook_cfm.py
"""
out_dir = "out/textbook-cfm"
path = "icfm"
t_mean = 0.0
t_uniform = 1.0          # all t equally likely
sampler = "textbook"     # Euler's method, in equal steps
sample_steps = 100
muon = False
adam_beta2 = 0.999
learning_rate = 2e-3     # torchcfm's 2e-4 is for a model a hundred times as large
warmup_iters = 0
decay_lr = False
weight_decay = 0.0       # AdamW without it is Adam
grad_clip = 0.0
label_dropout = 0.0
batch_size = 64
max_iters = 4690         # epochs 3, 4 and 5 end at 2814, 3752 and 4690
