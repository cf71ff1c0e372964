"""`server:` of kbsync.yaml."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from kbsync.references import is_reference

__all__ = ["Server", "Tls"]


class Tls(BaseModel):
    """`tls:` of the server: PEM files, relative to the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path
    key: Path


class Server(BaseModel):
    """`server:` of kbsync.yaml; absent: nothing listens."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    """The address to listen on, or `localhost`. Any but the machine's own loopback needs `tls`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """0: any that is free."""
    token: SecretStr | None = None
    """The bearer token, as `${NAME}` or `file:PATH`; null: data/server.token, made at the first start."""
    hosts: tuple[str, ...] = ()
    """Names that a request's Host header may have, beside `host` itself and those of loopback."""
    tls: Tls | None = None
    metrics: Literal["token", "open"] = "token"
    """Whether /metrics needs the token. `open` is for loopback only."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def names(self) -> frozenset[str]:
        """What a Host header may name, in lower case, without a port."""
        own = {self.host} | ({"localhost", "127.0.0.1", "::1"} if self.loopback else set())
        return frozenset(name.lower() for name in own | set(self.hosts))

    @field_validator("host")
    @classmethod
    def _address(cls, value: str) -> str:
        if value != "localhost":
            try:
                ipaddress.ip_address(value)
            except ValueError:
                raise ValueError("must be an IP address or localhost") from None
        return value

    @field_validator("token")
    @classmethod
    def _elsewhere(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not is_reference(value.get_secret_value()):
            raise ValueError("must be ${NAME} or file:PATH: a token does not stand in this file")
        return value

    @model_validator(mode="after")
    def _closed(self) -> Server:
        """What other machines can reach is encrypted, and answers nobody without the token (RELIABILITY R6.7)."""
        if not self.loopback and self.tls is None:
            raise ValueError(f"host {self.host} can be reached from other machines: it needs tls, or host: 127.0.0.1")
        if not self.loopback and self.metrics == "open":
            raise ValueError("metrics: open is for a loopback host only")
        return self
