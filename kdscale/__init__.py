"""kdscale: Ray-distributed sweeps for vision-language distillation research."""

from kdscale.core.config import DataSpec, Distill, Execution, MiniWorld, TowerSpec, ZeroShotSpec
from kdscale.sweep.grid import Pivot, Sweep, choose, product, zipped

__version__ = "0.1.0"
__all__ = [
    "DataSpec",
    "Distill",
    "Execution",
    "MiniWorld",
    "Pivot",
    "Sweep",
    "TowerSpec",
    "ZeroShotSpec",
    "choose",
    "product",
    "zipped",
]
