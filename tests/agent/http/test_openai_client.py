"""The unmodified `openai` client against a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from tests.agent.http.conftest import House


@pytest.fixture
def api(house: House, serve: Callable[[House], str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=serve(house) + "/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_chat_is_answered_under_the_name_it_was_asked(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="deepseek-chat", messages=[{"role": "user", "content": "Paris it is"}])
    assert answer.choices[0].message.content == "Paris it is"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "deepseek-chat"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_streamed_chat_has_role_text_finish_and_usage(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "one two"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_stop_and_logprobs(api: openai.OpenAI, house: House) -> None:
    answer = api.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": [{"type": "text", "text": "a b c"}]}],
        n=3, max_completion_tokens=2, logprobs=True, top_logprobs=2, stop=["\n"], seed=5, temperature=0.5,
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    entries = answer.choices[1].logprobs
    assert entries
    assert entries.content
    assert entries.content[1].token == " b"
    assert entries.content[1].bytes == [32, 98]
    assert [other.token for other in entries.content[1].top_logprobs] == [" b", "x"]
    assert house.text.last
    assert house.text.last.stop == ("\n",)
    assert house.text.last.temperature == 0.5


def test_completions_of_several_prompts(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="parrot", prompt=["x y", "z"], n=2, max_tokens=5, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["x y", "x y", "z", "z"]
    assert answer.usage
    assert answer.usage.prompt_tokens == 3
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.text_offset == [0, 1]
    tokens = api.completions.create(model="parrot", prompt=list(b"from tokens"))
    assert tokens.choices[0].text == "from tokens"
    streamed = api.completions.create(model="parrot", prompt="p q r", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "p q r"


def test_embeddings_as_the_client_asks_by_default_and_as_numbers(api: openai.OpenAI) -> None:
    default = api.embeddings.create(model="letters", input=["a", "abc"])
    numbers = api.embeddings.create(model="letters", input=["a", "abc"], encoding_format="float")
    assert [item.embedding for item in default.data] == [item.embedding for item in numbers.data]
    assert [item.embedding[0] for item in default.data] == [1.0, 3.0]
    assert default.usage.prompt_tokens == 4
    with pytest.raises(openai.BadRequestError) as caught:
        api.embeddings.create(model="letters", input="a", dimensions=2)
    assert caught.value.param == "dimensions"


def test_models_are_listed_with_their_aliases(api: openai.OpenAI) -> None:
    assert {"parrot", "deepseek-chat", "letters"} <= {model.id for model in api.models.list()}
    assert api.models.retrieve("deepseek-chat").id == "deepseek-chat"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-99")


def test_what_the_node_cannot_honour_is_refused_by_name(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": "hi"}],
            functions=[{"name": "f", "parameters": {}}],
        )  # fmt: skip
    assert (caught.value.param, caught.value.code) == ("functions", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}], temperature=3)
    assert caught.value.param == "temperature"


def test_an_unknown_model_is_not_found(api: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            api.chat.completions.create(model="gpt-99", messages=[{"role": "user", "content": "hi"}], stream=stream)
        assert caught.value.code == "model_not_found"


def test_a_standby_node_is_unavailable(api: openai.OpenAI, house: House) -> None:
    house.node.close()
    with pytest.raises(openai.InternalServerError) as caught:
        api.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "12"
    assert caught.value.response.headers["X-Hotspare-Mode"] == "standby"
    assert "it holds no lease" in caught.value.message
    assert api.models.list().data, "what is no inference is answered in every mode"


def test_a_lost_worker_is_a_status_before_the_first_text_and_an_event_after_it(api: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            api.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "boom"}], stream=stream)
        assert (caught.value.status_code, caught.value.code) == (503, "worker_lost")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
    seen = ""
    with pytest.raises(openai.APIError, match="SIGKILL"):
        for chunk in api.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "to fall over"}], stream=True):
            seen += chunk.choices[0].delta.content or ""
    assert seen == "to fall"
