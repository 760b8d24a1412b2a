"""The installer: a first installation, an upgrade that does not come up, and one that refuses the configuration. Only systemd is fake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Enables and restarts; a restart fails while the file `broken` is there.
SYSTEMCTL = """#!/bin/sh
echo "$*" >> {folder}/calls
case "$*" in "restart "*) [ ! -e {folder}/broken ] || { rm {folder}/broken; exit 1; } ;; esac
"""


def install(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}/bin:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "systemd" / "install.sh"],
        env={**os.environ, "PATH": path, "DESTDIR": str(folder / "root"), "PYTHON": sys.executable, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("systemd-sysusers") is None, reason="needs root and systemd's programs")
def test_an_installation_serves_or_leaves_the_one_before(tmp_path: Path) -> None:
    root, home = tmp_path / "root", tmp_path / "root" / "opt" / "hotspare"
    for folder in (root / "etc", root / "usr", root / "run" / "systemd" / "system", tmp_path / "bin"):
        folder.mkdir(parents=True)
    (tmp_path / "bin" / "systemctl").write_text(SYSTEMCTL.replace("{folder}", str(tmp_path)))
    (tmp_path / "bin" / "systemctl").chmod(0o755)

    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == ["daemon-reload", "enable --quiet hotspare.service", "restart hotspare.service"]
    version = subprocess.run([home / "bin" / "hotspare", "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("hotspare ")
    first = (home / "current").readlink()
    configuration = root / "etc" / "hotspare" / "hotspare.toml"
    configuration.write_text(configuration.read_text() + "# ours\n")

    (tmp_path / "broken").touch()
    failed = install(tmp_path)
    assert failed.returncode == 1 and "runs with" in failed.stderr
    assert (home / "current").readlink() == first and [each.name for each in (home / "releases").iterdir()] == [first.name]
    assert calls(tmp_path)[-2:] == ["restart hotspare.service"] * 2
    assert configuration.read_text().endswith("# ours\n")

    configuration.write_text("[http]\nport = 70000\n")
    refused = install(tmp_path)
    assert refused.returncode == 1 and "refuses" in refused.stderr and "http.port" in refused.stderr
    assert (home / "current").readlink() == first and len(list((home / "releases").iterdir())) == 1


def test_without_root_the_installer_says_so(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "systemd" / "install.sh"], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "needs root" in done.stderr
