"""The hands of the node: what is wanted is made and opened, renewed beside what serves, and left alone when it fails."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest

from agent.patience import CANCELLED
from agent.plan import QUIET_S, RestPolicy
from agent.preparation import PreparationFailed
from agent.state import Preparing, Renewing, Use
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


def rested(shop: Workshop, model: str, for_s: float) -> None:
    shop.reconciler.uses._uses[model] = Use(anyio.current_time() - for_s)
    shop.reconciler.wake()


async def test_who_is_idle_sleeps_and_wakes_for_the_next_request(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat", rest=RestPolicy(idle_s=3600.0))
    shop.maker.ready = [built("plan")]
    async with shop.working():
        await shop.until_served_by("plan")
        with shop.warmth.using("chat"):
            rested(shop, "code", 0.0)
            await anyio.sleep(0.05)
            assert shop.serving() is not None
        rested(shop, "chat", 3601.0)
        await shop.until(shop.asleep, "it sleeps")
        await shop.until(lambda: "close chat" in shop.hand.asked, "its worker has let go of it")
        with shop.warmth.using("chat"):
            await shop.until_served_by("plan")
            assert shop.reconciler.actual.uses["chat"].in_flight == 1
    assert shop.hand.asked == ["open plan", "close chat", "open plan"]
    assert (shop.reconciler.uses.unloads, shop.reconciler.uses.reloads) == ({("chat", "idle"): 1}, {"chat": 1})
    assert shop.notes == [
        ("info", "chat", "is taken out of memory: nobody asked for it for 3600 s"),
        ("info", "chat", "is in memory again"),
    ]


async def test_short_memory_takes_out_one_at_a_time_and_stops_when_there_is_enough(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat", "code", rest=RestPolicy(keep_free_bytes=100))
    shop.maker.ready = [built("a"), built("b")]
    async with shop.working():
        await shop.until(lambda: shop.serving() and shop.serving("code"), "both serve")
        rested(shop, "chat", QUIET_S + 100)
        rested(shop, "code", QUIET_S + 200)
        shop.free_bytes = 99
        shop.reconciler.wake()
        await shop.until(lambda: shop.asleep("code"), "who rested longest sleeps")
        shop.free_bytes = 200
        shop.reconciler.wake()
        await anyio.sleep(0.05)
        assert shop.serving("chat") is not None
    assert shop.reconciler.uses.unloads == {("code", "memory"): 1}


async def test_who_was_asked_for_and_does_not_fit_gets_the_room_of_one_that_rests(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat", "code", rest=RestPolicy(keep_free_bytes=100))
    shop.maker.ready = [built("a"), built("b")]
    async with shop.working():
        await shop.until(lambda: shop.serving() and shop.serving("code"), "both serve")
        shop.free_bytes = 99
        rested(shop, "code", QUIET_S + 200)
        await shop.until(lambda: shop.asleep("code"), "it sleeps")
        shop.free_bytes = 300
        shop.hand.has_no_room_for.add("b")
        rested(shop, "chat", QUIET_S + 1)
        with shop.warmth.using("code"):
            await shop.until(shop.asleep, "the other makes room")
            shop.hand.has_no_room_for.clear()
            shop.reconciler.rouse("code")
            await shop.until(lambda: shop.serving("code"), "it serves again")
    assert ("warning", "code", "stays out of memory: b needs 500 MiB, but 300 MiB are free") in shop.notes


async def test_warming_up_wakes_who_sleeps_and_runs_who_rested(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, "chat", "code", rest=RestPolicy(idle_s=3600.0))
    shop.maker.ready = [built("a"), built("b")]
    async with shop.working():
        await shop.until(lambda: shop.serving() and shop.serving("code"), "both serve")
        await shop.warmth.warm_up()
        assert "generate 2" not in shop.hand.asked, "both were opened just now"
        rested(shop, "chat", 3601.0)
        await shop.until(shop.asleep, "it sleeps")
        rested(shop, "chat", 3601.0)
        rested(shop, "code", QUIET_S + 1)
        await shop.warmth.warm_up()
        assert shop.serving() is not None
    assert sorted(shop.hand.asked[-3:]) == ["generate 2", "generate 2", "open a"]
