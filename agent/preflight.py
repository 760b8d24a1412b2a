"""What a configuration needs of this machine, asked once before anything starts: names that the catalogue knows, files that can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent.config import ConfigurationError, Settings
from agent.http.keys import KeysError, KeysFile, read_keys
from models.catalog import Catalog, CatalogError


def checked(settings: Settings, catalog: Catalog) -> Settings:
    """The settings with every model under its own name. Raises ConfigurationError that names all that is wrong."""
    problems = [*_model_problems(settings, catalog), *_file_problems(settings)]
    if problems:
        raise ConfigurationError("; ".join(problems))

    def own(name: str) -> str:
        return catalog.find(name).name

    models = settings.models.model_copy(
        update={
            "serve": tuple(dict.fromkeys(map(own, settings.models.serve))),
            "aliases": {name: alias.model_copy(update={"model": own(alias.model)}) for name, alias in settings.models.aliases.items()},
        }
    )
    cameras = tuple(camera.model_copy(update={"model": own(camera.model)}) for camera in settings.cameras)
    return settings.model_copy(update={"models": models, "cameras": cameras})


def keys_file(file: Path | None) -> KeysFile | None:
    """The API keys that clients must have; the keys themselves are nowhere on the device. Raises ConfigurationError."""
    if file is None:
        return None
    try:
        return KeysFile(file, read_keys(file))
    except KeysError as error:
        raise ConfigurationError(f"http.keys_file: {error}") from error


def _model_problems(settings: Settings, catalog: Catalog) -> Iterator[str]:
    named: Mapping[str, tuple[str, ...]] = {
        "models.serve": settings.models.serve,
        "models.aliases": tuple(alias.model for alias in settings.models.aliases.values()),
        "cameras": tuple(camera.model for camera in settings.cameras),
    }
    for field, names in named.items():
        for name in names:
            try:
                manifest = catalog.find(name)
            except CatalogError as error:
                yield f"{field}: {error}"
                continue
            if field == "cameras" and manifest.task != "detection":
                yield f"cameras: {manifest.name} is a model for {manifest.task}; a camera needs one for detection"
    for name, alias in settings.models.aliases.items():
        if name in catalog.manifests:
            yield f"models.aliases: {name} is a model's own name, which an alias would hide"
        target = catalog.manifests.get(catalog.aliases.get(alias.model, alias.model))
        if alias.adapter and target is not None and f"adapter.{alias.adapter}.config" not in target.files:
            kept = sorted(role.split(".")[1] for role in target.files if role.startswith("adapter.") and role.endswith(".config"))
            yield f"models.aliases: {target.name} has no adapter {alias.adapter!r} for {name}; it has {', '.join(kept) or 'none'}"


def _file_problems(settings: Settings) -> Iterator[str]:
    if shutil.which(settings.worker.python) is None:
        yield f"worker.python: {settings.worker.python} is no program that this user may run"
    mqtt, primary = settings.mqtt, settings.primary
    files = {
        "mqtt.ca": mqtt.ca,
        "mqtt.certificate": mqtt.certificate,
        "mqtt.key": mqtt.key,
        "mqtt.password_file": mqtt.password_file,
        "primary.key_file": primary.key_file,
        "gateway.key_file": settings.gateway.key_file,
        "cache.url_file": settings.cache.url_file,
    }
    for field, file in files.items():
        if file is None:
            continue
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            yield f"{field}: {file} cannot be read: {error.strerror}"
    if mqtt.key is not None and mqtt.certificate is None:
        yield "mqtt.key: a key without mqtt.certificate is of no use"
    if settings.gateway.primary and settings.http.keys_file is not None and settings.gateway.key_file is None:
        yield "gateway.key_file: needed where http.keys_file is set, since the keys of this node would be sent to the primary"
    try:
        keys_file(settings.http.keys_file)
    except ConfigurationError as error:
        yield str(error)
