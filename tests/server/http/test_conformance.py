"""What holds for every client over HTTP: many at once, a full queue, one that leaves."""

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from tritonclient.utils import InferenceServerException

from runtime.planning.config import EngineConfig
from tests.server.http.test_kserve import tensor
from tests.support.fakes import fake_engine, gated
from tests.support.live import Live, png, serve, until

CALLERS = 32
IMAGES = [png((n, 2 * n, 3), size=(120, 120)) for n in range(CALLERS)]
Caption = Callable[[bytes], str]


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Let the hub's library use the network, here our own server; other tests forbid it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@contextmanager
def by_openai(live: Live) -> Iterator[Caption]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.port}/v1", api_key="none", max_retries=0
    ) as client:

        def caption(image: bytes) -> str:
            said = client.chat.completions.create(model="fake", messages=chat(image))
            return said.choices[0].message.content or ""

        yield caption


def chat(image: bytes) -> list[dict]:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@contextmanager
def by_triton(live: Live) -> Iterator[Caption]:
    def caption(image: bytes) -> str:  # a connection belongs to the thread that made it
        with triton.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
            result = client.infer("fake", [tensor("IMAGE", [image])])
            return result.as_numpy("CAPTION")[0].decode()

    yield caption


@contextmanager
def by_hub(live: Live) -> Iterator[Caption]:
    hub = InferenceClient(f"http://127.0.0.1:{live.port}")
    yield lambda image: hub.image_to_text(image).generated_text


CLIENTS = {
    "openai": (by_openai, openai.RateLimitError),
    "triton": (by_triton, InferenceServerException),
    "huggingface_hub": (by_hub, HfHubHTTPError),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_each_of_many_callers_gets_its_own_caption(name):
    expected = [c.text for c in fake_engine().generate(IMAGES)]
    assert len(set(expected)) > CALLERS // 2
    with (
        serve(lambda: fake_engine(EngineConfig(slots=8)), slots=8) as live,
        CLIENTS[name][0](live) as caption,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        assert list(pool.map(caption, IMAGES)) == expected


@pytest.mark.parametrize("name", CLIENTS)
def test_a_full_queue_is_the_clients_own_error_and_over_when_there_is_room(name):
    engine = gated(slots=1)
    with (
        serve(lambda: engine, slots=1, max_queue=1) as live,
        CLIENTS[name][0](live) as caption,
        ThreadPoolExecutor(2) as pool,
    ):
        engine.runner.open.clear()
        held = [pool.submit(live.caption, IMAGES[0]) for _ in range(2)]
        until(lambda: live.model.admission.inside == 2)
        with pytest.raises(CLIENTS[name][1]) as error:
            caption(IMAGES[1])
        assert "queue" in str(error.value) or error.value.response.status_code == 429
        engine.runner.open.set()
        assert {future.result().status for future in held} == {200}
        assert caption(IMAGES[1])


def test_a_stream_that_is_closed_frees_its_slot():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{live.port}/v1", api_key="none", max_retries=0
        )
        engine.runner.open.clear()
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(
                model="fake", messages=chat(IMAGES[0]), stream=True, timeout=0.5
            )
        engine.runner.open.set()
        until(lambda: live.model.admission.inside == 0)
        assert live.caption(IMAGES[1]).status == 200
        client.close()
