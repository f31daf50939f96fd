"""
CIFAR-10 with the UNet of Ho et al. 2020, 35.7M parameters, plain Adam and a long average, on a GPU:
    python cfm.py config/cifar10.py
    python ddpm.py config/cifar10.py --prediction=eps --schedule=linear --out_dir=out/cifar10-ddpm
The second trains as Ho et al. do. Results have not been measured here.
"""
dataset = "cifar10"
out_dir = "out/cifar10"
conditional = False              # FID is quoted for the unconditional model
flip = True                      # a mirrored horse is a horse
channels = 128
channel_mults = (1, 2, 2, 2)     # at 32, 16, 8 and 4 pixels
n_res_blocks = 2
attention_levels = (1, 4)        # at 16 pixels, and in the middle
patch = 1
dropout = 0.1
batch_size = 128
max_iters = 400_000
muon = False                     # Adam, as in the published runs
adam_beta2 = 0.999
learning_rate = 2e-4
warmup_iters = 5000
decay_lr = False
weight_decay = 0.0
ema_decay = 0.9999
t_uniform = 1.0                  # as in the papers; the default was tuned on MNIST
sampler = "ddim"                 # dpm++, too, was chosen on MNIST, for five evaluations
sample_steps = 50
log_interval = 500
eval_interval = 10_000
