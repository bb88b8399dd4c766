"""Loads LoRA adapters on all ranks of a language group, while it serves.

Each rank reads its share on a thread of its own (PrepareAdapter). Once every rank has read the same
files, rank 0 has all of them use it (UseAdapter), in order with the steps. If a rank cannot, all
drop what they have read (DropAdapter).
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.adapter_names import objection_to_adapter
from common.checkpoint import BadCheckpoint, Checkpoint
from common.config import BadSetting
from common.errors import Exhausted, InvalidRequest, NotFound, ServingError
from common.logs import get_logger
from common.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraFiles,
    open_adapter,
)
from common.member import Member
from common.messages import (
    AdapterChanged,
    AdapterPrepared,
    DropAdapter,
    LoadAdapter,
    PrepareAdapter,
    UnloadAdapter,
    UseAdapter,
)
from common.settings import LlmSettings
from services.llm.lora_registry import LoraRegistry, Resident
from services.llm.parallel import Shard

COMPARED_BYTES = 7
"""Ranks compare this much of the hash of an adapter when they start. It fits into an int64."""


class AdapterRunner(Protocol):
    """What computes with adapters on one rank."""

    def prepare_adapter(self, files: LoraFiles) -> Any: ...

    def use_adapter(self, adapter: int, layers: Any) -> None: ...

    def drop_adapter(self, adapter: int) -> None: ...


class RankAdapters:
    """The adapters of one rank."""

    def __init__(
        self, runner: AdapterRunner, checkpoint: Checkpoint, settings: LlmSettings
    ) -> None:
        self._runner = runner
        self._checkpoint = checkpoint
        self._max_rank = settings.max_lora_rank
        self._root = settings.lora_root
        self._prepared: dict[int, Any] = {}
        self._thread = ThreadPoolExecutor(1, "adapters")

    def load_given(self, adapters: dict[str, str], shard: Shard) -> list[Resident]:
        """Load the adapters of the command line before the rank is ready.

        Raises
        ------
        BadCheckpoint
            if one cannot be used.
        BadSetting
            if the ranks have read different files.
        """
        residents = []
        for number, (name, path) in enumerate(adapters.items(), 1):
            files = open_adapter(path, self._checkpoint, self._max_rank)
            self._runner.use_adapter(number, self._runner.prepare_adapter(files))
            part = int.from_bytes(files.identity[:COMPARED_BYTES], "little")
            if shard.agree(int(shard.agree(part) == part)) == 0:
                raise BadSetting(f"--lora {name}={path}: the ranks have different files there")
            residents.append(Resident(number, name, path, files.identity))
        return residents

    def prepare(self, message: PrepareAdapter, done: Callable[[AdapterPrepared], None]) -> None:
        """Read an adapter on a thread, which calls `done`."""
        self._thread.submit(self._prepare, message, done)

    def _prepare(self, message: PrepareAdapter, done: Callable[[AdapterPrepared], None]) -> None:
        number = message.adapter
        try:
            files = open_adapter(
                place_in(self._root, message.path), self._checkpoint, self._max_rank
            )
            self._prepared[number] = self._runner.prepare_adapter(files)
            done(AdapterPrepared(adapter=number, identity=files.identity))
        except BadCheckpoint as e:
            done(AdapterPrepared(adapter=number, error=str(e)))
        except Exception as e:  # noqa: BLE001 - the outermost code of a thread; rank 0 waits
            get_logger().exception("an adapter could not be loaded")
            done(
                AdapterPrepared(adapter=number, error=f"unexpected {type(e).__name__}: see the log")
            )

    def use(self, adapter: int) -> None:
        """Let steps name an adapter that was prepared."""
        self._runner.use_adapter(adapter, self._prepared.pop(adapter))

    def drop(self, adapter: int) -> None:
        """Free an adapter, whether it was used or only prepared."""
        self._prepared.pop(adapter, None)
        self._runner.drop_adapter(adapter)


def place_in(root: str, path: str) -> Path:
    """Return the directory of an adapter in the folder from which adapters may be loaded.

    Raises
    ------
    BadCheckpoint
        if it, or a file in it, lies elsewhere.
    """
    folder = Path(root).expanduser().resolve()
    found = (folder / path).resolve()
    places = (found, *((found / name).resolve() for name in (CONFIG_FILE, WEIGHTS_FILE)))
    if not all(place.is_relative_to(folder) for place in places):
        raise BadCheckpoint(f"{path} is not within --lora-root, nor are its files")
    return found


@dataclass(slots=True)
class Loading:
    """An adapter that the ranks are reading."""

    gateway_id: str
    message: LoadAdapter
    answers: dict[str, AdapterPrepared] = field(default_factory=dict)
    """By rank."""

    @property
    def error(self) -> str:
        """Why the ranks cannot use what they have read; empty if they can."""
        errors = sorted(answer.error for answer in self.answers.values() if answer.error)
        if errors:
            return errors[0]
        same = len({answer.identity for answer in self.answers.values()}) == 1
        return "" if same else f"the ranks have different files in {self.message.path}"


class GroupAdapters:
    """Loads and unloads the adapters of a group, on its rank 0."""

    def __init__(
        self,
        registry: LoraRegistry,
        own: RankAdapters | None,
        settings: LlmSettings,
        member: Member[Any],
        ranks: frozenset[str] = frozenset(),
    ) -> None:
        """Create the adapters of a group.

        Parameters
        ----------
        own
            are those of rank 0; None if there are no adapters for the model.
        member
            is rank 0. An AdapterPrepared that is posted to it is for `on_prepared`.
        ranks
            are the ids of the other ranks.
        """
        self.registry = registry
        self._own = own
        self._can_load = bool(settings.lora_root)
        self._member = member
        self._ranks = ranks
        self._loading: dict[int, Loading] = {}
        self.changed = False
        """Whether the adapters that requests may choose have changed since this was cleared."""
        self._log = get_logger()

    def load(self, gateway_id: str, message: LoadAdapter) -> None:
        """Have all ranks read an adapter, or answer why they do not."""
        try:
            self._check(message)
        except ServingError as e:
            self._answer(gateway_id, message.task, e)
            return
        number = self.registry.next_number()
        self._loading[number] = Loading(gateway_id, message)
        prepare = PrepareAdapter(adapter=number, path=message.path)
        self._send(prepare)
        assert self._own
        self._own.prepare(prepare, self._member.post)

    def _check(self, message: LoadAdapter) -> None:
        """Raise a ServingError unless the adapter may be loaded now."""
        if not self._can_load or self._own is None:
            raise InvalidRequest(
                "no adapters are loaded at run time here: start the language groups with "
                "--lora-root DIR, or name adapters with --lora NAME=DIR"
            )
        if objection := objection_to_adapter(message.name, message.path):
            raise InvalidRequest(objection)
        loading = {loading.message.name for loading in self._loading.values()}
        if message.name in loading:
            raise InvalidRequest(f"the adapter {message.name!r} is being loaded")
        if message.name in self.registry.names and not message.replace:
            raise InvalidRequest(
                f"the adapter {message.name!r} is loaded already: unload it first, or ask for it "
                "to be replaced"
            )
        others = (self.registry.names | loading) - {message.name}
        if len(others) >= self.registry.max_loras:
            most = self.registry.max_loras
            raise InvalidRequest(f"all {most} adapters of --max-loras are loaded: unload one first")
        if self.registry.num_retired + len(loading) >= self.registry.max_loras:
            raise Exhausted(
                "unloaded adapters still have running requests: try again", retry_after=1.0
            )

    def on_prepared(self, rank: str, answer: AdapterPrepared) -> None:
        """Note the answer of a rank ("" for rank 0). The last one decides."""
        loading = self._loading.get(answer.adapter)
        if loading is None or rank not in {"", *self._ranks}:
            self._log.warning("ignored an adapter that nobody asked for", rank=rank)
            return
        loading.answers[rank] = answer
        if len(loading.answers) == 1 + len(self._ranks):
            del self._loading[answer.adapter]
            self._finish(answer.adapter, loading, answer.identity)

    def _finish(self, number: int, loading: Loading, identity: bytes) -> None:
        message = loading.message
        assert self._own
        if error := loading.error:
            self._send(DropAdapter(adapter=number))
            self._own.drop(number)
            self._answer(loading.gateway_id, message.task, InvalidRequest(error))
            return
        self._send(UseAdapter(adapter=number))
        self._own.use(number)
        self.registry.add(Resident(number, message.name, message.path, identity))
        self.changed = True
        self._log.info("adapter loaded", name=message.name, path=message.path)
        self._answer(loading.gateway_id, message.task)

    def unload(self, gateway_id: str, message: UnloadAdapter) -> None:
        """Accept no further requests for an adapter. Those that run go on with it."""
        if not self._can_load:
            error: ServingError | None = InvalidRequest(
                "no adapters are unloaded at run time here: start the language groups with "
                "--lora-root DIR"
            )
        elif not self.registry.retire(message.name):
            error = NotFound(f"no adapter {message.name!r} is loaded")
        else:
            error = None
            self.changed = True
            self._log.info("adapter unloaded", name=message.name)
        self._answer(gateway_id, message.task, error)

    def drop_unused(self, used: Iterable[Resident | None]) -> set[str]:
        """Free the unloaded adapters that no request uses any more.

        Returns the names that mean nothing any more.
        """
        unused = self.registry.take_unused(used)
        for resident in unused:
            self._send(DropAdapter(adapter=resident.number))
            assert self._own
            self._own.drop(resident.number)
        return {resident.name for resident in unused} - self.registry.names

    def _send(self, message: PrepareAdapter | UseAdapter | DropAdapter) -> None:
        for rank in self._ranks:
            self._member.links.send(rank, message)

    def _answer(self, gateway_id: str, task: str, error: ServingError | None = None) -> None:
        if error:
            self._log.warning("adapter refused", task=task, reason=error.message)
        code, reason = (error.code, error.message) if error else ("", "")
        self._member.links.send(gateway_id, AdapterChanged(task=task, code=code, reason=reason))
