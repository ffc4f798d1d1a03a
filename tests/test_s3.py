"""The same storage, shards and cache on an S3 server: rclone's, which keeps real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import pair
from test_embed import distill_job, embed_job, fill, losses, tall
from worlds import PX

from kdscale.core.config import DataSpec
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StorageError
from kdscale.data.shards import Manifest, build_manifest
from kdscale.stages.embed import pending


@pytest.fixture(scope="module")
def remote(bucket: Path, write_tar: Any, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards in the bucket."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        parts = [p for i in range(16) for p in pair(f"{number}{i:04d}", 100 * number + i)]
        tar = write_tar(folder / f"{number:05d}.tar", parts)
        fsspec.filesystem("s3").put(str(tar), f"bucket/shards/{tar.name}")
    return build_manifest(DataSpec(name="t", urls="s3://bucket/shards/{00000..00001}.tar"))


def test_a_stage_lives_there(bucket: Path) -> None:
    storage = Storage("s3://bucket/runs")
    with pytest.raises(StorageError, match="does not exist"):
        storage.check_made("`kdscale run`")
    stage = StageStore(storage, "distill", "k")
    lease = Lease.acquire(stage)
    assert lease is not None
    with lease:
        assert Lease.acquire(stage) is None
        stage.finish({"a": 1})
    storage.check_made("`kdscale run`")
    assert stage.is_done()
    assert stage.record() == {"a": 1}
    assert not Lease.is_left(stage)
    assert (bucket / "runs/stages/distill/k/DONE").exists()


def test_cached_training_equals_online_there(remote: Manifest) -> None:
    root, teacher = "s3://bucket/runs", tall(224, 32)
    online = distill_job(root, remote, teacher)
    embed = embed_job(online)
    fill(embed)
    assert pending(embed) == []
    cached = distill_job(root, remote, teacher, teacher_outputs=f"embed:{embed.key}")
    assert cached.cache is not None
    assert cached.cache.root.startswith("s3://")
    assert losses(cached, (PX,)) == pytest.approx(losses(online, (PX, 224)), rel=1e-3)
