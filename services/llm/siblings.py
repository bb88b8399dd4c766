"""Several answers to one prompt, which is computed once for all of them.

Each answer is a request. The first one computes the prompt, and the others are held until then:

    the first    prompt ........................ | token, token, ...
    the others   held                            | share its blocks, and go on by themselves

They share its items, too. Messages about items name the first one, also after its end.

Imports no torch.
"""

import msgspec

from common.messages import Prompt, RequestKey
from services.llm.request import Request


class Siblings:
    """The requests that have a prompt in common with others."""

    def __init__(self) -> None:
        self._by_first: dict[RequestKey, list[Request]] = {}
        """By the key of the first one: those that have not ended."""
        self._first_of: dict[RequestKey, RequestKey] = {}

    def add(self, first: Request, others: list[Request]) -> None:
        """Hold the others until the prompt of the first one is computed."""
        self._by_first[first.key] = [first, *others]
        for request in (first, *others):
            self._first_of[request.key] = first.key
        for other in others:
            other.is_held = True
            other.arrived = first.arrived
            other.embeddings = first.embeddings
            other.item_timings = first.item_timings

    def release(self, first: Request) -> list[Request]:
        """Return the requests that were held until the prompt of this one was computed."""
        released = [request for request in self._by_first.get(first.key, ()) if request.is_held]
        for request in released:
            request.is_held = False
            request.num_cached_tokens = first.num_cached_tokens
            request.first_scheduled = first.first_scheduled
        return released

    def recipient(self, key: RequestKey) -> Request | None:
        """Return a request for which the items are that were sent for one that has ended."""
        return next(iter(self._by_first.get(key, ())), None)

    def remove(self, request: Request) -> RequestKey | None:
        """Forget a request that has ended.

        Returns the key under which the items can be freed; None if others need them.
        """
        first = self._first_of.pop(request.key, None)
        if first is None:
            return request.key
        left = self._by_first[first]
        left.remove(request)
        if left:
            return None
        del self._by_first[first]
        return first

    def orphans_of(self, request: Request) -> list[Request]:
        """Return the requests that can never begin, because this one ended too soon."""
        return [other for other in self._by_first.get(request.key, ()) if other.is_held]


def sibling_keys(prompt: Prompt) -> list[RequestKey]:
    return [(sibling.request_id, prompt.attempt) for sibling in prompt.siblings]


def prompts_of_siblings(prompt: Prompt) -> list[Prompt]:
    """Return the prompts of the other answers, as each would have been sent alone."""
    return [
        msgspec.structs.replace(
            prompt,
            request_id=sibling.request_id,
            siblings=(),
            sampling=msgspec.structs.replace(
                prompt.sampling, seed=sibling.seed, num_prompt_logprobs=None
            ),
        )
        for sibling in prompt.siblings
    ]
