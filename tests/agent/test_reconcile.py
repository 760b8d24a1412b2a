"""The hands of the node: what is wanted is made and opened, renewed beside what serves, and left alone when it fails."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest

from agent.patience import CANCELLED
from agent.preparation import PreparationFailed
from agent.state import Preparing, Renewing
from tests.agent.workshop import Workshop, built

pytestmark = pytest.mark.anyio

QUICK = built("quick", is_current=False)
GATE_FAILED = PreparationFailed("boxes are lost at every precision", "not_the_same_model")


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, "chat")


async def test_what_is_at_hand_serves_until_the_wanted_engine_takes_over(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted, shop.maker.gate = [QUICK], [built("plan")], anyio.Event()
    async with shop.working():
        await shop.until(lambda: shop.maker.wishes, "prepared")
        shop.maker.gate.set()
        shop.maker.gate = anyio.Event()
        await shop.until(lambda: isinstance(shop.reconciler.actual.renewals.get("chat"), Renewing), "renewed")
        assert shop.serving() is not None, "it serves while its successor is built"
        shop.maker.gate.set()
        await shop.until_served_by("plan")
    assert shop.hand.asked == ["open quick", "open plan"], "opened beside, nothing closed before"
    assert shop.maker.wishes[1].serving == QUICK.folder
    assert shop.reconciler.actual.renewals == {}
    assert ("info", "chat", "served by its new engine plan") in shop.notes


async def test_what_turns_out_to_be_the_wanted_engine_stays_open(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [built("quick")]
    async with shop.working():
        await shop.until_served_by("quick")
    assert shop.hand.asked == ["open quick"]


async def test_a_build_that_fails_leaves_the_old_path_serving_and_says_so(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [GATE_FAILED]
    async with shop.working():
        left = await shop.until(shop.left, "the failure is told")
        await shop.until_served_by("quick", is_current=False)
    assert (left.message, left.retry_at_s) == (str(GATE_FAILED), math.inf), "the same would happen again"
    assert [note for note in shop.notes if note[0] == "warning"] == [
        ("warning", "chat", f"goes on being served by the engine before: {GATE_FAILED}")
    ]


async def test_what_may_go_better_later_is_tried_again(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [PreparationFailed("the disk is full", "no_space"), built("plan")]
    async with shop.working():
        left = await shop.until(shop.left, "the failure is told")
        assert 25 <= left.retry_at_s - anyio.current_time() <= 120
        shop.reconciler.retry("chat")
        await shop.until_served_by("plan")


@pytest.mark.parametrize("fault", ["refuses", "dies_of"])
async def test_a_new_engine_that_does_not_open_is_given_up(shop: Workshop, fault: str) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [built("plan")]
    getattr(shop.hand, fault).add("plan")
    async with shop.working():
        await shop.until(shop.left, "it is given up")
        await shop.until_served_by("quick", is_current=False)
    deaths = shop.hand.incarnation - 1
    assert deaths == (2 if fault == "dies_of" else 0)
    assert shop.hand.asked[-1] == ("open quick" if deaths else "open plan")


async def test_an_engine_that_does_not_open_is_distrusted_and_another_is_asked_for(shop: Workshop) -> None:
    shop.maker.ready = [built("old", is_current=False), built("new")]
    shop.hand.refuses.add("old")
    async with shop.working():
        await shop.until(shop.broken, "it does not open")
        shop.desired.want_model("eyes", False)  # any change wakes; the back-off holds
        assert len(shop.maker.wishes) == 1
        shop.reconciler._models["chat"] = type(shop.broken())("", 1, -math.inf)  # type: ignore[misc]  # its time has come
        shop.reconciler.wake()
        await shop.until_served_by("new")
    assert shop.maker.wishes[1].distrusted == frozenset({Path("/engines/old")})


@pytest.mark.parametrize("verdict", [{"passed": False, "reason": "boxes are lost"}, {}])
async def test_an_unproven_engine_is_not_opened(shop: Workshop, verdict: dict[str, object]) -> None:
    shop.maker.ready = [built("unproven", verdict=verdict)]
    async with shop.working():
        broken = await shop.until(shop.broken, "refused")
    assert "convert.accept_unverified" in broken.message
    assert str(verdict.get("reason", "did not run")) in broken.message
    assert shop.hand.asked == []


async def test_an_unproven_engine_serves_where_the_configuration_or_the_order_says_so(tmp_path: Path) -> None:
    for shop in (Workshop(tmp_path / "a", "chat", accepts_unverified=True), Workshop(tmp_path / "b", "chat")):
        shop.maker.ready = shop.maker.wanted = [built("unproven", verdict={"passed": False})]
        shop.desired.want_model("chat", True, {"accept_unverified": True})
        async with shop.working():
            await shop.until_served_by("unproven")


async def test_a_cancelled_build_stays_cancelled_until_somebody_asks(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.gate = [built("plan")], anyio.Event()
    async with shop.working():
        await shop.until(lambda: isinstance(shop.reconciler.actual.models.get("chat"), Preparing), "prepared")
        assert shop.reconciler.cancel("chat")
        broken = await shop.until(shop.broken, "cancelled")
        assert (broken.message, broken.retry_at_s) == (CANCELLED, math.inf)
        assert not shop.reconciler.cancel("chat")
        shop.maker.gate.set()
        shop.reconciler.retry("chat")
        await shop.until_served_by("plan")


async def test_a_cancelled_renewal_changes_nothing_for_clients(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [built("plan")]
    async with shop.working():
        await shop.until(shop.serving, "served")
        shop.maker.gate = anyio.Event()
        await shop.until(lambda: isinstance(shop.reconciler.actual.renewals.get("chat"), Renewing), "renewed")
        assert shop.reconciler.cancel("chat")
        assert (await shop.until(shop.left, "cancelled")).message == CANCELLED
        assert shop.serving() is not None


async def test_an_order_for_another_precision_renews_what_serves(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [built("fp32")], [built("fp16")]
    async with shop.working():
        await shop.until_served_by("fp32")
        shop.desired.want_model("chat", True, {"precision": "fp16"})
        await shop.until_served_by("fp16")
    assert shop.maker.wishes[-1].build == {"precision": "fp16"}


async def test_what_is_removed_in_mid_renewal_goes_and_its_build_ends(shop: Workshop) -> None:
    shop.maker.ready, shop.maker.wanted = [QUICK], [built("plan")]
    async with shop.working():
        await shop.until(shop.serving, "served")
        shop.maker.gate = anyio.Event()
        await shop.until(lambda: isinstance(shop.reconciler.actual.renewals.get("chat"), Renewing), "renewed")
        shop.desired.want_model("chat", False)
        await shop.until(lambda: "chat" not in shop.reconciler.actual.models, "gone")
        await anyio.wait_all_tasks_blocked()
    assert shop.hand.asked == ["open quick", "close chat"]
    assert shop.reconciler.actual.renewals == {}


async def test_a_worker_that_died_gets_its_model_again(shop: Workshop) -> None:
    shop.maker.ready = [built("plan")]
    async with shop.working():
        await shop.until_served_by("plan")
        shop.hand.incarnation += 1
        assert shop.serving() is None, "nobody holds it now"
        shop.reconciler.wake()
        await shop.until_served_by("plan")
    assert shop.hand.asked == ["open plan", "open plan"]


async def test_an_engine_that_kills_its_worker_is_left_alone_for_a_while(shop: Workshop) -> None:
    shop.maker.ready = [built("plan")]
    shop.hand.dies_of.add("plan")
    async with shop.working():
        broken = await shop.until(shop.broken, "given up")
    assert shop.hand.incarnation == 3
    assert broken.retry_at_s - anyio.current_time() > 500


async def test_an_unknown_model_is_reported_and_the_others_serve(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "nobody", "chat")
    shop.maker.ready = [built("plan")]
    async with shop.working():
        await shop.until_served_by("plan")
        assert "no model is called 'nobody'" in (await shop.until(lambda: shop.broken("nobody"), "reported")).message


async def test_a_bug_in_preparing_ends_one_model_only(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat")  # the maker has no answer, and raises IndexError
    async with shop.working():
        assert "IndexError" in (await shop.until(shop.broken, "reported")).message
