# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run; the caller has set `set -euo pipefail`.
#
# Trap: processes are ended by the pid that started them and only after a look at what that pid runs now, never by
# name: other copies may run beside this one.

# Exit codes, the same as the servers use.
# shellcheck disable=SC2034  # used by those who source this
readonly EX_USAGE=64 EX_UNAVAILABLE=69 EX_INTERNAL=70

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
[[ $target == /* ]] || target=$root/$target
me=${0##*/}

# fail CODE MESSAGE...: one line on stderr that says what to change, then the end.
fail() {
  local code=$1
  shift
  printf '%s: %s\n' "$me" "$*" >&2
  exit "$code"
}

# need_value "$@": the option in $1 has a value in $2.
need_value() {
  (($# >= 2)) || fail "$EX_USAGE" "$1 needs a value; see --help"
}

# check_port OPTION VALUE
check_port() {
  if ! [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || (($2 > 65535)); then
    fail "$EX_USAGE" "$1: '$2' is no port (1 to 65535)"
  fi
}

# absolute PATH: relative ones count from where the caller stood.
absolute() {
  if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$PWD/$1"; fi
}

port_in_use() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# refuse_occupied PORT OPTION: the servers' own exit code for a port that they cannot have.
refuse_occupied() {
  if port_in_use "$1"; then
    fail "$EX_UNAVAILABLE" "port $1 is in use; choose another with $2"
  fi
}

# http_get PORT PATH: status on the first line, body after it. Needs nothing but bash.
http_get() {
  # shellcheck disable=SC2016  # expanded by the inner bash
  timeout 3 bash -c '
    exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
    printf "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" "$2" >&3
    IFS=" " read -r _ status _ <&3
    printf "%s\n" "$status"
    while IFS= read -r line <&3 && [[ $line != $'"'\\r'"' ]]; do :; done
    cat <&3' http_get "$1" "$2" 2>/dev/null
}

# runs PID WORD: the process lives and WORD is part of its command line.
runs() {
  local line state look
  [[ -n ${1:-} ]] || return 1
  # The process may go between two looks. A zombie has no command line any more, a kernel thread none at all, and in the midst of an exec
  # there is none yet.
  for ((look = 0; look < 100; look++)); do
    line=$({ tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null) || return 1
    [[ -z $line ]] || break
    state=$({ cat "/proc/$1/stat"; } 2>/dev/null) || return 1
    state=${state##*) }
    [[ ${state:0:1} != [ZX] ]] || return 1
    sleep 0.01
  done
  [[ $line == *"$2"* ]]
}

# await_exec PID WORD: a child just forked still has our command line; waits until it has its own, or is gone.
await_exec() {
  until runs "$1" "$2" || ! kill -0 "$1" 2>/dev/null; do sleep 0.01; done
}

# pid_of FILE: what the file holds when it is a number, else nothing.
pid_of() {
  local pid=
  if [[ -r $1 ]]; then read -r pid <"$1" || true; fi
  if [[ $pid =~ ^[0-9]+$ ]]; then printf '%s\n' "$pid"; fi
}

# stop_pid PID WORD SECONDS: SIGTERM, then SIGKILL at the deadline. Status 1 when it had to be killed.
stop_pid() {
  local pid=$1 word=$2 end=$((SECONDS + $3))
  runs "$pid" "$word" || return 0
  kill -TERM "$pid" 2>/dev/null || return 0
  while runs "$pid" "$word"; do
    if ((SECONDS >= end)); then
      kill -KILL "$pid" 2>/dev/null || true
      return 1
    fi
    sleep 0.05
  done
}

# raise_fds: as many open files as this machine lets us have.
raise_fds() {
  ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
}

# build_failpoints debug|release: state and gateway with the feature `failpoints`, which no other build has, into
# target/failpoints/ or target/failpoints-release/. The plain binaries are put back behind it; both stay cached.
#
# Packages are chosen as in the other builds of the profile, or Cargo unites the features of libraries otherwise and compiles most of them
# once more. `--examples` makes it unite those of tests as well, as `cargo test` does.
build_failpoints() {
  local profile=$1 cargo_options=(--workspace --bin state --bin gateway --locked) to=$target/failpoints name
  if [[ $profile == release ]]; then
    cargo_options+=(--release)
    to=$target/failpoints-release
  else
    cargo_options+=(--examples)
  fi
  cargo build "${cargo_options[@]}" --features rookery-state/failpoints,rookery-gateway/failpoints || return
  mkdir -p "$to"
  for name in state gateway; do
    # A name of its own first: the old one may be running.
    cp "$target/$profile/$name" "$to/.$name.new" && mv -f "$to/.$name.new" "$to/$name" || return
  done
  cargo build "${cargo_options[@]}"
}
