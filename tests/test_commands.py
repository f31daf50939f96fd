"""Wrong command lines get one helpful line and exit code 2, before data is read or folders made."""

import time

import pytest

from helpers import ROOT, lines, run, wrong

# options | part of the message
BOTH = """
--batch_sise=3 | did you mean batch_size?
--lr=3 | unknown option
--batchsize=3 | did you mean batch_size?
--learning-rat=3 | did you mean learning_rate?
--maxiters=3 | did you mean max_iters?
--METHOD=cfm | unknown option
--UNCHANGEABLE=x | unknown option
--LIMITS={} | unknown option
--__name__=x | unknown option
--model=unet | unknown option
--config=x.py | unknown option
--n-samples=3 | unknown option
--task=draw | --task is no longer an option: see examples/likelihood.py or
batch_size=3 | options are written --key=value
-batch_size=3 | options are written --key=value
-v | options are written --key=value
train | cannot read the config file train
config/cifar | cannot read the config file
nowhere.py | cannot read the config file nowhere.py
. | cannot read the config file
binary.py | is not a config file
code.py | is not a config file
misspelt.py | misspelt.py:2: batchsize: unknown option, did you mean batch_size?
wrong.py | wrong.py:1: batch_size: expected int
--eval_interval=0 | not between 1
--eval_interval=-5 | not between 1
--eval_interval=1.5 | expected int
--eval_interval | expected int
--log_interval=0 | not between 1
--log_interval=often | expected int
--init_from=resumed | --init_from=resumed is neither scratch nor resume, nor the folder of a run
--init_from=ckpt.pt | nor the folder of a run
--init_from | expected str
--init_from=resume | there is no valid checkpoint
--init_from=resume --out_dir=nowhere | there is no valid checkpoint nowhere/ckpt.pt
--overwrite=maybe | expected bool
--overwrite=2 | expected bool
--dataset=mnits | not one of mnist
--dataset=nowhere.npz | not one of mnist
--dataset=nowhere/ | not one of mnist
--dataset= | not one of mnist
--dataset | expected str
--image_size=-1 | not between 0
--image_size=28x28 | expected int
--image_size=28,28 | expected int
--flip=sometimes | expected bool
--conditional=no | expected bool
--label_dropout=-0.1 | not between 0 and 1
--label_dropout=1.1 | not between 0 and 1
--label_dropout=10% | expected float
--channels=0 | not between 1
--channels=-8 | not between 1
--channels=7 | channels must be even
--channels=24.5 | expected int
--channel_mults=0 | not between 1
--channel_mults=1,-2 | not between 1
--channel_mults=1,2.5 | expected tuple
--channel_mults=a | expected tuple
--channel_mults= | expected tuple
--channel_mults=() | levels go from 0 to 0, the middle
--n_res_blocks=0 | not between 1
--n_res_blocks=-1 | not between 1
--attention_levels=-1 | not between 0
--attention_levels=3 | levels go from 0 to 2
--attention_levels=16 | levels go from 0 to 2
--attention_levels=all | expected tuple
--channels=194 --channel_mults=1,1 | attention over 194 channels: they do not divide into 3 heads
--dropout=-1 | not between 0 and 1
--dropout=1.5 | not between 0 and 1
--dropout=0,1 | expected float
--patch=0 | not between 1
--patch=-2 | not between 1
--patch=1.5 | expected int
--batch_size=0 | not between 1
--batch_size=-64 | not between 1
--batch_size=64.5 | expected int
--batch_size=1e999 | expected int
--batch_size=nan | expected int
--batch_size=many | expected int
--batch_size=True | expected int
--batch_size=64,64 | expected int
--batch_size=__import__('os').getpid() | expected int
--gradient_accumulation_steps=0 | not between 1
--gradient_accumulation_steps=0.5 | expected int
--max_iters=0 | not between 1
--max_iters=-1 | not between 1
--max_iters=inf | expected int
--muon=adam | expected bool
--learning_rate=-1e-3 | not between 0
--learning_rate=nan | expected float
--learning_rate=inf | expected float
--learning_rate=1e-3x | expected float
--learning_rate=fast | expected float
--learning_rate | expected float
--warmup_iters=-1 | not between 0
--warmup_iters=0.1 | expected int
--decay_lr=cosine | expected bool
--weight_decay=-0.1 | not between 0
--weight_decay=x | expected float
--adam_beta2=-0.1 | not between 0 and 0.999999
--adam_beta2=1 | not between 0 and 0.999999
--adam_beta2=0.9,0.99 | expected float
--adam_beta2=nan | expected float
--adam_beta2=high | expected float
--adam_beta2 | expected float
--adam_beta1=0.9 | unknown option, did you mean adam_beta2?
--grad_clip=-1 | not between 0
--grad_clip=off | expected float
--ema_decay=-0.1 | not between 0 and 1
--ema_decay=1.5 | not between 0 and 1
--ema_decay=off | expected float
--device=gpu | --device=gpu cannot be used here
--device=cuda:99 | --device=cuda:99 cannot be used here
--device= | cannot be used here
--device | expected str
--dtype=float64 | expected auto, float32, bfloat16, float16
--dtype=bf16 | expected auto, float32, bfloat16, float16
--dtype=16 | expected auto, float32
--compile=maybe | expected auto, True, False
--compile=inductor | expected auto, True, False
--seed=-1 | not between 0
--seed=1.5 | expected int
--seed=99999999999999999999 | not between 0
--seed=random | expected int
--sampler=dpm | --sampler=dpm is not one of euler
--sampler=DDIM | is not one of euler
--sampler | expected
--sample_steps=0 | not between 1
--sample_steps=-20 | not between 1
--sample_steps=x | expected int
--guidance=-1 | not between 0
--guidance=strong | expected float
--guidance=2 --conditional=false | without labels there is nothing to be guided by
--guidance=2 --label_dropout=0 | needs the unconditional model: a --label_dropout above 0 in training
--out_dir | expected str
"""
DDPM = """
--sigma=0.1 | unknown option
--path=ot | unknown option
--n_steps=0 | not between 2
--n_steps=1 | not between 2
--n_steps=-1000 | not between 2
--n_steps=1e3.5 | expected int
--schedule=sigmoid | expected linear, cosine, log_snr, not 'sigmoid'
--schedule=0 | expected linear, cosine, log_snr
--prediction=noise | expected eps, x0, v, not 'noise'
--weighting=minsnr | expected simple, min_snr
--variance=learned | expected fixedlarge, fixedsmall
"""
CFM = """
--n_steps=10 | unknown option
--prediction=v | unknown option
--path=straight | expected icfm, ot, target, vp, sb, sb_exact
--path=OT | expected icfm, ot, target, vp, sb, sb_exact
--sigma=-0.1 | not between 0
--sigma=small | expected float
--path=sb | a Schroedinger bridge needs a sigma above 0
--path=sb --sigma=0 | a Schroedinger bridge needs a sigma above 0
--t_uniform=1.5 | not between 0
--t_mean=-6 | not between -5
--t_mean=nan | expected float
--sampler=ancestral | --sampler=ancestral is not one of euler
--path=vp | use --sampler=euler
--path=vp --sampler=ddim | is for straight paths
--path=sb --sigma=1 --sampler=dpm++ | is for straight paths
"""
SAMPLE = """
--n_sample=3 | did you mean n_samples?
--ckpt=x | unknown option
--guidence=2 | did you mean guidance?
out/cfm | cannot read the config file
--out_dir=nowhere | there is no valid checkpoint nowhere/ckpt.pt
--out_dir | expected str
--n_samples=0 | not between
--n_samples=-10 | not between 1
--n_samples=ten | expected int
--n_samples=1.5 | expected int
--n_samples=1000000000000000 | Unable to allocate
--batch_size=-2 | not between 0
--batch_size=-1 | not between 0
--steps=-1 | not between 0
--steps=2.5 | expected int
--steps=many | expected int
--seed=-1 | not between 0
--seed=x | expected int
--eta=-0.5 | not between 0 and 1
--eta=2 | not between 0 and 1
--eta=x | expected float
--eta=0.5 --sampler=dpm++ | goes with --sampler=ddim
--clip=maybe | expected bool
--ema=0.999 | expected bool
--task=likelihood | is no longer an option: see examples/likelihood.py
--task=reconstruct | or examples/latent.py
--exact | is no longer an option: see examples/likelihood.py
--atol=1e-5 | is no longer an option: see examples/likelihood.py
--guidance=-1 | not between 0
--guidance=x | expected float
--guidance_interval=0.2,0.8 | goes with a --guidance
--guidance_interval=0.2,0.8 --guidance=1 | goes with a --guidance
--guidance_interval=0.2,0.8 --guidance=2 --sampler=dopri5 | not with dopri5
--guidance_interval=0.8,0.2 --guidance=2 | must be two times, such as 0.2,0.8
--guidance_interval=0.5 --guidance=2 | must be two times, such as 0.2,0.8
--guidance_interval=0,0.5,1 --guidance=2 | must be two times, such as 0.2,0.8
--guidance_interval=() --guidance=2 | must be two times, such as 0.2,0.8
--guidance_interval=0.2,1.5 --guidance=2 | not between 0 and 1
--guidance_interval=-0.2,0.8 --guidance=2 | not between 0 and 1
--guidance_interval=nan,1 --guidance=2 | expected tuple such as (0.0, 1.0)
--guidance_interval=early --guidance=2 | expected tuple such as (0.0, 1.0)
--guidance_interval | expected tuple such as (0.0, 1.0)
--labels=-1 | there is no class -1, the model has 0 to 9
--labels=10 | the model has 0 to 9
--labels=1,2,99 | the model has 0 to 9
--labels=a | there is no class a, the model has 0 to 9
--labels=1.5 | there is no class 1.5, the model has 0 to 9
--sampler=dpm | --sampler=dpm is not one of euler
--sampler=EULER | is not one of euler
--sampler= | is not one of euler
--sampler=dopri5 --steps=5 | as many as it needs
--device=gpu | cannot be used here
--device=cuda:99 | cannot be used here
--save=x.jpg | must end in .png or .gif or .npz
--save=x.npy | must end in .png or .gif or .npz
--save=x.gif --sampler=dopri5 | a .gif has a frame per evaluation
--save=full.gif | a new or empty folder
--save=full | a new or empty folder
--save | expected str
"""
SAMPLE_DDPM = """
--sampler=ancestral --steps=20 | ancestral sampling takes all 1000 steps
--steps=1001 | the run has only 1000
--save=x.gif --sampler=ancestral | a .gif has a frame per evaluation
--guidance_interval=0.2,0.8 --guidance=2 --sampler=ancestral | or the textbook's sampler
"""
SAMPLE_CFM = """
--sampler=ancestral | is not one of euler
--eta=1 | goes with --sampler=ddim, not with dpm++
"""
BENCH = """
bench/quality | nowhere.npz | nowhere.npz
bench/quality | --judge_epochs=0 x.npz | not between 1
bench/quality | --juge=0 x.npz | did you mean judge?
bench/quality | --against=all x.npz | expected test, train
bench/quality | text.npz | text.npz
bench/record | cfm | cfm is not a run of MNIST with labels
bench/record | nowhere | there is no valid checkpoint nowhere/ckpt.pt
bench/record | --teach=4 | whose row?
bench/nearest | nowhere.npz | nowhere.npz
bench/nearest | text.npz | text.npz
bench/nearest | --n=0 text.npz | not between 1
bench/nearest | --picture=x.jpg x.npz | must end in .png
bench/nearest | --n=9 | which pictures?
bench/speed | ddmp | ddmp
bench/speed | cfm --batch=3 | unknown option
bench/speed | torchcfm | as in config/cifar10.py
bench/speed | cfm --path=sb | a sigma above 0
bench/speed | ddpm --attention_levels=7 | attention_levels
bench/samplers | --runs=nowhere | there is no valid checkpoint nowhere/ckpt.pt
bench/samplers | --n_samples=0 | not between
bench/samplers | --runs=ddpm | ddpm is not a run of MNIST with labels
bench/peers | --minutes=-1 | not between
bench/peers | --peers=nobody | nobody
"""


TRAINING = [(s, *line) for s, own in (("ddpm", DDPM), ("cfm", CFM)) for line in lines(BOTH + own)]
SAMPLING = [(s, *line) for s, own in (("ddpm", SAMPLE_DDPM), ("cfm", SAMPLE_CFM))
            for line in lines(SAMPLE + own)]


@pytest.mark.parametrize("script, args, message", TRAINING)
def test_training(script, args, message, folder, monkeypatch):
    wrong(script, args, message, folder, monkeypatch)


@pytest.mark.parametrize("script, args, message", SAMPLING)
def test_sampling(script, args, message, folder, monkeypatch):
    where = "" if "--out_dir" in args else f" --out_dir={script}"
    wrong("sample", args + where, message, folder, monkeypatch)


@pytest.mark.parametrize("script, args, message", lines(BENCH))
def test_benchmarks(script, args, message, folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    wrong(script, args, message, folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script, args",
                         [("ddpm", "--n_steps=0"), ("cfm", "--path=sb"), ("sample", "--steps=-1")])
def test_it_takes_no_longer_than_the_import_and_a_second(script, args, folder):
    def seconds(args, code):
        start = time.time()
        assert run(script, args, cwd=folder, ok=False).returncode == code
        return time.time() - start

    for attempt in range(3):  # other work on the machine may slow one down
        if seconds(args, 2) < seconds("--help", 0) + 1:
            return
    raise AssertionError("it took longer")
