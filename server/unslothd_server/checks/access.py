"""Who may call: whether anybody is asked, whether anybody could answer, and how long the certificate lasts."""

from collections.abc import Iterator

from unslothd_server.access.certificates import SOON_DAYS, days_left
from unslothd_server.access.tokens import TokenFile, TokensError
from unslothd_server.checks.finding import Finding, ok, problem, warning
from unslothd_server.config import Settings, is_loopback, split_address


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
