"""From settings to who may call: the policy, the limits, the certificate, the tokens and the audit log."""

from pathlib import Path

import structlog

from unslothd_server.access.audit import AuditLog
from unslothd_server.access.certificates import ServedCertificate, TlsFiles
from unslothd_server.access.limits import CallLimits
from unslothd_server.access.scopes import scope_of
from unslothd_server.access.tokens import TokenBook, TokenFile
from unslothd_server.config import Settings
from unslothd_server.rpc.gate import AccessPolicy, Gate

log = structlog.get_logger()


def call_limits(settings: Settings) -> CallLimits:
    """What calls may hold, and how many there may be."""
    return CallLimits(
        max_message_bytes=settings.max_message_bytes,
        max_inline_bytes=settings.max_inline_bytes,
        max_streams=settings.max_streams,
        max_requests_per_second=settings.max_requests_per_second,
        max_request_burst=settings.max_request_burst,
        max_deadline_seconds=settings.max_deadline_seconds,
        upload_idle_seconds=settings.upload_idle_seconds,
        min_upload_bytes_per_second=settings.min_upload_bytes_per_second,
    )


def gate(settings: Settings) -> Gate:
    """Lets calls in; says in the log when nobody can call yet."""
    tokens = TokenBook(TokenFile(settings.home))
    policy = access_policy(settings)
    if policy.identity_required and policy.certificate_scope is None and not tokens:
        log.warning("nobody can call yet; make a token with `unslothd tokens create`", home=str(settings.home))
    return Gate(policy, tokens, call_limits(settings))


def access_policy(settings: Settings) -> AccessPolicy:
    """Whom calls are taken from."""
    by_certificate = settings.tls_client_ca is not None and settings.tls_client_scope != "none"
    return AccessPolicy(
        identity_required=settings.asks_who_calls,
        encrypted=settings.tls_cert is not None,
        certificate_scope=scope_of(settings.tls_client_scope) if by_certificate else None,
    )


def certificate(settings: Settings) -> ServedCertificate | None:
    """The certificate to serve with; None = without TLS. Raises CertificateProblem."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServedCertificate(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def audit_log(settings: Settings) -> AuditLog:
    """A line for every call."""
    return AuditLog(audit_path(settings), settings.audit_log_bytes, settings.audit_log_files)


def audit_path(settings: Settings) -> Path:
    """Where the lines of calls are; older files lie beside it."""
    return settings.home / "audit.jsonl"
