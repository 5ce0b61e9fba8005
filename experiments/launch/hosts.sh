#!/bin/bash
# The same command on a list of hosts, by ssh. The hosts share this folder, the work folder and the
# cache, under the same paths; process 0 runs on the first one.
#
#     experiments/launch/hosts.sh hosts.txt --config=configs/masked_lm.py:base --workdir=/shared/run
#
# hosts.txt holds one host per line, as ssh knows it and as the others reach it. Interrupt this
# script (Ctrl-C) to stop the run: all are told, and stop after the same step, with a checkpoint.
# Its status is the largest of all; 75 and 143 mean: run the same line again.
set -uo pipefail
hosts=${1:?"usage: $0 HOSTS --config=... --workdir=..."}
shift
mapfile -t hosts < <(grep -v '^ *$' "$hosts")
ssh=${SSH:-ssh}
port=${PORT:-12345}
printf -v command '%q ' "${PYTHON:-$PWD/.venv/bin/python}" -m pretraining.train "$@" \
    --coordinator="${hosts[0]}:$port" --process_count="${#hosts[@]}"
printf -v folder '%q' "$PWD"

# The shell there writes its number down, then becomes the program.
note=/tmp/pretraining.$(id -un).$$
stopped= last=-1 processes=()
# Tells all: one that has not begun to train ends at once, and cannot tell the others. Their notes
# may still be under way.
stop() {
    stopped=yes
    local i
    for ((i = 0; i <= last; i++)); do
        setsid $ssh -n "${hosts[$i]}" "n=0; while [ ! -s $note.$i ] && [ \$n -lt 100 ]; do
            sleep 0.1; n=\$((n + 1)); done; kill -TERM \$(cat $note.$i)" &
    done
}
trap stop INT TERM
for i in "${!hosts[@]}"; do
    [ $stopped ] && break
    last=$i
    # Of another process group, so that Ctrl-C reaches this script alone.
    setsid $ssh -n "${hosts[$i]}" \
        "cd $folder && echo \$\$ > $note.$i && exec $command --process_index=$i" \
        > >(sed -u "s/^/[$i] /") 2>&1 &
    processes[i]=$!
done
worst=$([ $stopped ] && echo 143 || echo 0)
for process in "${processes[@]}"; do
    # A trapped signal ends `wait` early: wait again.
    while wait "$process"; status=$?; kill -0 "$process" 2>/dev/null; do :; done
    [ $status -gt $worst ] && worst=$status
done
for i in "${!processes[@]}"; do
    $ssh -n "${hosts[$i]}" "rm -f $note.$i"
done
exit $worst
