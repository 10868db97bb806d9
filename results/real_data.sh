#!/usr/bin/env bash
# Real data at laptop scale: pretrain on books + Python source, AR2Diff, then Multi30k, SQuAD and MBPP with both kinds of model.
# Wants AR2DIFF_DATA, a folder with text/books_train.txt.xz, multi30k/, squad/ and mbpp.jsonl; writes data/prepared/ and out/real/.
set -euo pipefail
: "${AR2DIFF_DATA:?set it to the folder with the data sets}"
PY=${PYTHON:-python} OUT=${OUT:-out/real}
run() { echo; echo "\$ python $*"; "$PY" "$@"; }

run data/prepare.py text --out=data/prepared/books --sources="$AR2DIFF_DATA/text/books_train.txt.xz:0.8,stdlib:code:0.2"
for task in multi30k squad mbpp; do run data/prepare.py $task --from_dir="$AR2DIFF_DATA"; done

common="--log_every=100 --lr=3e-3 --eval_sequences=128"
run train_ar.py   --data=books --steps=1000 --batch_size=16 --eval_every=250 $common --out_dir=$OUT/ar
run train_diff.py --data=books --steps=100 --warmup=10 --batch_size=16 --eval_every=100 $common --init_from=$OUT/ar --out_dir=$OUT/ar2diff_100

finetune() {  # name, flags: both models, the same steps
  local task=$1; shift
  run train_ar.py   --data=$task --too_long=drop $common "$@" --init_from=$OUT/ar          --out_dir=$OUT/ar_$task
  run train_diff.py --data=$task --too_long=drop $common "$@" --init_from=$OUT/ar2diff_100 --out_dir=$OUT/ar2diff_$task
}
finetune squad --steps=600 --batch_size=16 --eval_every=200 --input_len=256 --target_len=24
for m in ar ar2diff; do run eval.py $OUT/${m}_squad --n_examples=200 --out=$OUT/${m}_squad/predictions.jsonl; done
finetune mbpp --steps=200 --batch_size=8 --eval_every=50 --input_len=256 --target_len=160
for m in ar ar2diff; do run eval.py $OUT/${m}_mbpp --n_examples=50 --allow_code_execution --out=$OUT/${m}_mbpp/predictions.jsonl; done
finetune multi30k --steps=3000 --batch_size=16 --eval_every=500
for m in ar ar2diff; do run eval.py $OUT/${m}_multi30k --n_examples=200 --out=$OUT/${m}_multi30k/predictions.jsonl; done
