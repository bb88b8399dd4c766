"""`twinlens status`, `scale` and `drain` through a gateway's gRPC port to a real controller.

The test plays the members and the launcher.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog

from common.membership import DRAINING, READY, STARTING
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.commands import control
from services.controller.service import ControlServicer
from tests.gateway.fake_core import FakeCore, grpc_server

DEADLINE = 20.0
CONTROLLER = control_pb2.Member(id="controller-1", role="controller", state=READY)
COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int]]] = {
    "status": (control.add_status_arguments, control.status),
    "scale": (control.add_scale_arguments, control.scale),
    "drain": (control.add_drain_arguments, control.drain),
}


class System:
    """A gateway's gRPC address, and a stub of the controller behind it."""

    def __init__(self, gateway: str, stub: Any) -> None:
        self.gateway = gateway
        self.stub = stub

    async def twinlens(self, command: str, *arguments: str) -> int:
        parser = argparse.ArgumentParser(f"twinlens {command}")
        add, run = COMMANDS[command]
        add(parser)
        return await asyncio.to_thread(run, parser.parse_args([*arguments, "--grpc", self.gateway]))

    async def join(self, *members: control_pb2.Member, **fields: Any) -> Any:
        """Join each member, or a launcher with these fields, by a stream of its own.

        Return the last stream, on which the controller has answered.
        """
        for request in [control_pb2.JoinRequest(member=member) for member in members] or [
            control_pb2.JoinRequest(**fields)
        ]:
            call = self.stub.Join(timeout=DEADLINE)
            await call.write(request)
            await call.read()
        return call


@pytest.fixture
def no_logs() -> Iterator[None]:
    """Keep logs off stdout, where the test reads the command's output."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def system(no_logs: None) -> AsyncIterator[System]:
    servicer = ControlServicer(CONTROLLER)
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    expiry = asyncio.create_task(servicer.expire_leases())
    async with (
        grpc_server(FakeCore(), address) as gateway,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield System(gateway, control_pb2_grpc.ControlServiceStub(channel))
    expiry.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await expiry
    await server.stop(None)


def vision(number: int, state: Any = READY, **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(id=f"vision-{number}", role="vision", state=state, **fields)


def managed(**replicas: int) -> control_pb2.Managed:
    return control_pb2.Managed(replicas=replicas)


async def wait_for(call: Any, found: Callable[[Any], bool]) -> Any:
    """Return the first response for which `found` is true."""
    while not found(answer := await call.read()):
        assert answer is not grpc.aio.EOF
    return answer


async def play_launcher(call: Any, **replicas: int) -> None:
    """Accept the first wanted counts."""
    response = await wait_for(call, lambda answer: answer.wanted)
    await call.write(
        control_pb2.JoinRequest(watch=True, managed=managed(**replicas | dict(response.wanted)))
    )


@pytest.mark.parametrize("as_json", [True, False])
async def test_status_lists_every_member(
    system: System, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    llm = control_pb2.Member(
        role="llm",
        id="llm-1",
        pid=12,
        state=READY,
        in_flight=2,
        queued=3,
        group="g",
        max_model_len=4096,
    )
    await system.join(llm, vision(1, STARTING, pid=13, detail="loading weights"))
    assert await system.twinlens("status", *(["--json"] if as_json else [])) == 0
    out = capsys.readouterr().out
    if as_json:
        _, first, other = json.loads(out)["members"]
        assert (
            first["role"],
            first["id"],
            first["pid"],
            first["state"],
            first["in_flight"],
            first["queued"],
        ) == (
            "llm",
            "llm-1",
            12,
            "ready",
            2,
            3,
        )
        assert (
            first["group"],
            first["rank"],
            first["max_model_len"],
            first["address"],
            first["host"],
        ) == ("g", 0, 4096, "", "")
        assert (other["state"], other["detail"]) == ("starting", "loading weights")
    else:
        header, _, *rows = (line.split() for line in out.splitlines())
        assert header == ["role", "id", "state", "pid", "in", "flight", "queued", "detail"]
        assert rows == [
            ["llm", "llm-1", "ready", "12", "2", "3"],
            ["vision", "vision-1", "starting", "13", "0", "0", "loading", "weights"],
        ]


def some_members() -> list[dict[str, Any]]:
    """Many members, with ids as Kubernetes makes them and long details."""
    why = "waits for a language group and for vision replicas with the fingerprint 0123456789abcdef"
    return [
        control.describe(
            control_pb2.Member(
                id=f"twinlens-{role}-7d9f8c5b4{n}-x2k8p-3fa2b1",
                role=role,
                state=STARTING if n % 7 == 0 else READY,
                pid=4_000_000 + n,
                in_flight=n,
                queued=1000 * n,
                detail=why if n % 7 == 0 else "",
            )
        )
        for role in ("preprocess", "vision", "llm", "detokenizer")
        for n in range(20)
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_of_members_fits_the_terminal(width: int) -> None:
    members = some_members()
    lines = control.table(members, width).splitlines()
    assert max(map(len, lines)) <= width
    text = "".join("".join(line.split()) for line in lines)
    assert all("".join(member["detail"].split()) in text for member in members)
    # An id is found in one line, or in two that follow each other in their column.
    if width >= 100:
        assert all(any(member["id"] in line for line in lines) for member in members)


def test_a_list_for_a_program_has_one_line_for_each_member() -> None:
    members = some_members()
    header, *rows = control.table(members).splitlines()
    assert header.split()[0] == "role" and len(rows) == len(members)
    for row, member in zip(rows, members, strict=True):
        assert member["id"] in row and row.endswith(member["detail"])


async def test_a_gateway_without_its_controller_is_not_reported_as_absent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with grpc_server(FakeCore()) as target:
        for command in (["status"], ["scale", "vision", "2"], ["drain", "vision-1"]):
            assert await System(target, None).twinlens(*command) == 1
            assert capsys.readouterr().err.startswith(
                f"twinlens: {target} says UNAVAILABLE: the controller does not answer"
            )


async def test_if_nothing_listens_the_error_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await System("127.0.0.1:1", None).twinlens("status") == 1
    assert capsys.readouterr().err.startswith(
        "twinlens: nothing answers at 127.0.0.1:1: start it with `twinlens serve`"
    )


@pytest.mark.parametrize("as_json", [True, False])
async def test_scale_returns_when_the_launcher_has_accepted_the_count(
    system: System, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    launcher = await system.join(watch=True, managed=managed(vision=1, llm=1))
    playing = asyncio.create_task(play_launcher(launcher, vision=1, llm=1))
    assert await system.twinlens("scale", "vision", "4", *(["--json"] if as_json else [])) == 0
    await playing
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out) == {"role": "vision", "replicas": 4, "replicas_before": 1}
    else:
        assert out == "vision: 4 wanted, 1 before\n"
    # The launcher keeps this count already, so it need not respond.
    assert await system.twinlens("scale", "vision", "4") == 0


async def test_without_a_launcher_scale_names_the_commands_to_use(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await system.twinlens("scale", "vision", "4") == 1
    err = capsys.readouterr().err
    assert "FAILED_PRECONDITION" in err
    assert (
        "docker compose up -d --no-recreate --scale vision=4" in err
        and "kubectl scale deployment/vision --replicas=4" in err
    )


async def test_scale_is_refused_after_the_launcher_left(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = await system.join(watch=True, managed=managed(vision=1))
    await launcher.done_writing()
    while await launcher.read() is not grpc.aio.EOF:
        pass
    assert await system.twinlens("scale", "vision", "2") == 1
    assert "FAILED_PRECONDITION: no launcher" in capsys.readouterr().err


async def test_status_and_scale_say_which_roles_the_model_does_not_need(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess = control_pb2.Member(
        id="preprocess-1",
        role="preprocess",
        state=READY,
        tasks=["classify"],
        stages=["preprocess", "llm"],
    )
    await system.join(preprocess)
    await system.join(watch=True, managed=managed(preprocess=1, llm=1))
    assert await system.twinlens("status") == 0
    assert "The served model needs no vision and no detokenizer." in capsys.readouterr().out
    assert await system.twinlens("scale", "vision", "2") == 1
    assert "needs no vision replicas" in capsys.readouterr().err


async def test_an_autoscaled_role_cannot_be_scaled_by_hand(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    await system.join(
        watch=True,
        managed=control_pb2.Managed(replicas={"vision": 1}, autoscaled={"vision": "1:4"}),
    )
    assert await system.twinlens("scale", "vision", "2") == 1
    assert (
        "FAILED_PRECONDITION" in (err := capsys.readouterr().err)
        and "--autoscale vision=1:4" in err
    )


@pytest.mark.parametrize(
    ("role", "replicas", "named"),
    [("gateway", 2, "vision, preprocess, llm, detokenizer"), ("vision", 0, "1 to 256")],
)
async def test_an_invalid_scale_request_is_refused_over_grpc_too(
    system: System, role: str, replicas: int, named: str
) -> None:
    await system.join(watch=True, managed=managed(vision=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.Scale(
            control_pb2.ScaleRequest(role=role, replicas=replicas), timeout=DEADLINE
        )
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and named in (
        caught.value.details() or ""
    )


@pytest.mark.parametrize(
    "wrong",
    [("gateway", "2"), ("vision", "0"), ("vision", "-1"), ("vision", "many"), ("vision",)],
    ids=" ".join,
)
async def test_wrong_use_of_scale_exits_with_2(system: System, wrong: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        await system.twinlens("scale", *wrong)
    assert caught.value.code == 2


async def test_the_later_of_two_scale_requests_wins(system: System) -> None:
    launcher = await system.join(watch=True, managed=managed(vision=1))

    def scale(replicas):
        return system.stub.Scale(
            control_pb2.ScaleRequest(role="vision", replicas=replicas), timeout=DEADLINE
        )

    first = scale(3)
    same = scale(3)
    await wait_for(launcher, lambda answer: answer.wanted.get("vision") == 3)
    second = scale(2)
    await wait_for(launcher, lambda answer: answer.wanted.get("vision") == 2)
    for call in (first, same):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.ABORTED
    await launcher.write(control_pb2.JoinRequest(managed=managed(vision=2)))
    assert (await second).replicas == 2


async def test_the_wanted_count_is_repeated_until_the_launcher_accepts_it(system: System) -> None:
    launcher = await system.join(watch=True, managed=managed(vision=1))
    call = system.stub.Scale(control_pb2.ScaleRequest(role="vision", replicas=3), timeout=DEADLINE)
    for _ in range(2):
        await wait_for(launcher, lambda answer: answer.wanted.get("vision") == 3)
    await launcher.write(control_pb2.JoinRequest(managed=managed(vision=3)))
    await call
    await wait_for(launcher, lambda answer: not answer.wanted)


async def test_drain_asks_the_member_to_drain_and_prints_its_state(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    await system.join(vision(2))
    launcher = await system.join(watch=True, managed=managed(vision=2))
    member = await system.join(vision(1))
    draining = asyncio.create_task(system.twinlens("drain", "vision-1"))
    await wait_for(member, lambda answer: answer.drain)
    await member.write(control_pb2.JoinRequest(member=vision(1, DRAINING, in_flight=1)))
    assert await draining == 0
    assert capsys.readouterr().out == "vision-1: draining, 1 in flight, 0 queued\n"
    assert (await wait_for(launcher, lambda answer: answer.drained)).drained == ["vision-1"]
    assert await system.twinlens("drain", "vision-1") == 0  # it is draining already


async def test_a_member_that_leaves_instead_counts_as_drained(system: System) -> None:
    await system.join(vision(2))
    member = await system.join(vision(1))
    draining = asyncio.create_task(system.twinlens("drain", "vision-1"))
    await wait_for(member, lambda answer: answer.drain)
    await member.done_writing()
    assert await draining == 0


async def test_the_last_ready_member_of_a_role_cannot_be_drained(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    await system.join(
        vision(1),
        vision(2, STARTING),
        control_pb2.Member(id="gateway-1", role="gateway", state=READY),
    )
    assert await system.twinlens("drain", "vision-1") == 1
    assert (
        "FAILED_PRECONDITION" in (err := capsys.readouterr().err)
        and "twinlens scale vision 2" in err
    )
    assert await system.twinlens("drain", "gateway-1") == 1


async def test_two_concurrent_drains_cannot_remove_the_last_two_members(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    await system.join(vision(2))
    member = await system.join(vision(1))
    draining = asyncio.create_task(system.twinlens("drain", "vision-1"))
    await wait_for(member, lambda answer: answer.drain)
    assert await system.twinlens("drain", "vision-2") == 1
    assert "FAILED_PRECONDITION" in capsys.readouterr().err
    await member.write(control_pb2.JoinRequest(member=vision(1, DRAINING)))
    assert await draining == 0


async def test_a_group_is_drained_by_the_id_of_any_rank(system: System) -> None:
    def rank(group, number):
        return control_pb2.Member(
            id=f"{group}.{number}", role="llm", state=READY, group=group, rank=number
        )

    await system.join(rank("llm-0", 0), rank("llm-1", 1))
    leader = await system.join(rank("llm-1", 0))
    draining = asyncio.create_task(system.twinlens("drain", "llm-1.1"))
    await wait_for(leader, lambda answer: answer.drain)
    await leader.write(
        control_pb2.JoinRequest(
            member=control_pb2.Member(id="llm-1.0", role="llm", state=DRAINING, group="llm-1")
        )
    )
    assert await draining == 0


@pytest.mark.parametrize(
    ("member_id", "code"), [("nobody", "NOT_FOUND"), ("controller-1", "INVALID_ARGUMENT")]
)
async def test_a_drain_of_an_unknown_member_or_the_controller_is_refused(
    system: System, capsys: pytest.CaptureFixture[str], member_id: str, code: str
) -> None:
    assert await system.twinlens("drain", member_id) == 1
    assert code in capsys.readouterr().err
