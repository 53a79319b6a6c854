/** What to do about errors that are not the server's own: what broke is in their text, not what to check. */
import { Code } from "@connectrpc/connect";

const BY_CODE: Partial<Record<Code, string>> = {
  [Code.Unavailable]: "Check that `unslothd serve` runs there and that the target is right.",
  [Code.DeadlineExceeded]: "Give the client a larger timeoutMs, or look at the server's log.",
  [Code.ResourceExhausted]: "If the message is too large: upload the rows with client.uploadDataset.",
};

const UNTRUSTED =
  "The server's certificate is not of an authority that this client trusts: give it that authority's certificate " +
  "(tls with tlsFromFiles, or UNSLOTHD_CA).";
/** By the codes of Node's errors. */
const BY_TLS_ERROR: Record<string, string> = {
  CERT_HAS_EXPIRED: "The server's certificate has expired: its operator has to renew it.",
  CERT_SIGNATURE_FAILURE: UNTRUSTED,
  DEPTH_ZERO_SELF_SIGNED_CERT: UNTRUSTED,
  ERR_SSL_WRONG_VERSION_NUMBER: "That server speaks no TLS: check the port, or connect without tls.",
  ERR_TLS_CERT_ALTNAME_INVALID:
    "The server's certificate is for another name: use a target that it names, or have one made for this name.",
  SELF_SIGNED_CERT_IN_CHAIN: UNTRUSTED,
  UNABLE_TO_GET_ISSUER_CERT: UNTRUSTED,
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: UNTRUSTED,
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: UNTRUSTED,
};
const CLOSED_AT_ONCE =
  "The server closed the connection at once: it may want TLS (tls), or a certificate of the client.";

/** The code that says what an error of connect-node is about, and the next step, where there is one to tell. */
export function explained(code: Code, cause: unknown, heard: boolean): { code: Code; hint: string | undefined } {
  const name = cause instanceof Error && "code" in cause ? String(cause.code) : "";
  const aboutTls = BY_TLS_ERROR[name];
  // connect-node calls a connection that was never made INTERNAL, and one that was never answered CANCELLED.
  if (aboutTls !== undefined) return { code: Code.Unavailable, hint: aboutTls };
  if (name.startsWith("ERR_SSL_")) return { code: Code.Unavailable, hint: CLOSED_AT_ONCE };
  if (code === Code.Canceled && !heard) return { code: Code.Unavailable, hint: CLOSED_AT_ONCE };
  return { code, hint: BY_CODE[code] };
}
