"""Asks a running system about the items of a task, a bounded number at a time."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from services.commands.chat_client import Answer, ChatClient, complete_patiently, image_part
from services.commands.client import ClientError
from services.commands.evaluation.records import Record
from services.commands.evaluation.task import BadItem, Item


@dataclass(frozen=True)
class Asking:
    """How every item is asked."""

    model: str
    max_tokens: int | None
    """None for what is left of the context."""
    temperature: float
    seed: int

    def body(self, item: Item) -> dict[str, Any]:
        """Return the chat completion request of an item. Reads its images."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else image_part(part())
            for part in item.parts
            if part != ""
        ]
        longest = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return longest | {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "seed": self.seed + item.repeat,
        }


async def ask(
    client: ChatClient,
    items: Sequence[Item],
    asking: Asking,
    concurrency: int,
    keep: Callable[[Record], None],
) -> None:
    """Ask about every item in order, and call `keep` with the record of each as it is answered."""
    left = iter(items)
    workers = min(concurrency, len(items))
    await asyncio.gather(*(ask_in_turn(client, left, asking, keep) for _ in range(workers)))


async def ask_in_turn(
    client: ChatClient, left: Iterator[Item], asking: Asking, keep: Callable[[Record], None]
) -> None:
    for item in left:
        keep(record_of(item, await answer_to(client, item, asking)))


async def answer_to(client: ChatClient, item: Item, asking: Asking) -> Answer:
    """Return the answer to an item; one with an error if the item or its request failed.

    Raises
    ------
    ClientError
        If an image of the data cannot be read.
    """
    try:
        body = await asyncio.to_thread(asking.body, item)
    except BadItem as error:
        return Answer(error=str(error))
    except ClientError as error:
        raise ClientError(f"item {item.id}: {error}") from error
    except OSError as error:
        raise ClientError(f"item {item.id}: cannot read {error.filename}") from error
    return await complete_patiently(client, body)


def record_of(item: Item, answer: Answer) -> Record:
    return {
        "id": item.id,
        "input": item.text,
        "output": answer.text,
        "error": answer.error,
        "finish_reason": answer.finish_reason,
        "e2e_time": round(answer.seconds, 6),
    }
