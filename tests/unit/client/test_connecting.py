"""Where a client connects to, how it trusts the server and as whom it calls, from four places in one order."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import unslothd
from support.certificates import Authority
from support.pages import ROOT, blocks
from support.scripted_server import Say, ScriptedServer
from unslothd import _connection, _profiles, errors
from unslothd.v1 import service_pb2

PAGE = ROOT / "docs" / "connecting.md"
TOKEN = "unslothd_planted-token"
SYSTEM = {"XDG_CONFIG_HOME": "/nowhere"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def secure_server(authority: Authority) -> Iterator[ScriptedServer]:
    certificate, key = authority.server()
    running = ScriptedServer(grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]))
    running.script.on("GetServerInfo", *[Say.answer(service_pb2.GetServerInfoResponse(server_version="1"))] * 3)
    yield running
    running.stop()


@pytest.fixture
def config(tmp_path: Path):
    """Writes the file with profiles; returns the environment in which it is found."""

    def write(text: str, mode: int = 0o600) -> dict[str, str]:
        file = tmp_path / "unslothd" / "config.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return {"XDG_CONFIG_HOME": str(tmp_path)}

    return write


def resolve(environment: dict[str, str] | None = None, **given) -> _connection.Connection:
    return _connection.resolve(given, environment=SYSTEM if environment is None else environment)


def refused(environment: dict[str, str] | None = None, **given) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the texts are compared by each test
        resolve(environment, **given)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_setting_comes_from_the_argument_then_the_environment_then_the_profile_then_the_default(config):
    file = config('[profiles.default]\ntarget = "localhost:3"\n')
    both = {**file, "UNSLOTHD_TARGET": "localhost:2"}
    assert resolve(both, target="localhost:1").target == "localhost:1"
    assert resolve(both).target == "localhost:2"
    assert resolve(file).target == "localhost:3"
    assert resolve(SYSTEM).target == "127.0.0.1:50051"


def test_each_setting_is_looked_for_on_its_own(config):
    environment = config('[profiles.work]\ntarget = "localhost:3"\ntoken = "of-the-profile"\n')
    way = resolve({**environment, "UNSLOTHD_TOKEN": "of-the-environment"}, profile="work")
    assert (way.target, way.headers["authorization"]) == ("localhost:3", "Bearer of-the-environment")


def test_the_token_of_a_file_wins_over_the_token_of_a_later_place(tmp_path):
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    file.chmod(0o600)
    way = resolve({**SYSTEM, "UNSLOTHD_TOKEN": "of-the-environment"}, token_file=file)
    assert way.headers["authorization"] == "Bearer of-the-file"


def test_a_named_profile_is_taken_and_paths_in_it_start_at_its_file(config, tmp_path, authority):
    environment = config('[profiles.work]\ntarget = "gpu-host:50051"\ntoken_file = "token"\nca = "ca.pem"\n')
    (tmp_path / "unslothd" / "token").write_text("t")
    (tmp_path / "unslothd" / "token").chmod(0o600)
    (tmp_path / "unslothd" / "ca.pem").write_bytes(authority.ca.read_bytes())
    way = resolve({**environment, "UNSLOTHD_PROFILE": "work"})
    assert (way.target, way.headers) == ("gpu-host:50051", {"authorization": "Bearer t"})
    assert way.credentials is not None


def test_a_default_profile_gives_nothing_to_a_target_that_was_named(config):
    environment = config('[profiles.default]\ntarget = "gpu-host:50051"\ntoken = "secret"\ntls = true\n')
    way = resolve(environment, target="other-host:50051")
    assert (way.headers, way.credentials) == ({}, None)


def test_a_profile_of_the_environment_gives_nothing_to_another_target_of_an_argument(config):
    environment = config('[profiles.work]\ntarget = "gpu-host:50051"\ntoken = "secret"\ntls = true\n')
    way = resolve({**environment, "UNSLOTHD_PROFILE": "work"}, target="localhost:1")
    assert (way.target, way.headers) == ("localhost:1", {})


@pytest.mark.parametrize("place", ["argument", "environment"])
def test_a_profile_and_another_target_beside_it_are_refused(config, place):
    environment = config(f'[profiles.work]\ntarget = "gpu-host:50051"\ntoken = "{TOKEN}"\ntls = true\n')
    if place == "argument":
        text = refused(environment, profile="work", target="localhost:1")
    else:
        text = refused({**environment, "UNSLOTHD_TARGET": "localhost:1"}, profile="work")
    assert "profile 'work' is for gpu-host:50051" in text
    assert "leave one of them out" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[profiles.work\n", "is not TOML"),
        ("listen = 'x'\n", "may hold tables called [profiles.NAME] and nothing else"),
        ("[profiles.other]\n", "profile 'work' is not in"),
        ("[profiles.work]\ntraget = 'x'\n", "profiles.work.traget is not known; known are target, token,"),
        ("[profiles.work]\ntarget = 1\n", "profiles.work.target must be a text"),
        ("[profiles.work]\ntls = 'on'\n", "profiles.work.tls must be true or false"),
        (f"[profiles.work]\ntoken = '{TOKEN}\n", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(config, text, told):
    assert told in refused(config(text), profile="work")


def test_a_profile_without_a_file_is_told():
    assert "/nowhere/unslothd/config.toml cannot be read" in refused(SYSTEM, profile="work")


def test_all_problems_are_told_at_once(tmp_path):
    (tmp_path / "rubbish").write_text("rubbish")
    text = refused(token_file=tmp_path / "absent", ca=tmp_path / "rubbish", client_key=tmp_path / "none", tls=False)
    for problem in (
        f"token file: {tmp_path}/absent cannot be read: No such file",
        f"ca: {tmp_path}/rubbish is not PEM",
        f"client key: {tmp_path}/none cannot be read",
        "a client certificate and its key belong together",
        "TLS is switched off, but",
    ):
        assert problem in text


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "täglich", "nul\x00"])
def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(token):
    with pytest.raises(ValueError, match="it must be one word of ASCII characters") as caught:
        resolve(token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    ["gpu-host:50051", "10.0.0.1:50051", "127.0.0.1.evil.example:1", "localhost.evil.example:1", "0.0.0.0:1",
     "ipv4:127.0.0.1:1,10.0.0.1:1", "dns://10.0.0.1/localhost:1", "[2001:db8::1]:1"],
)  # fmt: skip
@pytest.mark.parametrize("how", [{"token": TOKEN}, {"metadata": {"Authorization": f"Bearer {TOKEN}"}}])
def test_no_token_goes_to_another_host_in_plain_text(target, how):
    with pytest.raises(ValueError, match="would travel in plain text: use TLS") as caught:
        unslothd.Client(target, **how)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "target", ["localhost", "LOCALHOST:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "dns:///localhost:1", "unix:/s"]
)
def test_a_token_goes_to_this_host_in_plain_text_and_past_no_proxy(target):
    way = resolve(target=target, token=TOKEN)
    assert way.headers == {"authorization": f"Bearer {TOKEN}"}
    assert way.options == {"grpc.enable_http_proxy": 0}


def test_another_host_may_be_reached_through_a_proxy():
    assert resolve(target="gpu-host:1", token=TOKEN, tls=True).options == {}


def test_tls_comes_with_a_ca_a_certificate_or_on_demand(authority):
    certificate, key = authority.client("me")
    assert resolve().credentials is None
    assert resolve(ca=authority.ca).credentials is not None
    assert resolve(ca=authority.ca.read_bytes()).credentials is not None
    assert resolve(client_certificate=certificate, client_key=key).credentials is not None
    assert resolve({**SYSTEM, "UNSLOTHD_TLS": "1"}).credentials is not None
    assert resolve({**SYSTEM, "UNSLOTHD_TLS": "0"}).credentials is None
    assert "UNSLOTHD_TLS is 'maybe'" in refused({**SYSTEM, "UNSLOTHD_TLS": "maybe"})


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
@pytest.mark.parametrize("kind", ["token file", "config file"])
def test_a_file_with_a_token_that_others_can_read_is_warned_of(config, tmp_path, caplog, mode, kind):
    if kind == "token file":
        file = tmp_path / "token"
        file.write_text(TOKEN)
        file.chmod(mode)
        resolve(token_file=file)
    else:
        resolve(config(f'[profiles.default]\ntoken = "{TOKEN}"\n', mode))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [("can be read by others; run: chmod 600" in text) for text in warned] == [True] * (mode != 0o600)
    assert TOKEN not in caplog.text


def test_a_config_file_without_a_token_may_be_read_by_others(config, caplog):
    resolve(config('[profiles.default]\ntarget = "localhost:1"\n', 0o644))
    assert caplog.records == []


def test_the_token_goes_with_every_call_and_is_shown_nowhere(server, say, caplog):
    caplog.set_level(logging.DEBUG)
    server.script.on("GetModel", say.refuse(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN"))
    with unslothd.Client(server.target, token=TOKEN) as client:
        with pytest.raises(errors.Unauthenticated) as caught:
            client.get_model("m")
        shown = [repr(client), str(client), repr(client._transport), repr(caught.value), str(caught.value)]
    assert server.script.metadata[0]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in "".join(shown) + caplog.text
    assert TOKEN not in repr(resolve(token=TOKEN))


def test_a_server_of_the_right_authority_is_trusted_with_the_token(secure_server, authority):
    with unslothd.Client(secure_server.target, ca=authority.ca, token=TOKEN) as client:
        assert client.server_info().server_version == "1"

    async def main() -> None:
        async with unslothd.AsyncClient(secure_server.target, ca=authority.ca, token=TOKEN) as client:
            assert (await client.server_info()).server_version == "1"

    asyncio.run(main())
    assert {each["authorization"] for each in secure_server.script.metadata} == {f"Bearer {TOKEN}"}


def unavailable(target: str, **settings) -> str:
    with unslothd.Client(target, **settings) as client, pytest.raises(errors.Unavailable) as caught:
        client.server_info()
    return str(caught.value)


def test_a_server_of_another_authority_gets_nothing_and_the_text_says_what_to_give(secure_server, stranger):
    text = unavailable(secure_server.target, ca=stranger.ca, token=TOKEN)
    assert "not of an authority that this client trusts" in text
    assert "--ca" in text
    assert secure_server.script.requests == []


def test_a_certificate_for_another_name_is_told(stranger):
    certificate, key = stranger.server("elsewhere", ("elsewhere.example",))
    running = ScriptedServer(grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]))
    try:
        assert "certificate is for another name" in unavailable(running.target, ca=stranger.ca)
    finally:
        running.stop()


def test_tls_on_one_side_only_is_told(secure_server, server, authority):
    assert "it may want TLS" in unavailable(secure_server.target)
    assert "speaks no TLS" in unavailable(server.target, ca=authority.ca)


def test_a_client_certificate_is_shown_to_a_server_that_asks_for_one(authority):
    certificate, key = authority.server("asking")
    pair = (key.read_bytes(), certificate.read_bytes())
    running = ScriptedServer(grpc.ssl_server_credentials([pair], authority.ca.read_bytes(), require_client_auth=True))
    running.script.on("GetServerInfo", Say.answer(service_pb2.GetServerInfoResponse(server_version="1")))
    mine, my_key = authority.client("me")
    try:
        unavailable(running.target, ca=authority.ca)
        way = {"ca": authority.ca, "client_certificate": mine, "client_key": my_key}
        with unslothd.Client(running.target, **way) as client:
            assert client.server_info().server_version == "1"
    finally:
        running.stop()


def test_the_profiles_of_the_page_can_be_read_and_every_variable_is_on_it(tmp_path: Path):
    [shown] = [each.code for each in blocks(PAGE) if each.language == "toml"]
    file = tmp_path / "config.toml"
    file.write_text(shown)
    assert _profiles.read(file, None) == {
        "target": "gpu-host:50051",
        "ca": str(tmp_path / "gpu-host-ca.pem"),
        "token_file": str(tmp_path / "gpu-host-token"),
    }
    assert _profiles.read(file, "tunnel") == {"target": "127.0.0.1:50052"}
    assert [name for name in _connection.VARIABLES.values() if name not in PAGE.read_text()] == []
