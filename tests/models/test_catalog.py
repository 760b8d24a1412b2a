from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from models.catalog import SHIPPED, CatalogError, load_catalog, read_manifest
from models.manifest import ClassificationManifest, DetectionManifest, GenerationManifest, manifest_from_mapping
from models.record import to_mapping
from models.sources import base_name

TINY = """
name = "{name}"
aliases = {aliases}
task = "embedding"
format = "onnx"
licence = "MIT"
summary = "{summary}"
files.model.source = "file:/models/tiny.onnx"
embedding = {{ dimensions = 8, max_tokens = 16 }}
"""


def add(folder: Path, name: str, aliases: list[str] | None = None, summary: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(TINY.format(name=name, aliases=aliases or [], summary=summary))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_manifest_loads_and_round_trips(path: Path) -> None:
    manifest = read_manifest(path)
    assert manifest_from_mapping(to_mapping(manifest)) == manifest
    assert manifest.summary and manifest.licence == "Apache-2.0"
    assert "model" in manifest.files, "the role of the weights"
    assert len({base_name(file) for file in manifest.files.values()}) == len(manifest.files)
    for file in manifest.files.values():
        assert file.sha256 or file.source.startswith("hf:"), "only the hub's files may be recorded at first use"


def test_shipped_catalogue_has_what_it_promises(tmp_path: Path) -> None:
    catalog = load_catalog(tmp_path)
    assert catalog.problems == {}
    assert catalog.find("rt-detr") is catalog.find("rtdetr-r18vd")
    detr = catalog.find("detr-resnet-50")
    assert isinstance(detr, DetectionManifest)
    assert (detr.detection.scores, detr.detection.resize, len(detr.detection.labels)) == ("softmax", "shortest_edge", 91)
    assert (detr.detection.labels[1], detr.detection.labels[17], detr.detection.labels[90]) == ("person", "cat", "toothbrush")
    for name, labels in (("deimv2-femto", 80), ("deimv2-atto", 80), ("rtdetr-r18vd", 80), ("dfine-nano-coco", 80)):
        manifest = catalog.find(name)
        assert isinstance(manifest, DetectionManifest)
        assert len(set(manifest.detection.labels)) == labels
    assert isinstance(catalog.find("qwen2.5-0.5b-instruct"), GenerationManifest)
    assert isinstance(catalog.find("mistral-7b"), GenerationManifest)
    assert isinstance(catalog.find("mobilebert"), ClassificationManifest)


def test_pinned_digests_are_those_of_the_mirror(test_data: Path, tmp_path: Path) -> None:
    catalog = load_catalog(tmp_path)
    for name in ("deimv2-femto", "deimv2-femto-deploy", "deimv2-atto"):
        file = catalog.find(name).files["model"]
        data = (test_data / "models" / base_name(file)).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.size_bytes)


def test_site_wins_by_name(tmp_path: Path) -> None:
    shipped, site = tmp_path / "shipped", tmp_path / "site"
    add(shipped, "tiny", summary="shipped")
    add(shipped, "other")
    add(site, "tiny", summary="site")
    catalog = load_catalog(site, shipped)
    assert catalog.find("tiny").summary == "site"
    assert sorted(catalog.manifests) == ["other", "tiny"]


def test_broken_site_manifest_takes_away_only_its_own_model(tmp_path: Path) -> None:
    """And does not let the shipped one of its name step in."""
    shipped, site = tmp_path / "shipped", tmp_path / "site"
    add(shipped, "tiny")
    add(shipped, "other")
    add(site, "fine")
    (site / "tiny.toml").write_text('name = "tiny')
    catalog = load_catalog(site, shipped)
    assert sorted(catalog.manifests) == ["fine", "other"]
    with pytest.raises(CatalogError, match=r"site/tiny\.toml: this is not TOML"):
        catalog.find("tiny")


def test_site_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "mine")
    monkeypatch.setenv("HOTSPARE_SITE", str(tmp_path))
    assert load_catalog().find("mine").name == "mine"


def test_unknown_name_tells_near_ones(tmp_path: Path) -> None:
    catalog = load_catalog(tmp_path)
    with pytest.raises(CatalogError, match="no model is called 'smolm2-135m-instrukt'; did you mean smollm2-135m-instruct"):
        catalog.find("smolm2-135m-instrukt")
    with pytest.raises(CatalogError, match="did you mean smollm2-135m-instruct"):
        catalog.find("smollm2")
    with pytest.raises(CatalogError, match="known are all-minilm-l6-v2, "):
        catalog.find("zzzzzz")


def test_file_is_called_as_the_model(tmp_path: Path) -> None:
    add(tmp_path, "tiny")
    (tmp_path / "tiny.toml").rename(tmp_path / "small.toml")
    with pytest.raises(CatalogError, match=r"must be called tiny\.toml"):
        read_manifest(tmp_path / "small.toml")


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(CatalogError, match="more than 1048576 bytes"):
        read_manifest(tmp_path / "huge.toml")


def test_alias_of_two_models_is_nobodys_and_a_name_beats_an_alias(tmp_path: Path) -> None:
    add(tmp_path, "one", ["both", "two"])
    add(tmp_path, "two", ["both"])
    catalog = load_catalog(tmp_path, tmp_path / "absent")
    assert catalog.find("two").name == "two"
    with pytest.raises(CatalogError, match="the alias 'both' is claimed by one and two"):
        catalog.find("both")
