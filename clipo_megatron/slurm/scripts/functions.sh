# What the scripts of a job share; `clipo submit` copies this file into each. Needs bash 4.4 and Slurm's commands.

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

# ---- signals ---------------------------------------------------------------------------------------------------------
# USR1 comes STOP_BEFORE seconds before the walltime, or from a person: the ranks end their step and save, and the job
# queues itself again. TERM comes when Slurm takes the nodes away: the ranks do the same, if they are given the time.
# INT and HUP come from a person: the ranks end their step and save, and the job ends for good.

ranks= servers= asked= signals=0 helpers=()

later() { # SECONDS SIGNAL PID: sends the signal after that time, unless this script has ended
    (sleep "$1" & trap 'kill $!' TERM; wait $! && kill "$2" "$3") >/dev/null 2>&1 &
    helpers+=($!)
}

on_usr1() {
    signals=$((signals + 1))
    [[ -n $asked ]] && return
    asked=USR1
    say "USR1: the ranks end their step and save; they have $((STOP_BEFORE - STOP_BEFORE / 5)) s for it"
    [[ -n $ranks ]] && kill -USR1 "$ranks" 2>/dev/null
    later $((STOP_BEFORE - STOP_BEFORE / 5)) -ALRM $$
}

on_term() {
    signals=$((signals + 1))
    asked=TERM
    say "TERM: Slurm ends this attempt"
}

on_int() { # srun keeps INT to itself, so the ranks are asked by USR1
    signals=$((signals + 1))
    [[ $asked == INT ]] && return
    asked=INT
    say "INT: the ranks end their step and save, and the job ends"
    [[ -n $ranks ]] && kill -USR1 "$ranks" 2>/dev/null
}

on_alarm() {
    signals=$((signals + 1))
    say "the step does not end in time and is given up; the next attempt continues from the newest checkpoint"
    requeue
}

outlast() { # PID: waits for it, however many signals interrupt the wait, and returns its exit code
    local code before known=
    while :; do
        before=$signals
        wait "$1"
        code=$?
        [[ $code == 127 && -n $known ]] && return "$known"
        [[ $signals == "$before" ]] && return "$code"
        known=$code
    done
}

# ---- the nodes -------------------------------------------------------------------------------------------------------

address_of() { # NODE: prints the address at which Slurm reaches it
    local answer
    answer=$(scontrol --oneliner show node "$1" | grep -o 'NodeAddr=[^ ]*')
    echo "${answer#NodeAddr=}"
}

cores_of() { # GROUP: prints how many cores the job has on each node of that group, the fewest of them
    local group=SLURM_JOB_CPUS_PER_NODE_HET_GROUP_$1
    local told=${!group:-$SLURM_JOB_CPUS_PER_NODE} # such as 96(x3),64
    told=$(tr , '\n' <<< "$told" | sed 's/(.*//' | sort -n | head -n 1)
    echo "${told:-${SLURM_CPUS_ON_NODE:-$(nproc)}}"
}

divide_cores() { # the cores of a node go to its ranks alike; servers get a node's cores, with ranks beside them in turn
    local cores
    cores=$(cores_of 0)
    ((CPUS_PER_RANK)) || CPUS_PER_RANK=$((cores / RANKS_PER_NODE > 0 ? cores / RANKS_PER_NODE : 1))
    SERVERS_TOLD=
    if ((SERVER_NODES)); then SERVER_CPUS=$(cores_of 1); else SERVER_CPUS=$cores; fi
    [[ $ENGINE == local ]] || SERVERS_TOLD=", $SERVER_CPUS cores for a node's servers"
}

begin() {
    trap on_usr1 USR1
    trap on_term TERM
    trap on_int INT HUP
    trap on_alarm ALRM
    trap '((${#helpers[@]})) && kill "${helpers[@]}" 2>/dev/null' EXIT
    divide_cores
    export CLIPO_JOB=$JOB PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=$CPUS_PER_RANK
    mkdir -p "$JOB/logs" "$JOB/nodes" || exit 1
    nodes=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}
    server_nodes=${SLURM_JOB_NODELIST_HET_GROUP_1:-$nodes}
    local node all
    all=$(scontrol show hostnames "$nodes" && [[ $server_nodes == "$nodes" ]] || scontrol show hostnames "$server_nodes")
    CLIPO_ADDRESSES=
    for node in $all; do CLIPO_ADDRESSES+="$node=$(address_of "$node") "; done
    MASTER_ADDR=${CLIPO_ADDRESSES%% *}
    MASTER_ADDR=${MASTER_ADDR#*=}
    export CLIPO_ADDRESSES MASTER_ADDR
    attempt=${SLURM_RESTART_COUNT:-0}
    say "job $SLURM_JOB_ID, requeued $attempt times of $REQUEUES at most, on" $all
    say "$RANKS_PER_NODE ranks a node with $CPUS_PER_RANK cores each$SERVERS_TOLD"
    note_environment "$JOB/environment.$attempt.txt"
    check_nodes "$all"
    note started
}

note_environment() { # FILE: writes what decides how a job runs, a line each; everything else may be a secret
    local name
    rm -f "$1"
    (
        umask 077
        for name in $(compgen -e | sort); do
            case $name in
            SLURM_JWT | *KEY* | *TOKEN* | *SECRET* | *PASS* | *CREDENTIAL* | *PROXY*) ;;
            SLURM_* | SLURMD_* | CUDA_* | NCCL_* | GLOO_* | UCX_* | FI_* | OMP_* | MKL_* | TORCH_* | PYTORCH_* | \
                CLIPO_JOB | CLIPO_ADDRESSES | MASTER_ADDR | PATH | LD_LIBRARY_PATH | PYTHON* | VIRTUAL_ENV | \
                CONDA_PREFIX | LANG | LC_* | TMPDIR | HOSTNAME) printf '%s=%q\n' "$name" "${!name}" ;;
            esac
        done > "$1"
    )
}

check_nodes() { # NODES: ends the job unless each node sees its files, and the others what it writes
    local token=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$RANDOM place missing node tries
    place=$JOB/nodes/$token
    mkdir "$place" && echo "$token" > "$place/token" || exit 1
    local look='place=$1 token=$2 count=$3; shift 3
        [[ $(cat "$place/token" 2>/dev/null) == "$token" ]] || {
            echo "$SLURMD_NODENAME does not see $place, where the job writes: it is not shared with this node" >&2; exit 1; }
        for path in "${@:1:count}"; do [[ -e $path ]] || { echo "$SLURMD_NODENAME has no $path" >&2; exit 1; }; done
        shift "$count"
        (($#)) && ! said=$("$@" 2>&1) && {
            echo "$SLURMD_NODENAME cannot run ${*: -4}: $(tail -c 2000 <<< "$said")" >&2; exit 1; }
        touch "$place/$SLURMD_NODENAME"'
    local trial=() group patience=10 # a network file system may show new names late
    ((${#CONTAINER[@]})) && trial=("${CLIPO[@]}" --version)
    for group in "${GROUPS_OF_NODES[@]}"; do
        # --ntasks too: the one in the job's environment would win over --ntasks-per-node
        timeout "$NODES_DEADLINE" srun $group --ntasks="${group##*=}" --ntasks-per-node=1 --cpus-per-task=1 --overlap --chdir=/ \
            --kill-on-bad-exit=0 "${CONTAINER[@]}" bash -c "$look" look "$place" "$token" "${#MUST_SEE[@]}" \
            "${MUST_SEE[@]}" "${trial[@]}" </dev/null || patience=1
    done
    for ((tries = 0; tries < patience; tries++)); do
        missing=
        for node in $1; do [[ -e $place/$node ]] || missing+=" $node"; done
        [[ -z $missing || -n $asked ]] && break
        sleep 1
    done
    rm -rf "$place"
    [[ -z $missing || -n $asked ]] && return
    say "these nodes cannot work for this job:$missing. Put train.output, the model, the data and Python on a file system" \
        "that all nodes share (what is missing stands above), or leave the nodes out: --sbatch=--exclude=NODES"
    exit 2
}

# ---- servers and ranks -----------------------------------------------------------------------------------------------

start_servers() { # one `clipo serve` a node; they register in train.output/servers, where the ranks find them
    [[ $ENGINE == local ]] && return
    rm -f "$OUTPUT"/servers/*.json
    # Signals are for the ranks only: servers must live until the ranks have ended their step.
    local serve='trap "" USR1 TERM
        for each in $CLIPO_ADDRESSES; do [[ ${each%%=*} == "$SLURMD_NODENAME" ]] && host=${each#*=}; done
        exec "$@" "serve.host=$host"'
    local group=${GROUPS_OF_NODES[-1]}
    srun $group --job-name=servers --ntasks="${group##*=}" --ntasks-per-node=1 --cpus-per-task="$SERVER_CPUS" --overlap \
        --kill-on-bad-exit=1 --output="$JOB/logs/servers.%N.log" --open-mode=append "${CONTAINER[@]}" \
        bash -c "$serve" serve "${CLIPO[@]}" serve "$JOB/config.yaml" </dev/null &
    servers=$!
}

end_servers() {
    [[ -z $servers ]] && return
    local job=${SLURM_JOB_ID_HET_GROUP_1:-$SLURM_JOB_ID} step name
    while read -r step name; do
        [[ $name == servers ]] && scancel --signal=INT "$step"
    done < <(squeue --noheader --steps --jobs "$job" --format '%i %j')
    later 60 -KILL "$servers"
    outlast "$servers"
    kill "${helpers[-1]}" 2>/dev/null
    servers=
}

run_ranks() { # COMMAND: runs it on all ranks; returns the worst rank's exit code
    local extra=() code
    [[ $ENGINE == local ]] || extra=("rollout.sync.host=$MASTER_ADDR")
    # When a rank ends, the others end too: by themselves, or killed after RANKS_DEADLINE seconds.
    srun ${GROUPS_OF_NODES[0]} --job-name=ranks --ntasks="$RANKS" --ntasks-per-node="$RANKS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_RANK" --overlap --kill-on-bad-exit=0 --wait="$RANKS_DEADLINE" \
        --output="$JOB/logs/rank%t.log" --open-mode=append "${CONTAINER[@]}" \
        "${CLIPO[@]}" "$1" "$JOB/config.yaml" "${extra[@]}" </dev/null &
    ranks=$!
    [[ $asked == USR1 || $asked == INT ]] && kill -USR1 "$ranks"
    if [[ -n $servers ]]; then
        # Wait for whichever ends first: without servers the ranks would wait forever.
        while kill -0 "$ranks" 2>/dev/null && kill -0 "$servers" 2>/dev/null; do wait -n "$ranks" "$servers"; done
        if kill -0 "$ranks" 2>/dev/null; then
            say "the servers have ended; see $JOB/logs/servers.*.log"
            kill -TERM "$ranks"
            later "$RANKS_DEADLINE" -KILL "$ranks"
            outlast "$ranks"
            ranks=
            return 1
        fi
    fi
    outlast "$ranks"
    code=$?
    ranks=
    return $code
}

# ---- attempts --------------------------------------------------------------------------------------------------------

newest() { ls "$OUTPUT/checkpoints" 2>/dev/null | grep '^step_' | sort | tail -n 1; }

note() { # OUTCOME: appends a line on this attempt to JOB/attempts
    printf '%(%FT%T)T job=%s requeues=%s nodes=%s outcome=%s newest=%s\n' -1 "$SLURM_JOB_ID" \
        "${SLURM_RESTART_COUNT:-0}" "$nodes" "$1" "$(newest)" >> "$JOB/attempts"
}

requeue() { # queues the job again; it continues from the newest checkpoint
    if ((${SLURM_RESTART_COUNT:-0} >= REQUEUES)); then
        say "the job has been requeued $SLURM_RESTART_COUNT times, as often as it may; submit it again to continue"
        exit 1
    fi
    [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null | head -n 1) == RUNNING ]] || {
        say "Slurm is ending this job already"
        await_the_end
    }
    note requeued
    say "requeueing"
    scontrol requeue "$SLURM_JOB_ID" || {
        say "this job cannot be requeued here; submit it again to continue from $(newest)"
        exit 1
    }
    await_the_end
}

await_the_end() { # waits until Slurm kills this script; ending by itself could mark a requeued job as failed
    local seconds
    for ((seconds = 0; seconds < 600; seconds++)); do sleep 1; done
    exit 1
}

attempts_of() { # COMMAND: runs it until it is done, has to be requeued, or fails too often
    local code before failures
    while :; do
        before=$(newest)
        start_servers
        run_ranks "$1"
        code=$?
        if [[ $asked == INT && $code == 138 ]]; then
            code=130
        elif [[ -n $asked || $code == 138 || $code == 143 ]]; then # 128 + the number of USR1, TERM
            say "the ranks have ended with code $code; the newest checkpoint is $(newest)"
            ((code == 0)) || requeue
        fi
        end_servers
        case $code in
        0) note done; say "done"; exit 0 ;;
        129 | 130) note stopped; say "ended by SIGINT or SIGHUP; the state is saved"; exit "$code" ;;
        esac
        note "code-$code"
        failures=$(($(cat "$JOB/failures" 2>/dev/null || echo 0) + 1))
        [[ $(newest) == "$before" ]] || failures=1
        echo "$failures" > "$JOB/failures"
        if ((code == 2)) && [[ $(newest) == "$before" ]]; then
            say "what has to be corrected stands in $JOB/logs:"
            tail -n 3 "$JOB/logs/rank0.log"
            exit 2
        elif ((failures > RESTARTS)); then
            say "code $code: failure $failures in a row without a new checkpoint; giving up. See $JOB/logs/rank*.log"
            exit "$code"
        fi
        say "code $code: restart $failures of $RESTARTS, from ${before:-the beginning}; see $JOB/logs/rank*.log"
        sleep 2
    done
}
