#!/usr/bin/env bash
# Brings cluster.local.yaml up on this machine, sends it a sweep twice, and takes it down again.
#   unshare --mount --pid --net --fork --kill-child --mount-proc local_cluster.sh WORK SWEEP [ARGS]
# `ray stop`, which `ray up` and `ray down` run, ends every Ray process that it sees: in namespaces
# of its own it sees none but its own. So are Ray's directory, the user kdscale and sshd's port.
set -euo pipefail
work=$1 sweep=$2
shift 2
repo=$(cd "$(dirname "$0")/.." && pwd)
[ "$(tr '\0' ' ' < /proc/1/cmdline | grep -c local_cluster.sh)" = 1 ] || exit 99
home=$work/home
mkdir -p "$home/.ssh" "$home/.kdscale" "$work/ray" /tmp/ray
ip link set lo up
mount --bind "$work/ray" /tmp/ray
mount -t tmpfs tmpfs /run
{ sed "s|^root:.*|root:x:0:0::$home:/bin/bash|" /etc/passwd # ssh knows no other `~`
  echo "kdscale:x:0:0::$home:/bin/bash"; } > "$work/passwd"
mount --bind "$work/passwd" /etc/passwd

mkdir /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$home/.ssh/id_ed25519"
cp "$home/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
/usr/sbin/sshd -f /dev/null -h "$work/host_key" -o ListenAddress=127.0.0.1 -o StrictModes=no \
  -o PasswordAuthentication=no

# The environment is there already: setup_node.sh finds its lock.
ln -s "$(dirname "$PYTHON_BIN")" "$home/.kdscale/venv"
cp "$repo/requirements.lock" "$home/.kdscale/lock"
export HOME=$home PATH=$PYTHON_BIN:$PATH
unset RAY_ADDRESS KDSCALE_STORAGE MLFLOW_TRACKING_URI PYTHONPATH
export RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=1
ray get-auth-token --generate > /dev/null

cd "$repo"
launcher() { "$@" --cluster-name "kdscale-$$"; }
trap 'launcher ray down -y cluster.local.yaml' EXIT
timeout 20 ssh -o StrictHostKeyChecking=no kdscale@127.0.0.1 true
launcher ray up -y cluster.local.yaml
launcher ray submit cluster.local.yaml "$sweep" -- "$@"
echo "strangers: $(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/)"
ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
  python "sweeps/$(basename "$sweep")" "$@" --storage "$home/kdscale-runs"
