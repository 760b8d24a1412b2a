"""Orders of the coordinator about models: carried out, refused, cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.link.outcome import CommandFailed, CommandRejected, Output
from agent.preparation import PreparationFailed
from agent.protocol.operations import ModelDeployArgs, ModelRemoveArgs, PipelineStartArgs, PipelineStopArgs
from agent.state import Preparing
from tests.agent.workshop import Workshop, built

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


async def told(fraction: float | None = None, step: str | None = None) -> None:
    """What the coordinator would hear; see test_a_deployment_tells_how_far_it_is."""


async def deploy(shop: Workshop, **args: Any) -> Output:
    with anyio.fail_after(5):
        return await shop.orders.handlers()["model.deploy"](ModelDeployArgs(**{"name": "chat", **args}), told)


async def test_a_deployment_ends_once_the_model_serves(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [built("quick", is_current=False)], [built("plan")]
    async with shop.working():
        output = await deploy(shop)
        assert output["engine"] == "quick", "it can be asked: the successor comes when it comes"
        assert output["verdict"] == {"passed": True, "figures": {}, "attempts": []}
        await shop.until_served_by("plan")


async def test_an_order_that_says_how_ends_once_that_engine_serves(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [built("quick", is_current=False)], [built("fp16")]
    async with shop.working():
        assert (await deploy(shop, precision="fp16"))["engine"] == "fp16"
    assert shop.desired.value.builds == {"chat": {"precision": "fp16"}}


async def test_an_order_whose_engine_cannot_be_made_fails_and_the_one_before_serves(shop: Workshop) -> None:
    shop.maker.ready = [built("quick", is_current=False)]
    shop.maker.wanted = [PreparationFailed("fp16: boxes are lost", "not_the_same_model")]
    async with shop.working():
        with pytest.raises(CommandFailed, match="goes on serving: fp16: boxes are lost") as failure:
            await deploy(shop, precision="fp16")
        assert failure.value.code == "build_failed"
        assert shop.serving() is not None


async def test_a_failed_deployment_is_tried_anew_by_the_next_order(shop: Workshop) -> None:
    shop.maker.ready = [PreparationFailed("no such operator", "unsupported"), built("plan")]
    async with shop.working():
        with pytest.raises(CommandFailed, match="no such operator"):
            await deploy(shop)
        assert (await deploy(shop))["engine"] == "plan"


async def test_a_deployment_tells_how_far_it_is(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    heard: list[tuple[float | None, str | None]] = []

    async def hear(fraction: float | None = None, step: str | None = None) -> None:
        heard.append((fraction, step))
        if fraction and shop.maker.gate is not None:
            shop.maker.gate.set()

    async with shop.working():
        with anyio.fail_after(10):
            await shop.orders.handlers()["model.deploy"](ModelDeployArgs(name="chat"), hear)
    assert (0.5, "convert: fp16: 8.5 says nothing, 61 s") in heard


async def test_a_cancelled_order_ends_its_build_and_its_wish(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    async with shop.working(), anyio.create_task_group() as tasks:
        tasks.start_soon(deploy, shop)
        await shop.until(lambda: isinstance(shop.reconciler.actual.models.get("chat"), Preparing), "prepared")
        tasks.cancel_scope.cancel()  # as the command's scope is
        shop.orders.cancellers()["model.deploy"](ModelDeployArgs(name="chat"))
        assert shop.desired.value.models == ()
        with anyio.CancelScope(shield=True):
            await shop.until(lambda: shop.reconciler.actual.models == {}, "gone")


async def test_a_cancelled_order_for_what_is_configured_leaves_the_wish(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat")
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    async with shop.working():
        await shop.until(lambda: isinstance(shop.reconciler.actual.models.get("chat"), Preparing), "prepared")
        assert shop.orders.withdraw("chat")
        assert (await shop.until(shop.broken, "cancelled")).attempts == 1
        assert shop.desired.value.models == ("chat",)
        assert not shop.orders.withdraw("chat")


async def test_an_order_that_waited_for_its_turn_ends_no_build_of_others(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat")
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    async with shop.working():
        await shop.until(lambda: isinstance(shop.reconciler.actual.models.get("chat"), Preparing), "prepared")
        shop.orders.cancellers()["model.deploy"](ModelDeployArgs(name="chat"))
        await anyio.wait_all_tasks_blocked()
        assert shop.broken() is None


async def test_removal_does_not_wait_for_a_build(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    shop.desired.want_model("chat", True, {"precision": "fp16"})
    async with shop.working():
        await shop.until(lambda: isinstance(shop.reconciler.actual.models.get("chat"), Preparing), "prepared")
        with anyio.fail_after(3):
            assert await shop.orders.handlers()["model.remove"](ModelRemoveArgs(name="chat"), told) == {"model": "chat"}
    assert shop.desired.value.builds == {}


@pytest.mark.parametrize(
    ("args", "code"),
    [({"name": "nobody"}, "invalid"), ({"digest": f"sha256:{'0' * 64}"}, "digest_mismatch")],
)
async def test_an_order_that_cannot_be_meant_is_rejected(shop: Workshop, args: dict[str, Any], code: str) -> None:
    with pytest.raises(CommandRejected) as refusal:
        await deploy(shop, **args)
    assert refusal.value.code == code
    assert shop.desired.value.models == ()


async def test_while_it_is_autonomous_its_models_stay(shop: Workshop) -> None:
    shop.is_autonomous = True
    with pytest.raises(CommandRejected) as refusal:
        await deploy(shop)
    assert (refusal.value.code, refusal.value.is_retryable) == ("busy", True)


async def test_a_pipeline_starts_with_its_model_and_keeps_it(shop: Workshop) -> None:
    shop.maker.ready = [built("eyes")]
    handlers = shop.orders.handlers()
    async with shop.working():
        with anyio.fail_after(5):
            await handlers["pipeline.start"](PipelineStartArgs(id="belt", source="conveyor:", model="eyes"), told)
        with pytest.raises(CommandRejected, match="belt"):
            await handlers["model.remove"](ModelRemoveArgs(name="eyes"), told)
        await handlers["pipeline.stop"](PipelineStopArgs(id="belt"), told)
        with pytest.raises(CommandRejected, match="there is no pipeline"):
            await handlers["pipeline.stop"](PipelineStopArgs(id="belt"), told)
        with pytest.raises(CommandRejected, match="one for detection"):
            await handlers["pipeline.start"](PipelineStartArgs(id="belt", source="conveyor:", model="chat"), told)
        with pytest.raises(CommandRejected, match="source and model"):
            await handlers["pipeline.start"](PipelineStartArgs(id="other"), told)


async def test_a_pipeline_whose_model_cannot_be_made_is_told_and_taken_back(shop: Workshop) -> None:
    shop.maker.ready = [PreparationFailed("no such operator", "unsupported")]
    async with shop.working():
        with pytest.raises(CommandFailed, match="no such operator"), anyio.fail_after(5):
            await shop.orders.handlers()["pipeline.start"](PipelineStartArgs(id="belt", source="conveyor:", model="eyes"), told)
    assert shop.desired.value.pipelines == {}
