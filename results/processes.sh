#!/usr/bin/env bash
# AR and the three diffusion processes, side by side: likelihood of characters, and quality against decoding steps.
# Wants tiny Shakespeare as $1 (input.txt); writes data/prepared/ and $OUT. About four hours on one core.
set -euo pipefail
PY=${PYTHON:-python} OUT=${OUT:-out/processes} TEXT=${1:?the path of tiny Shakespeare}
run() { echo; echo "\$ python $*"; "$PY" "$@"; }

# Bits per character: the same model, the same 4,000 x 12 x 64 characters for each; then twice as many, to see the gap move.
[ -d data/prepared/shakespeare ] || run data/prepare.py text --sources="$TEXT" --tokenizer=bytes --out=data/prepared/shakespeare
characters="--data=shakespeare --size=4x128x4 --input_len=0 --target_len=64 --batch_size=12 --lr=2e-3 --log_every=500 --eval_every=2000"
bits() { # steps, models
    steps=$1; shift
    for model in "$@"; do
        [ $model = ar ] && script=train_ar.py || script="train_diff.py --process=$model"
        run $script $characters --steps=$steps --out_dir="$OUT/${model}_characters_$steps"
        run eval.py "$OUT/${model}_characters_$steps" --metric=bits --n_examples=256 --n_draws=32
    done
}
bits 4000 ar absorbing uniform gaussian
bits 8000 ar absorbing

# Tasks: each process from the same AR model (200 steps on mostly Python text, as in demo.py) and from random weights; the better half
# then by every decoder in 1 to 32 steps.
[ -d data/prepared/python ] || run data/prepare.py text --sources=stdlib:docs:0.2,stdlib:code:0.8 --out=data/prepared/python
shared="--size=4x96x3 --batch_size=16 --log_every=200 --eval_every=100000 --eval_sequences=128"
run train_ar.py --data=python --lr=3e-4 --steps=200 --input_len=24 --target_len=32 $shared --out_dir="$OUT/ar"
models=
for task in code translate qa; do
    [ -d data/prepared/$task ] || run data/prepare.py $task
    for process in uniform absorbing gaussian; do
        [ $process = uniform ] && steps=1200 || steps=2400  # uniform makes two passes a step
        model="$OUT/${task}_$process"
        run train_diff.py --data=$task --lr=3e-3 --steps=$steps $shared --process=$process --init_from="$OUT/ar" --out_dir="$model"
        run train_diff.py --data=$task --lr=3e-3 --steps=$steps $shared --process=$process --out_dir="${model}_scratch"
        for m in "$model" "${model}_scratch"; do run eval.py "$m" --n_examples=200 --n_steps=32 --allow_code_execution; done
        [ $process = uniform ] || model="${model}_scratch"
        models="$models,$model"
    done
done
run results/decoders.py --allow_code_execution --models="${models#,}" --out="$OUT/decoders"
