"""Text through a real worker process: SmolLM2 and MiniLM on ONNX Runtime, deaths included."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from agent.errors import AgentError, WorkerLost, WorkerRefused
from agent.http import collaborators
from agent.http.collaborators import Sampling, ServiceFailure, TextDelta
from agent.supervision.incarnation import SupervisionSettings
from agent.supervision.process import worker_command
from agent.supervision.restart import RestartPolicy
from agent.supervision.state import Running
from agent.supervision.worker import Worker
from agent.text import Served, TextService
from agent.worker_protocol import OpenModel
from models.catalog import load_catalog
from models.chat_template import ChatTemplate
from models.manifest import ClassificationManifest, manifest_from_mapping
from models.record import to_mapping
from models.tokenizer import Tokenizer
from tests.agent.supervision.running import until
from tests.models.tasks.conftest import minilm, smollm2  # noqa: F401  # fixtures
from tests.models.tasks.tiny_encoder import write_tiny_encoder

pytestmark = pytest.mark.anyio

CHAT = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
CLASSIFIER = "tiny-classifier"
SETTINGS = SupervisionSettings(hang_s=20, stop_s=5, restart=RestartPolicy(first_s=0.05, cap_s=0.2))
GREEDY = Sampling(temperature=0.0, max_tokens=24)
FRANCE = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
STORY = [{"role": "user", "content": "Tell a long story about a dog."}]


class Node:
    """What reconciliation does in the daemon: opens the models in each new process of the worker and knows which are open."""

    def __init__(self, models: Mapping[str, Served], options: Mapping[str, Any]) -> None:
        self.models = models
        self.options = options
        self.opened_in = 0

    def resolve(self, name: str) -> Served:
        if name not in self.models:
            raise ServiceFailure("unknown_model", name)
        return self.models[name]

    def using(self, model: str) -> AbstractContextManager[None]:
        return nullcontext()

    def rouse(self, model: str) -> None:
        """None of these models sleeps."""

    async def keep_open(self, worker: Worker) -> None:
        while True:
            running = await worker.until_running(60)
            if running.incarnation == self.opened_in:
                await anyio.sleep(0.01)
                continue
            try:
                for name, served in self.models.items():
                    await worker.call(OpenModel(0, name, to_mapping(served.manifest), str(served.folder), dict(self.options)), b"", 60)
            except WorkerLost:
                continue
            self.opened_in = running.incarnation


@asynccontextmanager
async def serving(*folders: Path, retry_s: float = 30.0) -> AsyncIterator[tuple[TextService, Worker, Node]]:
    worker = Worker("text", worker_command(), SETTINGS)
    models = {served.manifest.name: served for served in (served_from(folder, worker) for folder in folders)}
    node = Node(models, {"threads": 2, "slots": 2, "context_tokens": 512})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        tasks.start_soon(node.keep_open, worker)
        await until(lambda: node.opened_in == 1, 60)
        yield TextService(node.resolve, node, retry_s), worker, node
        tasks.cancel_scope.cancel()


def served_from(folder: Path, worker: Worker) -> Served:
    tokenizer = Tokenizer(folder)
    if (folder / "generation.json").is_file():
        return Served(worker, load_catalog().find(CHAT), folder, tokenizer, ChatTemplate.from_folder(folder, tokenizer), 512)
    if (folder / "is-classifier").is_file():
        return Served(worker, classifier(), folder, tokenizer)
    return Served(worker, load_catalog().find(EMBEDDER), folder, tokenizer)


def classifier() -> ClassificationManifest:
    manifest = manifest_from_mapping({
        "name": CLASSIFIER,
        "task": "classification",
        "format": "onnx",
        "licence": "Apache-2.0",
        "summary": "",
        "files": {"model": {"source": "file:/nowhere"}},
        "classification": {"labels": list("abcdef"), "max_tokens": 8},
    })  # fmt: skip
    assert isinstance(manifest, ClassificationManifest)
    return manifest


async def collect(
    text: TextService, prompt: list[int], sampling: Sampling = GREEDY, each: Callable[[TextDelta], object] = id
) -> list[TextDelta]:
    deltas = []
    async for delta in text.generate(CHAT, prompt, sampling):
        deltas.append(delta)
        each(delta)
    return deltas


def joined(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def pid_of(worker: Worker) -> int:
    assert isinstance(worker.state, Running)
    return worker.state.pid


async def test_an_answer_streams_and_says_what_it_cost(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, _, _):
        prompt = text.chat_prompt(CHAT, FRANCE)
        deltas = await collect(text, prompt)
        assert joined(deltas) == "The capital of France is Paris."
        assert len(deltas) > 4
        assert [delta.finish for delta in deltas if delta.finish] == ["stop"]
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (len(prompt), 7, 0)
        again = (await collect(text, prompt, replace(GREEDY, max_tokens=3)))[-1]
        assert again.finish == "length"
        assert again.usage is not None
        assert again.usage.cached_tokens == len(prompt) - 1


async def test_stop_strings_end_the_work_and_are_not_given_out(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, worker, _):
        prompt = text.chat_prompt(CHAT, FRANCE)
        deltas = await collect(text, prompt, replace(GREEDY, stop=(" Par", "Spain"), max_tokens=None))
        assert joined(deltas) == "The capital of France is"
        assert deltas[-1].finish == "stop"
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 6
        await until(lambda: is_idle(worker))


def is_idle(worker: Worker) -> bool:
    model = worker.status.models.get(CHAT, {}) if worker.status else {}
    return bool(model.get("generated_tokens")) and model.get("running") == 0 and model.get("waiting") == 0


async def test_a_full_queue_is_known_without_asking_the_worker(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, worker, _):
        prompt = text.chat_prompt(CHAT, STORY)
        await until(lambda: worker.status is not None and CHAT in worker.status.models)
        assert worker.status is not None
        told = worker.status.models[CHAT]
        text.check_room(CHAT, "", 0)
        begun: set[int] = set()

        async def talk(number: int) -> None:
            await collect(text, prompt, replace(GREEDY, max_tokens=None), lambda _: begun.add(number))

        async with anyio.create_task_group() as tasks:
            for number in range(told["slots"]):  # first, for those that come together have to wait together
                tasks.start_soon(talk, number)
            await until(lambda: len(begun) == told["slots"])
            os.kill(pid_of(worker), signal.SIGSTOP)  # who answers now has not asked it
            for number in range(told["queue"]):
                tasks.start_soon(talk, -1 - number)
            await anyio.wait_all_tasks_blocked()
            try:
                with pytest.raises(WorkerRefused, match="wait already") as refusal:
                    await collect(text, prompt)
                assert refusal.value.reason == "busy"
                assert refusal.value.retry_after_s is not None
                text.check_room(CHAT, "another tenant", 0)  # for whom somebody gives way
            finally:
                os.kill(pid_of(worker), signal.SIGCONT)
            tasks.cancel_scope.cancel()
        text.check_room(CHAT, "", 0)


async def test_log_probabilities_have_words(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, _, _):
        deltas = await collect(text, text.chat_prompt(CHAT, FRANCE), replace(GREEDY, top_logprobs=2))
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert "".join(entry.token for entry in entries) == joined(deltas)
        assert all(len(entry.top) == 2 and entry.top[0][0] == entry.token for entry in entries)
        assert all(entry.logprob <= 0 and entry.raw.decode() == entry.token for entry in entries)


async def test_two_answers_interleave(smollm2: Path) -> None:  # noqa: F811
    order: list[str] = []
    async with serving(smollm2) as (text, _, _):
        async with anyio.create_task_group() as tasks:
            for name, messages in (("a", FRANCE), ("b", STORY)):
                prompt = text.chat_prompt(CHAT, messages)

                def note(_: TextDelta, name: str = name) -> None:
                    order.append(name)

                tasks.start_soon(collect, text, prompt, replace(GREEDY, max_tokens=16), note)
        assert sum(one != other for one, other in pairwise(order)) >= 6


async def test_a_consumer_that_leaves_ends_the_work(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, worker, _):
        async with aclosing(text.generate(CHAT, text.chat_prompt(CHAT, STORY), replace(GREEDY, max_tokens=None))) as deltas:
            await anext(deltas)
        await until(lambda: is_idle(worker))
        assert worker.status is not None
        assert worker.status.models[CHAT]["generated_tokens"] < 100


async def test_killed_in_mid_answer_is_one_clear_error_then_it_works(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, worker, node):
        prompt = text.chat_prompt(CHAT, STORY)
        deltas: list[TextDelta] = []
        with pytest.raises(WorkerLost) as lost:
            async for delta in text.generate(CHAT, prompt, replace(GREEDY, max_tokens=200)):
                deltas.append(delta)
                if len(deltas) == 3:
                    os.kill(pid_of(worker), signal.SIGSEGV)
        assert lost.value.cause.kind == "segfault"
        assert not any(delta.finish for delta in deltas)
        # The next request comes while the worker is away, and waits until the model is open again.
        assert "Paris" in joined(await collect(text, text.chat_prompt(CHAT, FRANCE)))
        assert worker.restarts == {"segfault": 1}
        assert node.opened_in == 2


async def test_killed_before_the_first_token_is_asked_again_once(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, worker, _):
        answers: list[str] = []

        async def ask() -> None:
            answers.append(joined(await collect(text, text.chat_prompt(CHAT, FRANCE))))

        os.kill(pid_of(worker), signal.SIGSTOP)  # so that the request is in its hands but no token is out
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.1)
            os.kill(pid_of(worker), signal.SIGKILL)
        assert answers == ["The capital of France is Paris."]
        assert worker.restarts == {"killed": 1}


async def test_it_gives_up_when_the_model_does_not_come_back(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2, retry_s=5.0) as (text, worker, node):
        prompt = text.chat_prompt(CHAT, FRANCE)
        node.opened_in = 2  # it believes that the next process has the model
        os.kill(pid_of(worker), signal.SIGKILL)
        with pytest.raises(ServiceFailure) as failure:
            await collect(text, prompt)
        assert failure.value.reason == "not_ready"


async def test_what_cannot_be_asked_is_refused_with_figures(smollm2: Path, minilm: Path) -> None:  # noqa: F811
    async with serving(smollm2, minilm) as (text, _, _):
        with pytest.raises(ServiceFailure, match=r"600 tokens.*fit into 512") as failure:
            await collect(text, [5] * 600)
        assert failure.value.reason == "context_length_exceeded"
        for ask, reason in [
            (collect(text, []), "invalid"),
            (collect(text, [10**6]), "invalid"),
            (collect(text, [5], replace(GREEDY, top_p=5.0)), "invalid"),
            (text.embed(CHAT, ["x"]), "invalid"),
            (text.embed(EMBEDDER, [[10**6]]), "invalid"),
            (text.embed("nobody", ["x"]), "unknown_model"),
        ]:
            with pytest.raises(AgentError) as error:
                await ask
            assert getattr(error.value, "reason", None) == reason
        with pytest.raises(ServiceFailure):
            text.chat_prompt(EMBEDDER, FRANCE)


async def test_without_max_tokens_it_may_fill_the_context(smollm2: Path) -> None:  # noqa: F811
    async with serving(smollm2) as (text, _, _):
        deltas = await collect(text, text.encode(CHAT, "one two three " * 160), replace(GREEDY, max_tokens=None))
        usage = deltas[-1].usage
        assert usage is not None
        assert deltas[-1].finish == "length"
        assert usage.prompt_tokens + usage.completion_tokens == 512


async def test_embeddings_beside_a_running_answer(smollm2: Path, minilm: Path) -> None:  # noqa: F811
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    async with serving(smollm2, minilm) as (text, _, _), anyio.create_task_group() as tasks:
        tasks.start_soon(collect, text, text.chat_prompt(CHAT, STORY), replace(GREEDY, max_tokens=200))
        rows, tokens = await text.embed(EMBEDDER, [*texts, "long " * 1000])
        assert rows.shape == (4, 384)
        assert rows.dtype == np.float32
        assert 256 < tokens < 300
        similar = rows[:3] @ rows[:3].T
        documented = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]  # https://www.sbert.net/docs/quickstart.html
        np.testing.assert_allclose(similar, documented, atol=0.01)
        many, _ = await text.embed(EMBEDDER, texts * 40)
        np.testing.assert_allclose(many[-3:] @ rows[:3].T, documented, atol=0.01)
        tasks.cancel_scope.cancel()


async def test_classes_with_probabilities(minilm: Path, tmp_path: Path) -> None:  # noqa: F811
    write_tiny_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(words())
    (tmp_path / "is-classifier").touch()
    async with serving(tmp_path) as (text, _, _):
        (first, second) = await text.classify(CLASSIFIER, ["three", "three four"])
        for scores in (first, second):
            assert sorted(label for label, _ in scores) == list("abcdef")
            assert sum(score for _, score in scores) == pytest.approx(1.0)
            assert [score for _, score in scores] == sorted((score for _, score in scores), reverse=True)
        assert first != second


def words() -> bytes:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "one", "two", "three", "four"])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}).encode()


async def test_it_is_what_the_http_side_wants() -> None:
    node = Node({}, {})
    service: collaborators.TextService = TextService(node.resolve, node)
    assert service


@pytest.mark.parametrize(
    ("opening", "closed"),
    [
        ("{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}", ""),
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("", ""),
    ],
)
def test_words_that_were_said_are_no_thoughts(smollm2: Path, opening: str, closed: str) -> None:  # noqa: F811
    template = ChatTemplate("{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]" + opening)
    served = replace(served_from(smollm2, Worker("text", worker_command(), SETTINGS)), template=template)
    node = Node({CHAT: served}, {})
    service = TextService(node.resolve, node)
    tokens, said = service.continued_prompt(CHAT, [{"role": "user", "content": "hi"}], "Once upon ")
    assert served.tokenizer.decode(tokens) == f"[user] hi\n[assistant]{closed}Once upon"
    assert served.tokenizer.decode(tokens[-said:]).strip() == "Once upon"
    tokens, said = service.continued_prompt(CHAT, [{"role": "user", "content": "hi"}], " ")
    assert (served.tokenizer.decode(tokens), said) == (f"[user] hi\n[assistant]{closed}", 0)
