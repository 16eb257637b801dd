#!/usr/bin/env bash
# Rents Cloud TPU slices as queued resources, runs `sbs` in a container on every host, restarts it after a preemption.
# docs/tpu.md describes all steps to a finished run: on GKE (read that first), and with this script.
set -uo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "tpu_pod: this is bash $BASH_VERSION; expected 4.4 or newer (macOS: brew install bash)." >&2
  exit 2
fi

usage() {
  cat <<'HELP'
usage: scripts/tpu_pod.sh COMMAND [flags] [-- sbs train ...]

commands
  run      create and watch, in one
  create   request a queued resource: one slice, or several with --slices
  watch    wait for the slice, start the command on every host (adds --multihost), wait until it ends;
           after a preemption request the slice again and restart the command, which resumes
  start    start the command again on an existing slice, after stop or an error
  status   state of the resource, its nodes and the run on every host
  logs     follow the log of the first host (--all: the last 100 lines of every host)
  stop     send SIGTERM to the run on every host and wait until it has saved; the slice keeps costing money
  delete   delete the queued resource and its nodes, which ends the costs

flags (= environment variable with the default)
  --name NAME              queued resource, and prefix of its nodes         = SBS_TPU_NAME, else sbs
  --project ID --zone ZONE = SBS_TPU_PROJECT, SBS_TPU_ZONE
  --accelerator_type TYPE  such as v5litepod-16, v6e-16, v5p-128, v4-32     = SBS_TPU_TYPE
  --runtime_version V      software of the hosts; by default follows the type
  --slices N               slices of that type                              = SBS_TPU_SLICES, else 1
  --spot                   cheaper, can be preempted
  --internal_ips           hosts without external addresses: run this from their network, which needs Cloud NAT
  --create_flag=FLAG       another flag of `gcloud compute tpus queued-resources create`, such as --reserved; repeat
  --image IMAGE            container image with a tag that never moves      = SBS_IMAGE
  --env NAME=VALUE         environment variable of the run; repeat
  --attempts N             watch: restarts in a row before it gives up      default 10
  --backoff S              watch: pause before the second one, doubled each time up to 1800   default 60
  --delete_when_done       watch: delete the resource once the run has finished
  --timeout S --kill       stop: seconds to wait (default 300), then SIGKILL instead of giving up
  --all                    logs: every host
  --yes                    delete: do not ask

exit status
  0 done   1 a call or a host failed   2 bad flag, or gcloud, project or zone missing
  3 already created, or already running   4 resource FAILED, or ended by a user, or run ended by stop
  5 gave up (--timeout, --attempts)   6 the run itself failed
HELP
}

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; }
complain() { printf 'tpu_pod: %s\n' "$@" >&2; }
fail() { complain "$2" && exit "$1"; } # CODE MESSAGE

quoted() { # words, quoted so that a POSIX shell reads back the same words
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s' "${line# }"
}

tpus() { gcloud compute tpus "$1" "$2" "$3" --project="$project" --zone="$zone" --quiet "${@:4}"; }
nodes() { if ((slices == 1)); then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi; }
missing() { grep -q -e NOT_FOUND -e 'was not found' "$scratch/error"; }

may_cost=""
remind() { # at every exit of the script: a forgotten slice is the most expensive mistake
  [[ ! $may_cost ]] || say "$name costs money from ACTIVE until it is deleted:" \
    "$(quoted "$0" delete --name="$name" --project="$project" --zone="$zone")"
}

look() { # sets state (NONE: no such resource), initiator and reason; fails if gcloud cannot tell
  local answer format='value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)'
  initiator="" reason=""
  if answer=$(tpus queued-resources describe "$name" --format="$format" 2>"$scratch/error"); then
    IFS='|' read -r state initiator reason <<<"$answer"
    may_cost=1
  else
    missing || { cat "$scratch/error" >&2 && return 1; }
    state=NONE may_cost=""
  fi
}

look_at_nodes() { # sets lost and waiting: nodes that are gone, and nodes that are not READY yet
  local node answer
  lost="" waiting=""
  for node in $(nodes); do
    answer=$(tpus tpu-vm describe "$node" '--format=value(state)' 2>"$scratch/error") ||
      if missing; then answer=NONE; else answer=UNKNOWN; fi
    case $answer in
      READY) ;;
      PREEMPTED | TERMINATED | NONE) lost+="${lost:+, }$node is $answer" ;;
      *) waiting+="${waiting:+, }$node is $answer" ;;
    esac
  done
}

# Runs on a host: `on_hosts` sends its text along. Exit status 10: a run is active; 12: it still runs after stop.
host() { # VERB ARGUMENTS..
  local status="" code="" id="" boot="" this_boot new_id variables=() stopped=$HOME/sbs_stopped
  read -r this_boot </proc/sys/kernel/random/boot_id
  read -r status code id boot < <(sudo docker inspect --type=container \
    --format='{{.State.Status}} {{.State.ExitCode}} {{.Config.Labels.id}} {{.Config.Labels.boot}}' sbs 2>/dev/null)
  if [[ $1 == prepare || ($1 == launch && $id != "$2") ]] && [[ $status == running ]]; then return 10; fi
  case $1 in
    prepare) # IMAGE
      [[ $2 != *.pkg.dev/* ]] || gcloud auth print-access-token --quiet |
        sudo docker login --username=oauth2accesstoken --password-stdin "https://${2%%/*}" >/dev/null
      sudo docker pull --quiet "$2" ||
        { echo "cannot pull $2; has the service account roles/artifactregistry.reader?" && return 1; }
      ;;
    launch) # ID IMAGE NAME=VALUE.. -- COMMAND..
      new_id=$2
      [[ $id != "$2" ]] || return 0 # gcloud repeats a command when its connection breaks
      host clear || return
      shift 2
      while [[ $2 != -- ]]; do variables+=(--env="$2") && shift; done
      # The host's environment stays out: after a preemption it may hold the MEGASCALE_* of slices that are gone. Port
      # 8476 is open in Google's own firewall rule; 8482, JAX's default, is not.
      sudo docker run --detach --name=sbs --label=id="$new_id" --label=boot="$this_boot" --privileged --network=host \
        --ipc=host --stop-timeout=120 --env=JAX_COORDINATOR_PORT=8476 \
        "${variables[@]}" "$1" "${@:3}"
      ;;
    status)
      case $status:$code in
        :*) echo "state: idle (nothing was started)" && return ;;
        running:*) echo "state: running" ;;
        exited:0) echo "state: finished" ;;
        *)
          if [[ -e $stopped ]]; then status=stopped; elif [[ $code == 75 || $boot != "$this_boot" ]]; then
            status="interrupted"
          else status=failed; fi
          echo "state: $status (exit status $code)"
          ;;
      esac
      sudo docker logs --tail=10 sbs || return 0
      ;;
    logs) sudo docker logs --tail=100 ${2:+--follow} sbs ;; # FOLLOW
    clear) # ends the run if it still waits for a host that is gone, and keeps its log
      rm -f "$stopped"
      [[ $status ]] || return 0
      [[ $status != running ]] || sudo docker stop -t 60 sbs >/dev/null
      sudo docker logs sbs 2>&1 | cat >>"$HOME/sbs.log"
      sudo docker rm sbs >/dev/null
      ;;
    stop) # TIMEOUT KILL
      [[ $status == running ]] || return 0
      touch "$stopped" # without it, exit status 75 asks for a restart
      sudo docker kill --signal=TERM sbs >/dev/null
      timeout "$2" sudo docker wait sbs && return
      [[ $3 ]] || return 12
      sudo docker kill sbs
      ;;
  esac
}

# One `tpu-vm ssh` a node, all at once: `queued-resources ssh --node=all` skips the nodes that it cannot reach.
on_hosts() { # WORKER (all; 0: of the first node) VERB ARGUMENTS..
  local node pids=() limit=() status=0 failed="" words script
  # shellcheck disable=SC2016 # expands on the host
  script="$(declare -f host); "'host "$@" 2>&1 | sed -u "s/^/[$(hostname)] /"; exit "${PIPESTATUS[0]}"'
  words=(--worker="$1" --command="$(quoted bash -c "$script" sbs "${@:2}")" ${internal_ips:+--internal-ip})
  [[ $2 != status ]] || limit=(timeout 120) # a status query must not hang on a machine that is gone
  for node in $(nodes); do
    (
      "${limit[@]}" gcloud compute tpus tpu-vm ssh "$node" --project="$project" --zone="$zone" --quiet "${words[@]}" \
        </dev/null 2>&1 | sed -u "s/^/[$node] /"
      exit "${PIPESTATUS[0]}"
    ) &
    pids+=("$node $!")
    [[ $1 == all ]] || break
  done
  for node in "${pids[@]}"; do
    wait "${node#* }" || { status=$? && failed+="${failed:+, }${node% *} (exit status $status)"; }
  done
  case $status in
    0) return 0 ;;
    10) complain "a run is going on: $failed. Follow it with watch or logs, or end it with stop." && return 3 ;;
    12) complain "still running: $failed. Repeat stop with a longer --timeout, or with --kill." && return 5 ;;
    *) complain "$2 failed: $failed. The lines above begin with node and host." && return 1 ;;
  esac
}

create() {
  local flags=(--accelerator-type="$accelerator_type" --runtime-version="$runtime_version")
  if ((slices == 1)); then flags+=(--node-id="$name"); else flags+=(--node-count="$slices" --node-prefix="$name"); fi
  say "requesting $slices x $accelerator_type${spot:+ (spot)} in $zone as $name"
  if ! tpus queued-resources create "$name" "${flags[@]}" ${spot:+--spot} ${internal_ips:+--internal-ips} \
    "${create_flags[@]}" 2>"$scratch/error"; then
    cat "$scratch/error" >&2
    grep -qi -e ALREADY_EXISTS -e 'already exists' "$scratch/error" || return 1
    complain "$name exists already. Use watch on it, delete it, or choose another --name." && return 3
  fi
  may_cost=1
}

start() {
  local id
  id=$(date +%s)-$$
  say "pulling the image on every host (minutes the first time)"
  on_hosts all prepare "$image" &&
    on_hosts all launch "$id" "$image" "${env[@]}" -- "${command[@]}" --launch_id="$id" && say "started on every host"
}

run_state() { # WORKER: sets run_states, the different states on its hosts; unknown if they cannot be reached
  on_hosts "$1" status >"$scratch/status" 2>&1 || { run_states=unknown && return; }
  run_states=$(sed -nE 's/^\[[^]]*\] \[[^]]*\] state: ([a-z]+).*/\1/p' "$scratch/status" | sort -u | paste -sd' ' -)
}

status() {
  look || return 1
  look_at_nodes
  echo "$name: $state${initiator:+ (by $initiator)}${reason:+: $reason}${lost:+; $lost}${waiting:+; $waiting}"
  [[ $state == ACTIVE && ! $lost$waiting ]] || return 0
  run_state all
  cat "$scratch/status"
  case $run_states in *unknown*) return 1 ;; *failed* | *interrupted*) return 6 ;; esac
}

delete() {
  local answer=""
  if [[ ! $yes ]]; then
    [[ -t 0 ]] || fail 2 "delete asks first, and there is no terminal to ask on: give --yes."
    read -r -p "Delete $name in $zone ($project) with all its nodes? [y/N] " answer
    [[ $answer == [yY]* ]] || fail 2 "nothing was deleted."
  fi
  say "deleting $name"
  if ! tpus queued-resources delete "$name" --force 2>"$scratch/error"; then
    cat "$scratch/error" >&2
    missing || return 1
  fi
  may_cost=""
}

restarts=0 pause="" run_began=""
again() { # WHY: counts a restart, and pauses before the second and later ones in a row; fails if there were too many
  # A run that lasted half an hour has made progress.
  if [[ $run_began ]] && ((SECONDS - run_began > 1800)); then restarts=0; fi
  if ((restarts >= attempts)); then complain "gave up after $restarts restarts. $1" && return 5; fi
  run_began=""
  if ((restarts++ == 0)); then pause=$backoff && say "$1: restart 1 of $attempts" && return; fi
  say "$1: restart $restarts of $attempts in $pause s"
  sleep "$pause"
  pause=$((pause * 2 < 1800 ? pause * 2 : 1800))
}

watch() {
  local last="" word doubts=0 misses=0
  while :; do
    [[ ! $last ]] || sleep "$poll"
    if ! look; then
      if [[ ! $last ]] || ((++misses >= 10)); then
        complain "gcloud cannot tell the state of $name. The run, if any, goes on." && return 1
      fi
      continue
    fi
    misses=0 lost="" word="$name is $state${reason:+: $reason}"
    case $state:$initiator in
      NONE:*) complain "$name is not there; watch does not bring back what somebody deleted." && return 4 ;;
      SUSPEND*:USER) complain "$name was suspended by its user; watch does not bring it back." && return 4 ;;
      FAILED:*) if ((restarts)); then lost=$word; else complain "$word. Delete it, then run again." && return 4; fi ;;
      SUSPENDED:*) lost=$word ;;
      ACTIVE:*)
        look_at_nodes
        word=$waiting
        if [[ ! $lost$waiting ]]; then
          run_state 0 # sbs ends everywhere when one of its processes ends
          # A slice that is preempted ends the run first and shows its state later: decide at the fifth check.
          if [[ $run_states == *running* ]]; then doubts=0; else ((doubts++)); fi
          if [[ $run_states =~ ^(finished|idle)$ ]] || ((doubts >= 5)); then run_state all; fi
          word="run: $run_states"
        fi
        ;;
    esac
    [[ ! $word || $word == "$last" ]] || say "$word"
    last=${word:-$lost}
    if [[ $lost ]]; then
      again "$lost" || return
      yes=1 delete || continue
      while look && [[ $state != NONE ]]; do sleep "$poll"; done
      until create; do again "$name could not be requested" || return; done
    elif [[ $word == "run: finished" ]]; then
      [[ ! $delete_when_done ]] || yes=1 delete
      return
    elif [[ $word == "run: idle" ]]; then
      if ! start; then
        ((restarts)) || return 1 # a first start that fails, such as for a wrong image, is not worth repeating
        again "the run did not start" || return
      fi
    elif [[ $word == *running* ]]; then
      run_began=${run_began:-$SECONDS}
    elif [[ $word == run:* ]] && ((doubts >= 5)); then
      doubts=0
      case $word in
        # If other hosts have a container, a host without one was replaced.
        *interrupted* | *unknown* | *idle*)
          again "the run was interrupted, or its hosts cannot be reached" || return
          on_hosts all clear # so that it is idle, and is started
          ;;
        *failed*)
          cat "$scratch/status" >&2
          complain "the run itself failed, and is not repeated. Its log: logs --all" && return 6
          ;;
        *) complain "the run was ended by stop; start continues it." && return 4 ;;
      esac
    fi
  done
}

options=" name project zone accelerator_type runtime_version slices image timeout attempts backoff "
switches=" spot internal_ips delete_when_done kill all yes "
parse() {
  name=${SBS_TPU_NAME:-sbs} slices=${SBS_TPU_SLICES:-1} accelerator_type=${SBS_TPU_TYPE:-} runtime_version=""
  project=${SBS_TPU_PROJECT:-} zone=${SBS_TPU_ZONE:-} image=${SBS_IMAGE:-}
  timeout=300 attempts=10 backoff=60 poll=${SBS_TPU_POLL:-30} create_flags=() env=() command=()
  spot="" internal_ips="" delete_when_done="" kill="" all="" yes=""
  local key value
  while (($#)); do
    key=${1%%=*} && key=${key#--} value=${1#*=}
    case $1 in
      --help | -h) usage && exit 0 ;;
      --) command=("${@:2}") && break ;;
      --*) ;;
      *) fail 2 "unexpected argument $1. The command to run comes after --." ;;
    esac
    if [[ $switches == *" $key "* && $1 != *=* ]]; then
      printf -v "$key" 1
    elif [[ $options == *" $key "* || $key =~ ^(env|create_flag)$ ]]; then
      if [[ $1 != *=* ]]; then
        (($# > 1)) || fail 2 "$1 needs a value."
        value=$2 && shift
      fi
      case $key in
        env) env+=("$value") ;;
        create_flag) create_flags+=("$value") ;;
        *) printf -v "$key" %s "$value" ;;
      esac
    else
      fail 2 "unknown flag $1; --help lists them. What the run itself takes comes after --."
    fi
    shift
  done
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail 2 "--name is $name; expected up to 40 of a-z, 0-9 and -."
  for key in slices attempts timeout backoff; do
    [[ ${!key} =~ ^(0|[1-9][0-9]{0,8})$ && (${!key} != 0 || $key == backoff) ]] ||
      fail 2 "--$key is ${!key}; expected a whole number of at least 1."
  done
  for value in "${env[@]}"; do
    [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail 2 "--env is $value; expected NAME=VALUE."
  done
}

check_type() {
  local known=" v5litepod:v2-alpha-tpuv5-lite v6e:v2-alpha-tpuv6e v5p:v2-alpha-tpuv5 v4:tpu-ubuntu2204-base "
  local family=${accelerator_type%-*}
  [[ $accelerator_type =~ ^[a-z0-9]+-[1-9][0-9]*$ && ($runtime_version || $known == *" $family:"*) ]] ||
    fail 2 "--accelerator_type is ${accelerator_type:-missing}; expected v5litepod-N or v6e-N (N chips), v5p-N or v4-N \
(N cores, two a chip). A newer type needs --runtime_version too; tpu7x is rented through GKE only (docs/tpu.md)."
  known=${known#*" $family:"}
  runtime_version=${runtime_version:-${known%% *}}
}

check_command() {
  local word
  [[ ${command[0]:-} == sbs && ${#command[@]} -ge 2 ]] || fail 2 "got -- ${command[*]}; expected -- sbs train .."
  [[ $image =~ [:@][^/]+$ && $image != *:latest ]] ||
    fail 2 "--image is ${image:-missing}; expected one with a tag that never moves, such as a revision."
  for word in "${command[@]}"; do # disks of the hosts are deleted with the slice
    [[ ! $word =~ ^--gin\.(MODEL|RECORDS)_DIR= || ${word#*=} == gs://* ]] ||
      fail 2 "$word is not in a bucket (gs://..)."
  done
  [[ ${command[1]} != train || " ${command[*]}" == *" --gin.MODEL_DIR="* ]] ||
    fail 2 "sbs train needs --gin.MODEL_DIR=gs://.."
  [[ " ${command[*]} " == *" --multihost "* ]] || command=("${command[@]:0:2}" --multihost "${command[@]:2}")
}

main() {
  case ${1:-} in
    run | create | start | watch | status | logs | stop | delete) ;;
    help | --help | -h) usage && exit 0 ;;
    *) fail 2 "unknown command ${1:-}; expected run, create, watch, start, status, logs, stop or delete (--help)." ;;
  esac
  parse "${@:2}"
  case $1 in run | create | watch) check_type ;; esac
  case $1 in run | start | watch) check_command ;; esac
  [[ $project && $zone ]] || fail 2 "no project or zone: give --project and --zone (or SBS_TPU_PROJECT, SBS_TPU_ZONE)."
  command -v gcloud >/dev/null || fail 2 "gcloud is missing: https://cloud.google.com/sdk/docs/install"
  scratch=$(mktemp -d) || exit 1
  trap 'remind; rm -rf "$scratch"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  case $1 in
    run) create && watch ;;
    logs) if [[ $all ]]; then on_hosts all logs; else on_hosts 0 logs follow; fi ;;
    stop) may_cost=1 && on_hosts all stop "$timeout" "$kill" ;;
    *) "$1" ;;
  esac
}

main "$@"
