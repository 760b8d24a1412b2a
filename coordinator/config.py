"""The coordinator's settings: defaults, then one TOML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class CoordinatorConfigError(Exception):
    """The configuration cannot be used; the message names the file, the field and the fault."""


class Slice(BaseModel):
    """Unknown names are errors: a misspelt setting must not be silently without effect."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PrimarySettings(Slice):
    """The API that the fleet backs up. `url` is its base, as clients are told: `https://api.deepseek.com`."""

    url: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:_\[\]-]+(/[A-Za-z0-9._~/-]*)?$")]
    model: str = "deepseek-chat"
    key_file: Path | None = None
    interval_s: float = Field(default=30.0, gt=0)
    timeout_s: float = Field(default=5.0, gt=0)
    failures: int = Field(default=3, ge=1)
    passes: int = Field(default=4, ge=1)


class LeaseSettings(Slice):
    """`contingent`: warm nodes may serve as soon as the balancer sends them something: no gap before the third failed probe."""

    lease_s: float = Field(default=90.0, gt=0)
    renew_s: float = Field(default=30.0, gt=0)
    contingent: bool = True
    contingent_s: float = Field(default=3600.0, gt=0)
    min_active_s: float = Field(default=300.0, ge=0)
    command_deadline_s: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _leaves_room_for_a_lost_renewal(self) -> LeaseSettings:
        if 2 * self.renew_s > self.lease_s:
            raise ValueError(
                f"renew_s {self.renew_s:g} must be at most half of lease_s {self.lease_s:g}, or one lost renewal ends the lease"
            )
        return self


class BrokerSettings(Slice):
    host: str = "127.0.0.1"
    port: int = Field(default=1883, ge=1, le=65535)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    username: str = ""
    password_file: Path | None = None


class NginxSettings(Slice):
    """Where the rendered upstream goes and how nginx takes it up; commands are argument lists and run without a shell."""

    file: Path | None = None
    listen: str = "127.0.0.1:8088"
    bridge_port: int = Field(default=8089, ge=1, le=65535)
    test_command: tuple[str, ...] = ("nginx", "-t", "-q", "-c")
    reload_command: tuple[str, ...] = ("nginx", "-s", "reload")
    min_interval_s: float = Field(default=5.0, ge=0)
    read_timeout_s: float = Field(default=30.0, gt=0)


class HttpSettings(Slice):
    host: str = "127.0.0.1"
    port: int = Field(default=8090, ge=0, le=65535)
    token_file: Path | None = None


class CoordinatorSettings(Slice):
    name: str = "coordinator"
    database: Path
    primary: PrimarySettings
    broker: BrokerSettings = BrokerSettings()
    leases: LeaseSettings = LeaseSettings()
    nginx: NginxSettings = NginxSettings()
    http: HttpSettings = HttpSettings()


def load_coordinator_settings(file: Path) -> CoordinatorSettings:
    """Raises CoordinatorConfigError."""
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text())
        return CoordinatorSettings.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise CoordinatorConfigError(f"{file}: " + "; ".join(faults)) from error
    except (OSError, ValueError) as error:
        raise CoordinatorConfigError(f"{file}: {error}") from error
