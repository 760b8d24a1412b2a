"""Which models this device knows: the shipped manifests, those made here of files, and those of the site; the later wins by name."""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from models.manifest import Manifest, ManifestError, manifest_from_mapping

SHIPPED = Path(__file__).parent / "manifests"
SITE = Path("/etc/hotspare/models")
MANIFEST_BYTES_MAX = 1 << 20


class CatalogError(ValueError):
    """No usable model of that name; the message names near ones, or what is wrong with its manifest."""


@dataclass(frozen=True)
class Catalog:
    """`problems`: file stem → why a manifest is not used. One bad site manifest takes no other model away, not even for a shipped
    manifest of its name to step in: a site that meant to change a model must not get the unchanged one."""

    manifests: Dict[str, Manifest]
    aliases: Dict[str, str]
    problems: Dict[str, str]

    def find(self, name: str) -> Manifest:
        """The manifest of a name or alias. Raises CatalogError."""
        if name in self.problems:
            raise CatalogError(self.problems[name])
        manifest = self.manifests.get(self.aliases.get(name, name))
        if manifest is not None:
            return manifest
        known = sorted({*self.manifests, *self.aliases})
        near = [one for one in known if name and name in one][:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(self.manifests)) or 'none'}"
        raise CatalogError(f"no model is called {name!r}; {hint}")


def site_folder(environment: Mapping[str, str]) -> Path:
    """HOTSPARE_SITE, else /etc/hotspare/models; it need not exist."""
    return Path(environment.get("HOTSPARE_SITE") or SITE)


def load_catalog(site: Optional[Path] = None, shipped: Path = SHIPPED, own: Optional[Path] = None) -> Catalog:
    """Read all manifests: those of this package, those that `hotspare convert` made of files (`own`), and those of the site, which win."""
    folders = [shipped, *([own] if own is not None else []), site_folder(os.environ) if site is None else site]
    manifests: Dict[str, Manifest] = {}
    problems: Dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            try:
                manifests[path.stem] = read_manifest(path)
                problems.pop(path.stem, None)
            except CatalogError as error:
                problems[path.stem] = str(error)
                manifests.pop(path.stem, None)
    return Catalog(manifests, _aliases(manifests, problems), problems)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a TOML file, which is called as the model is. Raises CatalogError with the path and the reason."""
    try:
        if path.stat().st_size > MANIFEST_BYTES_MAX:
            raise CatalogError(f"{path} has more than {MANIFEST_BYTES_MAX} bytes; a manifest holds facts, not data")
        manifest = manifest_from_mapping(_toml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ManifestError) as error:
        raise CatalogError(f"{path}: {error}") from error
    if manifest.name != path.stem:
        raise CatalogError(f"{path}: the file must be called {manifest.name}.toml, as the model is")
    return manifest


def _toml(text: str) -> Mapping[str, Any]:
    """Parse TOML. The parser is looked up here, for workers on Python 3.8 have none and read no catalogue."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"this is not TOML: {error}") from error


def _aliases(manifests: Mapping[str, Manifest], problems: Dict[str, str]) -> Dict[str, str]:
    """Alias → name. A name beats an alias, and an alias of two models is nobody's."""
    owners: Dict[str, List[str]] = {}
    for manifest in manifests.values():
        for alias in manifest.aliases:
            if alias not in manifests:
                owners.setdefault(alias, []).append(manifest.name)
    for alias, names in owners.items():
        if len(names) > 1:
            problems[alias] = f"the alias {alias!r} is claimed by {' and '.join(names)}; ask for one of them, or remove it from a manifest"
    return {alias: names[0] for alias, names in owners.items() if len(names) == 1}
