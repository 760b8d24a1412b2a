"""What more than one file of these tests needs."""

from __future__ import annotations

from pathlib import Path

import pytest

# Compiles once for each set of options, as ccache would; $CC is how an operator names a compiler too.
CACHING_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec {compiler} --version
for word in "$@"; do
  if [ "$previous" = -o ]; then target=$word; elif [ "$word" != -o ]; then options="$options $word"; fi
  previous=$word
done
kept={folder}/$(echo "$options" | sha256sum | cut -c1-16)
[ -e "$kept" ] || {compiler} $options -o "$kept" || exit 1
cp "$kept" "$target"
"""


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converters.native_from_causal_model import find_compiler  # not under Python 3.8, where parts of these tests run too

    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "cc"
    script.write_text(CACHING_COMPILER.format(compiler=find_compiler(), folder=folder))
    script.chmod(0o755)
    return script


@pytest.fixture
def caching_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(compiler))
