"""
DDPM as in the paper, scaled to MNIST: five epochs of noise prediction, plain Adam.
    python ddpm.py config/textbook_ddpm.py
"""
out_dir = "out/textbook-ddpm"
prediction = "eps"
schedule = "linear"
t_uniform = 1.0          # Algorithm 1: all t equally likely
sampler = "textbook"     # Algorithm 2: all 1000 steps
muon = False
adam_beta2 = 0.999
learning_rate = 2e-3     # the paper's 2e-4 is for a model a hundred times as large
warmup_iters = 0
decay_lr = False
weight_decay = 0.0       # AdamW without it is Adam
grad_clip = 0.0
label_dropout = 0.0
batch_size = 64
max_iters = 4690         # epochs 3, 4 and 5 end at 2814, 3752 and 4690
