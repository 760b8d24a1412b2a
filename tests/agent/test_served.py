"""Names: what a client calls a model, and what that means here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.config import Alias
from agent.gateway.side import OwnNames
from agent.http.collaborators import Meant, ServiceFailure
from agent.reconcile import Reconciler
from agent.served import ServedModels
from agent.state import Desired

ALIASES = {
    "deepseek-chat": Alias(model="qwen", thinking=False),
    "deepseek-reasoner": Alias(model="qwen", thinking=True),
    "deepseek/deepseek-r1:free": Alias(model="qwen", adapter="law"),
    "short": Alias.model_validate("qwen:law"),
}


@pytest.fixture
def served() -> ServedModels:
    models = ServedModels({}, ALIASES, 1024)
    known: Any = SimpleNamespace(
        models={"qwen": None, "a:b": None},
        manifest=lambda name: SimpleNamespace(aliases=("q",) * (name == "qwen")),
        desired=SimpleNamespace(value=Desired(("later",))),
    )
    models.reconciler = cast("Reconciler", known)
    return models


@pytest.mark.parametrize(
    ("name", "meant", "is_own", "is_known"),
    [
        ("qwen", Meant("qwen"), True, True),
        ("qwen:law", Meant("qwen", "law"), True, True),
        ("a:b", Meant("a:b"), True, True),
        ("a:b:law", Meant("a:b", "law"), True, True),
        ("q", Meant("qwen"), False, True),
        ("q:law", Meant("qwen", "law"), False, True),
        ("deepseek-chat", Meant("qwen", thinking=False), False, True),
        ("deepseek-reasoner", Meant("qwen", thinking=True), False, True),
        ("deepseek-reasoner:law", Meant("qwen", "law", True), False, True),
        ("deepseek/deepseek-r1:free", Meant("qwen", "law"), False, True),
        ("deepseek/deepseek-r1:free:other", Meant("qwen", "other"), False, True),
        ("short", Meant("qwen", "law"), False, True),
        ("gpt-9:x", Meant("gpt-9:x"), False, False),
        (":x", Meant(":x"), False, False),
        ("", Meant(""), False, False),
    ],
)
def test_a_whole_name_comes_before_its_parts(served: ServedModels, name: str, meant: Meant, is_own: bool, is_known: bool) -> None:
    names = OwnNames(served)
    assert (names.meant(name), names.is_own(name), names.is_known(name)) == (meant, is_own, is_known)


@pytest.mark.parametrize(("name", "reason"), [("later", "not_ready"), ("gpt-9", "unknown_model")])
def test_what_has_not_had_its_turn_is_on_its_way(served: ServedModels, name: str, reason: str) -> None:
    with pytest.raises(ServiceFailure) as failure:
        served.resolve(name)
    assert failure.value.reason == reason
