"""A Hub token is taken only where nobody could read it on its way, and refused before anything else is looked at."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from unslothd.v1 import service_pb2 as pb
from unslothd_server import access_setup
from unslothd_server.access.tokens import TokenBook, TokenFile
from unslothd_server.config import Settings
from unslothd_server.errors import PreconditionError
from unslothd_server.rpc.gate import AccessPolicy, Gate
from unslothd_server.rpc.intake import Intake

TOKEN = "hf_PlantedOnAPlainConnection"


class Peer:
    """The part of a call's context that says where it comes from."""

    def __init__(self, address: str) -> None:
        self._address = address

    def peer(self) -> str:
        return self._address


def exposed(home: Path, peer: str, *, encrypted: bool) -> bool:
    limits = access_setup.call_limits(Settings(home=home))
    policy = AccessPolicy(identity_required=False, encrypted=encrypted)
    return Gate(policy, TokenBook(TokenFile(home)), limits).exposed(cast(Any, Peer(peer)))


def taken(request: pb.LoadModelRequest, home: Path, *, exposed: bool) -> pb.LoadModelRequest:
    async def requests() -> AsyncIterator[bytes]:
        yield request.SerializeToString()

    intake = Intake(access_setup.call_limits(Settings(home=home)))
    parse = pb.LoadModelRequest.FromString
    return cast(pb.LoadModelRequest, asyncio.run(intake.one(requests(), parse, exposed=exposed)))


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.7:1", "ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B::ffff:10.0.0.7%5D:1"])
def test_what_another_host_sends_without_tls_can_be_read_on_its_way(tmp_path, peer):
    assert exposed(tmp_path, peer, encrypted=False)
    assert not exposed(tmp_path, peer, encrypted=True)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:1", "ipv6:%5B::1%5D:1", "ipv6:%5B::ffff:127.0.0.1%5D:1", "unix:"])
def test_what_this_host_sends_cannot(tmp_path, peer):
    assert not exposed(tmp_path, peer, encrypted=False)


def test_a_server_knows_whether_its_calls_are_encrypted(tmp_path):
    plain = Settings(home=tmp_path, listen="0.0.0.0:1", allow_insecure_listen=True)
    assert not access_setup.access_policy(plain).encrypted
    with_tls = plain.model_copy(update={"tls_cert": tmp_path / "cert.pem"})
    assert access_setup.access_policy(with_tls).encrypted


def test_a_token_that_could_be_read_is_refused_with_the_way_out_and_not_shown(tmp_path):
    with pytest.raises(PreconditionError) as caught:
        taken(pb.LoadModelRequest(model_name="org/gated", token=TOKEN), tmp_path, exposed=True)
    assert caught.value.reason_name == "HUB_TOKEN_IN_PLAIN_TEXT"
    for step in ("Revoke it", "TLS", "SSH tunnel", "HF_TOKEN"):
        assert step in caught.value.message
    assert TOKEN not in str(vars(caught.value))


def test_it_is_refused_before_the_rules_of_the_contract_are_looked_at(tmp_path):
    with pytest.raises(PreconditionError):
        taken(pb.LoadModelRequest(model_name="", token=TOKEN * 100), tmp_path, exposed=True)


def test_without_a_token_or_where_nobody_could_read_it_the_request_is_taken(tmp_path):
    without = pb.LoadModelRequest(model_name="org/open")
    assert taken(without, tmp_path, exposed=True) == without
    with_one = pb.LoadModelRequest(model_name="org/gated", token=TOKEN)
    assert taken(with_one, tmp_path, exposed=False) == with_one


def test_no_other_request_of_the_contract_has_a_secret():
    messages = [method.input_type for method in pb.DESCRIPTOR.services_by_name["UnslothService"].methods]
    secret = [f"{each.name}.{field.name}" for each in messages for field in _redacted(each, set())]
    assert secret == ["LoadModelRequest.token"]


def _redacted(message: Any, seen: set[str]) -> list[Any]:
    """Fields of a message that the contract marks as secret, also those of messages in it."""
    if message.full_name in seen:
        return []
    seen.add(message.full_name)
    own = [field for field in message.fields if field.GetOptions().debug_redact]
    inner = [field.message_type for field in message.fields if field.message_type is not None]
    return own + [field for each in inner for field in _redacted(each, seen)]
