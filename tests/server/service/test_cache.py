"""Captions that are known already: made once for all who ask, bounded, and nobody's for long."""

import asyncio

from msgspec.structs import replace

from runtime.request import Completion, FinishReason, RequestOutput, SamplingParams, Timing
from server.service.cache import Key, OutputCache
from tests.support.fakes import fake_engine
from tests.support.live import png, serve


def output(*tokens: int) -> RequestOutput:
    return RequestOutput(
        1, Completion(tokens, finish_reason=FinishReason.STOP), Timing(1.0, 1.0, 1.0)
    )


def key(digest: str) -> Key:
    return "fake", "fp32", digest, (0,), SamplingParams(20)


def test_one_flight_serves_all_who_ask_meanwhile():
    async def run():
        cache, flights = OutputCache(10_000), []

        async def make():
            flights.append(1)
            await asyncio.sleep(0.01)
            return output(1)

        found = await asyncio.gather(*(cache.get(key("x"), make) for _ in range(5)))
        assert {o.token_ids for o in found} == {(1,)}
        assert len(flights) == 1

    asyncio.run(run())


def test_a_flight_that_fails_is_nobody_elses():
    async def run():
        cache, tries = OutputCache(10_000), []

        async def make():
            tries.append(1)
            await asyncio.sleep(0.01)
            if len(tries) == 1:
                raise TimeoutError
            return output(2)

        asked = [asyncio.create_task(cache.get(key("x"), make)) for _ in range(3)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(done[0], TimeoutError)
        assert [o.token_ids for o in done[1:]] == [(2,), (2,)]
        assert len(tries) == 2

    asyncio.run(run())


def test_the_cache_is_bounded_and_forgets_what_was_not_asked_for():
    async def run():
        cache = OutputCache(5_000)
        for n in range(100):
            await cache.get(key(f"{n:064}"), lambda n=n: made(n))
            await cache.get(key(f"{0:064}"), lambda: made(0))
            assert cache.size <= 5_000
        before = len(flown)
        await cache.get(key(f"{0:064}"), lambda: made(0))
        assert len(flown) == before, "what is asked for stays"
        await cache.get(key(f"{1:064}"), lambda: made(1))
        assert len(flown) == before + 1

    flown = []

    async def made(n: int):
        flown.append(n)
        return output(n)

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


def test_captions_of_another_engine_of_the_model_are_not_known():
    """Ingresses stay open while a cluster is updated."""
    with serve(fake_engine, cache_mb=1) as live:
        for identity in ("new fp32", "new int8"):
            live.model.identity = identity
            assert live.caption(png()).status == 200
        assert live.metric("vignette_cache_hits_total") == 0


def test_the_bound_counts_all_that_is_kept():
    top = tuple((token, -1.5) for token in range(20))
    text = Completion(tuple(range(40)), (-0.5,) * 40, (top,) * 40, FinishReason.STOP)
    large = replace(output(1), completion=text, others=(text,) * 7)

    async def run():
        cache = OutputCache(10_000_000)
        await cache.get(key("x"), lambda: made(large))
        assert cache.size > 700_000  # as measured

    async def made(found):
        return found

    asyncio.run(run())


def test_what_is_drawn_is_not_kept():
    with serve(fake_engine, cache_mb=1) as live:
        said = {live.caption(png(), "?temperature=5").json["caption"] for _ in range(8)}
        assert len(said) > 1
        assert live.metric("vignette_cache_hits_total") == 0
