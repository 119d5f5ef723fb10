#!/usr/bin/env bash
# Starts the store (Redis) and the registry (etcd) that Rookery's servers use, as processes of their own.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
usage: scripts/start-services.sh [options]

Starts Redis and etcd on 127.0.0.1 in the background and waits until both answer. Redis is set so that what it
acknowledges survives the power going off (appendonly yes, appendfsync always). Started twice with the same --data, it
finds its own processes and leaves them alone. A port that somebody else holds is refused by name.

  --redis-port PORT   default 6379
  --etcd-port PORT    default 2379 (etcd's peer port is any free one: there are no peers)
  --data DIR          data, logs and pid files, default target/services
  --stop              stop what runs in DIR, by pid; the data stays
  --install-only      only see that the programs are installed: redis-server, redis-cli, etcd, etcdctl; and what --install-for-build sees to
  --install-for-tests the same, and also what scripts/test needs beside them: systemd-analyze, which judges the units in
                      scripts/systemd (Debian's package systemd; nothing of it is started), python3, and what loadtest torture
                      makes faults with: strace, nft, ip and tc, faketime; and into target/schemathesis/, from PyPI, what holds
                      api/src/openapi.json against the running server. When that cannot be had its test is left out
  --install-for-build only see that what cargo needs beside Rust is installed: a C compiler and make, for jemalloc
  --install-wrk       what scripts/bench http calls api with
  --install-peers     the servers that scripts/bench density compares us with: mosquitto, nginx, haproxy. One that cannot be
                      installed is named and left out; that is no error. They are not started
  -h, --help          this page

Missing programs are installed with apt-get when this runs as root on Debian or Ubuntu; no service is started by their
packages. Elsewhere they must be on the PATH.

exit codes: 0 ok, 64 wrong use, 69 a port is in use, or a program is missing or does not start
HELP
}

redis_port=6379
etcd_port=2379
data=$target/services
action=start
tests=no
while (($#)); do
  case $1 in
    --redis-port) need_value "$@"; redis_port=$2; shift 2 ;;
    --etcd-port) need_value "$@"; etcd_port=$2; shift 2 ;;
    --data) need_value "$@"; data=$(absolute "$2"); shift 2 ;;
    --stop) action=stop; shift ;;
    --install-only) action=install; shift ;;
    --install-for-tests) action=install tests=yes; shift ;;
    --install-for-build) action=build; shift ;;
    --install-peers) action=peers; shift ;;
    --install-wrk) action=wrk; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "$EX_USAGE" "unknown option $1; see --help" ;;
  esac
done
check_port --redis-port "$redis_port"
check_port --etcd-port "$etcd_port"
((redis_port != etcd_port)) || fail "$EX_USAGE" "--redis-port and --etcd-port are both $redis_port"

main() {
  case $action in
    install)
      install_missing
      [[ $tests == no ]] || install_schemathesis
      return
      ;;
    wrk)
      command -v wrk >/dev/null || install_packages no --install-wrk wrk
      return
      ;;
    build) install_packages yes --install-for-build; return ;;
    peers) install_peers; return ;;
    stop) stop_all; return ;;
  esac
  install_missing
  mkdir -p "$data/redis" "$data/etcd"
  # Two of us at once would both find the ports free. The lock ends with this script: children do not inherit it.
  exec 9>"$data/lock"
  flock -w 60 9 || fail "$EX_UNAVAILABLE" "another start-services.sh holds $data/lock"

  local redis_pid etcd_pid
  redis_pid=$(running_pid redis)
  etcd_pid=$(running_pid etcd)
  [[ -n $redis_pid ]] && same_port redis "$redis_port" --redis-port
  [[ -n $etcd_pid ]] && same_port etcd "$etcd_port" --etcd-port
  [[ -n $redis_pid ]] || refuse_occupied "$redis_port" --redis-port
  [[ -n $etcd_pid ]] || refuse_occupied "$etcd_port" --etcd-port

  trap 'stop_started' EXIT
  trap 'exit 130' INT TERM
  [[ -n $redis_pid ]] || start_redis
  [[ -n $etcd_pid ]] || start_etcd
  wait_for redis "$redis_port" redis_answers
  wait_for etcd "$etcd_port" etcd_answers
  trap - EXIT

  report redis "$redis_port" "$redis_pid"
  report etcd "$etcd_port" "$etcd_pid"
  local options=
  ((redis_port == 6379)) || options+=" --redis-port $redis_port"
  ((etcd_port == 2379)) || options+=" --etcd-port $etcd_port"
  [[ $data == "$target/services" ]] || options+=" --services-data $data"
  echo "next: scripts/run --services$options    to end these: scripts/start-services.sh --stop${options:+ --data $data}"
}

# --- starting ---------------------------------------------------------------------------------------------------------

started=()

start_redis() {
  # `save ""`: the append-only file is the truth, snapshots beside it would only cost. `noeviction`: a store that is
  # full refuses, it does not forget. While Redis rewrites its file, what is written waits for its fsync behind the
  # rewrite's, for hundreds of ms: not from 64 MB on, therefore.
  cat >"$data/redis/redis.conf" <<CONF
bind 127.0.0.1
port $redis_port
dir "$data/redis"
daemonize no
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
maxmemory-policy noeviction
auto-aof-rewrite-min-size 1gb
save ""
CONF
  launch redis "$redis_port" redis-server "$data/redis/redis.conf"
}

start_etcd() {
  # No peers: the peer listener takes any free port, and nobody is told of it.
  local peer=http://127.0.0.1:0 client=http://127.0.0.1:$etcd_port
  [[ $(uname -m) == x86_64 ]] || export ETCD_UNSUPPORTED_ARCH=${ETCD_UNSUPPORTED_ARCH:-arm64}
  launch etcd "$etcd_port" etcd --name rookery --data-dir "$data/etcd/data" \
    --listen-client-urls "$client" --advertise-client-urls "$client" \
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "rookery=$peer" \
    --logger zap --log-outputs stderr --log-level warn --auto-compaction-retention 1
}

# launch NAME PORT COMMAND...: in a session of its own, so that Ctrl-C in this terminal does not reach it.
launch() {
  local name=$1 port=$2
  shift 2
  setsid "$@" >"$data/$name/log" 2>&1 </dev/null 9>&- &
  started+=("$name")
  echo "$!" >"$data/$name/pid"
  echo "$port" >"$data/$name/port"
  # Just forked, it still has our command line; by the next look at it, it must have its own.
  until [[ -n $(running_pid "$name") ]] || ! kill -0 "$!" 2>/dev/null; do sleep 0.01; done
}

redis_answers() { [[ $(timeout 2 redis-cli -h 127.0.0.1 -p "$redis_port" ping 2>/dev/null) == PONG ]]; }

etcd_answers() {
  ETCDCTL_API=3 etcdctl --endpoints "http://127.0.0.1:$etcd_port" --command-timeout 2s endpoint health >/dev/null 2>&1
}

# wait_for NAME PORT COMMAND
wait_for() {
  local name=$1 port=$2 answers=$3 end=$((SECONDS + 60))
  until "$answers"; do
    if [[ -z $(running_pid "$name") ]]; then
      tail -n 5 "$data/$name/log" >&2 || true
      fail "$EX_UNAVAILABLE" "$name ended at its start; its log is $data/$name/log"
    fi
    if ((SECONDS >= end)); then
      tail -n 5 "$data/$name/log" >&2 || true
      fail "$EX_UNAVAILABLE" "$name does not answer on port $port after 60 s; its log is $data/$name/log"
    fi
    sleep 0.05
  done
}

# report NAME PORT PID_BEFORE
report() {
  local how=started
  [[ -z $3 ]] || how='was running'
  printf '%-6s 127.0.0.1:%-5s %s, pid %s, data and log in %s\n' "$1" "$2" "$how" "$(running_pid "$1")" "$data/$1"
}

# --- finding and stopping ---------------------------------------------------------------------------------------------

# running_pid NAME: the pid of this folder's process when it lives. The word that proves it is the path of its data
# (etcd), or the port in the title that Redis gives itself.
running_pid() {
  local pid
  pid=$(pid_of "$data/$1/pid")
  if [[ -n $pid ]] && { runs "$pid" "$data/$1/" || runs "$pid" "$1-server 127.0.0.1:$(port_of "$1")"; }; then
    printf '%s\n' "$pid"
  fi
}

port_of() { cat "$data/$1/port" 2>/dev/null || true; }

# same_port NAME PORT OPTION
same_port() {
  local port
  port=$(port_of "$1")
  [[ $port == "$2" ]] || fail "$EX_USAGE" "$1 of $data runs on port $port already: give $3 $port, another --data, or --stop first"
}

stop_one() {
  local name=$1 pid word
  pid=$(running_pid "$name")
  if [[ -z $pid ]]; then
    echo "$name is not running in $data"
    return
  fi
  word=$data/$name/
  runs "$pid" "$word" || word=$name-server
  stop_pid "$pid" "$word" 15 || echo "$me: $name did not end within 15 s and was killed" >&2
  rm -f "$data/$name/pid"
  echo "$name stopped (pid $pid)"
}

stop_all() {
  stop_one redis
  stop_one etcd
}

# A start that fails leaves nothing behind that it started.
stop_started() {
  local name
  for name in "${started[@]}"; do stop_one "$name" >&2; done
}

# --- installing -------------------------------------------------------------------------------------------------------

install_missing() {
  local packages=() option=--install-only compiler=no
  # Who only starts services needs none.
  [[ $action != install ]] || compiler=yes
  command -v redis-server >/dev/null || packages+=(redis-server)
  command -v redis-cli >/dev/null || packages+=(redis-tools)
  command -v etcd >/dev/null || packages+=(etcd-server)
  command -v etcdctl >/dev/null || packages+=(etcd-client)
  [[ $tests == no ]] || command -v systemd-analyze >/dev/null || packages+=(systemd)
  [[ $tests == no ]] || command -v python3 >/dev/null || packages+=(python3)
  # Debian keeps back what makes a virtual environment.
  [[ $tests == no ]] || python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
  [[ $tests == no ]] || command -v strace >/dev/null || packages+=(strace)
  # Debian puts these where the PATH of users does not look.
  [[ $tests == no ]] || [[ -n $(PATH=$PATH:/usr/sbin type -P nft) ]] || packages+=(nftables)
  [[ $tests == no ]] || [[ -n $(PATH=$PATH:/usr/sbin type -P tc) ]] || packages+=(iproute2)
  [[ $tests == no ]] || command -v faketime >/dev/null || packages+=(faketime)
  [[ $tests == no ]] || option=--install-for-tests
  install_packages "$compiler" "$option" "${packages[@]}"
}

# install_packages yes|no OPTION PACKAGE...: these, and with `yes` what building needs. OPTION is what root would have to say.
install_packages() {
  local option=$2 packages=("${@:3}") list
  [[ $1 == no ]] || command -v cc >/dev/null || packages+=(gcc libc6-dev)
  [[ $1 == no ]] || command -v make >/dev/null || packages+=(make)
  ((${#packages[@]})) || return 0
  list=${packages[*]}
  if ! command -v apt-get >/dev/null; then
    fail "$EX_UNAVAILABLE" "not installed: what Debian calls $list; install it (here is no apt-get)"
  elif ((EUID != 0)); then
    fail "$EX_UNAVAILABLE" "not installed: $list; run: sudo scripts/start-services.sh $option"
  fi
  echo "$me: installing $list" >&2
  apt_install "${packages[@]}" || fail "$EX_UNAVAILABLE" "apt-get could not install $list; its words are above"
}

# Once for each list of versions.
install_schemathesis() {
  local venv=$target/schemathesis list=$root/scripts/python/schemathesis.txt try
  if [[ -x $venv/bin/schemathesis ]] && cmp -s "$list" "$venv/installed.txt"; then return; fi
  mkdir -p "$target"
  # Two of us at once would build it into each other.
  exec 8>"$target/schemathesis.lock"
  flock -w 600 8 || fail "$EX_UNAVAILABLE" "another start-services.sh holds $target/schemathesis.lock"
  if [[ -x $venv/bin/schemathesis ]] && cmp -s "$list" "$venv/installed.txt"; then return; fi
  echo "$me: installing schemathesis into $venv" >&2
  rm -rf "$venv"
  for try in 1 2 3; do
    if python3 -m venv --clear "$venv" >&2 \
      && "$venv/bin/pip" install -q --disable-pip-version-check --no-input --timeout 60 -r "$list" >&2; then
      cp "$list" "$venv/installed.txt"
      exec 8>&-
      return
    fi
    sleep "$try"
  done
  rm -rf "$venv"
  exec 8>&-
  echo "$me: schemathesis could not be installed (its words are above): the test of openapi.json is left out" >&2
}

# The bench leaves out by name what is still missing after this.
install_peers() {
  local missing=() peer
  for peer in mosquitto nginx haproxy; do
    # Debian puts servers where the PATH of users does not look.
    [[ -n $(PATH=$PATH:/usr/sbin:/usr/local/sbin type -P "$peer") ]] || missing+=("$peer")
  done
  ((${#missing[@]})) || return 0
  if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "$me: not installed: ${missing[*]}; as root on Debian or Ubuntu, $me --install-peers would" >&2
    return 0
  fi
  for peer in "${missing[@]}"; do
    echo "$me: installing $peer" >&2
    apt_install "$peer" || echo "$me: apt-get could not install $peer; its words are above" >&2
  done
}

# In a subshell, for the trap: the policy file must be gone whatever happens.
apt_install() (
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    # 101: "not allowed". Packages then do not start their services, which would take our ports.
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt_get() { apt-get -qq -o DPkg::Lock::Timeout=120 "$@" </dev/null >&2; }
  apt_get update || echo "$me: apt-get update failed; trying with the lists at hand" >&2
  apt_get install -y --no-install-recommends "$@"
)

main
