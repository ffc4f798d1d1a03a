"""kdscale: Ray-distributed sweeps for vision-language distillation research."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdscale.core.config import (
        CkaSpec,
        DataSpec,
        Distill,
        Execution,
        MiniWorld,
        Pretrained,
        TowerSpec,
        ZeroShotSpec,
    )
    from kdscale.core.vlm_config import LanguageModelSpec, Lora, QuestionsSpec, Vlm
    from kdscale.sweep.grid import Pivot, Sweep, choose, product, zipped
    from kdscale.sweep.search import Search
    from kdscale.sweep.study import Study

__version__ = "0.1.0"
__all__ = [
    "CkaSpec",
    "DataSpec",
    "Distill",
    "Execution",
    "LanguageModelSpec",
    "Lora",
    "MiniWorld",
    "Pivot",
    "Pretrained",
    "QuestionsSpec",
    "Search",
    "Study",
    "Sweep",
    "TowerSpec",
    "Vlm",
    "ZeroShotSpec",
    "choose",
    "product",
    "zipped",
]
_SWEEP = {"Pivot", "Sweep", "choose", "product", "zipped"}
_OWN_FILE = {"Search": "sweep.search", "Study": "sweep.study"}
_VLM = {"LanguageModelSpec", "Lora", "QuestionsSpec", "Vlm"}


def __getattr__(name: str) -> Any:
    """Imports on first use: a data task needs none of it, and starts the sooner."""
    if name not in __all__:
        raise AttributeError(f"module 'kdscale' has no attribute {name!r}")
    home = "sweep.grid" if name in _SWEEP else "core.vlm_config" if name in _VLM else "core.config"
    return getattr(import_module(f"kdscale.{_OWN_FILE.get(name, home)}"), name)
