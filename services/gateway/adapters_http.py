"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shape."""

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from services.gateway.adapters import check_adapter
from services.gateway.bodies import Bodies
from services.gateway.generation import Core
from services.gateway.json_bodies import read_body


class Load(BaseModel):
    """The body of a load."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    """Whether an adapter of this name may be replaced."""


class Unload(BaseModel):
    """The body of an unload."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
    """vLLM's own number of an adapter, which it does not read either."""


class AdapterEndpoint(ABC):
    """An endpoint that changes the adapters, as an ASGI application."""

    def __init__(self, core: Core, bodies: Bodies) -> None:
        self.core = core
        self.bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.bodies.reserve(scope) as reservation:
            body = await self.bodies.receive(scope, receive, reservation)
            text = await self.change(body)
        await PlainTextResponse(text)(scope, receive, send)

    @abstractmethod
    async def change(self, body: bytearray) -> str:
        """Do what a body asks for, and return what the client reads.

        Raises
        ------
        ServingError
            if that is not possible.
        """


class LoadAdapterEndpoint(AdapterEndpoint):
    """POST /v1/load_lora_adapter."""

    async def change(self, body: bytearray) -> str:
        asked = read_body(body, Load)
        check_adapter(self.core.model_name, asked.lora_name, asked.lora_path)
        await self.core.adapters.load(asked.lora_name, asked.lora_path, asked.load_inplace)
        return f"Success: LoRA adapter '{asked.lora_name}' added successfully."


class UnloadAdapterEndpoint(AdapterEndpoint):
    """POST /v1/unload_lora_adapter."""

    async def change(self, body: bytearray) -> str:
        asked = read_body(body, Unload)
        await self.core.adapters.unload(asked.lora_name)
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."
