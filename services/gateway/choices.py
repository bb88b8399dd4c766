"""How many answers a chat asks for, and how urgent it is."""

from typing import TYPE_CHECKING

from services.gateway.invalid_field import InvalidField

if TYPE_CHECKING:
    from services.gateway.schema import ChatRequest


def read_n(chat: "ChatRequest") -> int:
    """Return the number of answers. Raises InvalidField if it should choose the best of more."""
    n = 1 if chat.n is None else chat.n
    if chat.best_of not in (None, n):
        problem = f"only n answers are made, which is {n}; send {n} or leave it out"
        raise InvalidField("best_of", problem)
    return n
