#!/usr/bin/env bash
# Measure what the project says about GPUs: on one NVIDIA card, in at most twelve minutes.
#
#   bash bench/gpu.sh FOLDER               # on a card; FOLDER must be new or empty
#   bash bench/gpu.sh FOLDER --rehearse    # the same stages on a CPU, tiny, in three minutes
#
# --seconds=720     for everything, results included; 178 in a rehearsal
# --data_dir=data   holds MNIST and CIFAR-10: stages without their data are skipped
# --only=REGEX      only stages whose names match; to draw, include the stage that trains
#
# It needs python3, or the Python named in $PYTHON, and no network. A stage that fails or takes too
# long does not stop the next. After each one, and at SIGTERM, FOLDER has the results so far:
# gpu.json, logs.tgz with all output and table.md, grids, and pictures of CIFAR-10 for an FID. These
# are at most eight files, each smaller than 16 MB.
set -uo pipefail

usage() {
    echo "gpu.sh: $1; options are at the top of bench/gpu.sh" >&2
    exit 2
}

folder="" rehearse="" seconds="" data="" only=.
for option in "$@"; do
    case $option in
        --rehearse) rehearse=yes ;;
        --seconds=*) seconds=${option#*=} ;;
        --data_dir=*) data=${option#*=} ;;
        --only=*) only=${option#*=} ;;
        -*) usage "unknown option $option" ;;
        *) folder=$option ;;
    esac
done
seconds=${seconds:-${rehearse:+178}} seconds=${seconds:-720}
[[ $seconds =~ ^[0-9]+$ ]] || usage "--seconds=$seconds is not a number"
[[ $folder ]] || usage "needs a folder for the results"
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
[[ -z $(ls -A "$folder") ]] || usage "$folder is not empty"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=$(cd "${data:-$root/data}" 2>/dev/null && pwd)
cd "$root" || exit
python=${PYTHON:-python3}
export LC_ALL=C PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Data are linked into a scratch folder: the judge is trained there, and data_dir stays as it is.
scratch=$(mktemp -d)
logs=$scratch/logs
mkdir -p "$logs" "$scratch/data" "$scratch/run"
trap 'rm -rf "$scratch"' EXIT
[[ -z $data ]] || cp -rsL "$data/." "$scratch/data"
rm -f "$scratch"/data/judge-*
data=$scratch/data

# ---- stages ----

grace=${rehearse:+5}               # seconds from SIGTERM, at which a script saves, to SIGKILL
grace=${grace:-15}
deadline=$((seconds - grace - 5))  # the last 5 are for the results
failed=0 running=""

left() { echo $((deadline - SECONDS)); }

# A signal counts as the deadline: the running stage is stopped, and no other starts.
trap 'deadline=0; [[ -z $running ]] || kill "$running" 2>/dev/null' TERM INT HUP

note() { # NAME START SECONDS CODE WHY
    local IFS=$'\t'
    echo "$*" >>"$scratch/stages.tsv"
    "$python" bench/gpu.py report "$scratch" "$folder" $device || failed=1
}

skip() { # NAME WHY
    [[ $1 =~ $only ]] || return 0
    echo "$1: skipped, $2"
    note "$1" 0 0 skipped "$2"
}

stage() { # NAME LIMIT COMMAND...: the command, for at most LIMIT seconds, its output in NAME.log
    local name=$1 limit=$2 begin=$SECONDS start=$EPOCHREALTIME code
    shift 2
    [[ $name =~ $only ]] || return 0
    ((limit < $(left))) || limit=$(left)
    if ((limit < 1)); then
        skip "$name" "no time left"
        return
    fi
    echo "$name: $*"
    # each stage compiles from scratch, so its time is a first run's
    TORCHINDUCTOR_CACHE_DIR=$scratch/inductor/$name timeout --kill-after="$grace" "$limit" "$@" \
        >"$logs/$name.log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    while kill -0 "$running" 2>/dev/null; do # a signal ended the wait, not the stage
        wait "$running"
        code=$?
    done
    running=""
    [[ $code =~ ^(0|124|143)$ ]] || failed=1
    echo "$name: exit code $code after $((SECONDS - begin)) s: $(tail -n 1 "$logs/$name.log")"
    note "$name" "$start" "$((SECONDS - begin))" "$code" ""
}

train() { # NAME LIMIT SCRIPT OPTION...
    local name=$1 limit=$2 script=$3
    shift 3
    stage "$name" "$limit" "$python" "$script.py" "$@" --data_dir="$data" \
        --out_dir="$scratch/run/$name" --device=$device "${tiny[@]}"
}

draw() { # NAME LIMIT RUN N OPTION...: pictures of the run, as run/NAME.npz
    local name=$1 limit=$2 run=$3 n=$4
    shift 4
    if [[ $name =~ $only && ! -e $scratch/run/$run/ckpt.pt ]]; then
        skip "$name" "$run has no checkpoint"
    else
        stage "$name" "$limit" "$python" sample.py --out_dir="$scratch/run/$run" --n_samples="$n" \
            --save="$scratch/run/$name.npz" --device=$device "$@"
    fi
}

present() { [[ $(find "$data" -name "$1" -print -quit) ]]; }

# ---- what is measured, and how small in a rehearsal ----

device=cuda digits=10000 cifar_pictures=5000 tiny=() tiny_pairs=() tiny_peer=() speed=(--dtype=bfloat16)
mnist=(--dataset=mnist) cifar=(--dataset=cifar10)
present '*t10k-images*' || mnist=()
present 'cifar-10-*' || cifar=()
if [[ $rehearse ]]; then
    device=cpu digits=200 cifar_pictures=20 speed=()
    tiny=(--channels=8 --batch_size=16 --max_iters=20 --eval_interval=10 --log_interval=5
        --sample_steps=2)
    tiny_pairs=(--pool=100 --fresh=1 --iterations=20 --batch_size=16 --teacher_steps=2)
    tiny_peer=(--channels=32 --batch_size=2) # their group norms need a multiple of 32 channels
    [[ ${mnist[*]} ]] || mnist=(--dataset=synthetic)
    [[ ${cifar[*]} ]] || cifar=(--dataset=synthetic --image_size=32)
fi

# 1. Does it work at all?
stage card 60 "$python" bench/gpu.py card $device
stage smoke 200 "$python" -m pytest -q -p no:cacheprovider test_smoke.py -k cuda
if [[ ${mnist[*]} ]]; then
    quick=(--max_iters=50 --compile=false "${mnist[@]}")
    train adamw 30 cfm "${quick[@]}" --muon=false
    train adamw-patch1 30 cfm "${quick[@]}" --muon=false --patch=1
    train float16 30 cfm "${quick[@]}" --dtype=float16

    # 2. The default runs, and how good their digits are.
    train cfm 150 cfm "${mnist[@]}"
    train ddpm 150 ddpm "${mnist[@]}"
    if [[ -e $scratch/run/cfm/ckpt.pt ]]; then
        stage one_step 240 "$python" examples/one_step.py --init_from="$scratch/run/cfm" \
            --out_dir="$scratch/run/one_step" --device=$device "${tiny_pairs[@]}"
        draw one_step-digits 40 one_step $digits
    else
        skip one_step "it needs the run cfm"
    fi
    draw cfm-digits 40 cfm $digits
    draw ddpm-digits 40 ddpm $digits
    drawn=("$scratch"/run/*-digits.npz)
    if [[ -e ${drawn[0]} ]] && present '*t10k-images*'; then
        stage quality 90 "$python" bench/quality.py "${drawn[@]}" --training --data_dir="$data" \
            --device=$device
    else
        skip quality "it needs MNIST and digits"
    fi
    train cfm-eager 45 cfm "${mnist[@]}" --compile=false
    train ddpm-eager 45 ddpm "${mnist[@]}" --compile=false
else
    skip "training on MNIST" "it is not in data_dir"
fi

# 3. Where the time of a step goes.
stage speed-default 100 "$python" bench/speed.py cfm --device=$device "${speed[@]}" "${tiny[@]}"
stage speed-cifar10 150 "$python" bench/speed.py cfm config/cifar10.py --device=$device \
    "${speed[@]}" "${tiny[@]}"
for peer in torchcfm diffusers; do # their training steps, with a UNet of the same size
    if ! "$python" -c "import importlib.util as u; exit(not u.find_spec('$peer'))"; then
        skip "speed-cifar10-$peer" "$peer is not installed"
    elif [[ $rehearse ]] && (($(left) < 100)); then
        skip "speed-cifar10-$peer" "the rehearsal needs the time for CIFAR-10"
    else
        stage "speed-cifar10-$peer" 90 "$python" bench/speed.py "$peer" config/cifar10.py \
            --device=$device "${speed[@]}" "${tiny[@]}" "${tiny_peer[@]}"
    fi
done

# 4. CIFAR-10, in the time that is left: a third of it, at most two minutes, goes to drawing.
drawing=$(($(left) / 3))
((drawing < 120)) || drawing=120
training=$(($(left) - drawing - 40)) # reading the data and the last grid take up to 40
least=60
[[ ! $rehearse ]] || training=6 least=6
recipe=(config/cifar10_fast.py)
[[ -e ${recipe[0]} ]] || # a learning rate schedule for minutes: its own is for days
    recipe=(config/cifar10.py --warmup_iters=200 --decay_lr=true --ema_decay=0.999
        --log_interval=50)
if [[ ! ${cifar[*]} ]]; then
    skip cifar10 "CIFAR-10 is not in data_dir"
elif ((training < least)); then
    skip cifar10 "no time left"
else
    minutes=$(printf '%d.%02d' $((training / 60)) $((training % 60 * 100 / 60)))
    train cifar10 $((training + 40)) cfm "${recipe[@]}" "${cifar[@]}" --minutes="$minutes"
    # 5,000 pictures each: 15 MB
    draw cifar10-1 $(($(left) / 2)) cifar10 $cifar_pictures --seed=1
    draw cifar10-2 "$(left)" cifar10 $cifar_pictures --seed=2
fi

echo
cat "$logs/table.md"
exit $failed
