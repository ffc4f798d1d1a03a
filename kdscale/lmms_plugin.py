"""Makes kdscale's checkpoints a model of lmms-eval: `lmms_eval --model kdscale`.

lmms-eval is no dependency. Where it is installed, it finds this function through the entry point
group `lmms_eval.models` and imports `kdscale.lmms_model` only when the model is asked for.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "kdscale"
CLASS_PATH = "kdscale.lmms_model.KdscaleVlm"


def manifest() -> Any:
    """Returns the `ModelManifest` that lmms-eval registers (its version 0.7)."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
