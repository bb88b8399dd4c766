"""The detokenizer as a target."""

from typing import Any

from common.events import Event
from common.messages import Abort, Delta, Failed, RequestMessage
from tests.detokenizer.test_worker import Detokenizer, ids_of, start, tokens
from tests.fuzz.actions import Conversation, Member, Say
from tests.fuzz.making import Maker
from tests.fuzz.targets import ATTEMPTS, REQUEST_IDS, Target, innocent_key

TEXT = "é is a test, and 😀 too"
GATEWAYS = (Member("gateway-1", "gateway"), Member("gateway-2", "gateway"))
GROUPS = (Member("llm-1", "llm"), Member("llm-2", "llm"))


class DetokenizerTarget(Target):
    role = "detokenizer"
    peers = GATEWAYS + GROUPS
    innocents = (Member("gateway-i", "gateway"), Member("llm-i", "llm"))

    def __init__(self) -> None:
        super().__init__()
        self._service = Detokenizer()
        self._service.member.links = self.door  # type: ignore[assignment]
        for peer in self.innocents:
            self.door.join(peer.id, peer.role)

    def play(self, events: list[Event[Any]]) -> None:
        self._service.play(events)

    def converse(self, maker: Maker) -> Conversation:
        draw = maker.draw
        key = (draw.choice(REQUEST_IDS), draw.choice(ATTEMPTS))
        gateway = draw.choice(GATEWAYS)
        llm = draw.choice(GROUPS)
        stop = tuple(draw.sample(["test", "😀", "too", " "], draw.randrange(3)))
        text = TEXT[: draw.randrange(1, len(TEXT))]
        found = answer_to(key, gateway.id, llm, text, draw.random() < 0.3, stop)
        match draw.randrange(4):
            case 0:
                found[-1] = Say(llm, Abort(request_id=key[0], attempt=key[1]))
            case 1:
                found[-1] = Say(llm, maker.make(Failed))
        return found

    def question(self, number: int) -> Conversation:
        gateway, llm = self.innocents
        return answer_to(innocent_key(number), gateway.id, llm, TEXT, True, ("too",))

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        key = innocent_key(number)
        own = [(p, m) for p, m in sent if isinstance(m, RequestMessage) and m.key == key]
        ends = [n for n, (_, m) in enumerate(own) if isinstance(m, Delta) and m.finish_reason]
        own = own[: ends[0] + 1] if ends else own  # after its end, the key is free for others
        return [
            (peer_id, type(message).__name__)
            if not isinstance(message, Delta)
            else (
                peer_id,
                message.offset,
                message.text.text(),
                message.finish_reason,
                message.usage,
                message.logprobs and message.logprobs.bytes(),
            )
            for peer_id, message in own
        ]

    def held(self) -> dict[str, float]:
        worker = self._service.worker
        return {
            "answers": len(worker._answers),
            "gateways": len(worker._gateways - {"gateway-i"}),
            "unreleased": len(worker._unreleased),
        }


def answer_to(
    key: tuple[str, int],
    gateway: str,
    llm: Member,
    text: str,
    has_logprobs: bool,
    stop: tuple[str, ...],
) -> Conversation:
    """Return the tokens of a whole answer, as a language group sends them."""
    request_id, attempt = key
    ids = ids_of(text)
    events = start(request_id, attempt, gateway, llm.id, stop=stop)
    for offset in range(0, len(ids), 3):
        part = ids[offset : offset + 3]
        end = "length" if offset + 3 >= len(ids) else ""
        events += tokens(offset, part, end, request_id, attempt, has_logprobs)
    return [Say(llm, event.message) for event in events]  # type: ignore[union-attr]
