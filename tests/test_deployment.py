"""What is put onto machines: example configurations, units, image, compose file, alerts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are one more package for one call

from agent.config import load_settings
from coordinator.config import load_coordinator_settings
from tests.conftest import ROOT

SYSTEMD = ROOT / "systemd"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def test_the_example_configuration_loads() -> None:
    settings = load_settings(SYSTEMD / "hotspare.toml")
    assert settings.node.id == "gateway-0001"
    assert settings.cameras[0].source.startswith("rtsp://")


def test_the_example_of_the_coordinator_loads() -> None:
    settings = load_coordinator_settings(SYSTEMD / "coordinator.toml")
    assert settings.nginx.file is not None and not settings.nginx.reload_command
    assert f"PathChanged={settings.nginx.file}\n" in (SYSTEMD / "hotspare-nginx.path").read_text()
    unit = (SYSTEMD / "hotspare-coordinator.service").read_text()
    folders = [f"/var/lib/{name}" for name in re.search(r"^StateDirectory=(.+)$", unit, re.MULTILINE)[1].split()]  # type: ignore[index]
    assert {str(settings.database.parent), str(settings.nginx.file.parent)} <= set(folders)


@needs_systemd
@pytest.mark.parametrize("name", sorted(path.name for path in SYSTEMD.glob("*.service")))
def test_units_are_sound(tmp_path: Path, name: str) -> None:
    verified = _analyze(tmp_path, name, "verify")
    assert verified.stdout + verified.stderr == ""
    assert verified.returncode == 0


@needs_systemd
@pytest.mark.parametrize("name", ["hotspare.service", "hotspare-coordinator.service"])
def test_services_are_tight(tmp_path: Path, name: str) -> None:
    scored = _analyze(tmp_path, name, "security", "--offline=true", "--threshold=20")
    assert scored.returncode == 0, f"exposure above 2.0:\n{scored.stdout[-2000:]}"


def _analyze(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On a copy whose programs this machine has."""
    installed = folder / name
    text = (SYSTEMD / name).read_text()
    for program in ("/opt/hotspare/bin/hotspare", "/usr/sbin/nginx"):
        text = text.replace(program, shutil.which("true") or "/bin/true")
    installed.write_text(text)
    return subprocess.run(["systemd-analyze", *arguments, str(installed)], capture_output=True, text=True)


def test_the_dockerfile_takes_the_jetpack_as_an_argument() -> None:
    text = (ROOT / "jetson.Dockerfile").read_text()
    assert re.search(r"^ARG JETPACK_IMAGE=\S+\nFROM \$\{JETPACK_IMAGE\}", text, re.MULTILINE)
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists(), f"the image copies {source}, which is not there"


def test_the_compose_file_fits_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    service: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["hotspare"]
    image = (ROOT / service["build"]["dockerfile"]).read_text()
    for argument, value in service["build"]["args"].items():
        default = re.search(rf'^ARG {argument}="?([^"\n]+)"?$', image, re.MULTILINE)
        assert default is not None, f"the image takes no {argument}"
        assert _default(value) == default[1]
    assert service["ports"][0].endswith(":" + re.findall(r"^EXPOSE (\d+)$", image, re.MULTILINE)[0])
    assert service["volumes"][0].partition(":")[2] in re.findall(r"^VOLUME (\S+)$", image, re.MULTILINE)
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, _default(value))
    settings = load_settings(None)
    assert settings.node.id == "edge-node" and settings.mqtt.host == ""


def _default(value: str) -> str:
    """Of `${NAME:-default}`."""
    found = re.fullmatch(r"\$\{\w+:-(.*)\}", value)
    return found[1] if found else value


def test_alerts_name_what_nodes_tell() -> None:
    rules = yaml.safe_load((SYSTEMD / "prometheus.rules.yml").read_text())["groups"][0]["rules"]
    told = "".join(file.read_text() for file in (ROOT / "agent").rglob("*.py"))
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "action"} and "severity" in rule["labels"]
        names = set(re.findall(r"hotspare_\w+", rule["expr"]))
        assert names or "up{" in rule["expr"], rule
        for name in names:
            assert f'"{name.removesuffix("_total")}"' in told, f"{rule['alert']} watches {name}, which no node tells"
