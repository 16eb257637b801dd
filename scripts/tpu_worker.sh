#!/usr/bin/env bash
# What tpu_pod.sh runs on every worker of a TPU slice: install, start, status, logs, stop. Not called by hand.
#
# In $HOME: sbs (checkout), sbs_venv (packages; its file `revision` says that install was whole), sbs_run (lock, id,
# command, pid, log, exit_code, stopped). Who holds the lock is the run: a stale pid is none, and two never start.
# Exit statuses that tpu_pod.sh explains: 10 a run is going on, 11 not installed, 12 still running after stop.
set -uo pipefail

home=$HOME venv=$HOME/sbs_venv run=$HOME/sbs_run

install() { # REVISION PYTHON BUCKET MOUNT, run from the new checkout in sbs.new
  mkdir -p "$run"
  local python
  if is_running; then
    echo "a run is going on; stop it first"
    return 10
  fi
  rm -f "$venv/revision"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    python=$(find_python "$2") || return 1
    echo "making $venv with $python"
    "$python" -m venv --clear "$venv" || return 1
  fi
  rm -rf "$home/sbs" && mv "$home/sbs.new" "$home/sbs" || return 1
  if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    -c "$home/sbs/scripts/constraints.txt" -e "$home/sbs[tpu]"; then
    echo "pip could not install (its words are above)"
    return 1
  fi
  if [[ $3 ]]; then mount_bucket "$3" "$4" || return 1; fi
  rm -f "$home"/sbs-*.tar.gz
  echo "$1" >"$venv/revision"
  echo "revision $1 is installed"
}

find_python() { # GIVEN: path of a Python 3.11 to 3.13 that can make virtual environments
  local candidate test='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
  for candidate in ${1:-python3.13 python3.12 python3.11 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$test" 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  if [[ $1 ]]; then
    echo "--python $1 is not there, or not 3.11 to 3.13 with the venv module" >&2
    return 1
  fi
  # Ubuntu 22.04, which the TPU images are, has 3.10.
  if ! { sudo add-apt-repository -y ppa:deadsnakes/ppa && apt_install python3.12 python3.12-venv; } >&2; then
    echo "no Python 3.11 to 3.13 is there, and apt could not install one" >&2
    return 1
  fi
  echo python3.12
}

apt_install() { # PACKAGES..; a machine that has just started may be updating itself
  sudo apt-get -q -o DPkg::Lock::Timeout=600 update && sudo apt-get -q -y -o DPkg::Lock::Timeout=600 install "$@"
}

mount_bucket() { # BUCKET MOUNT
  local there key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
  local packages=https://packages.cloud.google.com/apt
  there=$(findmnt --noheadings --output SOURCE --mountpoint "$2")
  if [[ $there == "$1" ]]; then return 0; fi
  if [[ $there ]]; then
    echo "$2 is a mount of $there already, not of $1; choose another --mount"
    return 1
  fi
  if ! command -v gcsfuse >/dev/null; then
    if ! { curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" &&
      echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -c -s) main" | sudo tee "$list" &&
      apt_install gcsfuse; } >/dev/null; then
      echo "gcsfuse could not be installed"
      return 1
    fi
  fi
  { sudo mkdir -p "$2" && sudo chown "$(id -u):$(id -g)" "$2"; } || return 1
  # What one worker writes, another sees at once: no cached names, neither present nor absent ones.
  if ! gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$2"; then
    echo "the bucket $1 could not be mounted: does the service account have roles/storage.objectUser on it?"
    return 1
  fi
}

start() { # ID SETTLE NAME=VALUE.. -- COMMAND..
  local id=$1 settle=$2 variables=() revision
  shift 2
  while [[ $1 != -- ]]; do variables+=("$1") && shift; done
  shift
  mkdir -p "$run"
  if ! revision=$(cat "$venv/revision" 2>/dev/null); then
    echo "nothing is installed here"
    return 11
  fi
  exec 9>>"$run/lock"
  if ! flock -n 9; then
    # gcloud repeats a command whose connection broke: the second time it is no second start.
    if [[ $(cat "$run/id") == "$id" ]]; then
      echo "started before the connection broke"
      return 0
    fi
    echo "already running: $(cat "$run/command" 2>/dev/null)"
    return 10
  fi
  rm -f "$run/exit_code" "$run/pid" "$run/stopped"
  echo "$id" >"$run/id"
  printf '%q ' "$@" >"$run/command"
  echo "== $(date -u +%FT%TZ) revision $revision: $(cat "$run/command")" >>"$run/log"
  setsid env ${variables[@]+"${variables[@]}"} PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1 \
    bash "$home/sbs/scripts/tpu_worker.sh" supervise "$@" </dev/null >>"$run/log" 2>&1 &
  exec 9>&-
  sleep "$settle"
  if [[ -e $run/exit_code && $(cat "$run/exit_code") != 0 ]]; then
    tail -n 20 "$run/log"
    echo "the command ended at once, with exit status $(cat "$run/exit_code")"
    return 1
  fi
  echo "started: $(cat "$run/command")"
}

supervise() { # COMMAND..; holds the lock from start as file 9, and so does what it starts
  cd "$home/sbs" || return 1
  trap '' HUP
  "$@" &
  local pid=$!
  echo "$pid $$" >"$run/pid.new" && mv "$run/pid.new" "$run/pid"
  wait "$pid"
  local code=$?
  echo "$code" >"$run/exit_code.new" && mv "$run/exit_code.new" "$run/exit_code"
  echo "== $(date -u +%FT%TZ) exit status $code"
}

is_running() { [[ -e $run/lock ]] && ! flock -n "$run/lock" true; }

status() {
  local word=idle more=" (nothing was started)"
  if is_running; then
    word=running more=" (revision $(cat "$venv/revision" 2>/dev/null))"
  elif [[ -e $run/id && ! -e $run/exit_code ]]; then
    word=interrupted more=" (killed, or the machine was started again)"
  elif [[ -e $run/id && $(cat "$run/exit_code") == 0 ]]; then
    word=finished more=""
  elif [[ -e $run/id && $(cat "$run/exit_code") == 75 && -e $run/stopped ]]; then
    word=stopped more=" (it has saved)"
  elif [[ -e $run/id && $(cat "$run/exit_code") == 75 ]]; then
    word=interrupted more=" (told to end by this machine; it has saved)"
  elif [[ -e $run/id ]]; then
    word=failed more=" (exit status $(cat "$run/exit_code"))"
  fi
  echo "state: $word$more"
  if [[ -e $run/log ]]; then tail -n 3 "$run/log"; fi
}

logs() { # LINES FOLLOW
  local words=(-n "$1") pid keeper
  if [[ ! -e $run/log ]]; then
    echo "there is no log yet"
    return 0
  fi
  # Following ends with the run.
  if [[ $2 ]] && is_running && read_pid; then words+=(-F -s 1 --pid="$keeper"); fi
  tail "${words[@]}" "$run/log"
}

read_pid() { # sets pid and keeper (`supervise`), which are there soon after the start
  local tries
  for ((tries = 0; tries < 50; tries++)); do
    if read -r pid keeper 2>/dev/null <"$run/pid"; then return 0; fi
    sleep 0.1
  done
  return 1
}

stop() { # TIMEOUT KILL
  local pid keeper begin=$SECONDS
  if ! is_running; then
    echo "nothing runs"
    return 0
  fi
  read_pid || return 1
  touch "$run/stopped" # else exit status 75 would ask for a new start
  kill -TERM "$pid" 2>/dev/null
  while is_running; do
    if ((SECONDS - begin >= $1)); then
      if [[ ! $2 ]]; then
        echo "still running $1 s after SIGTERM"
        return 12
      fi
      kill -KILL "$pid" 2>/dev/null
      sleep 1
      break
    fi
    sleep 0.2
  done
  echo "ended with exit status $(cat "$run/exit_code" 2>/dev/null)"
}

main() {
  local what=$1 status reader
  shift
  if [[ $what == supervise ]]; then
    supervise "$@"
    exit
  fi
  # Every line after the name of the host; the run itself must not hold this pipe, or ssh would wait for its end.
  exec 3> >(exec sed -u "s/^/[$(hostname)] /")
  reader=$!
  case $what in
    install) install "$@" ;;
    start) start "$@" ;;
    status) status ;;
    logs) logs "$@" ;;
    stop) stop "$@" ;;
  esac >&3 2>&1 3>&-
  status=$?
  exec 3>&-
  wait "$reader"
  exit "$status"
}

main "$@"
