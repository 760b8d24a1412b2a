"""What answers a model's name right now: worker, manifest, folder, and the tokenizer that the daemon keeps for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from anyio import to_thread

from agent.config import Alias
from agent.http.collaborators import Meant, ServiceFailure
from agent.plan import wanted_models
from agent.preparation import Built, Preparation, PreparationFailed, Progress, Wish
from agent.reconcile import Reconciler
from agent.state import WORKER_OF_TASK, Asleep, Broken, Serving, WorkerName
from agent.supervision.worker import Worker
from agent.text import Served
from models.chat_template import ChatTemplate, ChatTemplateError
from models.engines import EngineError
from models.manifest import Manifest
from models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Language:
    """Tokenizer and chat template of one engine folder."""

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None


class ServedModels:
    """Resolves names and aliases for the text service. `aliases` are the operator's; those of manifests count too."""

    def __init__(self, workers: Mapping[WorkerName, Worker], aliases: Mapping[str, Alias], context_tokens: int) -> None:
        self._workers = workers
        self._aliases = aliases
        self._context_tokens = context_tokens
        self._languages: dict[Path, Language] = {}
        self.reconciler: Reconciler | None = None

    def load(self, model: str, folder: Path) -> None:
        """Read tokenizer and template of a prepared text model; blocks. Raises PreparationFailed."""
        if folder in self._languages:
            return
        try:
            tokenizer = Tokenizer(folder)
            language = Language(folder, tokenizer, ChatTemplate.from_folder(folder, tokenizer))
        except (OSError, ValueError, EngineError, ChatTemplateError) as error:
            raise PreparationFailed(f"{model}: its tokenizer in {folder} cannot be used: {error}") from error
        # The one of the engine that serves stays while its successor is opened; older ones of the model go.
        served = self.reconciler.models.get(model) if self.reconciler else None
        current = getattr(served, "folder", None)
        for old in [known for known in self._languages if known.parent == folder.parent and known != current]:
            del self._languages[old]
        self._languages[folder] = language

    def resolve(self, name: str) -> Served:
        """What sleeps is answered for too: it is loaded once its worker is asked (see Reconciler.using).

        Raises ServiceFailure: unknown_model for a name nobody asked to serve, not_ready while it is on its way.
        """
        model = self.canonical(name)
        reconciler = self.reconciler
        state = reconciler.models.get(model) if reconciler else None
        manifest = reconciler.manifest(model) if reconciler else None
        if state is None and reconciler is not None and model in wanted_models(reconciler.desired.value):
            raise ServiceFailure("not_ready", f"{model} is wanted here and has not had its turn yet; ask again in a moment")
        if state is None:
            raise ServiceFailure("unknown_model", f"there is no model {name[:200]!r} on this node; see /v1/models")
        if isinstance(state, Broken):
            raise ServiceFailure("not_ready", f"{model} could not be made ready: {state.message}")
        if manifest is None or not isinstance(state, Serving | Asleep):
            raise ServiceFailure("not_ready", f"{model} is being prepared; ask again in a moment")
        language = self._languages.get(state.folder)
        if language is None:
            raise ServiceFailure("invalid", f"{model} is a model for {manifest.task}; it has no text endpoint")
        worker = self._workers[WORKER_OF_TASK[manifest.task]]
        context_tokens, is_asleep = self._context(manifest), isinstance(state, Asleep)
        return Served(worker, manifest, state.folder, language.tokenizer, language.template, context_tokens, is_asleep)

    def meant(self, name: str) -> Meant:
        """What a client's name stands for: an alias or a model's name as a whole, else `model:adapter`; an unknown one for itself."""
        whole = self._known(name)
        if whole is not None:
            return whole
        base, _, adapter = name.rpartition(":")
        known = self._known(base) if base else None
        return replace(known, adapter=adapter) if known is not None else Meant(name)

    def is_own(self, name: str) -> bool:
        """Whether a name means a model of this node and no other: its manifest's own, with an adapter or not; no alias."""
        models = self.reconciler.models if self.reconciler else {}
        return name not in self._aliases and (name in models or name.rpartition(":")[0] in models)

    def canonical(self, name: str) -> str:
        """The manifest's name for a name or alias, as a whole; an unknown one comes back unchanged."""
        known = self._known(name)
        return name if known is None else known.model

    def _known(self, name: str) -> Meant | None:
        if (alias := self._aliases.get(name)) is not None:
            return Meant(alias.model, alias.adapter, alias.thinking)
        models = self.reconciler.models if self.reconciler else {}
        if name in models:
            return Meant(name)
        for model in models:
            manifest = self.reconciler.manifest(model) if self.reconciler else None
            if manifest is not None and name in manifest.aliases:
                return Meant(model)
        return None

    def _context(self, manifest: Manifest) -> int:
        return min(self._context_tokens, manifest.generation.context_tokens) if manifest.task == "generation" else 0


class WithLanguage:
    """A Preparation that reads the tokenizer of text models too, so that an engine whose language cannot be used does not serve."""

    def __init__(self, preparation: Preparation, served: ServedModels) -> None:
        self._preparation = preparation
        self._served = served

    async def prepare(self, wish: Wish, progress: Progress) -> Built:
        return await self._loaded(wish, await self._preparation.prepare(wish, progress))

    async def renew(self, wish: Wish, progress: Progress) -> Built:
        return await self._loaded(wish, await self._preparation.renew(wish, progress))

    async def _loaded(self, wish: Wish, built: Built) -> Built:
        if wish.manifest.task != "detection":
            await to_thread.run_sync(self._served.load, wish.manifest.name, built.folder)
        return built
