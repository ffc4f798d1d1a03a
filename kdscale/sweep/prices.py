"""Accelerators by name: how fast they compute and what an hour of them costs.

The numbers are data (`prices.toml`), which a file of one's own may replace field by field.
"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, model_validator

from kdscale.core.config import Spec
from kdscale.core.types import ConfigError, unknown_name

DEFAULT_ACCELERATOR = "h100"
DEFAULT_EFFICIENCY = 0.4  # of the peak; with an H100 396 TFLOP/s
PACKAGED = Path(__file__).with_name("prices.toml")


class Accelerator(Spec):
    """One kind of accelerator.

    Attributes:
        bf16_tflops: Peak of dense bf16 matrix products; None where there is no bf16.
        fp16_tflops: Likewise of fp16.
        on_demand: Price of an hour; None where it is not known.
        spot: Price of an hour that may be cut short, likewise.
    """

    bf16_tflops: float | None = Field(default=None, gt=0)
    fp16_tflops: float | None = Field(default=None, gt=0)
    on_demand: float | None = Field(default=None, ge=0)
    spot: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _has_a_peak(self) -> Self:
        if self.peak_tflops == 0:
            raise ValueError("give bf16_tflops or fp16_tflops")
        return self

    @property
    def peak_tflops(self) -> float:
        """Peak of 16-bit products, bf16 where there is bf16."""
        return self.bf16_tflops or self.fp16_tflops or 0.0


class Rates(Spec):
    """What turns operations into hours and hours into money.

    Attributes:
        name: The accelerator's name.
        efficiency: Share of its peak that training sustains.
        currency: Of the prices.
    """

    name: str
    accelerator: Accelerator
    efficiency: float = Field(default=DEFAULT_EFFICIENCY, gt=0, le=1)
    currency: str = "USD"

    @property
    def tflops(self) -> float:
        """What it is taken to sustain."""
        return self.accelerator.peak_tflops * self.efficiency

    def gpu_hours(self, flops: float) -> float:
        """Returns how many hours of one accelerator some operations take."""
        return flops / (self.tflops * 1e12) / 3600

    def price(self, *, spot: bool = False) -> float | None:
        """Returns the price of an hour, None where it is not known."""
        return self.accelerator.spot if spot else self.accelerator.on_demand

    def money(self, gpu_hours: float | None) -> dict[str, float | None]:
        """Returns what hours cost, on demand and spot; None where that is not known."""
        prices = {"on_demand": self.price(), "spot": self.price(spot=True)}
        return {
            name: None if price is None or gpu_hours is None else price * gpu_hours
            for name, price in prices.items()
        }

    def document(self) -> dict[str, Any]:
        """Returns what an estimate rests on as JSON."""
        return {
            "accelerator": self.name,
            "peak_tflops": self.accelerator.peak_tflops,
            "efficiency": self.efficiency,
            "effective_tflops": self.tflops,
            "currency": self.currency,
        }


def find_rates(
    name: str = DEFAULT_ACCELERATOR,
    efficiency: float = DEFAULT_EFFICIENCY,
    prices: Path | None = None,
) -> Rates:
    """Returns the rates of an accelerator.

    Args:
        name: Its name in the price file.
        efficiency: Share of its peak that training sustains.
        prices: A price file of one's own; what it does not say is taken from the packaged one.

    Raises:
        UnknownName: No price file has such an accelerator.
        ConfigError: The file cannot be read, or a value in it makes no sense.
    """
    known, currency = _read(PACKAGED)
    if prices is not None:
        own, own_currency = _read(prices)
        if own_currency not in (None, currency):
            # Packaged prices would be taken for amounts of the other currency.
            known = {k: {**v, "on_demand": None, "spot": None} for k, v in known.items()}
            currency = own_currency
        known = known | {k: {**known.get(k, {}), **v} for k, v in own.items()}
    if name not in known:
        raise unknown_name("accelerator", name, known)
    return Rates(
        name=name,
        accelerator=Accelerator(**known[name]),
        efficiency=efficiency,
        currency=currency or "USD",
    )


@lru_cache(maxsize=1)
def default_rates() -> Rates:
    """Returns the rates that hold where nothing else is said."""
    return find_rates()


def _read(file: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Reads a price file: {accelerator: its fields}, and the currency where it names one."""
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the price file {file}: {error}") from error
    found = document.pop("accelerators", None)
    currency = document.pop("currency", None)
    tables = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if document or not tables or not all(isinstance(entry, dict) for entry in tables.values()):
        raise ConfigError(
            f"{file} is no price file: it holds `currency` and a table [accelerators.NAME] for "
            f"each, with bf16_tflops, fp16_tflops, on_demand, spot; found {sorted(document)}"
        )
    return tables, currency
