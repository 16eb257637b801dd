#!/usr/bin/env bash
# Rent Cloud TPU slices, run `sbs train` on all of their workers, and keep it running when they are taken away.
# Its side on the workers is tpu_worker.sh, which `install` puts there with the project. docs/tpu.md walks through it.
set -uo pipefail
if ((BASH_VERSINFO[0] < 4)); then
  echo "tpu_pod: this is bash $BASH_VERSION; expected 4.3 or newer (macOS: brew install bash)." >&2
  exit 2
fi

usage() {
  cat <<'HELP'
usage: scripts/tpu_pod.sh COMMAND [flags] [-- sbs train ...]

commands, in the order of use
  run      create, wait, install, start and watch, in one
  create   ask for a queued resource (one slice, or several with --slices)
  wait     until it is ACTIVE, saying its state
  install  put this checkout, at its revision, and its packages on every worker
  start    start what follows -- on every worker, detached; adds --multihost
  status   state of the resource, its nodes and the run on every worker
  logs     follow the log of the first worker (--all: of every worker)
  watch    until the run ends; slices taken away are deleted, asked for again, installed and started again
  stop     SIGTERM to the run on every worker, then wait for its end
  delete   delete the queued resource and its nodes, which ends the costs

which TPU (after the sign = the environment variable that gives the default)
  --name NAME              queued resource, and prefix of its nodes         = SBS_TPU_NAME, else sbs
  --project ID             = SBS_TPU_PROJECT, else CLOUDSDK_CORE_PROJECT, else gcloud's
  --zone ZONE              = SBS_TPU_ZONE, else CLOUDSDK_COMPUTE_ZONE, else gcloud's
  --accelerator_type TYPE  such as v5litepod-16, v5p-128, v6e-16, v4-32     = SBS_TPU_TYPE
  --runtime_version V      software of the workers                          = SBS_TPU_RUNTIME, else by type
  --slices N               slices of that type                              = SBS_TPU_SLICES, else 1
  --spot | --reserved      cheaper, may be taken away | your reservation; else on demand
  --network N --subnetwork N --service_account EMAIL
  --internal_ips           no external addresses (this machine is in their network; they need Cloud NAT)
  --create_flag FLAG       one more flag for `queued-resources create`, word for word; repeat

install, start
  --allow_dirty            take uncommitted and untracked files along (otherwise they are refused)
  --python PATH            Python of the workers (default: newest of 3.11 to 3.13 there, else installed with apt)
  --bucket NAME --mount DIR  mount the bucket there with gcsfuse on every worker (default DIR: /mnt/sbs)
  --env NAME=VALUE         environment variable of the run; repeat

while waiting
  --poll S                 seconds between looks                            = SBS_TPU_POLL, else 30
  --settle S               `start`: time in which a run that ends is an error  = SBS_TPU_SETTLE, else 5
  --timeout S              give up `wait` (0: never) or `stop`              default 0, stop 300
  --attempts N             tries of `watch` to bring a run back in a row    default 10
  --backoff S              pause before the 2nd try, doubled each time to 1800 at most   default 60
  --kill                   `stop`: SIGKILL to what is left after --timeout
  --delete_when_done       `watch`, `run`: delete the resource when the run has ended well
  --all, --lines N, --no_follow   of `logs`
  --yes                    `delete` without asking
  --dry_run                print the gcloud commands, quoted; call nothing. Answers are taken to be good

exit status
  0 done   1 a call or a worker failed   2 wrong flag, or gcloud, project, zone or type missing
  3 wrong order (not created, not ACTIVE, not installed, already running)   4 resource FAILED, SUSPENDED or deleted
  5 gave up (--timeout, --attempts)   6 the run itself ended with an error

example
  export SBS_TPU_PROJECT=my-project SBS_TPU_ZONE=us-west4-a SBS_TPU_TYPE=v5litepod-16
  scripts/tpu_pod.sh run --spot --bucket my-bucket -- sbs train \
      --gin_file=gin_configs/experiments/esnli/base_step_by_step.gin --gin_file=gin_configs/meshes/fsdp.gin \
      --gin.RECORDS_DIR=/mnt/sbs/records --gin.MODEL_DIR=/mnt/sbs/runs/esnli
HELP
}

# ---------------------------------------------------------------------------------------------------- small things

say() { [[ $dry_run ]] || printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; }
fail() { # CODE MESSAGE..: for mistakes that no repetition mends
  printf 'tpu_pod: %s\n' "${@:2}" >&2
  exit "$1"
}
complain() { printf 'tpu_pod: %s\n' "$@" >&2; }

quoted() { # words, so that a POSIX shell reads back the same words
  local word flag line=""
  for word in "$@"; do
    flag=""
    if [[ $word =~ ^--[A-Za-z0-9_.-]+= ]]; then flag=${BASH_REMATCH[0]}; fi
    word=${word#"$flag"}
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ || ($flag && ! $word) ]]; then
      line+=" $flag$word"
    else
      line+=" $flag'${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${line# }"
}

call() { # a command that changes something: run, or printed
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

nodes() { # ids of the nodes, in order
  local index
  if ((slices == 1)); then
    echo "$name"
  else
    for ((index = 0; index < slices; index++)); do echo "$name-$index"; done
  fi
}

# ------------------------------------------------------------------------------------------------ accelerator types

known_type() {
  local cores=${1##*-}
  case $1 in
    v5litepod-* | v6e-*) [[ $cores =~ ^(1|4|8|16|32|64|128|256)$ ]] ;;
    v4-* | v5p-*)
      [[ $cores =~ ^(8|16|32|64|[1-9][0-9]{2,4})$ ]] && ((cores < 100 || (cores % 128 == 0 && cores <= 12288)))
      ;;
    *) return 1 ;;
  esac
}

runtime_of() { # software version of Google's table
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

nearest_type() { # of v5e:4x4, v5e-16, v5lite-16, v5p:2x2x2, v5litepod-17 ..
  local family=${1%%[:-]*} size=${1#*[:-]} chips=1 side best="" step
  if [[ $1 == *:* ]]; then
    for side in ${size//x/ }; do
      [[ $side =~ ^[1-9][0-9]*$ ]] || return
      chips=$((chips * side))
    done
    [[ $family =~ ^v(4|5p)$ ]] && chips=$((chips * 2)) # those are counted in cores, two a chip
  elif [[ $size =~ ^[1-9][0-9]{0,4}$ ]]; then
    chips=$size
  else
    chips=16
  fi
  case $family in
    v5e | v5lite*) family=v5litepod ;;
    v6*) family=v6e ;;
    v5*) family=v5p ;;
    v4*) family=v4 ;;
    *) return ;;
  esac
  for step in 1 4 8 16 32 64 128 256 512 1024 2048 4096 8192 12288; do
    known_type "$family-$step" && { [[ ! $best ]] || ((step <= chips)); } && best=$family-$step
  done
  echo "$best"
}

check_type() {
  [[ $type ]] || fail 2 "no accelerator type: give --accelerator_type or SBS_TPU_TYPE, such as v5litepod-16."
  if ! known_type "$type" && [[ ! $runtime ]]; then
    local near
    near=$(nearest_type "$type")
    [[ $type != tpu7* ]] ||
      fail 2 "$type is not rented as TPU VMs, only with GKE or Compute Engine; see GKE in docs/tpu.md."
    fail 2 "unknown accelerator type $type${near:+ (did you mean $near?)}. Known:" \
      "  v5e  v5litepod-1 4 8 16 32 64 128 256 (chips)" "  v6e  v6e-1 4 8 16 32 64 128 256 (chips)" \
      "  v5p  v5p-8 16 32 64 128 256 .. 12288 (cores, two a chip)" \
      "  v4   v4-8 16 32 64 128 256 .. (cores, two a chip)" \
      "A type that is newer than this list is taken if --runtime_version is given with it."
  fi
  [[ $runtime ]] || runtime=$(runtime_of "$type")
}

# --------------------------------------------------------------------------------------------------- asking gcloud

resource() { # VERB FLAGS..
  call gcloud compute tpus queued-resources "$1" "$name" --project="$project" --zone="$zone" --quiet "${@:2}"
}

state="" initiator="" reason=""
look() { # sets state (NONE: there is no such resource), initiator and reason; 1 where gcloud could not say
  local answer format='value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)'
  state=ACTIVE initiator="" reason=""
  if [[ $dry_run ]]; then
    resource describe --format="$format"
    return 0
  fi
  if answer=$(resource describe --format="$format" 2>"$scratch/error"); then
    IFS='|' read -r state initiator reason <<<"$answer"
    return 0
  fi
  state=NONE
  grep -q -e NOT_FOUND -e 'was not found' "$scratch/error" && return 0
  state=UNKNOWN
  cat "$scratch/error" >&2
  return 1
}

node_state() { # NODE: sets state_of_node
  state_of_node=READY
  local words=(gcloud compute tpus tpu-vm describe "$1" --project="$project" --zone="$zone" --quiet)
  words+=('--format=value(state)')
  if [[ $dry_run ]]; then
    call "${words[@]}"
  elif ! state_of_node=$("${words[@]}" 2>"$scratch/error"); then
    state_of_node=UNKNOWN
    if grep -q -e NOT_FOUND -e 'was not found' "$scratch/error"; then state_of_node=NONE; fi
  fi
}

need_active() {
  look || return 1
  case $state in
    ACTIVE) return 0 ;;
    NONE) complain "there is no queued resource $name in $zone: run create first." ;;
    *) complain "the queued resource $name is $state, not ACTIVE: run wait first." ;;
  esac
  return 3
}

# Every node at once, each through one gcloud that reaches its workers; `queued-resources ssh --node=all` would pass
# over a node it cannot reach, with a warning. Output goes on with the node's name before it, and to $scratch/LABEL.*.
on_nodes() { # LABEL gcloud's words before the node -- and after it
  local label=$1 before=() node pids=() index=0 code status=0 words limit=()
  shift
  # A look must not hang on a machine that is gone.
  if [[ $label == status ]]; then limit=(timeout 120); fi
  while [[ $1 != -- ]]; do before+=("$1") && shift; done
  shift
  rm -f "$scratch/$label".*
  for node in $(nodes); do
    words=(gcloud compute tpus tpu-vm "${before[@]}" "$node${colon:-}" --project="$project" --zone="$zone" --quiet "$@")
    if [[ $internal ]]; then words+=(--internal-ip); fi
    if [[ $dry_run ]]; then
      call "${words[@]}"
      continue
    fi
    (
      cd "$scratch" || exit 1
      : >"$label.$node"
      ${limit[@]+"${limit[@]}"} "${words[@]}" </dev/null 2>&1 | sed -u "s/^/[$node] /" |
        if [[ $label == logs ]]; then cat; else tee "$label.$node"; fi
      exit "${PIPESTATUS[0]}"
    ) &
    pids+=("$!")
  done
  failed=""
  for node in $(nodes); do
    if [[ $dry_run ]]; then break; fi
    wait "${pids[index++]}"
    code=$?
    if ((code)); then
      status=$code
      failed+="${failed:+, }$(workers_that_failed "$node" "$scratch/$label.$node" "$code")"
    fi
  done
  return "$status"
}

workers_that_failed() { # NODE OUTPUT CODE: "sbs-0 worker 3 (exit 1)", from gcloud's own lines
  local found line='.*##### Command execution on worker ([0-9]+) failed with exit status ([0-9]+).*'
  found=$(sed -nE "s/$line/worker \\1 (exit \\2)/p" "$2" | sort -u | paste -sd, - | sed 's/,/, /g')
  echo "$1 ${found:-worker 0, or gcloud itself (exit $3)}"
}

on_workers() { # LABEL WORKER COMMAND.. on every node
  on_nodes "$1" ssh -- --worker="$2" --command="$(quoted "${@:3}")"
}

explain() { # CODE WHAT: after on_workers; the exit status for it
  case $1 in
    10) complain "a run is already going on: $failed. Follow it with watch or logs, or end it with stop." && return 3 ;;
    11 | 127) complain "not installed: $failed. Run install first." && return 3 ;;
    12) complain "still running: $failed. Repeat stop with a longer --timeout, or with --kill." && return 5 ;;
    *) complain "$2 failed: $failed. Its last lines are above, each after the name of its node and host." && return 1 ;;
  esac
}

# ------------------------------------------------------------------------------------------------------- commands

create() {
  local flags=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices == 1)); then flags+=(--node-id="$name"); else flags+=(--node-count="$slices" --node-prefix="$name"); fi
  [[ $capacity ]] && flags+=("--$capacity")
  [[ $network ]] && flags+=(--network="$network")
  [[ $subnetwork ]] && flags+=(--subnetwork="$subnetwork")
  [[ $service_account ]] && flags+=(--service-account="$service_account")
  [[ $internal ]] && flags+=(--internal-ips)
  say "asking for $slices x $type (${capacity:-on demand}) in $zone as $name"
  if ! resource create "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"} 2>"$scratch/error"; then
    cat "$scratch/error" >&2
    if grep -q -i -e ALREADY_EXISTS -e 'already exists' "$scratch/error"; then
      complain "$name exists already in $zone. Go on with it (wait, install, start, watch), or delete it," \
        "  or choose another --name."
      return 3
    fi
    complain "gcloud did not create $name (its words are above)."
    return 1
  fi
}

wait_active() {
  local begin=$SECONDS last="" misses=0
  while :; do
    if look; then
      misses=0
    elif [[ ! $last ]] || ((++misses >= 10)); then
      complain "gcloud could not say the state of $name (its words are above)."
      return 1
    fi
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      NONE) complain "there is no queued resource $name in $zone: run create first." && return 3 ;;
      FAILED)
        complain "$name FAILED: ${reason:-gcloud gives no reason}." \
          "  It stays until it is deleted: run delete, then create." \
          "  Quota, zone and type must fit together; a --spot request may also find no free capacity."
        return 4
        ;;
      SUSPENDING | SUSPENDED | DELETING)
        complain "$name is $state (by ${initiator:-somebody}): its nodes are gone or going." \
          "  Run delete, then create; watch does this by itself."
        return 4
        ;;
    esac
    if ((timeout > 0 && SECONDS - begin >= timeout)); then
      complain "$name is still $state after $timeout s. It stays in the queue: wait again, or delete it."
      return 5
    fi
    sleep "$poll"
  done
}

check_tree() { # sets revision
  local changes
  revision=$(git -C "$repository" rev-parse HEAD) ||
    fail 1 "$repository is no git checkout; install copies a revision of one."
  changes=$(git -C "$repository" status --porcelain)
  if [[ $changes && ! $allow_dirty ]]; then
    complain "uncommitted changes would not be part of revision ${revision:0:12}:"
    head -n 10 <<<"$changes" >&2
    fail 2 "commit them (or stash them), or take them along with --allow_dirty."
  fi
}

pack() { # $scratch/sbs-REVISION.tar.gz: a checkout with the one revision, so that run manifests can name it. Made once,
  # so that what watch installs in days to come is what was installed first.
  local tree=$scratch/tree
  rm -rf "$tree"
  git clone --quiet --depth 1 "file://$repository" "$tree" || return 1
  if [[ $(git -C "$tree" rev-parse HEAD) != "$revision" ]]; then
    complain "the checkout changed while it was packed; repeat."
    return 1
  fi
  if [[ $allow_dirty ]]; then
    (
      cd "$repository" || exit 1
      git ls-files -z --deleted | (cd "$tree" && xargs -0 -r rm -f --)
      git ls-files -z --modified --others --exclude-standard |
        while IFS= read -r -d '' file; do [[ -e $file ]] && printf '%s\0' "$file"; done |
        tar --null --files-from=- -cf - | tar -xf - -C "$tree"
    ) || return 1
  fi
  tar -czf "$scratch/sbs-$revision.tar.gz" -C "$tree" . && rm -rf "$tree"
}

install() {
  local archive=sbs-$revision.tar.gz code
  local unpack="rm -rf sbs.new && mkdir sbs.new && tar -xzf $archive -C sbs.new"
  need_active || return
  if [[ $dry_run ]]; then
    echo "# in a folder that holds $archive, a checkout of this revision:"
  else
    say "copying revision ${revision:0:12}${allow_dirty:+, with changes if any}, to every worker"
  fi
  colon=: on_nodes copy scp "$archive" -- --worker=all
  code=$?
  if ((code)); then
    explain "$code" "copying to the workers"
    return
  fi
  say "installing (minutes the first time)"
  on_nodes install ssh -- --worker=all \
    --command="$unpack && $(quoted bash sbs.new/scripts/tpu_worker.sh install "$revision" "$python" "$bucket" "$mount")"
  code=$?
  if ((code)); then
    explain "$code" "install"
    return
  fi
  say "installed on every worker"
}

start() {
  need_active || return
  local id code
  id=$(date +%s)-$$
  on_workers start all bash sbs/scripts/tpu_worker.sh start "$id" "$settle" ${env[@]+"${env[@]}"} -- "${command[@]}"
  code=$?
  if ((code)); then
    explain "$code" "start"
    return
  fi
  was_running=1
  say "started on every worker; nothing here has to stay open"
}

worker_states() { # WORKER, or all: sets run_states, one word a worker: running finished stopped failed interrupted idle unknown
  local code
  on_workers status "$1" bash sbs/scripts/tpu_worker.sh status >"$scratch/status"
  code=$?
  if [[ $dry_run ]]; then
    cat "$scratch/status"
    run_states=finished
  elif ((code == 127)); then
    run_states=idle # not even installed
  elif ((code)); then
    run_states=unknown
  else
    run_states=$(sed -nE 's/^.*\[[^]]*\] state: ([a-z]+).*/\1/p' "$scratch"/status.* | sort -u | paste -sd' ' -)
    [[ $run_states ]] || run_states=unknown
  fi
}

status() {
  local node ready=yes
  look || return 1
  if [[ ! $dry_run ]]; then
    echo "$name: $state${initiator:+ (by $initiator)}${reason:+: $reason}"
    [[ $state == NONE ]] && return 3
    [[ $state == ACTIVE ]] || return 0
  fi
  for node in $(nodes); do
    node_state "$node"
    [[ $dry_run ]] || echo "$node: $state_of_node"
    [[ $state_of_node == READY ]] || ready=""
  done
  [[ $ready ]] || return 0
  worker_states all
  [[ $dry_run ]] || cat "$scratch"/status.*
  [[ $run_states == *failed* || $run_states == *interrupted* ]] && return 6
  [[ $run_states == unknown ]] && return 1
  return 0
}

logs() {
  need_active || return
  local words=(bash sbs/scripts/tpu_worker.sh logs "$lines" "$follow") all_nodes=$slices
  if [[ ! $all ]]; then
    # The first worker alone: of the first node, which is called name-0 where there are several.
    if ((slices > 1)); then
      slices=1
      name=$name-0
    fi
    on_workers logs 0 "${words[@]}"
  else
    on_workers logs all "${words[@]}"
  fi
  local code=$?
  slices=$all_nodes
  if ((code)); then explain "$code" "logs"; fi
}

stop() {
  need_active || return
  on_workers stop all bash sbs/scripts/tpu_worker.sh stop "$stop_timeout" "$kill"
  local code=$?
  if ((code)); then
    explain "$code" "stop"
    return
  fi
  say "stopped; the resource still costs money until it is deleted"
}

delete() {
  if [[ ! $yes && ! $dry_run ]]; then
    local answer=""
    [[ -t 0 ]] || fail 2 "delete asks first, and there is nobody to ask: give --yes."
    read -r -p "Delete $name in $zone ($project) with all its nodes? [y/N] " answer
    [[ $answer == [yY]* ]] || fail 2 "nothing was deleted."
  fi
  say "deleting $name"
  if ! resource delete --force 2>"$scratch/error"; then
    cat "$scratch/error" >&2
    grep -q -e NOT_FOUND -e 'was not found' "$scratch/error" || return 1
    complain "$name was not there."
  fi
}

healthy() { # the resource is ACTIVE and all of its nodes are READY
  local node
  look && [[ $state == ACTIVE ]] || return 1
  for node in $(nodes); do
    node_state "$node"
    [[ $state_of_node == READY ]] || return 1
  done
}

attempts=0 run_began=0 was_running=""
bring_back() { # WHY: a resource whose nodes are all there, with the run started on it; or gives up
  local pause=$backoff
  # A run that lasted is progress: only tries in a row are counted.
  if ((run_began && SECONDS - run_began > 1800)); then attempts=0; fi
  run_began=0
  say "$1"
  while ((attempts < max_attempts)); do
    attempts=$((attempts + 1))
    if ((attempts > 1)); then
      say "attempt $attempts of $max_attempts in $pause s"
      sleep "$pause"
      pause=$((pause * 2 < 1800 ? pause * 2 : 1800))
    else
      say "attempt 1 of $max_attempts"
    fi
    if healthy; then
      # What is left of the run elsewhere waits for a process that will not answer.
      on_workers stop all bash sbs/scripts/tpu_worker.sh stop 60 1
    else
      yes=1 delete || continue
      while look && [[ $state != NONE ]]; do sleep "$poll"; done
      create || continue
      wait_active || continue
    fi
    install || continue
    start || continue
    run_began=$SECONDS
    return 0
  done
  complain "gave up after $attempts attempts. $1"
  return 5
}

watch() {
  local node lost waiting last="" word doubt=0 misses=0
  run_began=$SECONDS
  while :; do
    if ! look; then
      if [[ ! $last ]] || ((++misses >= 10)); then
        complain "gcloud could not say the state of $name (its words are above); the run, if any, goes on."
        return 1
      fi
      sleep "$poll"
      continue
    fi
    misses=0 lost="" waiting="" word="$name is $state"
    case $state in
      NONE)
        complain "$name was deleted; watch does not bring back what somebody deleted."
        return 4
        ;;
      SUSPENDED | FAILED)
        if [[ $state == SUSPENDED && $initiator == USER ]]; then
          complain "$name was SUSPENDED by its user; watch does not bring back what somebody ended."
          return 4
        fi
        lost="$word${reason:+: $reason}"
        ;;
      ACTIVE)
        for node in $(nodes); do
          node_state "$node"
          case $state_of_node in
            READY) ;;
            PREEMPTED | TERMINATED | NONE) lost+="${lost:+, }$node is $state_of_node" ;;
            *) waiting+="${waiting:+, }$node is $state_of_node" ;;
          esac
        done
        if [[ $lost || $waiting ]]; then
          word=$waiting
        else
          one_worker_state
          word="run $run_states"
        fi
        ;;
    esac
    if [[ $lost ]]; then
      bring_back "$lost: asking again" || return
      last=again doubt=0
      continue
    fi
    [[ $word == "$last" ]] || say "$word"
    last=$word
    if [[ $word == "run finished" ]]; then
      worker_states all
      if [[ $run_states == finished ]]; then
        say "the run has ended well on every worker"
        if [[ $delete_when_done ]]; then
          yes=1 delete
          return
        fi
        say "the resource still costs money: $(quoted "$0" delete --name "$name" --project "$project" --zone "$zone")"
        return 0
      fi
    fi
    if [[ $word == *running* ]]; then was_running=1; fi
    # A slice that is being taken away ends the run first and shows its state later: look 5 times before judging.
    if [[ $word != run\ * || $word == *running* ]]; then
      doubt=0
    elif ((++doubt >= 5)); then
      doubt=0
      worker_states all
      cat "$scratch"/status.* >&2
      # A worker on which nothing is any more was made anew.
      if [[ $was_running ]]; then run_states=${run_states/idle/interrupted}; fi
      case $run_states in
        *interrupted* | *unknown*)
          bring_back "the nodes are there, but the run was interrupted or cannot be reached: starting again" || return
          last=again
          ;;
        *failed*)
          complain "the run ended with an error of its own, and is not repeated." \
            "  Last lines are above; more: logs --all --no_follow --lines 200"
          return 6
          ;;
        *stopped*)
          complain "the run was ended with stop, which watch does not undo; start goes on with it."
          return 4
          ;;
        *idle*)
          complain "nothing was started on $name: run install, then start."
          return 3
          ;;
      esac
    fi
    sleep "$poll"
  done
}

one_worker_state() { # of the first worker: when one process ends, jax.distributed ends the others
  local all_nodes=$slices whole=$name
  if ((slices > 1)); then
    slices=1
    name=$name-0
  fi
  worker_states 0
  slices=$all_nodes name=$whole
}

# ------------------------------------------------------------------------------------------------------------ main

flags_known="--name --project --zone --accelerator_type --runtime_version --slices --spot --reserved --network \
--subnetwork --service_account --internal_ips --create_flag --allow_dirty --python --bucket --mount --env --poll \
--settle --timeout --attempts --backoff --kill --delete_when_done --all --lines --no_follow --yes --dry_run --help"
commands_known="run create wait install start status logs watch stop delete"

like() { # LENGTH WORD WORDS..: those whose first LENGTH characters are its own
  local start=${2//-/_} word
  for word in "${@:3}"; do
    if [[ ${word//-/_} == "${start:0:$1}"* ]]; then echo "$word"; fi
  done | paste -sd' ' -
}

whole_number() { # NAME VALUE LEAST
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then fail 2 "$1 is $2; expected a whole number of at least $3."; fi
}

capacity_is() {
  [[ ${capacity:-$1} == "$1" ]] || fail 2 "--spot and --reserved exclude each other."
  capacity=$1
}

parse() {
  name=${SBS_TPU_NAME:-sbs} slices=${SBS_TPU_SLICES:-1} type=${SBS_TPU_TYPE:-} runtime=${SBS_TPU_RUNTIME:-}
  project=${SBS_TPU_PROJECT:-${CLOUDSDK_CORE_PROJECT:-}} zone=${SBS_TPU_ZONE:-${CLOUDSDK_COMPUTE_ZONE:-}}
  capacity="" network="" subnetwork="" service_account="" internal="" create_flags=()
  allow_dirty="" python="" bucket="" mount=/mnt/sbs env=() command=()
  poll=${SBS_TPU_POLL:-30} settle=${SBS_TPU_SETTLE:-5} timeout="" max_attempts=10 backoff=60
  kill="" delete_when_done="" all="" lines=20 follow=1 yes="" dry_run="" colon=""
  while (($#)); do
    local flag=$1 value=""
    if [[ $flag == -- ]]; then
      command=("${@:2}")
      break
    fi
    case $flag in
      --spot | --reserved) capacity_is "${flag#--}" ;;
      --internal_ips) internal=1 ;;
      --allow_dirty) allow_dirty=1 ;;
      --kill) kill=1 ;;
      --delete_when_done) delete_when_done=1 ;;
      --all) all=1 ;;
      --no_follow) follow="" ;;
      --yes) yes=1 ;;
      --dry_run) dry_run=1 ;;
      --help | -h) usage && exit 0 ;;
      --*)
        if [[ $flag == *=* ]]; then
          value=${flag#*=}
          flag=${flag%%=*}
        fi
        [[ " $flags_known " == *" $flag "* ]] || {
          local near
          # shellcheck disable=SC2086
          near=$(like 4 "$flag" $flags_known)
          fail 2 "unknown flag $flag${near:+ (did you mean $near?)}. What the run itself takes stands after --."
        }
        if [[ $1 != *=* ]]; then
          (($# > 1)) || fail 2 "$flag needs a value."
          value=$2
          shift
        fi
        case $flag in
          --name) name=$value ;;
          --project) project=$value ;;
          --zone) zone=$value ;;
          --accelerator_type) type=$value ;;
          --runtime_version) runtime=$value ;;
          --slices) slices=$value ;;
          --network) network=$value ;;
          --subnetwork) subnetwork=$value ;;
          --service_account) service_account=$value ;;
          --create_flag) create_flags+=("$value") ;;
          --python) python=$value ;;
          --bucket) bucket=${value#gs://} ;;
          --mount) mount=${value%/} ;;
          --env)
            [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail 2 "--env is $value; expected NAME=VALUE."
            env+=("$value")
            ;;
          --poll) poll=$value ;;
          --settle) settle=$value ;;
          --timeout) timeout=$value ;;
          --attempts) max_attempts=$value ;;
          --backoff) backoff=$value ;;
          --lines) lines=$value ;;
          *) fail 2 "$flag takes no value." ;;
        esac
        ;;
      *) fail 2 "unexpected argument $flag. What the run itself takes stands after --." ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail 2 "--name is $name; expected small letters, digits and -, at most 40, a letter first."
  [[ $bucket != */* ]] || fail 2 "--bucket is $bucket; expected the name of a bucket, without a path."
  [[ $mount == /* ]] || fail 2 "--mount is $mount; expected an absolute path."
  whole_number --slices "$slices" 1
  whole_number --timeout "${timeout:-0}" 0
  whole_number --attempts "$max_attempts" 1
  whole_number --backoff "$backoff" 0
  whole_number --lines "$lines" 0
  [[ $poll =~ ^[0-9]*[.]?[0-9]+$ ]] || fail 2 "--poll is $poll; expected seconds."
  [[ $settle =~ ^[0-9]*[.]?[0-9]+$ ]] || fail 2 "--settle is $settle; expected seconds."
  stop_timeout=${timeout:-300} timeout=${timeout:-0}
}

check_command() { # what follows --, with --multihost
  ((${#command[@]})) || fail 2 "nothing to run: end the command with -- sbs train --gin_file=.."
  [[ ${command[0]} == sbs && ${#command[@]} -ge 2 ]] ||
    fail 2 "got -- $(quoted "${command[@]}"); expected -- sbs train .."
  [[ " ${command[*]} " == *" --multihost "* ]] || command=("${command[@]:0:2}" --multihost "${command[@]:2}")
}

from_gcloud() { # PROPERTY: gcloud's own setting; gcloud prints (unset) to stderr
  if [[ $dry_run ]]; then return; fi
  gcloud config get-value "$1" --quiet 2>/dev/null | grep -v '^(unset)$'
}

main() {
  local what=${1:-}
  case $what in
    "" | help | --help | -h)
      usage
      [[ $what ]] && exit 0
      exit 2
      ;;
  esac
  if [[ " $commands_known " != *" $what "* ]]; then
    local near
    # shellcheck disable=SC2086
    near=$(like 2 "$what" $commands_known)
    fail 2 "unknown command $what${near:+ (did you mean $near?)}. Known: $commands_known."
  fi
  parse "${@:2}"
  case $what in run | create | watch) check_type ;; esac
  case $what in run | start | watch) check_command ;; esac
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ $dry_run ]] || command -v gcloud >/dev/null ||
    fail 2 "gcloud is not installed: https://cloud.google.com/sdk/docs/install, then gcloud init."
  command -v git >/dev/null || fail 2 "git is not installed."
  [[ $project ]] || project=$(from_gcloud core/project)
  [[ $project ]] || fail 2 "no project: give --project or SBS_TPU_PROJECT, or run gcloud config set project ID."
  [[ $zone ]] || zone=$(from_gcloud compute/zone)
  [[ $zone ]] ||
    fail 2 "no zone: give --zone or SBS_TPU_ZONE, such as us-west4-a (v5e), us-east5-a (v5p, v6e), us-central2-b (v4)."
  case $what in run | install | watch) check_tree ;; esac
  scratch=$(mktemp -d) || exit 1
  trap 'rm -rf "$scratch"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  case $what in run | install | watch) [[ $dry_run ]] || pack || exit 1 ;; esac
  case $what in
    run) create && wait_active && install && start && watch ;;
    create) create ;;
    wait) wait_active ;;
    install) install ;;
    start) start ;;
    status) status ;;
    logs) logs ;;
    watch) watch ;;
    stop) stop ;;
    delete) delete ;;
  esac
  exit
}

main "$@"
