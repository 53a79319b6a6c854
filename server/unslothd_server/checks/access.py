"""Who may call: whether anybody is asked, whether anybody could answer, and what lasts no longer or is not used."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from unslothd_server import access_setup
from unslothd_server.access.audit import calls_of_tokens
from unslothd_server.access.certificates import SOON_DAYS, days_left
from unslothd_server.access.tokens import Token, TokenFile, TokensError
from unslothd_server.checks.finding import Finding, ok, problem, warning
from unslothd_server.config import Settings, is_loopback, split_address

_LONG_UNUSED = timedelta(days=30)


def access_findings(settings: Settings) -> Iterator[Finding]:
    """What of these settings concerns callers."""
    yield _callers(settings)
    if settings.tls_cert is not None:
        days = days_left(settings.tls_cert)
        text = f"{settings.tls_cert} is good for {days} more days"
        mend = "Renew it and replace the files; the server takes them without a restart."
        yield warning("certificate", text, mend) if days < SOON_DAYS else ok("certificate", text)
    host, _ = split_address(settings.listen)
    if settings.tls_cert is None and settings.asks_who_calls and not is_loopback(host):
        mend = "Use --tls-cert and --tls-key, unless something before the server speaks TLS: docs/access.md."
        yield warning("callers' tokens", f"they cross the network to {host} in the clear", mend)
    tokens = TokenFile(settings.home).path
    if tokens.exists() and tokens.stat().st_mode & 0o077:
        yield warning("file of tokens", f"other users can use {tokens}: names, scopes, hashes", f"chmod 600 {tokens}")
    expired = ", ".join(token.name for token in _tokens(settings) if token.expired)
    if expired:
        mend = "unslothd tokens revoke NAME; then unslothd tokens create NAME for who still needs one."
        yield warning("expired tokens", f"refused: {expired}", mend)


def unused_token_findings(settings: Settings) -> Iterator[Finding]:
    """Tokens that would be let in and made no call for long, as far back as the audit log goes. It is read whole."""
    tokens = [token for token in _tokens(settings) if not token.expired]
    try:
        oldest, newest = calls_of_tokens(access_setup.audit_path(settings)) if tokens else (None, {})
    except OSError as error:
        yield warning("unused tokens", f"not looked for: {error}", "Run this as the server's user.")
        return
    if oldest is None:
        return
    since = {each.name: max(each.create_time, oldest, newest.get(each.name, oldest)) for each in tokens}
    unused = [
        f"{name} since {when:%Y-%m-%d}" for name, when in since.items() if datetime.now(UTC) - when > _LONG_UNUSED
    ]
    if unused:
        text = f"no call by {', '.join(unused)}, as far as the audit log goes"
        yield warning("unused tokens", text, "unslothd tokens revoke NAME, unless somebody still needs it.")


def _tokens(settings: Settings) -> list[Token]:
    """All that there are; none when the file is damaged, which `callers` tells where it matters."""
    with suppress(TokensError, OSError):
        return TokenFile(settings.home).read()
    return []


def _callers(settings: Settings) -> Finding:
    host, _ = split_address(settings.listen)
    if not settings.asks_who_calls:
        text = f"nobody is asked: who reaches {host} may do everything"
        if is_loopback(host):
            return ok("callers", text)
        return warning("callers", text, "Use --tls-cert and --tls-key, or --require-identity yes: docs/access.md.")
    try:
        tokens = [token for token in TokenFile(settings.home).read() if not token.expired]
    except (TokensError, OSError) as error:
        return problem("callers", f"no token is accepted: {error}", "Mend the file of tokens; see docs/access.md.")
    if settings.tls_client_ca is not None and settings.tls_client_scope != "none":
        return ok("callers", f"a client certificate, or one of {len(tokens)} tokens")
    if not tokens:
        return warning("callers", "callers need a token, and there is none", "unslothd tokens create NAME")
    return ok("callers", f"one of {len(tokens)} tokens is needed")
