"""Every RPC needs exactly one scope."""

import pytest

from unslothd.v1 import service_pb2
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.scopes import SCOPES, scope_name, scope_of


def test_every_rpc_of_the_contract_has_a_scope_and_nothing_else_has_one():
    assert set(SCOPES) == set(service_pb2.DESCRIPTOR.services_by_name["UnslothService"].methods_by_name)
    assert set(SCOPES.values()) == {Scope.SCOPE_READ, Scope.SCOPE_TRAIN, Scope.SCOPE_ADMIN}


def test_what_only_reads_is_named_so():
    reads = {rpc for rpc, scope in SCOPES.items() if scope == Scope.SCOPE_READ}
    assert all(rpc.startswith(("Get", "List", "Watch", "Download")) for rpc in reads)
    assert not any(rpc.startswith(("Get", "List", "Watch")) for rpc in set(SCOPES) - reads)


def test_a_scope_comes_back_from_its_name():
    for name in ("read", "train", "admin"):
        assert scope_name(scope_of(name)) == name
    with pytest.raises(ValueError, match="SCOPE_ROOT"):
        scope_of("root")
