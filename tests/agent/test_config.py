"""Defaults, file, environment, in this order; every fault named with its field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent.config import Alias, ConfigurationError, load_settings
from agent.preflight import checked
from models.catalog import Catalog, load_catalog


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hotspare.toml"
    file.write_text(text)
    return file


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, '[node]\nid = "edge-01"\n[http]\nport = 9000\nhost = "0.0.0.0"\n')
    monkeypatch.setenv("HOTSPARE__HTTP__PORT", "9001")
    settings = load_settings(file)
    assert (settings.node.id, settings.http.host, settings.http.port, settings.mqtt.port) == ("edge-01", "0.0.0.0", 9001, 1883)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[http]\nprot = 1\n", "http.prot"),
        ('[node]\nid = "Edge 1"\n', "Edge 1"),
        ("[http]\nport = 70000\n", "http.port"),
        ("[http\n", "hotspare.toml"),
        ('[http]\nadvertise = "10.0.0.7"\n', "http.advertise.*HOST:PORT"),
        ('[http]\nadvertise = "10.0.0.7:0"\n', "http.advertise"),
        ('[[cameras]]\nid="a"\nsource="rstp://10.0.0.2/"\nmodel="m"\n', "cameras.0.source.*rtsp"),
        ('[[cameras]]\nid="a"\nsource="conveyor:"\nmodel="m"\n[[cameras]]\nid="a"\nsource="conveyor:"\nmodel="m"\n', "not all different"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        load_settings(written(tmp_path, text))


@pytest.mark.parametrize("source", ["csi:0", "v4l2:/dev/video0?fourcc=MJPG", "rtsp://camera/live", "file:/srv/door.mp4", "conveyor:"])
def test_every_kind_of_source_can_be_configured(tmp_path: Path, source: str) -> None:
    (camera,) = load_settings(written(tmp_path, f'[[cameras]]\nid="a"\nsource="{source}"\nmodel="m"\n')).cameras
    assert camera.source == source


def test_an_alias_is_a_name_or_a_table(tmp_path: Path) -> None:
    text = '[models.aliases]\na = "m"\n"x/y:free" = "m:law"\nc = { model = "m", adapter = "law", thinking = true }\n'
    aliases = load_settings(written(tmp_path, text)).models.aliases
    assert aliases == {
        "a": Alias(model="m"),
        "x/y:free": Alias(model="m", adapter="law"),
        "c": Alias(model="m", adapter="law", thinking=True),
    }
    with pytest.raises(ConfigurationError, match=r"aliases.a.thinks"):
        load_settings(written(tmp_path, '[models.aliases]\na = { model = "m", thinks = true }\n'))


def test_an_aliases_adapter_must_be_one_of_the_models(tmp_path: Path) -> None:
    manifests = {**load_catalog().manifests}
    smol = manifests["smollm2-135m-instruct"]
    manifests[smol.name] = replace(smol, files={**smol.files, "adapter.law.config": smol.files["model"]})
    catalog = Catalog(manifests, {}, {})
    settings = load_settings(written(tmp_path, f'[models.aliases]\na = "{smol.name}:law"\n'))
    assert checked(settings, catalog).models.aliases["a"].adapter == "law"
    settings = load_settings(written(tmp_path, f'[models.aliases]\na = "{smol.name}:lore"\n'))
    with pytest.raises(ConfigurationError, match="no adapter 'lore' for a; it has law"):
        checked(settings, catalog)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a file"):
        load_settings(tmp_path / "none.toml")
