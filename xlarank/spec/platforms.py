"""Devices of one platform that serve: `PlatformOptions`."""

from __future__ import annotations

import dataclasses

from xlarank.errors import ConfigError
from xlarank.spec.fields import check_name, from_words, to_integer, to_number

__all__ = ["PlatformOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformOptions:
    """Devices of one of JAX's platforms, and what they cost."""

    name: str
    """As JAX calls it, such as cpu or cuda."""

    devices: int | None = None
    """How many, the first ones; all by default. Of cpu so many are made."""

    cost: float = 1.0
    """Of a second of each: of devices that meet a request's deadline the one with the least takes it."""

    def __post_init__(self) -> None:
        check_name("platform", self.name)
        where = f"platform {self.name}"
        if self.devices is not None:
            to_integer(where, "devices", self.devices, least=1)
        if to_number(where, "cost", self.cost) <= 0:
            raise ConfigError(f"{where}: cost must be > 0; was {self.cost}")

    @classmethod
    def parse(cls, text: str) -> PlatformOptions:
        """What a text says, such as ``cuda`` or ``cpu,devices=2,cost=0.1``.

        Raises:
          ConfigError: for a field that there isn't, or that is no such value.
        """
        name, fields = from_words("platform", text, "NAME", {"devices": int, "cost": float})
        return cls(name=name, **fields)

    def __str__(self) -> str:
        devices = "" if self.devices is None else f",devices={self.devices}"
        return f"{self.name}{devices}" + ("" if self.cost == 1 else f",cost={self.cost:g}")
