#!/bin/sh
# Writes every report of experiments/plan/README.md anew into this folder: sh experiments/plan/run.sh
# One compiler at a time; needs the extra `tpu`, no TPU. Names after the script choose some of them.
# A plan that fails leaves no report; the others are still made, and the status is 1.
cd "$(dirname "$0")/../.." || exit 1
chosen=" $* "
failed=0

plan() { # name recipe topology overrides...
    name=$1 recipe=$2 topology=$3
    shift 3
    [ "$chosen" = "  " ] || case "$chosen" in *" $name "*) ;; *) return ;; esac
    command="python -m pretraining.plan --config=configs/$recipe --topology=$topology"
    for override; do command="$command --config.$override"; done
    echo "$name"
    report="experiments/plan/$name.txt"
    printf '%s\n\n' "$command" > "$report"
    $command >> "$report" 2>&1
    case $? in
        0) return ;;
        1) grep -q "^It does not fit" "$report" && return ;; # a traceback ends with 1 too
    esac
    echo "$name: no report: $(tail -n 1 "$report")" >&2
    rm "$report"
    failed=1
}

fast="model.dtype=bfloat16 model.execution=scanned"

plan bert_large_none masked_lm.py:large v5e:4x4 $fast mesh.fsdp=16
plan bert_large masked_lm.py:large v5e:4x4 $fast mesh.fsdp=16 model.remat=outputs

plan electra_large replaced_token_detection.py:large v5e:16x16 $fast \
    mesh.fsdp=16 evaluate.batch_size=256 model.remat=outputs

plan xlnet_large permutation_lm.py:large v4:4x4x8 $fast \
    mesh.fsdp=8 evaluate.batch_size=128 model.remat=full train.accumulation=4

billions="model.layers=32 model.width=4096 model.heads=32 model.mlp_width=11008 model.gated=True
    model.activation=silu model.norm=rmsnorm model.norm_epsilon=1e-5 model.position=rotary
    model.bias=False model.dropout=0.0 model.attention_dropout=0.0 model.attention=splash
    tokenizer.size=32000 data.sequence_length=4096 train.batch_size=1024
    evaluate.batch_size=1024 mesh.data=1 mesh.fsdp=128 mesh.tensor=8"

plan causal_7b causal_lm.py:large v5:8x8x16 $fast $billions model.remat=full

exit "$failed"
