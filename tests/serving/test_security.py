"""TLS, mutual TLS, tokens and administration, through real servers and clients."""

import contextlib
import datetime
import hmac
import http.client
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from xlarank_serving import access, http_server, tls
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.access import Access, Authorizer, access_of, load_tokens
from xlarank_serving.admin import AdminClient
from xlarank_serving.channel import ClientTls
from xlarank_serving.client import RankingClient
from xlarank_serving.config import HttpConfig, SecurityConfig, ServerConfig
from xlarank_serving.server import RankingServer
from xlarank_serving.tls import Certificates

from xlarank.errors import AccessError, ConfigError, ModelNotFoundError, UnavailableError

RANK, RANK_2, ADMIN = "rank-token-0123456789", "rank-token-9876543210", "admin-token-0123456789"


@pytest.fixture(scope="session")
def authorities():
    """Two authorities that know nothing of each other."""
    return [trustme.CA(), trustme.CA()]


def write_certificate(folder, authority, name="server", **options):
    """Writes a certificate for 127.0.0.1, its key and its authority; their paths."""
    issued = authority.issue_cert("127.0.0.1", **options)
    paths = [folder / f"{name}{ending}" for ending in (".pem", ".key", ".ca")]
    paths[0].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    return paths


@contextlib.contextmanager
def served(wire, **options):
    running = wire.start(**options)
    try:
        yield running
    finally:
        running.channel.close()
        running.client.close()
        running.server.stop(0)


def ask(running, candidates, **options):
    """Scores through a client of its own."""
    with RankingClient(running.server.address, timeout=10, **options) as client:
        return client.score("feed", candidates)


def assert_right(running, candidates, **options):
    scores = ask(running, candidates, **options)
    assert len(scores["finish"]) == 3
    assert running.engine.requests


HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and no settings


def session_of(context, address, session=None):
    """Asks a port something, by a given session or a new one; the session, None if nothing is answered."""
    host, port = address.split(":")
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=host, session=session) as connection,
    ):
        is_http2 = connection.selected_alpn_protocol() == "h2"
        connection.sendall(HTTP2 if is_http2 else b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.session if connection.recv(4096) else None
    return None


def test_with_tls_a_client_that_trusts_the_server_is_answered_and_no_other(
    wire, candidates, authorities, tmp_path
):
    certificate, key, ca = write_certificate(tmp_path, authorities[0])
    *_, other_ca = write_certificate(tmp_path, authorities[1], "other")
    with served(wire, tls_certificate=certificate, tls_key=key) as running:
        assert_right(running, candidates, tls=ClientTls(server_ca=ca))
        for tls in (None, ClientTls(server_ca=other_ca), ClientTls()):
            with pytest.raises(UnavailableError):
                ask(running, candidates, tls=tls)
        with pytest.raises(UnavailableError):
            ask(running, candidates, tls=ClientTls(server_ca=ca, server_name="elsewhere.example"))
        url = f"https://{running.server.http_address}/metrics"
        with contextlib.ExitStack() as stack:
            address = ("127.0.0.1", running.server.http_port)
            silent = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(20)]
            context = ssl.create_default_context(cafile=ca)
            with urllib.request.urlopen(url, context=context, timeout=10) as answer:
                assert b"nv_inference_request_success" in answer.read()
            assert silent[0].recv(1) == b""  # without a handshake, so that it made room
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(url, context=ssl.create_default_context(cafile=other_ca), timeout=10)


def test_with_mutual_tls_the_client_must_have_a_certificate_too(wire, candidates, authorities, tmp_path):
    certificate, key, ca = write_certificate(tmp_path, authorities[0])
    own, own_key, own_ca = write_certificate(tmp_path, authorities[1], "client")
    with served(wire, tls_certificate=certificate, tls_key=key, client_ca=own_ca) as running:
        assert_right(running, candidates, tls=ClientTls(server_ca=ca, certificate=own, key=own_key))
        with pytest.raises(UnavailableError):
            ask(running, candidates, tls=ClientTls(server_ca=ca))
        with pytest.raises(UnavailableError):  # of the server's authority, not the clients'
            ask(running, candidates, tls=ClientTls(server_ca=ca, certificate=certificate, key=key))
        context = ssl.create_default_context(cafile=ca)
        url = f"https://{running.server.http_address}/metrics"
        with pytest.raises(OSError):
            urllib.request.urlopen(url, context=context, timeout=10).read()
        context.load_cert_chain(own, own_key)
        assert urllib.request.urlopen(url, context=context, timeout=10).status == 200
        session = session_of(context, running.server.http_address)
        assert session is not None
        assert not session.has_ticket  # its certificate is looked at each time


def test_plain_http_leaves_metrics_without_tls(wire, authorities, tmp_path):
    certificate, key, _ = write_certificate(tmp_path, authorities[0])
    with served(wire, tls_certificate=certificate, tls_key=key, plain_http=True) as running:
        assert (
            urllib.request.urlopen(f"http://{running.server.http_address}/metrics", timeout=10).status == 200
        )


def test_new_certificates_are_taken_up_and_half_written_ones_are_not(
    wire, candidates, authorities, tmp_path, caplog
):
    certificate, key, old_ca = write_certificate(tmp_path, authorities[0])
    new_certificate, new_key, new_ca = write_certificate(tmp_path, authorities[1], "new")
    old, new = ClientTls(server_ca=old_ca), ClientTls(server_ca=new_ca)
    with served(wire, tls_certificate=certificate, tls_key=key) as running:
        with RankingClient(running.server.address, timeout=10, tls=old) as connected:
            connected.score("feed", candidates)
            certificate.write_bytes(new_certificate.read_bytes())
            assert_right(running, candidates, tls=old)  # its key isn't there yet
            assert "the last good version stays in use" in caplog.text
            key.write_bytes(new_key.read_bytes())
            assert_right(running, candidates, tls=new)
            with pytest.raises(UnavailableError):
                ask(running, candidates, tls=old)
            connected.score("feed", candidates)  # connections stay
        context = ssl.create_default_context(cafile=new_ca)
        url = f"https://{running.server.http_address}/metrics"
        assert urllib.request.urlopen(url, context=context, timeout=10).status == 200


@pytest.mark.parametrize("what", ["grpc", "rest", "metrics"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_whose_authority_was_removed_does_not_come_back_by_a_session(
    wire, authorities, tmp_path, what, version
):
    certificate, key, ca = write_certificate(tmp_path, authorities[0])
    _, _, client_ca = clients = write_certificate(tmp_path, authorities[0], "client")
    others = write_certificate(tmp_path, authorities[1], "other")
    contexts = []
    for own, own_key, _ in (clients, others):
        contexts.append(ssl.create_default_context(cafile=ca))
        contexts[-1].load_cert_chain(own, own_key)
        contexts[-1].maximum_version = version
        if what == "grpc":
            contexts[-1].set_alpn_protocols(["h2"])
    repository = wire.repository()
    server = RankingServer(
        repository,
        repository.metrics.text,
        ServerConfig(port=0, http_port=0),
        security=SecurityConfig(tls_certificate=certificate, tls_key=key, client_ca=client_ca),
        http=HttpConfig(port=0),
    )
    addresses = {"grpc": server.address, "rest": server.rest.address, "metrics": server.http_address}
    with server:
        session = session_of(contexts[0], addresses[what])
        assert session is not None
        assert session_of(contexts[0], addresses[what], session) is not None
        assert session_of(contexts[1], addresses[what]) is None
        client_ca.write_bytes(others[2].read_bytes())
        assert session_of(contexts[1], addresses[what]) is not None
        assert session_of(contexts[0], addresses[what], session) is None


def test_a_client_of_rest_that_never_shakes_hands_is_left(wire, authorities, tmp_path, monkeypatch):
    monkeypatch.setattr(http_server, "_MAX_HANDSHAKE_SECONDS", 0.5)
    certificate, key, _ = write_certificate(tmp_path, authorities[0])
    repository = wire.repository()
    server = RankingServer(
        repository,
        repository.metrics.text,
        ServerConfig(port=0, http_port=0),
        security=SecurityConfig(tls_certificate=certificate, tls_key=key),
        http=HttpConfig(port=0),
    )
    with server, socket.create_connection(("127.0.0.1", server.rest.port), timeout=20) as silent:
        assert silent.recv(1) == b""


def test_a_plain_client_of_https_harms_nobody(wire, authorities, tmp_path):
    certificate, key, ca = write_certificate(tmp_path, authorities[0])
    with served(wire, tls_certificate=certificate, tls_key=key) as running:
        host, port = running.server.http_address.split(":")
        for _ in range(3):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("GET", "/metrics")
            with pytest.raises((http.client.HTTPException, OSError)):
                connection.getresponse()
            connection.close()
        url = f"https://{running.server.http_address}/metrics"
        context = ssl.create_default_context(cafile=ca)
        assert urllib.request.urlopen(url, context=context, timeout=10).status == 200


def refuse_certificates(security):
    with pytest.raises(ConfigError) as caught:
        Certificates.load(security)
    return str(caught.value)


def test_certificates_that_clients_would_refuse_are_refused_at_the_start(authorities, tmp_path):
    certificate, key, ca = write_certificate(tmp_path, authorities[0])
    _, other_key, _ = write_certificate(tmp_path, authorities[0], "other")
    assert Certificates.load(SecurityConfig(tls_certificate=certificate, tls_key=key, client_ca=ca)).key
    pair = SecurityConfig(tls_certificate=certificate, tls_key=other_key)
    assert "expected a PEM certificate and its unencrypted key, got: " in refuse_certificates(pair)
    assert "key values mismatch" in refuse_certificates(pair)
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    long_ago = past - datetime.timedelta(days=9)
    expired, expired_key, _ = write_certificate(
        tmp_path, authorities[0], "expired", not_before=long_ago, not_after=past
    )
    told = refuse_certificates(SecurityConfig(tls_certificate=expired, tls_key=expired_key))
    assert told.endswith("expired.pem: expected one that clients accept now, got: certificate has expired")
    (tmp_path / "text").write_text("certificate")
    for options in (
        {"tls_certificate": tmp_path / "text", "tls_key": key},
        {"tls_certificate": certificate, "tls_key": tmp_path / "text"},
        {"tls_certificate": certificate, "tls_key": key, "client_ca": tmp_path / "text"},
    ):
        assert "expected" in refuse_certificates(SecurityConfig(**options))
    told = refuse_certificates(SecurityConfig(tls_certificate=certificate, tls_key=tmp_path / "none"))
    assert told == f"security: tls_key {tmp_path}/none: can't be read: No such file or directory"
    locked = tmp_path / "locked.key"
    locked.write_text(encrypted(key.read_bytes()))
    told = refuse_certificates(SecurityConfig(tls_certificate=certificate, tls_key=locked))
    assert "expected a PEM certificate and its unencrypted key" in told


@pytest.mark.parametrize("gone", [0, 1, 2], ids=["certificate", "key", "client_ca"])
def test_a_file_that_goes_while_it_is_read_again_leaves_the_last_certificates(
    authorities, tmp_path, monkeypatch, caplog, gone
):
    paths = write_certificate(tmp_path, authorities[0])
    names = ("tls_certificate", "tls_key", "client_ca")
    server_tls = tls.ServerTls(SecurityConfig(**dict(zip(names, paths, strict=True))))
    known = server_tls.certificates()
    read = tls.read_file

    def read_and_remove(what, path):
        content = read(what, path)
        if what == f"security: {names[gone]}":
            path.unlink()
        return content

    write_certificate(tmp_path, authorities[1])
    monkeypatch.setattr(tls, "read_file", read_and_remove)
    assert server_tls.certificates() is known
    assert "the last good version stays in use: security: " in caplog.text
    assert f"{paths[gone]}" in caplog.text
    assert "No such file or directory" in caplog.text


def encrypted(pem):
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(pem, None)
    password = s.BestAvailableEncryption(b"secret")
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, password).decode()


@pytest.fixture
def tokens(tmp_path):
    """Files of rank and admin tokens."""
    (tmp_path / "tokens").write_text(f"# ours\n{RANK}\n\n  {RANK_2}  \n")
    (tmp_path / "admin").write_text(f"{ADMIN}\n")
    return {"tokens": tmp_path / "tokens", "admin_tokens": tmp_path / "admin"}


@pytest.fixture
def guarded(wire, tokens):
    with served(wire, **tokens) as running:
        yield running


def refusal(running, candidates, **options):
    with pytest.raises(AccessError) as caught:
        ask(running, candidates, **options)
    return caught.value.is_known_caller, str(caught.value)


@pytest.mark.parametrize("token", [RANK, RANK_2, ADMIN])
def test_a_known_token_may_rank(guarded, candidates, token):
    assert_right(guarded, candidates, token=token)


@pytest.mark.parametrize("token", ["rank-token-0123456788", RANK[:-1], RANK + "x", "x", "ours", RANK.upper()])
def test_an_unknown_token_may_not(guarded, candidates, token):
    assert refusal(guarded, candidates, token=token) == (False, "the token isn't known to the server")


def test_bad_tokens_of_ranking_calls_are_counted_once_each(guarded, candidates, wire):
    for values in ([], [("authorization", "Bearer another-token-0123456")]):
        with pytest.raises(grpc.RpcError):
            guarded.infer(wire.raw(**wire.valid(1)), metadata=values)
    stream = guarded.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    with pytest.raises(grpc.RpcError):
        next(stream(iter([b""])))
    metadata = guarded.channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
    with pytest.raises(grpc.RpcError):  # ranks nothing
        metadata(b"")
    assert_right(guarded, candidates, token=RANK)
    (family,) = guarded.server.refusals.collect()
    assert {sample.labels["status"]: sample.value for sample in family.samples} == {"UNAUTHENTICATED": 3}


def test_no_token_is_unauthenticated_and_told_what_to_send(guarded, wire):
    with pytest.raises(grpc.RpcError) as caught:
        guarded.infer(wire.raw(**wire.valid(1)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "expected a token as metadata 'authorization: Bearer TOKEN', got none"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["Basic abc"], "got another scheme"),
        ([RANK], "got another scheme"),
        (["Bearer"], "got another scheme"),
        (["Bearer x", f"Bearer {RANK}"], "expected one authorization header, got several"),
    ],
)
def test_another_header_is_refused(guarded, wire, values, told):
    metadata = [("authorization", value) for value in values]
    with pytest.raises(grpc.RpcError, match=told) as caught:
        guarded.infer(wire.raw(**wire.valid(1)), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_where_no_token_is_asked_for_nobody_minds_the_header(shared, guarded, wire):
    metadata = [("authorization", "Bearer x"), ("authorization", f"Bearer {RANK}")]
    assert len(shared.infer(wire.raw(**wire.valid(1)), metadata=metadata).outputs) == 2
    check = health_pb2_grpc.HealthStub(guarded.channel).Check
    assert check(health_pb2.HealthCheckRequest(), timeout=10, metadata=metadata).status == 1


def test_the_scheme_s_case_does_not_matter(guarded, wire):
    guarded.infer(wire.raw(**wire.valid(1)), metadata=[("authorization", f"bearer  {RANK}")])


def test_probes_are_open_and_nothing_else_is(guarded):
    m = messages
    assert guarded.call("ServerLive", m.ServerLiveRequest()).live
    assert guarded.call("ServerReady", m.ServerReadyRequest()).ready
    assert guarded.call("ModelReady", m.ModelReadyRequest(name="feed")).ready
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert next(watch).status == 1
    watch.cancel()
    stream = ServerReflectionStub(guarded.channel).ServerReflectionInfo(
        iter([ServerReflectionRequest(list_services="")]), timeout=10
    )
    for call in (
        lambda: next(stream),
        lambda: guarded.call("ModelMetadata", m.ModelMetadataRequest(name="feed")),
        lambda: guarded.call("ServerMetadata", m.ServerMetadataRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_probes_can_be_closed(wire, tokens):
    with served(wire, open_probes=False, **tokens) as running:
        watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        for call in (lambda: next(watch), lambda: running.call("ServerLive", messages.ServerLiveRequest())):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_stranger_s_message_is_not_read(wire, tokens):
    request = messages.ModelInferRequest(raw_input_contents=[bytes(3 * 2**20)])
    with served(wire, max_message_mib=1, **tokens) as running:
        with pytest.raises(grpc.RpcError) as caught:
            running.infer(request)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            running.infer(request, metadata=[("authorization", f"Bearer {RANK}")])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_process_that_others_replace_ranks_and_takes_no_changes(guarded, candidates):
    with (
        AdminClient(guarded.server.address, token=ADMIN) as admin,
        RankingClient(guarded.server.address, timeout=10, token=RANK) as client,
    ):
        before = client.score("feed", candidates)["finish"]
        with pytest.raises(ModelNotFoundError):
            admin.update_rows("nobody", "videos", [1], np.zeros((1, 4)))
        guarded.server.retire(lambda _: True)
        with pytest.raises(UnavailableError, match="takes no more changes, as it is about to end: connect"):
            admin.update_rows("nobody", "videos", [1], np.zeros((1, 4)))
        np.testing.assert_array_equal(client.score("feed", candidates)["finish"], before)


def test_tokens_are_exchanged_while_serving(guarded, candidates, tokens, caplog):
    with RankingClient(guarded.server.address, timeout=10, token=RANK) as client:
        client.score("feed", candidates)
        tokens["tokens"].write_text("")  # as a writer leaves it for a moment
        client.score("feed", candidates)
        assert "expected 1 to 1000 tokens, one a line, got 0" in caplog.text
        tokens["tokens"].unlink()
        client.score("feed", candidates)
        tokens["tokens"].write_text("a-new-token-of-theirs\n")
        with pytest.raises(AccessError, match="the token isn't known"):
            client.score("feed", candidates)
    assert_right(guarded, candidates, token="a-new-token-of-theirs")
    assert "a-new-token" not in caplog.text


def get_metrics(running, authorization=None):
    request = urllib.request.Request(f"http://{running.server.http_address}/metrics")
    if authorization is not None:
        request.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_metrics_take_a_token_unless_they_are_open(guarded, wire, tokens):
    assert get_metrics(guarded) == (
        401,
        b"expected a token as metadata 'authorization: Bearer TOKEN', got none\n",
    )
    assert get_metrics(guarded, f"Bearer {RANK}x")[0] == 401
    assert get_metrics(guarded, f"Bearer {RANK}")[0] == 200
    with served(wire, open_metrics=True, **tokens) as running:
        assert get_metrics(running)[0] == 200


def update(running, token=None):
    with AdminClient(running.server.address, timeout=10, token=token) as client:
        return client.update_rows("feed", "videos", [1], np.ones((1, 4)))


def test_administration_takes_an_admin_token(guarded):
    updates = []
    guarded.engine.update_rows = lambda *args: updates.append(args) or 7
    for token, is_known, told in (
        (None, False, "expected a token as metadata"),
        ("nobody-s-token-0123456789", False, "the token isn't known"),
        (RANK, True, "expected an admin token, got a token that may only rank"),
    ):
        with pytest.raises(AccessError, match=told) as caught:
            update(guarded, token)
        assert caught.value.is_known_caller is is_known
    assert not updates
    assert update(guarded, ADMIN) == 7
    assert updates[0][0] == "videos"


METHODS = ("inference.GRPCInferenceService/RepositoryModelLoad", "xlarank.admin.v1.Admin/UpdateRows")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_tokens", [False, True])
def test_administration_is_off_by_default(wire, tokens, method, has_tokens):
    options = {"tokens": tokens["tokens"]} if has_tokens else {}
    with served(wire, **options) as running:
        with pytest.raises(grpc.RpcError, match="administrative RPCs are off on this port") as caught:
            running.channel.unary_unary(f"/{method}")(
                b"", timeout=10, metadata=[("authorization", f"Bearer {RANK}")]
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("method", "expected"),
    {
        "/inference.GRPCInferenceService/ModelInfer": Access.RANK,
        "/inference.GRPCInferenceService/RepositoryIndex": Access.RANK,
        "/inference.GRPCInferenceService/ServerLive": Access.PROBE,
        "/inference.GRPCInferenceService/RepositoryModelLoad": Access.ADMIN,
        "/inference.GRPCInferenceService/RepositoryModelUnload": Access.ADMIN,
        "/xlarank.admin.v1.Admin/UpdateRows": Access.ADMIN,
        "/xlarank.admin.v1.Admin/Anything": Access.ADMIN,
        "/grpc.health.v1.Health/Check": Access.PROBE,
        "/grpc.health.v1.HealthX/Check": Access.RANK,
        "/x/ServerLive": Access.RANK,
    }.items(),
)
def test_what_each_method_takes(method, expected):
    assert access_of(method) is expected


def test_a_comparison_takes_as_long_whichever_token_it_is(tokens, monkeypatch):
    compared, compare = [], hmac.compare_digest

    def counting(a, b):
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(access.hmac, "compare_digest", counting)
    loaded = load_tokens("tokens", tokens["tokens"])
    for token in (RANK, RANK_2, "x", "x" * 1000):
        del compared[:]
        assert (token in loaded) is (token in (RANK, RANK_2))
        assert compared == [(32, 32)] * 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n# none\n", "expected 1 to 1000 tokens, one a line, got 0"),
        (b"\nfifteen-letters\n", "line 2: expected a token of at least 16 printable ASCII .*, got 15 bytes"),
        (b"two words in one line\n", "line 1: expected a token of at least 16 printable ASCII characters"),
        ("schlüssel-von-uns-allen\n".encode(), "line 1: expected a token"),
        (b"".join(b"token-number-%08d\n" % i for i in range(1001)), "one a line, got 1001"),
    ],
)
def test_a_file_of_bad_tokens_is_refused_without_showing_one(tmp_path, content, told):
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(ConfigError, match=f"security: tokens {tmp_path}/tokens: .*{told}") as caught:
        Authorizer(SecurityConfig(tokens=tmp_path / "tokens"))
    assert "words" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"security: admin_tokens .*can't be read: No such file"):
        Authorizer(SecurityConfig(admin_tokens=Path("none")))
