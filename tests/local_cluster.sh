#!/usr/bin/env bash
# Brings cluster.local.yaml up on this machine, sends it a sweep in both ways, and takes it down.
#   unshare --mount --pid --net --fork --kill-child --mount-proc tests/local_cluster.sh BIN WORK SWEEP [OPTION ...]
# BIN is the environment's, WORK an empty directory, SWEEP a file below this repository; seed 0 is
# submitted by `ray submit`, seed 1 by `ray job submit`, each with the OPTIONs, and their stages are in
# WORK/home/kdscale-runs.
#
# `ray stop`, which `ray up` and `ray down` run, ends every Ray process that it sees: in a process
# namespace of its own it sees no others. So are the user, Ray's directory and the ports.
set -euo pipefail
[ $$ = 1 ] || { echo "run me in namespaces of my own: unshare, as above" >&2; exit 2; }
bin=$1 work=$2 sweep=$3
shift 3
cd "$(dirname "$0")/.."
home=$work/home
mkdir -p "$home/.ssh" "$home/.kdscale" "$home/.ray" "$work/ray" /tmp/ray
ip link set lo up
mount --bind "$work/ray" /tmp/ray
mount -t tmpfs tmpfs /run
{ # ssh takes `~` from here, not from HOME
  sed "s|^root:.*|root:x:0:0::$home:/bin/bash|" /etc/passwd
  echo "kdscale:x:0:0::$home:/bin/bash"
} > "$work/passwd"
mount --bind "$work/passwd" /etc/passwd

mkdir /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$home/.ssh/id_ed25519"
cp "$home/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
/usr/sbin/sshd -f /dev/null -h "$work/host_key" -o ListenAddress=127.0.0.1 -o StrictModes=no \
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no

# The environment is there already; tools/setup_node.sh sees that by its lock.
ln -s "$(dirname "$bin")" "$home/.kdscale/venv"
cp requirements.lock "$home/.kdscale/lock"
echo "export RAY_DASHBOARD_STARTUP_TIMEOUT_S=600 RAY_raylet_start_wait_time_s=600" \
  > "$home/.bashrc" # the machine may be busy
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$home/.ray/auth_token")
export HOME=$home PATH=$bin:$PATH RAY_AUTH_MODE=token
unset RAY_ADDRESS KDSCALE_STORAGE MLFLOW_TRACKING_URI PYTHONPATH

launcher() { "$@" --cluster-name "$(basename "$work")"; }
down() { launcher ray down -y cluster.local.yaml; }
trap down EXIT
launcher ray up -y cluster.local.yaml
ray submit --cluster-name "$(basename "$work")" cluster.local.yaml "$sweep" -- --seeds 0 "$@"
launcher ray exec cluster.local.yaml "TERM=dumb kdscale cluster watch --help"
echo "without the token: $(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/)"
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python "$sweep" --seeds 1 "$@"
