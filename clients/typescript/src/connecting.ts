/** Which server a client talks to, how it is trusted, and as whom: from the options, else from the environment. */
import { readFileSync, statSync } from "node:fs";
import { isIPv4 } from "node:net";
import type { SecureContextOptions } from "node:tls";

/** Where a server listens that was started without --listen. */
export const DEFAULT_TARGET = "127.0.0.1:50051";

/** Trust and identity of an encrypted connection, as node:tls takes them; `{}` trusts Node's own authorities. */
export type TlsOptions = Pick<SecureContextOptions, "ca" | "cert" | "key" | "passphrase"> & { servername?: string };

/** What says where a server is and how to reach it. */
export interface ConnectionOptions {
  /** Encrypts the connection; default: UNSLOTHD_CA, UNSLOTHD_CLIENT_CERT with UNSLOTHD_CLIENT_KEY, UNSLOTHD_TLS=1. */
  tls?: TlsOptions;
  /** Sent as "authorization: Bearer TOKEN"; default: UNSLOTHD_TOKEN. Refused without TLS for another host. */
  token?: string;
  /** File with the token instead; default: UNSLOTHD_TOKEN_FILE. */
  tokenFile?: string;
  /** Sent with every call. */
  metadata?: Record<string, string>;
}

/** A way to a server. */
export interface Connection {
  target: string;
  tls: TlsOptions | undefined;
  headers: Headers;
  /** Others could read what is sent: it goes to another host without TLS. */
  exposed: boolean;
}

const SWITCHES: Record<string, boolean> = {
  "1": true, true: true, on: true, yes: true, "": false, "0": false, false: false, off: false, no: false,
};

/** Options for `tls` from PEM files: the server's authority, and the client's own certificate with its key. */
export function tlsFromFiles(files: { ca?: string; cert?: string; key?: string }): TlsOptions {
  if ((files.cert === undefined) !== (files.key === undefined)) {
    throw new TypeError("a client certificate and its key belong together: give both, or neither");
  }
  const found = Object.entries(files).filter(([, file]) => file !== undefined);
  return Object.fromEntries(found.map(([what, file]) => [what, pem(what, file)]));
}

/** The way to the server that the options and the environment describe. Throws TypeError, whose text has no token. */
export function resolve(target: string | undefined, options: ConnectionOptions): Connection {
  const found = target || process.env["UNSLOTHD_TARGET"] || DEFAULT_TARGET;
  const tls = options.tls ?? tlsOfEnvironment();
  const headers = new Headers(options.metadata);
  const token = tokenOf(options);
  if (token !== undefined) headers.set("authorization", `Bearer ${token}`);
  const exposed = tls === undefined && !isThisHost(found);
  if (headers.has("authorization") && exposed) throw new TypeError(inPlainText("token", found));
  return { target: found, tls, headers, exposed };
}

/** Why something secret is not sent to a target, and what to do instead. */
export function inPlainText(what: string, target: string): string {
  return `a ${what} for ${target} would travel in plain text: add tls, or set UNSLOTHD_CA`;
}

function tlsOfEnvironment(): TlsOptions | undefined {
  const { UNSLOTHD_CA: ca, UNSLOTHD_CLIENT_CERT: cert, UNSLOTHD_CLIENT_KEY: key } = process.env;
  const text = process.env["UNSLOTHD_TLS"] ?? "";
  const wanted = SWITCHES[text.toLowerCase()];
  if (wanted === undefined) throw new TypeError(`UNSLOTHD_TLS is "${text}": write 1 or 0`);
  if (!wanted && !ca && !cert && !key) return undefined;
  return tlsFromFiles({ ...(ca && { ca }), ...(cert && { cert }), ...(key && { key }) });
}

function tokenOf(options: ConnectionOptions): string | undefined {
  const given = options.token !== undefined || options.tokenFile !== undefined;
  const token = given ? options.token : process.env["UNSLOTHD_TOKEN"] || undefined;
  const file = given ? options.tokenFile : process.env["UNSLOTHD_TOKEN_FILE"] || undefined;
  if (token !== undefined && file !== undefined) {
    throw new TypeError("a token and the file of a token are given: leave one of them out");
  }
  const found = (file === undefined ? token : contentOf(file))?.trim();
  // What a header can carry; Node's own error would quote the token.
  if (found !== undefined && !/^[\x21-\x7e]+$/.test(found)) {
    throw new TypeError("the token is none: it must be one word of ASCII characters, as `unslothd tokens create` printed it");
  }
  return found;
}

function contentOf(file: string): string {
  const content = read("token file", file).toString();
  if (process.platform !== "win32" && statSync(file).mode & 0o044) {
    process.emitWarning(`${file} holds a token and can be read by others; run: chmod 600 ${file}`);
  }
  return content;
}

function pem(what: string, file: string): Buffer {
  const content = read(what, file);
  if (!content.includes("-----BEGIN ")) throw new TypeError(`${what}: ${file} is not PEM (a text with -----BEGIN …)`);
  return content;
}

function read(what: string, file: string): Buffer {
  try {
    return readFileSync(file);
  } catch (cause) {
    throw new TypeError(`${what}: ${file} cannot be read: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
}

/** True when what is sent to a target never leaves this machine; false where that is not sure. */
function isThisHost(target: string): boolean {
  const host = target.replace(/:\d+$/, "").toLowerCase();
  return host === "localhost" || host === "[::1]" || (isIPv4(host) && host.startsWith("127."));
}
