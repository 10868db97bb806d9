#!/usr/bin/env bash
# AR and the three diffusion processes, side by side: likelihood of characters, and quality against decoding steps.
# Wants tiny Shakespeare as $1 (input.txt); writes data/prepared/ and $OUT. About five hours on one core.
set -euo pipefail
PY=${PYTHON:-python} OUT=${OUT:-out/processes} TEXT=${1:?the path of tiny Shakespeare}
run() { echo; echo "\$ python $*"; "$PY" "$@"; }

# Bits per character: the same model and the same characters for each; fewer and more of them, and a wider model, to see the gap move.
[ -d data/prepared/shakespeare ] || run data/prepare.py text --sources="$TEXT" --tokenizer=bytes --out=data/prepared/shakespeare
characters="--dtype=float32 --input_len=0 --target_len=64 --batch_size=12 --log_every=1000 --eval_every=4000"
bits() { # data, size, learning rate, steps, windows, noise levels, models
    data=$1 size=$2 lr=$3 steps=$4 windows=$5 draws=$6; shift 6
    for model in "$@"; do
        [ $model = ar ] && script=train_ar.py || script="train_diff.py --process=$model"
        out="$OUT/${model}_${data}_${size}_$steps"
        run $script --data=$data $characters --size=$size --lr=$lr --steps=$steps --out_dir="$out"
        run eval.py "$out" --metric=bits --n_examples=$windows --n_draws=$draws
    done
}
bits shakespeare 4x128x4 2e-3 4000 256 32 ar absorbing uniform gaussian
bits shakespeare 4x128x4 2e-3 1000 256 32 ar absorbing uniform
for steps in 8000 16000; do bits shakespeare 4x128x4 2e-3 $steps 256 32 ar absorbing; done
bits shakespeare 4x256x4 1e-3 4000 256 32 ar absorbing

# Tasks: each process from the same AR model (200 steps on mostly Python text, as in demo.py) and from random weights; then every
# decoder in 1 to 32 steps, of uniform from AR weights and of the others from scratch, which is what was better on code.
[ -d data/prepared/python ] || run data/prepare.py text --sources=stdlib:docs:0.2,stdlib:code:0.8 --out=data/prepared/python
shared="--size=4x96x3 --batch_size=16 --log_every=200 --eval_every=100000 --eval_sequences=128"
run train_ar.py --data=python --lr=3e-4 --steps=200 --input_len=24 --target_len=32 $shared --out_dir="$OUT/ar"
models=
for task in code translate qa; do
    [ -d data/prepared/$task ] || run data/prepare.py $task
    for process in uniform absorbing gaussian; do
        [ $process = uniform ] && steps=1200 || steps=2400  # uniform makes two passes a step
        model="$OUT/${task}_$process" train="train_diff.py --data=$task --lr=3e-3 --steps=$steps $shared --process=$process"
        run $train --init_from="$OUT/ar" --out_dir="$model"
        run $train --out_dir="${model}_scratch"
        for m in "$model" "${model}_scratch"; do run eval.py "$m" --n_examples=200 --n_steps=32 --allow_code_execution; done
        [ $process = uniform ] || model="${model}_scratch"
        models="$models,$model"
    done
done
run experiments/decoders.py --allow_code_execution --models="${models#,}" --out="$OUT/decoders"
