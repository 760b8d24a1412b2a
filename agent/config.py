"""The node's configuration: defaults, then one TOML file, then the environment (`HOTSPARE__MQTT__HOST=…`); handed out in slices.

Validators are pure: no file, no network, no GPU is touched here. Secrets are paths to files, never values.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from agent.protocol.operations import Target
from agent.worker.addresses import FORMS, is_source
from models.manifest import Precision
from models.store import default_root

ADVERTISED = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252}):(\d{1,5})$")
NODE_ID = re.compile(r"^[a-z0-9][a-z0-9-]{2,62}$")
EXIT_CONFIGURATION = 78  # EX_CONFIG of sysexits.h; the unit does not restart on it


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names file, field, value and what is allowed."""


class Slice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _node_id(value: str) -> str:
    if not NODE_ID.match(value):
        raise ValueError(f"node id {value!r} must match {NODE_ID.pattern}: it is the client id and a level of every topic")
    return value


def _advertised(value: str) -> str:
    match = ADVERTISED.match(value)
    if value and (match is None or not 0 < int(match[2]) < 65536):
        raise ValueError(f"{value!r} is not HOST:PORT, such as 10.0.0.7:8080, edge.example:8080 or [fd00::7]:8080")
    return value


def _source(value: str) -> str:
    if not is_source(value):
        raise ValueError(f"a source is one of {FORMS}")
    return value


def default_node_id() -> str:
    """The host's name in the letters that a node id may have."""
    name = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")
    return name if NODE_ID.match(name) else f"node-{name}"[:63].rstrip("-") or "node-unnamed"


def default_state_folder() -> Path:
    return default_root(os.environ)


class NodeSettings(Slice):
    id: Annotated[str, AfterValidator(_node_id)] = Field(default_factory=default_node_id)
    state: Path = Field(default_factory=default_state_folder)
    weight: int = Field(default=1, ge=1, le=100)
    max_requests_per_s: float = Field(default=2.0, gt=0)


class HttpSettings(Slice):
    """Where clients reach the node. `advertise` is what the coordinator puts into nginx; empty: host and port as bound.

    `keys_file` has the SHA-256 of each API key in hex, one a line, with a name and limits where wanted (agent/http/keys.py); without the
    file no key is asked for. A key is made with `openssl rand -hex 24`, its line with `printf %s KEY | sha256sum | cut -c1-64`.

    in_flight   inference requests that this node answers itself at the same time; one more is told to come back (429)
    forwarded   those that wait for the primary, or for a kept answer, beside them
    names       public names by which browsers may ask for cameras, events and orders where no key is asked for; plain addresses, local
                names, `host` and `advertise` always may
    """

    host: str = Field(default="127.0.0.1", pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:_-]{0,252}$")
    port: int = Field(default=8080, ge=0, le=65535)
    advertise: Annotated[str, AfterValidator(_advertised)] = ""
    keys_file: Path | None = None
    in_flight: int = Field(default=32, ge=1, le=4096)
    forwarded: int = Field(default=256, ge=1, le=4096)
    names: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,252}$")], ...] = ()


class MqttSettings(Slice):
    """The broker. An empty host means standalone: no coordinator, the node always serves."""

    host: str = ""
    port: int = Field(default=1883, ge=1, le=65535)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    username: str = ""
    password_file: Path | None = None
    heartbeat_active_s: float = Field(default=10.0, gt=0)
    heartbeat_standby_s: float = Field(default=30.0, gt=0)


class PrimarySettings(Slice):
    """The cloud API this node backs up, probed by the node itself only while the coordinator is out of reach. Empty URL: no autonomy."""

    url: str = ""
    model: str = "deepseek-chat"
    key_file: Path | None = None
    interval_s: float = Field(default=30.0, gt=0)
    timeout_s: float = Field(default=5.0, gt=0)
    failures: int = Field(default=3, ge=1)
    passes: int = Field(default=4, ge=1)
    autonomous_max_s: float = Field(default=24 * 3600.0, gt=0)


class GatewaySettings(Slice):
    """Local clients talk to this node only; it asks `primary` (a URL without /v1) while that is well, and answers itself when not.

    model        what the probe asks for one token, each `probe_s` that brought no good answer
    key_file     this node's key there; without it each client's own is passed on
    rename       a client's name of a model → the primary's
    hedge_s      after so long without a token the local model is asked too, and the first one answers; 0: never
    continues    a stream that dies half-way is finished by the local model; else it ends with an error event
    retry_share  second attempts as a share of requests
    """

    primary: Annotated[str, Field(pattern=r"^(https?://[^/?#\s@]+[^?#\s]*)?$")] = ""
    model: str = "deepseek-chat"
    key_file: Path | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    connect_s: float = Field(default=3.0, gt=0, le=60)
    first_byte_s: float = Field(default=10.0, gt=0, le=600)
    first_token_s: float = Field(default=10.0, gt=0, le=600)
    between_tokens_s: float = Field(default=15.0, gt=0, le=600)
    answer_s: float = Field(default=600.0, gt=0, le=3600)
    hedge_s: float = Field(default=0.0, ge=0, le=600)
    continues: bool = True
    retry_share: float = Field(default=0.1, ge=0, le=1)
    probe_s: float = Field(default=30.0, gt=0)
    probe_timeout_s: float = Field(default=5.0, gt=0)


class CacheSettings(Slice):
    """Answers that are given again to the same request, word for word; kept in the state folder, or in Redis where `url` names one.

    ttl_s       how long; 0: nothing is kept
    keeps_all   also answers that were drawn at random; else only those of temperature 0 or with a seed
    is_shared   one API key's answers are given to another
    """

    ttl_s: float = Field(default=3600.0, ge=0, le=30 * 86400)
    url: Annotated[str, Field(pattern=r"^((rediss?|unix)://\S+)?$")] = ""
    url_file: Path | None = None
    deadline_ms: float = Field(default=10.0, gt=0, le=1000)
    entries: int = Field(default=10_000, ge=1, le=1_000_000)
    budget_mb: float = Field(default=64.0, gt=0, le=16_384)
    keeps_all: bool = False
    is_shared: bool = False


class BatchSettings(Slice):
    """Files of requests (`/v1/files`, `/v1/batches`), kept in the state folder: the oldest that no batch uses goes first when something is
    older than `keep_days`, or when all of them take more than `budget_mb`. `keep_free_mb` of the disk are left to the rest of the node.

    file_mb, lines   the largest file, and the requests of one
    at_once          requests that are asked at the same time, of all batches together
    """

    file_mb: float = Field(default=200.0, gt=0, le=4096)
    lines: int = Field(default=50_000, ge=1, le=1_000_000)
    budget_mb: float = Field(default=1024.0, gt=0)
    keep_free_mb: float = Field(default=512.0, ge=0)
    keep_days: float = Field(default=30.0, gt=0, le=365)
    at_once: int = Field(default=4, ge=1, le=64)


class WorkerSettings(Slice):
    """`python` is the interpreter that has the device's runtime: on JetPack the system's, since only that one has TensorRT."""

    python: Path = Path(sys.executable)
    threads: int = Field(default=0, ge=0, le=64)
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    context_tokens: int = Field(default=2048, ge=64)
    slots: int = Field(default=4, ge=1, le=64)
    hang_s: float = Field(default=120.0, gt=0)


class Alias(Slice):
    """Another name for a model, perhaps with an adapter; in short `"model"` or `"model:adapter"`. `thinking`: whether the model thinks
    where a request does not say; left out, the model's own way."""

    model: str = Field(min_length=1)
    adapter: str = ""
    thinking: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        model, _, adapter = values.partition(":")
        return {"model": model, "adapter": adapter}


class ModelSettings(Slice):
    """`store` holds artefacts and engines; empty: the node's state folder.

    `budget_gb`: most that the store may take, 0: what the disk has. What is neither wanted nor in use goes first, least recently used.
    `idle_s`: a text model that nobody asked for so long is taken out of memory, and loaded again for who asks next; 0: it stays warm.
    `keep_free_mb`: with less memory free than this, the text model that rested longest is taken out, if it rested for half a minute.
    """

    store: Path | None = None
    budget_gb: float = Field(default=0.0, ge=0)
    idle_s: float = Field(default=0.0, ge=0)
    keep_free_mb: int = Field(default=128, ge=0)
    serve: tuple[str, ...] = ("smollm2-135m-instruct", "all-minilm-l6-v2")
    aliases: dict[str, Alias] = Field(default_factory=dict)


class ConvertSettings(Slice):
    """How engines are built, where neither an order nor a manifest says otherwise.

    target           `auto`: TensorRT where `worker.python` has it and a driver answers, else ONNX Runtime
    precision        where the ladder begins that ends with fp32; `auto`: fp16 on a GPU, fp32 on a CPU
    accept_unverified  serve engines that are not proven to be the model they were made from
    calibration      folder that holds the pictures and texts for int8, by the names that orders may give
    workspace_share  of the memory that is free when a build begins, which TensorRT may use to try things in
    """

    target: Target = "auto"
    precision: Precision = "auto"
    accept_unverified: bool = False
    calibration: Path | None = None
    workspace_share: float = Field(default=0.5, gt=0, le=0.9)
    timeout_s: float = Field(default=2 * 3600.0, gt=0)
    nice: int = Field(default=10, ge=0, le=19)


class CameraSettings(Slice):
    """One camera pipeline; the fields beyond these are those of PipelineSettings in agent/worker/settings.py. The worker checks them, and
    one that it refuses is reported as failed: a bad camera does not keep the node from serving."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    source: Annotated[str, AfterValidator(_source)]
    model: str

    def pipeline(self) -> dict[str, Any]:
        return self.model_dump()


class EventSettings(Slice):
    """What cameras saw, kept on this node: the oldest goes first when something is older than `keep_days`, when pictures and clips take
    more than `budget_gb`, or when the disk has less than `keep_free_gb` left. `media` is their folder; empty: in the state folder."""

    media: Path | None = None
    keep_days: float = Field(default=14.0, gt=0, le=3650)
    budget_gb: float = Field(default=4.0, gt=0)
    keep_free_gb: float = Field(default=0.5, ge=0)
    keep_count: int = Field(default=100_000, ge=1, le=1_000_000)


class HomeAssistantSettings(Slice):
    """Cameras as devices of Home Assistant, over the node's broker. `prefix` is its discovery prefix, there `homeassistant` unless changed;
    empty: off. `image_s`: seconds between two pictures of one camera, at least; `image_idle_s`: at most, while nothing is seen."""

    prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*)?$")
    image_s: float = Field(default=5.0, ge=1)
    image_idle_s: float = Field(default=60.0, ge=1)


class DemoSettings(Slice):
    """Only `hotspare demo` sets this: where its stand-in primary can be switched off and on."""

    switch_url: str = ""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="HOTSPARE__", env_nested_delimiter="__")

    node: NodeSettings = NodeSettings()
    http: HttpSettings = HttpSettings()
    mqtt: MqttSettings = MqttSettings()
    primary: PrimarySettings = PrimarySettings()
    gateway: GatewaySettings = GatewaySettings()
    cache: CacheSettings = CacheSettings()
    batches: BatchSettings = BatchSettings()
    worker: WorkerSettings = WorkerSettings()
    models: ModelSettings = ModelSettings()
    convert: ConvertSettings = ConvertSettings()
    cameras: tuple[CameraSettings, ...] = ()
    events: EventSettings = EventSettings()
    home_assistant: HomeAssistantSettings = HomeAssistantSettings()
    demo: DemoSettings = DemoSettings()


def load_settings(file: Path | None) -> Settings:
    """Defaults, then `file`, then the environment. Raises ConfigurationError."""

    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            toml = (TomlConfigSettingsSource(settings_cls, toml_file=file),) if file else ()
            return (env_settings, *toml)

    if file is not None and not file.is_file():
        raise ConfigurationError(f"{file} is not a file; give --config the path of a TOML file, or leave it out for the defaults")
    try:
        settings = FromFile()
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigurationError(f"{file or 'environment'}: " + "; ".join(lines)) from error
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{file}: {error}") from error
    identifiers = [camera.id for camera in settings.cameras]
    if len(set(identifiers)) != len(identifiers):
        raise ConfigurationError(f"cameras: the ids {identifiers} are not all different")
    return settings
