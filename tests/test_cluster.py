"""The cluster's manifests: what they hold, what Ray says of them, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from kdscale.cli_cluster import cluster_app
from kdscale.core.catalog import DATA, TEACHERS
from kdscale.core.config import Distill, Embed, Execution
from kdscale.core.nodes import GROWS_TO, NodeType, growth, on_gpus_for, with_growth
from kdscale.core.types import ConfigError, ImpossibleResources
from kdscale.sweep.cluster import Cluster, load_cluster
from kdscale.sweep.cluster_check import (
    ClusterProblems,
    check_config,
    exported,
    problems,
    read_config,
)
from kdscale.sweep.cluster_kube import rayjob
from kdscale.sweep.cluster_ray import ray_on_aws, ray_on_this_machine

REPOSITORY = Path(__file__).parent.parent
Config = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """The repository's cluster, with names in place of placeholders."""
    described = load_cluster(REPOSITORY / "cluster.toml")
    names = {"image": "ami-1", "subnets": ("subnet-1",), "security_groups": ("sg-1",)}
    return described.replace(storage="s3://ours/runs", aws=described.aws.replace(**names))


@pytest.fixture
def config(cluster: Cluster) -> Config:
    return ray_on_aws(cluster)


def test_the_kept_manifests_are_what_the_description_gives() -> None:
    described = load_cluster(REPOSITORY / "cluster.toml")
    assert read_config(REPOSITORY / "cluster.yaml") == as_read(ray_on_aws(described))
    local = as_read(ray_on_this_machine(described))
    assert read_config(REPOSITORY / "cluster.local.yaml") == local


def as_read(document: Config) -> Config:
    return json.loads(json.dumps(document))


def test_ray_and_we_find_nothing_wrong(cluster: Cluster, config: Config) -> None:
    assert list(problems(config)) == []
    assert list(problems(ray_on_this_machine(cluster))) == []


def test_placeholders_are_all_that_is_wrong_with_the_kept_manifest() -> None:
    found = list(problems(read_config(REPOSITORY / "cluster.yaml")))
    assert len(found) == 4
    assert all("placeholder" in problem for problem in found)


def test_gpus_are_spot_and_the_head_runs_no_stage(config: Config) -> None:
    types = config["available_node_types"]
    spot = {name for name in types if "InstanceMarketOptions" in types[name]["node_config"]}
    assert spot == {"inference", "training"}
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["decode"]["resources"].keys() == {"CPU"}
    assert types["training"]["resources"]["training"] == types["training"]["resources"]["GPU"]
    profiles = {name: types[name]["node_config"]["IamInstanceProfile"]["Name"] for name in types}
    assert profiles["head"] not in {profiles[name] for name in types if name != "head"}
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())


def test_every_node_gets_the_same_variables_and_its_own_lock(config: Config) -> None:
    gpus = [config["available_node_types"][n]["worker_setup_commands"] for n in GPU_GROUPS]
    setups = [config["setup_commands"], *gpus]
    variables = [exported(commands) for commands in setups]
    assert variables[0] == variables[1] == variables[2]
    assert variables[0]["KDSCALE_STORAGE"] == "s3://ours/runs"
    assert variables[0]["MLFLOW_TRACKING_URI"].startswith("http://")
    assert "requirements.lock" in setups[0][-1]
    assert all("requirements-gpu.lock" in setup[-1] for setup in setups[1:])


GPU_GROUPS = ("inference", "training")


def test_locks_agree_on_every_version() -> None:
    cpu, gpu = locked("requirements.lock"), locked("requirements-gpu.lock")
    both = cpu.keys() & gpu.keys()
    assert len(both) > 100
    assert {name: cpu[name] for name in both} == {name: gpu[name] for name in both}
    assert {"boto3", "colorful", "opencensus"} <= both  # of Ray's launcher and job server


def locked(name: str) -> dict[str, str]:
    """Returns the versions that a lock has for a node."""
    lines = (REPOSITORY / name).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    node = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux"}
    kept = [each for each in wanted if each.marker is None or each.marker.evaluate(node)]
    return {each.name: str(each.specifier) for each in kept}


def put(*path: Any, value: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        place: Any = config
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def without(old: str, new: str = "") -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for holder in (config, *config["available_node_types"].values()):
            for name in ("setup_commands", "worker_setup_commands", *STARTS):
                if name in holder:
                    holder[name] = [command.replace(old, new) for command in holder[name]]

    return change


STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def also(*path: str, command: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        place: Any = config
        for name in path[:-1]:
            place = place[name]
        place.setdefault(path[-1], []).append(command)

    return change


NODE = ("available_node_types", "training", "node_config")
WORLD = {"FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("provider", "use_internal_ips", value=False), "public address"),
        (put("provider", "security_group", value={"IpPermissions": [WORLD]}), "open to the world"),
        (put(*NODE, "SecurityGroupIds", value=[]), "training: give SecurityGroupIds"),
        (
            put(*NODE, "NetworkInterfaces", value=[{"AssociatePublicIpAddress": True}]),
            "training: AssociatePublicIpAddress",
        ),
        (without("RAY_AUTH_MODE=token", "A=b"), "head: its setup must .* RAY_AUTH_MODE=token"),
        (put("file_mounts", value={}), "auth_token"),
        (without("host=127.0.0.1", "host=0.0.0.0"), "start_ray_commands.1: --dashboard-host"),
        (without("host=127.0.0.1", "host='0.0.0.0'"), "--dashboard-host=0.0.0.0"),
        (without("host=127.0.0.1", 'host "::"'), "--dashboard-host=::"),
        (without("ray start --head", "sh -c 'ray start --dashboard-host ::'"), "dashboard-host=::"),
        (lambda config: config.pop(STARTS[0]), "head_start_ray_commands: give yours"),
        (put("idle_timeout_minutes", value=0), "idle_timeout_minutes"),
        (put("setup_commands", value=[]), "decode: .* KDSCALE_STORAGE"),
        (without("s3://ours/runs", "/data/runs"), "decode: /data/runs is this node's own disk"),
        (without("requirements-gpu.lock", "requirements.lock"), "training: .*requirements-gpu"),
        (without("bash ~/kdscale/tools/setup_node.sh", "echo"), "head: .* install requirements"),
        (put("available_node_types", "training", "spot", value=True), "types.training: .*spot"),
        (put("head_node_type", value="nobody"), "head_node_type"),
        (put("provider", "type", value="gcp"), "gcp"),
    ],
)
def test_what_would_cost_or_leak_is_named(
    config: Config, change: Callable[[Config], None], message: str
) -> None:
    config = deepcopy(config)
    change(config)
    with pytest.raises(ClusterProblems, match=message):
        check_config(config, "cluster.yaml")


DISABLED = "export RAY_AUTH_MODE=disabled"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (without("ray start", "RAY_AUTH_MODE=disabled ray start"), r"head_start_ray_commands\.1"),
        (without("ray start", "RAY_AUTH_MODE='' ray start"), r"worker_start_ray_commands\.1"),
        (also("setup_commands", command=DISABLED), r"setup_commands\.2"),
        (also("initialization_commands", command=DISABLED), r"initialization_commands\.0"),
        (also("head_setup_commands", command="unset RAY_AUTH_MODE"), r"head_setup_commands\.0"),
        (also(*NODE[:2], "initialization_commands", command=DISABLED), r"training\.init.*\.0"),
    ],
)
def test_no_command_may_set_another_mode_than_the_token(
    config: Config, change: Callable[[Config], None], place: str
) -> None:
    config = deepcopy(config)
    change(config)
    with pytest.raises(ClusterProblems, match=f"{place}: set RAY_AUTH_MODE=token"):
        check_config(config, "cluster.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("provider", value=None), "provider: is null; give a value, or leave the field out"),
        (put("provider", value="aws"), "provider: 'aws' is not of type 'object'; change it"),
        (lambda config: config.pop("provider"), "the file: 'provider' is a required .*; give it"),
        (put("setup_commands", value=None), "setup_commands: is null"),
        (put("setup_commands", value=["ls", None]), r"setup_commands\.1: is null"),
        (put("available_node_types", value=None), "available_node_types: is null"),
        (lambda config: [config.pop(name) for name in TYPES], "available_node_types: give yours"),
        (put(*NODE, "IamInstanceProfile", value=None), "IamInstanceProfile: is null"),
        (put(*NODE, "NetworkInterfaces", value=["eni-1"]), r"NetworkInterfaces\.0: 'eni-1' is not"),
        (lambda config: config[NODE[0]]["training"].pop(NODE[2]), "training: 'node_config' is a"),
        (put(NODE[0], 1, value={}), "available_node_types: the name 1 is no text; .* quotes"),
        (put("file_mounts", value=None), "file_mounts: is null"),
        (put("file_mounts", "~/x", value=5), "file_mounts.~/x: 5 is not of type 'string'"),
    ],
)
def test_what_is_null_or_of_another_type_is_named(
    config: Config, change: Callable[[Config], None], message: str
) -> None:
    config = deepcopy(config)
    change(config)
    assert re.search(message, "\n".join(problems(config)))


TYPES = ("available_node_types", "head_node_type")


def test_ray_s_remarks_are_kept_from_the_terminal(config: Config, tmp_path: Path) -> None:
    sent = {"~/x": str(REPOSITORY / "requirements.lock")}  # a file: Ray says what Docker would do
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config | {"file_mounts": config["file_mounts"] | sent}))
    asked = CliRunner().invoke(cluster_app, ["check", str(file)], env={"COLUMNS": "400"})
    assert asked.output == f"{file}: nothing public, one storage, one lock for all\n"
    local = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    (found,) = problems(config | {"provider": local})
    assert found == "Ray: The field available_node_types is not supported for on-premise clusters."


def test_a_node_without_a_role_cannot_reach_an_object_store(config: Config) -> None:
    config = deepcopy(config)
    del config["available_node_types"]["decode"]["node_config"]["IamInstanceProfile"]
    assert list(problems(config)) == [
        "decode: give an IamInstanceProfile that may use s3://ours/runs"
    ]


def test_a_mounted_path_is_a_storage(config: Config) -> None:
    config = deepcopy(config)
    without("s3://ours/runs", "/shared/runs")(config)
    for holder in (config, *(config["available_node_types"][name] for name in GPU_GROUPS)):
        name = "setup_commands" if holder is config else "worker_setup_commands"
        holder[name].insert(0, "sudo mount -t nfs4 files.internal:/ /shared")
    assert list(problems(config)) == []


NO_GPU = {"instance_type": "x", "cpus": 4, "memory_gib": 8, "max_nodes": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Kd Scale"}, "name"),
        ({"idle_timeout_minutes": 0}, "idle_timeout_minutes"),
        ({"groups": {"training": NO_GPU}}, "groups.training has 0 GPUs"),
        ({"groups": {"decode": NO_GPU | {"min_nodes": 3}}}, "min_nodes=3 is above max_nodes=2"),
        ({"subnet": "subnet-1"}, "subnet"),
    ],
)
def test_descriptions_that_mean_nothing_are_refused(fields: Config, message: str) -> None:
    described = load_cluster(REPOSITORY / "cluster.toml")
    with pytest.raises(ConfigError, match=message):
        Cluster(**described.model_dump() | fields)


def test_ray_reads_the_same_nodes_from_the_manifest_for_kubernetes(cluster: Cluster) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    job = yaml.safe_load(yaml.safe_dump(rayjob(cluster, "python sweeps/quickstart.py --seeds 0,1")))
    spec = job["spec"]["rayClusterSpec"]
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": job["metadata"], "spec": spec})
    types = derived["available_node_types"]
    launcher = ray_on_aws(cluster)["available_node_types"]
    for role in cluster.groups:
        found = {name: n for name, n in types[role]["resources"].items() if name != "memory"}
        assert found == launcher[role]["resources"]
        assert types[role]["max_workers"] == launcher[role]["max_workers"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert derived["idle_timeout_minutes"] == cluster.idle_timeout_minutes
    assert spec["authOptions"] == {"mode": "token"}
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert "--seeds 0,1" in job["spec"]["entrypoint"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        drains = float(variables.pop("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 0))
        role = cluster.groups.get(group.get("groupName"))
        assert (drains > 60) == (role is not None and role.spot)
        assert drains <= pod.get("terminationGracePeriodSeconds", 30)
        assert variables == cluster.environment()


def test_workers_on_aws_watch_for_the_notice(cluster: Cluster) -> None:
    start = ray_on_aws(cluster)["worker_start_ray_commands"]
    assert "nohup kdscale cluster watch" in start[-1]
    assert "nohup" not in str(ray_on_this_machine(cluster))


def test_a_cluster_is_as_large_as_it_may_become(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    monkeypatch.setenv(GROWS_TO, cluster.environment()[GROWS_TO])
    total, to_come = with_growth({"CPU": 0.0, "memory": 1e9}, growth())
    assert total["GPU"] == 16 * 1 + 2 * 8
    assert total["training"] == 2 * 8
    assert total["memory"] == 1e9
    assert max(node["CPU"] for node in to_come) == 184
    assert on_gpus_for("training", 1.0) == {"training": 1.0}
    assert on_gpus_for("training", 0.0) == {}


def test_trainings_count_only_gpus_for_training(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    from kdscale.sweep.fitting import concurrent_trials

    monkeypatch.setenv(GROWS_TO, cluster.environment()[GROWS_TO])
    total, nodes = with_growth({}, growth())
    run = Execution(num_workers=12, gpus_per_worker=1, data_cpus=8)
    train = stage_of(Distill(student="vit_t16", loss="clip", run=run))
    assert concurrent_trials([train], total, nodes) == 1
    embed = stage_of(Embed(teacher=TEACHERS["clip_b16"], data=DATA["cc12m"], run=run))
    assert concurrent_trials([embed], total, nodes) == 1
    larger = stage_of(train.recipe.replace(run=run.replace(num_workers=20)))
    with pytest.raises(ImpossibleResources, match="20 GPUs for training, the cluster has 16"):
        concurrent_trials([larger], total, nodes)


def stage_of(recipe: Any) -> Any:
    from kdscale.sweep.stage import Stage

    fields: dict[str, Any] = dict.fromkeys(("total_steps", "flops", "bytes_out"))
    named = {"kind": recipe.kind, "key": "k", "name": "n", "recipe": recipe, "inputs": ()}
    return Stage(**named, reused=False, num_samples=8, **fields)


def test_clusters_that_do_not_tell_gpus_apart_are_asked_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(GROWS_TO, raising=False)
    assert growth() == ()
    assert on_gpus_for("training", 1.0) == {}
    monkeypatch.setenv(GROWS_TO, '[{"resources": {"CPU": 4}, "count": 2}]')
    assert growth() == (NodeType(resources={"CPU": 4}, count=2),)
    monkeypatch.setenv(GROWS_TO, "many")
    with pytest.raises(ConfigError, match="many"):
        growth()
