"""Captions that are known already: made once for all who ask, bounded, and nobody's for long."""

import asyncio

from runtime.request import Caption, FinishReason
from server.service.cache import CaptionCache
from tests.fakes import fake_engine
from tests.live import png, serve

JSON = {"Content_Type": "application/json"}


def caption(text: str) -> Caption:
    return Caption(text, (3, 1), FinishReason.STOP, 0, 1, 0.0, 0.0, 0.0)


def test_one_flight_serves_all_who_ask_meanwhile():
    async def run():
        cache, flights = CaptionCache(10_000), []

        async def make():
            flights.append(1)
            await asyncio.sleep(0.01)
            return caption("a"), 0.1

        found = await asyncio.gather(*(cache.get(("x", None, None), make) for _ in range(5)))
        assert {c.text for c, _ in found} == {"a"}
        assert len(flights) == 1

    asyncio.run(run())


def test_a_flight_that_fails_is_nobody_elses():
    async def run():
        cache, tries = CaptionCache(10_000), []

        async def make():
            tries.append(1)
            await asyncio.sleep(0.01)
            if len(tries) == 1:
                raise TimeoutError
            return caption("b"), 0.1

        asked = [asyncio.create_task(cache.get(("x", None, None), make)) for _ in range(3)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(done[0], TimeoutError)
        assert [c.text for c, _ in done[1:]] == ["b", "b"]
        assert len(tries) == 2

    asyncio.run(run())


def test_the_cache_is_bounded_and_forgets_what_was_not_asked_for():
    async def run():
        cache = CaptionCache(5_000)
        for n in range(100):
            await cache.get((f"{n:064}", None, None), lambda n=n: made(n))
            await cache.get((f"{0:064}", None, None), lambda: made(0))
            assert cache.size <= 5_000
        before = len(flown)
        await cache.get((f"{0:064}", None, None), lambda: made(0))
        assert len(flown) == before, "what is asked for stays"
        await cache.get((f"{1:064}", None, None), lambda: made(1))
        assert len(flown) == before + 1

    flown = []

    async def made(n: int):
        flown.append(n)
        return caption(f"caption {n}"), 0.0

    asyncio.run(run())


def test_identical_images_are_captioned_once_if_that_is_wished():
    engine = fake_engine()
    with serve(lambda: engine, cache_mb=1) as live:
        first = live.caption(png())
        again = live.caption(png())
        prompted = live.caption(png(), "?prompt=3")
        assert first.json["caption"] == again.json["caption"]
        assert sum(engine.runner.encoded) == 2
        assert prompted.json["usage"]["prompt_tokens"] == 1
        assert live.metric("vignette_cache_hits_total") == 1
        gone_through = {k for k, v in again.json["timing_ms"].items() if v}
        assert gone_through <= {"total"}, "no time was spent on what was known"
        assert live.metric('vignette_stage_seconds_count{stage="encode"}') == 2
        assert live.metric('vignette_stage_seconds_count{stage="total"}') == 3


def test_who_waits_too_long_for_anothers_flight_starts_one(monkeypatch):
    monkeypatch.setattr("server.service.cache._PATIENCE_SECONDS", 0.05)

    async def run():
        cache, stuck = CaptionCache(10_000), asyncio.Event()

        async def never():
            await stuck.wait()
            return caption("late"), 0.0

        async def soon():
            return caption("soon"), 0.0

        first = asyncio.create_task(cache.get(("a", None, None), never))
        await asyncio.sleep(0)
        found, _ = await cache.get(("a", None, None), soon)
        stuck.set()
        await first
        return found.text

    assert asyncio.run(run()) == "soon"
