"""`notify:` of kbsync.yaml: the channels that notices go out on, and which ones."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from kbsync.policy import Name, Seconds
from kbsync.references import is_reference

__all__ = ["KINDS", "Channel", "Command", "Email", "Notify", "Webhook"]

Kind = Literal["held", "rejected", "conflict", "failed", "stale", "faded"]
KINDS: tuple[Kind, ...] = ("held", "rejected", "conflict", "failed", "stale", "faded")
"""What people may be told of; that it is over, they are told where they were told of it."""
Address = Annotated[str, Field(pattern=r"^[^@\s,;:<>\"]+@[^@\s,;:<>\"]+$", max_length=254)]


def _elsewhere(value: SecretStr | None) -> SecretStr | None:
    if value is not None and not is_reference(value.get_secret_value()):
        raise ValueError("must be ${NAME} or file:PATH: a secret does not stand in this file")
    return value


class _Channel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Name
    on: tuple[Kind, ...] = KINDS
    """The kinds of notices that go out here."""


class Webhook(_Channel):
    """POST of JSON, signed as Standard Webhooks (https://www.standardwebhooks.com) says."""

    type: Literal["webhook"]
    url: SecretStr
    """An https URL, or `${NAME}` or `file:PATH`: the addresses of chat services are secrets."""
    secret: SecretStr
    """The signing key, `whsec_` and base64, as `${NAME}` or `file:PATH`."""
    private_network: bool = False
    """Whether the host may lie in a private network."""
    insecure_http: bool = False
    """Whether plain http is allowed to a host other than this machine."""

    _secret = field_validator("secret")(_elsewhere)


class Command(_Channel):
    """A shell command in the workspace, with the notice as JSON on its stdin."""

    type: Literal["command"]
    run: Annotated[str, Field(min_length=1)]
    timeout: Annotated[Seconds, Field(gt=0, le=600)] = 30.0


class Email(_Channel):
    """A mail by SMTP."""

    type: Literal["email"]
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:_-]+$")]
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Default: 587 with starttls, 465 with tls, 25 with none."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """`none` for a server on this machine only."""
    user: str | None = None
    password: SecretStr | None = None
    """`${NAME}` or `file:PATH`."""
    sender: Address = Field(alias="from")
    to: Annotated[tuple[Address, ...], Field(min_length=1, max_length=50)]

    _secret = field_validator("password")(_elsewhere)

    @model_validator(mode="after")
    def _safe(self) -> Email:
        if self.security == "none" and not _is_loopback(self.host):
            raise ValueError("security: none is for a server on this machine only")
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        return self


Channel = Annotated[Webhook | Command | Email, Field(discriminator="type")]


class Notify(BaseModel):
    """`notify:` of kbsync.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: Annotated[int, Field(ge=1)] = 3
    """Passes of a policy that fail in a row before people are told."""
    channels: tuple[Channel, ...] = ()
    """Where notices go; without any they are only in `kbsync notices`."""

    @field_validator("channels")
    @classmethod
    def _named_apart(cls, value: tuple[Channel, ...]) -> tuple[Channel, ...]:
        names = [channel.name for channel in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two channels have the name {twice[0]}")
        return value


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
