"""The cluster as Ray's cluster launcher reads it: on AWS, and on one machine over ssh."""

from __future__ import annotations

import shlex
from typing import Any

from kdscale.sweep.cluster import CPU_LOCK, GPU_LOCK, STORAGE, Cluster, Group, Node, resources_of

CODE = "~/kdscale"  # what nodes need of this repository
SENT = (
    "kdscale",
    "tools",
    CPU_LOCK,
    GPU_LOCK,
)  # `ray up` reads all of it, so not `.git` and `.venv`
HOME = "~/.kdscale"  # its variables and environment (tools/setup_node.sh), on every node
TOKEN = "~/.ray/auth_token"
HEAD_TYPE = "head"
PORT = 6379

# `ray submit` starts a plain program, which would start a Ray of its own without an address.
LAUNCHER = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "auto"}
START_HEAD = (
    f"ulimit -n 65536; ray start --head --port={PORT} --dashboard-host=127.0.0.1 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml --disable-usage-stats"
)
START_WORKER = f"ulimit -n 65536; ray start --address=$RAY_HEAD_IP:{PORT}"
# Hands the cloud's notice to Ray; the brackets keep pkill from finding its own command.
WATCH = (
    f"pkill -f '[k]dscale cluster watch'; nohup kdscale cluster watch > {HOME}/watch.log 2>&1 "
    "< /dev/null &"
)


def ray_on_aws(cluster: Cluster) -> dict[str, Any]:
    """Returns `cluster.yaml`: nodes without public addresses, each group with its own lock."""
    types: dict[str, Any] = {
        HEAD_TYPE: {
            "resources": {"CPU": 0},  # a sweep's driver must outlive spot nodes: no stage runs here
            "node_config": _instance(cluster, cluster.head, cluster.aws.head_profile),
        }
    }
    for role, group in cluster.groups.items():
        config = _instance(cluster, group, cluster.aws.worker_profile)
        if group.spot:
            config["InstanceMarketOptions"] = {"MarketType": "spot"}
        types[role] = {
            "min_workers": group.min_nodes,
            "max_workers": group.max_nodes,
            "resources": resources_of(role, group),
            "node_config": config,
        }
        if group.gpus:  # these replace the commands below
            types[role]["worker_setup_commands"] = _setup(cluster.environment(), GPU_LOCK)
    proxy = f"aws ssm start-session --region {cluster.aws.region} --target %h "
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(group.max_nodes for group in cluster.groups.values()),
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "provider": {
            "type": "aws",
            "region": cluster.aws.region,
            "use_internal_ips": True,
            "cache_stopped_nodes": False,
        },
        "auth": {
            "ssh_user": cluster.aws.ssh_user,
            "ssh_private_key": f"~/.ssh/{cluster.aws.key_name}.pem",
            "ssh_proxy_command": f"{proxy}--document-name AWS-StartSSHSession "
            "--parameters portNumber=%p",
            "ssh_proxy_use_node_id": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        **_shared(_setup(cluster.environment(), CPU_LOCK)),
        "worker_start_ray_commands": ["ray stop", START_WORKER, WATCH],
    }


def ray_on_this_machine(cluster: Cluster) -> dict[str, Any]:
    """Returns `cluster.local.yaml`: one node, which is the head and all workers."""
    local = cluster.local
    environment = {STORAGE: local.storage}
    return {
        "cluster_name": f"{cluster.name}-local",
        "max_workers": 0,
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "provider": {"type": "local", "head_ip": local.head_ip, "worker_ips": []},
        "auth": {"ssh_user": local.ssh_user, "ssh_private_key": "~/.ssh/id_ed25519"},
        **_shared(_setup(environment, CPU_LOCK)),
    }


def _instance(cluster: Cluster, node: Node | Group, profile: str) -> dict[str, Any]:
    """Returns what EC2 is asked for."""
    disk = {"VolumeSize": node.disk_gib, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": node.instance_type,
        "ImageId": cluster.aws.image,
        "KeyName": cluster.aws.key_name,
        "SubnetIds": list(cluster.aws.subnets),
        "SecurityGroupIds": list(cluster.aws.security_groups),
        "IamInstanceProfile": {"Name": profile},
        "MetadataOptions": {"HttpTokens": "required"},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }


def _shared(setup: list[str]) -> dict[str, Any]:
    """Returns what both providers have in common."""
    return {
        "file_mounts": {f"{CODE}/{name}": name for name in SENT} | {TOKEN: TOKEN},
        "rsync_exclude": ["__pycache__"],
        "setup_commands": setup,
        "head_start_ray_commands": ["ray stop", START_HEAD],
        "worker_start_ray_commands": ["ray stop", START_WORKER],
    }


def _setup(environment: dict[str, str], lock: str) -> list[str]:
    """Returns the commands that give a node the cluster's variables and a lock's environment."""
    variables = environment | LAUNCHER
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return [
        f"mkdir -p {HOME} && printf '%s\\n' {shlex.join(lines)} > {HOME}/env.sh",
        f"bash {CODE}/tools/setup_node.sh {lock}",
    ]
