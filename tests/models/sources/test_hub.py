from __future__ import annotations

from pathlib import Path

import pytest

from models.sources.errors import SourceError
from models.sources.hub import request_of


def test_address() -> None:
    request = request_of("facebook/detr-resnet-50@no_timm/a b/config.json", 7, {})
    assert request.url == "https://huggingface.co/facebook/detr-resnet-50/resolve/no_timm/a%20b/config.json"
    assert (request.size_bytes, request.headers) == (7, ())


@pytest.mark.parametrize("location", ["detr@main/x", "a/b/config.json", "a/b@main", "a/b@main/../x", "../b@main/x", "a/b@main/"])
def test_malformed_location(location: str) -> None:
    with pytest.raises(SourceError, match="is not hf:owner/repository@revision/path"):
        request_of(location, 0, {})


def test_token_is_never_sent_in_the_clear() -> None:
    assert request_of("a/b@main/x", 0, {"HF_TOKEN": "t", "HF_ENDPOINT": "http://hub.lan"}).headers == ()
    assert request_of("a/b@main/x", 0, {"HF_TOKEN": "t", "HF_ENDPOINT": "https://hub.lan/"}).headers == (("Authorization", "Bearer t"),)


def test_unreadable_token_and_endpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="HF_TOKEN_PATH"):
        request_of("a/b@main/x", 0, {"HF_TOKEN_PATH": str(tmp_path / "absent")})
    with pytest.raises(SourceError, match="set it anew"):
        request_of("a/b@main/x", 0, {"HF_TOKEN": "a\r\nHost: evil"})
    with pytest.raises(SourceError, match="HF_ENDPOINT"):
        request_of("a/b@main/x", 0, {"HF_ENDPOINT": "file:///etc"})
