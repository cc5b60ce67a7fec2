"""Clients that people already have, unmodified."""

import base64
import json
from collections.abc import Iterator

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from runtime.planning.config import EngineConfig
from server.service.keys import main as make_key
from tests.support.fakes import fake_engine, gated
from tests.support.live import Live, as_json, b64, png, serve

IMAGE = png((1, 2, 3), size=(200, 200))
URL = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve(lambda: fake_engine(EngineConfig(slots=8, patience=0)), slots=8) as server:
        yield server


def client(live: Live, key: str = "none", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.port}/v1", api_key=key, max_retries=retries
    )


def message(text: str | None = None, url: str = URL) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": url}}
    parts = [image] if text is None else [{"type": "text", "text": text}, image]
    return [{"role": "user", "content": parts}]


def test_openai_lists_models_and_captions(live):
    assert [model.id for model in client(live).models.list()] == ["fake"]
    assert client(live).models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="name one of fake"):
        client(live).models.retrieve("other")
    expected = live.caption(IMAGE, "?prompt=3+4&max_new_tokens=5").json
    for limit in ("max_tokens", "max_completion_tokens"):
        said = client(live).chat.completions.create(
            model="fake", messages=message("3 4"), **{limit: 5}
        )
        [choice] = said.choices
        assert (choice.message.content, said.model) == (expected["caption"], "fake")
        assert choice.finish_reason == expected["finish_reason"]
        assert said.usage.model_dump(include=expected["usage"].keys()) == expected["usage"]


def test_openai_may_send_what_asks_for_nothing(live):
    asked = {"messages": message(url=URL.replace("data:image", "DATA:Image")), "model": "fake"}
    neutral = {"store": False, "service_tier": "auto", "parallel_tool_calls": True}
    plain = client(live).chat.completions.create(**asked)
    said = client(live).chat.completions.create(**asked, **neutral)
    assert said.choices[0].message.content == plain.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="store"):
        client(live).chat.completions.create(**asked, store=True)


def test_openai_may_ask_for_more_tokens_than_a_slot_has_room_for(live):
    """A bound of some hundred is in every example, and captions are shorter."""
    expected = live.caption(IMAGE, "?max_new_tokens=32").json
    said = client(live).chat.completions.create(model="fake", messages=message(), max_tokens=300)
    assert said.choices[0].message.content == expected["caption"]
    assert said.usage.completion_tokens == expected["usage"]["completion_tokens"]


def test_openai_draws_several_with_logprobs(live):
    said = client(live).chat.completions.create(
        model="fake", messages=message(), temperature=1.5, top_p=0.9, seed=3, n=2, max_tokens=4,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    again = client(live).chat.completions.create(
        model="fake", messages=message(), temperature=1.5, top_p=0.9, seed=3, n=2, max_tokens=4
    )
    texts = [choice.message.content for choice in said.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(texts) == 2
    [first, *_] = said.choices[0].logprobs.content
    assert len(first.top_logprobs) == 2
    assert first.logprob < 0 and bytes(first.bytes).decode() == first.token


def test_openai_streams(live):
    whole = client(live).chat.completions.create(
        model="fake", messages=message(), max_tokens=6, stop=None
    )
    chunks = list(
        client(live).chat.completions.create(
            model="fake", messages=message(), max_tokens=6, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"completion_tokens_details": None, "prompt_tokens_details": None}
    )


def test_openai_stops_where_it_is_told(live):
    whole = client(live).chat.completions.create(model="fake", messages=message(), max_tokens=8)
    words = whole.choices[0].message.content.split()
    stop = f" {words[2]}"
    cut = client(live).chat.completions.create(
        model="fake", messages=message(), max_tokens=8, stop=[stop]
    )
    assert cut.choices[0].message.content == whole.choices[0].message.content.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client(live).chat.completions.create(
        model="fake", messages=message(), max_tokens=8, stop=stop, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == cut.choices[0].message.content
    assert live.caption(IMAGE).status == 200
    long = " ".join(["", *words[2:5]])  # a stop string that is complete only three tokens later
    chunks = client(live).chat.completions.create(
        model="fake", messages=message(), max_tokens=8, stop=long, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == " ".join(words[:2])


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"model": "other"}, openai.NotFoundError, "name one of fake"),
        ({"messages": [{"role": "user", "content": "hello"}]}, openai.BadRequestError, "no image"),
        (
            {"messages": [{"role": "system", "content": "be nice"}, *message()]},
            openai.BadRequestError, "send one message",
        ),
        ({"messages": message(url="data:image/png;base64,eHg=")}, openai.BadRequestError,
         "not an image"),
        ({"messages": message(url="https://example.org/x.png")}, openai.BadRequestError,
         "switched off"),
        ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty"),
        ({"n": 3}, openai.BadRequestError, "n is 3"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError,
         "tools"),
    ],
)  # fmt: skip
def test_openai_raises_its_own_errors(live, asked, kind, said):
    with pytest.raises(kind) as error:
        client(live).chat.completions.create(**({"model": "fake", "messages": message()} | asked))
    assert said in error.value.body["message"]


def test_openai_keys_and_limits_are_those_of_caption(tmp_path, capsys):
    assert make_key(["me"]) == 0
    made = capsys.readouterr()
    (tmp_path / "keys").write_text(made.out)
    key = made.err.split()[-1]
    with serve(fake_engine, api_keys=tmp_path / "keys", max_body_bytes=100_000) as live:
        with pytest.raises(openai.AuthenticationError):
            client(live).chat.completions.create(model="fake", messages=message())
        ours = client(live, key)
        assert ours.chat.completions.create(model="fake", messages=message()).choices
        large = "data:image/png;base64," + base64.b64encode(bytes(200_000)).decode()
        with pytest.raises(openai.APIStatusError) as error:
            ours.chat.completions.create(model="fake", messages=message(url=large))
        assert error.value.status_code == 413
        assert live.request("GET", "/").status == 200, "the page wants no key"


def test_openai_retries_a_full_queue():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1, max_queue=1, timeout_seconds=1) as live:
        engine.runner.open.clear()
        held = live.caption  # two requests fill the slot and the queue until their deadline
        import threading

        waiting = [threading.Thread(target=held, args=(png(),)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        from tests.support.live import until

        until(lambda: live.model.admission.inside == 2)
        with pytest.raises(openai.RateLimitError):
            client(live).chat.completions.create(model="fake", messages=message())
        engine.runner.open.set()
        for thread in waiting:
            thread.join()
        said = client(live, retries=3).chat.completions.create(model="fake", messages=message())
        assert said.choices


@pytest.fixture
def online(monkeypatch):
    """Let the hub's library use the network, here our own server; other tests forbid it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_the_hub_client_captions_and_asks(live, online):
    hub = InferenceClient(f"http://127.0.0.1:{live.port}")
    assert hub.image_to_text(IMAGE).generated_text == live.caption(IMAGE).json["caption"]
    [answer] = hub.visual_question_answering(IMAGE, question="3 4")
    assert answer.answer == live.caption(IMAGE, "?prompt=3+4").json["caption"]
    assert 0 < answer.score < 1
    body = as_json(
        inputs=b64(IMAGE),
        parameters={"max_new_tokens": 4, "generation_parameters": {"num_beams": 2}},
    )
    [said] = live.request("POST", "/", body, Content_Type="application/json").json
    expected = live.caption(IMAGE, "?max_new_tokens=4&num_beams=2").json["caption"]
    assert said["generated_text"] == expected
    greedy = as_json(inputs=b64(IMAGE), parameters={"generation_parameters": {"do_sample": None}})
    assert live.request("POST", "/", greedy, Content_Type="application/json").status == 200
    drawn = {"do_sample": True, "n": 3, "seed": 1}
    body = as_json(inputs=b64(IMAGE), parameters={"generation_parameters": drawn})
    assert len(live.request("POST", "/", body, Content_Type="application/json").json) == 3


def test_the_hub_client_is_told_what_is_wrong(live, online):
    hub = InferenceClient(f"http://127.0.0.1:{live.port}")
    with pytest.raises(HfHubHTTPError) as error:
        hub.image_to_text(b"no image")
    assert error.value.response.status_code == 400
    assert "not an image" in error.value.response.json()["error"]
    for wrong, told in (({"colour": "red"}, "'colour'"), ({"do_sample": [1]}, "do_sample must be")):
        body = as_json(inputs=b64(IMAGE), parameters={"generation_parameters": wrong})
        reply = live.request("POST", "/", body, Content_Type="application/json")
        assert reply.status == 400 and told in json.loads(reply.body)["error"]
