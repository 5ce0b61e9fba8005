#!/bin/bash
# The same command on a list of hosts, by ssh. The hosts share this folder, the work folder and the
# cache, under the same paths; process 0 runs on the first one.
#
#     experiments/launch/hosts.sh hosts.txt --config=configs/masked_lm.py:base --workdir=/shared/run
#
# hosts.txt holds one host per line, as ssh knows it and as the others reach it. Interrupt this
# script (Ctrl-C) to stop the run: a signal to one process stops all, after the same step, with a
# checkpoint. Its status is the largest of all; 75 and 143 mean: run the same line again.
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
note=/tmp/pretraining.$(id -un).$$.pid
trap '$ssh -n "${hosts[0]}" "kill -TERM \$(cat $note)"' INT TERM
for i in "${!hosts[@]}"; do
    keep=$([ "$i" = 0 ] && echo "echo \$\$ > $note &&")
    # Of another process group, so that Ctrl-C reaches this script alone.
    setsid $ssh -n "${hosts[$i]}" "cd $folder && $keep exec $command --process_index=$i" \
        > >(sed -u "s/^/[$i] /") 2>&1 &
    processes[i]=$!
done
worst=0
for process in "${processes[@]}"; do
    # A trapped signal ends `wait` early: wait again.
    while wait "$process"; status=$?; kill -0 "$process" 2>/dev/null; do :; done
    [ $status -gt $worst ] && worst=$status
done
$ssh -n "${hosts[0]}" "rm -f $note"
exit $worst
