#!/bin/bash
# The same command on all hosts of a TPU VM slice, from any machine with gcloud:
#
#     TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_vm.sh \
#         --config=configs/masked_lm.py:base --workdir=/mnt/shared/runs/mlm
#
# Each host holds this repository in ~/pretraining with its .venv (pip install -c constraints.txt
# -e '.[tpu]'); --workdir and data.cache lie in a folder that all hosts have mounted (Filestore).
# The hosts find each other by themselves. Where a process is lost (75) or told to stop (143, e.g.
# by maintenance) the same line goes on; a mistake (2) ends this script.
set -uo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
printf -v command '%q ' .venv/bin/python -m pretraining.train "$@" --distributed
for _ in {1..100}; do
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
        --command="cd ~/pretraining && $command"
    status=$?
    case $status in
    75 | 143) sleep 10 ;;
    *) exit $status ;;
    esac
done
exit $status
