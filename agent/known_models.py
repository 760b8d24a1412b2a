"""The catalogue of a node, which sees manifests that are added or changed while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from models.catalog import Catalog, CatalogError, load_catalog, site_folder
from models.manifest import Manifest
from models.store import Store

MANIFESTS = "manifests"


def own_manifests(store: Path) -> Path:
    """Where `hotspare convert` keeps the manifests that it makes of files: beside what it makes of them."""
    return store / MANIFESTS


class KnownModels:
    """`find` looks at the folders' times first and reads them again only when something changed."""

    def __init__(self, store: Path) -> None:
        self._folders = (own_manifests(store), site_folder(os.environ))
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._catalog = Catalog({}, {}, {})

    @property
    def catalog(self) -> Catalog:
        seen = tuple(self._marks())
        if seen != self._seen:
            self._catalog = load_catalog(own=self._folders[0])
            self._seen = seen
        return self._catalog

    def find(self, name: str) -> Manifest:
        """Raises CatalogError."""
        return self.catalog.find(name)

    def own_name(self, model: str) -> str:
        """A model's name for an alias; an unknown one fails later, where it can be reported."""
        try:
            return self.find(model).name
        except CatalogError:
            return model

    def pinned(self, store: Store, models: Iterable[str]) -> frozenset[str]:
        """What must not go to make room: the names of these models and the digests of their files."""
        names: set[str] = set()
        for model in models:
            try:
                manifest = self.find(model)
            except CatalogError:
                names.add(model)
                continue
            names |= {manifest.name, *(store.expected_sha256(file) for file in manifest.files.values())}
        return frozenset(names - {""})

    def _marks(self) -> Iterable[tuple[str, int, int]]:
        for folder in self._folders:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
                yield from ((entry.path, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in entries)
            except OSError:
                continue
