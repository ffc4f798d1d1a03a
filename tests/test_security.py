"""What must not get in: code in files, archives that climb out, strangers in a cluster."""

from __future__ import annotations

import ast
import io
import tarfile
import zlib
from pathlib import Path

import pytest
import yaml
from conftest import pair
from typer.testing import CliRunner

from kdscale.core.config import DataSpec
from kdscale.data.shards import build_manifest

ROOT = Path(__file__).parent.parent


def test_no_code_reads_what_can_execute() -> None:
    """pickle reads what the driver sends within Ray's job, and nothing from files."""
    within_jobs = {"data/blocks.py", "stages/ask.py", "stages/streams.py"}
    package = ROOT / "kdscale"
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, given = (
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )
            place = f"{name}:{node.lineno} {called}"
            assert called not in {"eval", "exec", "yaml.load", "pickle.load", "os.system"}, place
            assert called != "pickle.loads" or name in within_jobs, place
            assert called != "torch.load" or given.get("weights_only") == "True", place
            assert given.get("weights_only", "True") == "True", place
            assert given.get("allow_pickle", "False") == "False", place
            assert given.get("trust_remote_code", "False") == "False", place
            assert given.get("shell", "False") == "False", place


def png_bomb(side: int = 60_000) -> bytes:
    """A PNG of a few kilobytes that is gigabytes when it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    size = side.to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_a_hostile_tar_escapes_nowhere_and_is_counted(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(pair("x", 1)[0][1])
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for name, data in [*pair("good", 1), *pair("../../out", 2), *pair("/root/out", 3)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        links = [tarfile.SYMTYPE, tarfile.LNKTYPE]
        devices = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
        for number, kind in enumerate((*links, *devices)):
            tar.addfile(entry(f"{number}.jpg", kind, str(tmp_path / "secret.jpg")))
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 7
            tar.addfile(info, io.BytesIO(b"caption"))
        bomb = png_bomb()
        for name, data in (("bomb.png", bomb), ("bomb.txt", b"caption")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    spec = DataSpec(name="hostile", urls=str(tmp_path / "in" / "*.tar"), max_bad_fraction=1.0)
    manifest = build_manifest(spec, num_threads=1)
    assert manifest.num_samples == 3
    assert manifest.causes() == {"missing_image": 5, "bomb": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_size_that_lies_ends_the_shard(tmp_path: Path) -> None:
    """A header may claim eight exabytes; what is read is what is there."""
    parts = dict(pair("a", 1))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    info = tarfile.TarInfo("b.jpg")
    info.size = 1 << 62
    whole = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + info.tobuf(tarfile.GNU_FORMAT) + b"short"
    (tmp_path / "a.tar").write_bytes(whole)
    spec = DataSpec(name="lying", urls=str(tmp_path / "a.tar"), max_bad_fraction=1.0)
    assert build_manifest(spec, num_threads=1).num_samples == 1


@pytest.mark.parametrize(
    "member",
    [
        entry("../out", tarfile.REGTYPE),
        entry("link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("link", tarfile.LNKTYPE, "../../out"),
        entry("device", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name} {member.type}",
)
def test_a_checkpoint_s_archive_writes_only_where_it_should(
    member: tarfile.TarInfo, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member)
    (tmp_path / "in").mkdir()
    from kdscale.stages.vlm_run import unpack

    with pytest.raises(tarfile.TarError):
        unpack(buffer.getvalue(), tmp_path / "in")
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


def test_a_cluster_without_a_token_is_refused(tmp_path: Path) -> None:
    kept = (ROOT / "cluster.yaml").read_text()
    assert "RAY_AUTH_MODE=token" in kept
    assert yaml.safe_load(kept)["provider"]["use_internal_ips"] is True
    (tmp_path / "open.yaml").write_text(
        kept.replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")
    )
    from kdscale.cli import app

    found = CliRunner().invoke(app, ["cluster", "check", str(tmp_path / "open.yaml")])
    assert found.exit_code == 2
    assert "RAY_AUTH_MODE=token, as on every node" in found.output
