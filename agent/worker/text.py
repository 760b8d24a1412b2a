"""Text generation in the worker: one scheduler per open model, all stepped in turn."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from agent.worker.loop import Emit, Refusal
from agent.worker_protocol import Cancel, CloseModel, Done, Failed, Generate, OpenModel, Tokens
from models.engines import EngineError, EngineOptions, GenerationEngine, SlotTokens, open_generation_engine
from models.engines.decoder import read_facts
from models.manifest import GenerationManifest, manifest_from_mapping
from models.record import from_mapping
from models.tasks.generation.constrain import Constraint, Grammars
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest, Output, Refused

OpenEngine = Callable[[Path, EngineOptions], GenerationEngine]

ENDS: Dict[str, str] = {
    "cancelled": "the request was cancelled",
    "deadline": "the answer was not complete before its deadline",
    "grammar": "the grammar became too complex to follow; make it simpler",
    "busy": "the queue is full, and this request gave way to a more urgent one or to somebody who has fewer in it; try again later",
}


class OpenText:
    """An open model and the numbers of its requests that have not ended."""

    def __init__(self, message: OpenModel, engine: GenerationEngine, scheduler: Scheduler) -> None:
        self.message = message
        self.engine = engine
        self.scheduler = scheduler
        self.requests: Set[int] = set()


class TextService:
    handles: Tuple[Any, ...] = (OpenModel, CloseModel, Generate, Cancel)

    def __init__(
        self,
        emit: Emit,
        wake: Callable[[], None],
        open_engine: OpenEngine = open_generation_engine,
        settings: Optional[SchedulerSettings] = None,
    ) -> None:
        self._emit = emit
        self._open_engine = open_engine
        self._settings = settings or SchedulerSettings()
        self._models: Dict[str, OpenText] = {}
        self._leaving: List[OpenText] = []

    def handle(self, message: Any, payload: bytes) -> None:
        if isinstance(message, Generate):
            self._generate(message, payload)
        elif isinstance(message, OpenModel):
            self._open(message)
        elif isinstance(message, CloseModel):
            self._close(message.model)
            self._emit(Done(message.request))
        elif isinstance(message, Cancel):
            for model in [*self._models.values(), *self._leaving]:
                model.scheduler.cancel(message.target)

    def step(self) -> bool:
        for model in [*self._models.values(), *self._leaving]:
            if not model.scheduler.is_idle:
                self._step(model)
        for model in [model for model in self._leaving if model.scheduler.is_idle]:
            self._leaving.remove(model)
            model.engine.close()
        return any(not model.scheduler.is_idle for model in [*self._models.values(), *self._leaving])

    def status(self) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Dict[str, Any]]]:
        return {name: _status(model) for name, model in self._models.items()}, {}

    def close(self) -> None:
        for name in list(self._models):
            self._close(name)
        for model in self._leaving:
            self._end(model, "cancelled", f"model {model.message.model} was closed")
        self._leaving.clear()

    def _open(self, message: OpenModel) -> None:
        manifest = manifest_from_mapping(message.manifest)
        if not isinstance(manifest, GenerationManifest):
            raise Refusal("invalid", f"model {message.model} has task {manifest.task!r}; the text service generates")
        model = self._load(message)  # where there is no memory for both, the one before goes on
        before = self._models.get(message.model)
        if before is not None:
            self._leaving.append(before)  # it ends its answers, and closes
        self._models[message.model] = model
        self._emit(Done(message.request, _facts(model.engine)))

    def _load(self, message: OpenModel) -> OpenText:
        engine = self._open_engine(Path(message.folder), from_mapping(EngineOptions, message.options))
        _warm_up(engine)
        return OpenText(message, engine, Scheduler(engine, self._settings, constrain=_constrain(Path(message.folder), engine)))

    def _close(self, name: str) -> None:
        model = self._models.pop(name, None)
        if model is not None:
            self._end(model, "cancelled", f"model {name} was closed")

    def _generate(self, message: Generate, payload: bytes) -> None:
        model = self._models.get(message.model)
        if model is None:
            raise Refusal("unknown_model", f"model {message.model} is not open; open are {', '.join(self._models) or 'none'}")
        try:
            model.scheduler.add(_request(message, payload, model.engine.adapters))
        except Refused as refused:
            raise Refusal(refused.code, str(refused), refused.retry_after_s) from refused
        model.requests.add(message.request)

    def _step(self, model: OpenText) -> None:
        try:
            outputs = model.scheduler.step()
        except EngineError as error:
            # What the engine holds cannot be trusted any more. If it cannot be opened anew either, the worker ends and is restarted.
            traceback.print_exc()
            self._end(model, "engine", str(error))
            if model in self._leaving:
                self._leaving.remove(model)
            else:
                self._models[model.message.model] = self._load(model.message)
            return
        for output in outputs:
            self._report(model, output)

    def _report(self, model: OpenText, output: Output) -> None:
        if output.tokens:
            self._emit(Tokens(output.number, output.tokens, output.logprobs, output.cached_tokens))
        if output.finish is None:
            return
        model.requests.discard(output.number)
        if output.finish in ENDS:
            retry_after_s = model.scheduler.retry_after_s if output.finish == "busy" else None
            code = "invalid" if output.finish == "grammar" else output.finish
            self._emit(Failed(output.number, code, ENDS[output.finish], retry_after_s))
            return
        result = {
            "finish": output.finish,
            "prompt_tokens": output.prompt_tokens,
            "generated_tokens": output.generated_tokens,
            "cached_tokens": output.cached_tokens,
            "queued_s": round(output.queued_s, 6),
        }
        self._emit(Done(output.number, result))

    def _end(self, model: OpenText, code: str, message: str) -> None:
        for number in sorted(model.requests):
            self._emit(Failed(number, code, message))
        model.requests.clear()
        model.engine.close()


def _warm_up(engine: GenerationEngine) -> None:
    """A prompt and one token more: the first passes read weights from the disk and set up kernels, and are nobody's to wait for."""
    try:
        engine.step([SlotTokens(0, [0] * min(16, engine.context_tokens - 1))])
        engine.step([SlotTokens(0, [0])])
        engine.truncate(0, 0)
    except EngineError:
        engine.close()
        raise


def _request(message: Generate, payload: bytes, adapters: Sequence[str]) -> GenerationRequest:
    if len(payload) % 4:
        raise Refusal("invalid", f"the prompt has {len(payload)} bytes, not a multiple of 4")
    if message.adapter and message.adapter not in adapters:
        raise Refusal("invalid", f"model {message.model} has no adapter {message.adapter!r}; it has {', '.join(adapters) or 'none'}")
    sampling = Sampling(
        message.temperature,
        message.top_p,
        message.top_k,
        message.seed,
        message.presence_penalty,
        message.frequency_penalty,
        message.top_logprobs,
        message.logit_bias,
    )
    return GenerationRequest(
        message.request,
        tuple(np.frombuffer(payload, "<i4").tolist()),
        message.max_tokens,
        sampling,
        message.stop_tokens,
        message.priority,
        time.monotonic() + message.deadline_s,
        adapters.index(message.adapter) + 1 if message.adapter else 0,
        message.grammar,
        message.tenant,
    )


def _constrain(folder: Path, engine: GenerationEngine) -> Callable[[str], Constraint]:
    """Reads grammars for the model in `folder`; of it nothing is read before the first."""
    grammars: List[Grammars] = []

    def start(grammar: str) -> Constraint:
        if not grammars:
            grammars.append(Grammars(folder / "tokenizer.json", engine.vocabulary, read_facts(folder).eos_ids))
        return grammars[0].start(grammar)

    return start


def _facts(engine: GenerationEngine) -> Dict[str, Any]:
    return {
        "provider": engine.provider,
        "slots": engine.slots,
        "context_tokens": engine.context_tokens,
        "vocabulary": engine.vocabulary,
        "adapters": list(engine.adapters),
    }


def _status(model: OpenText) -> Dict[str, Any]:
    load = model.scheduler.load
    return {
        "task": "generation",
        **_facts(model.engine),
        "running": load.running,
        "waiting": load.waiting,
        "queue": model.scheduler.most_waiting,
        "retry_after_s": round(model.scheduler.retry_after_s, 1),
        "prompt_tokens": load.prompt_tokens,
        "cached_tokens": load.cached_tokens,
        "generated_tokens": load.generated_tokens,
        "guessed_tokens": load.guessed_tokens,
        "kept_tokens": load.kept_tokens,
    }
