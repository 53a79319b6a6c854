/** Where a client connects to and as whom; TLS itself is in the cases of tests/conformance, which have certificates. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, chmod, writeFile } from "node:fs/promises";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, test, type TestContext } from "node:test";
import { inspect } from "node:util";

import { create } from "@bufbuild/protobuf";
import { connectNodeAdapter } from "@connectrpc/connect-node";

import { LoadModelResponseSchema, type LoadModelRequest } from "../gen/unslothd/v1/service_pb.js";
import { Client, tlsFromFiles, UnslothdError, UnslothService, type ClientOptions } from "../src/index.js";

const TOKEN = "unslothd_planted-token";
const timeout = { timeout: 20_000 };

afterEach(() => {
  for (const name of Object.keys(process.env)) if (name.startsWith("UNSLOTHD_")) delete process.env[name];
});

interface Heard {
  target: string;
  authorization: string | null;
  hubTokens: string[];
}

/** Starts a server that keeps the authorization of the last call, and the Hub token of each load. */
async function listening(t: TestContext) {
  const heard: Heard = { target: "", authorization: null, hubTokens: [] };
  const getServerInfo = (_: unknown, { requestHeader }: { requestHeader: Headers }) => {
    heard.authorization = requestHeader.get("authorization");
    return {};
  };
  async function* loadModel({ token }: LoadModelRequest) {
    heard.hubTokens.push(token);
    yield create(LoadModelResponseSchema, { result: { case: "model", value: { modelId: "m" } } });
  }
  const server = createServer(
    connectNodeAdapter({ routes: ({ service }) => void service(UnslothService, { getServerInfo, loadModel }) }),
  );
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  heard.target = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  t.after(() => server.close());
  return heard;
}

async function ask(t: TestContext, target?: string, options: ClientOptions = {}): Promise<void> {
  const client = new Client(target, options);
  t.after(() => client.close());
  await client.serverInfo();
}

async function tokenFile(content: string): Promise<string> {
  const file = join(await mkdtemp(join(tmpdir(), "unslothd-")), "token");
  await writeFile(file, content, { mode: 0o600 });
  return file;
}

/** What the constructor throws; it never shows the token. */
function refused(target: string, options: ClientOptions = {}): string {
  let told = "";
  assert.throws(() => new Client(target, options), (error) => (told = String(error)).startsWith("TypeError"));
  assert.ok(!told.includes(TOKEN), told);
  return told;
}

test("a token is sent, from the option, its file, or the environment, in this order", timeout, async (t) => {
  const server = await listening(t);
  process.env["UNSLOTHD_TARGET"] = server.target;
  process.env["UNSLOTHD_TOKEN"] = "of-the-environment";
  await ask(t);
  assert.equal(server.authorization, "Bearer of-the-environment");
  await ask(t, server.target, { tokenFile: await tokenFile("of-the-file\n") });
  assert.equal(server.authorization, "Bearer of-the-file");
  await ask(t, server.target, { token: "of-the-option" });
  assert.equal(server.authorization, "Bearer of-the-option");
  delete process.env["UNSLOTHD_TOKEN"];
  process.env["UNSLOTHD_TOKEN_FILE"] = await tokenFile("of-the-file-of-the-environment");
  await ask(t);
  assert.equal(server.authorization, "Bearer of-the-file-of-the-environment");
});

test("no token goes to another host in plain text", () => {
  const ways: ClientOptions[] = [{ token: TOKEN }, { metadata: { Authorization: `Bearer ${TOKEN}` } }];
  for (const options of ways) {
    for (const target of ["gpu-host:1", "10.0.0.1:1", "127.0.0.1.evil.example:1", "0.0.0.0:1", "[2001:db8::1]:1"]) {
      assert.match(refused(target, options), /would travel in plain text/);
    }
    for (const target of ["localhost:1", "LOCALHOST:1", "127.9.9.9:1", "[::1]:1"]) new Client(target, options).close();
    new Client("gpu-host:1", { ...options, tls: {} }).close();
  }
});

test("no Hub token goes to another host in plain text", timeout, async (t) => {
  const server = await listening(t);
  const elsewhere = new Client(server.target.replace("127.0.0.1", "0.0.0.0")); // leads to the server, but not surely
  const here = new Client(server.target);
  t.after(() => [elsewhere, here].forEach((client) => client.close()));
  await assert.rejects(elsewhere.loadModel({ modelName: "org/gated", token: TOKEN }), (error) => {
    assert.ok(error instanceof UnslothdError && error.is("FailedPrecondition"));
    assert.equal(error.reason, "HUB_TOKEN_IN_PLAIN_TEXT");
    assert.match(error.message, /would travel in plain text: add tls/);
    return !inspect(error).includes(TOKEN);
  });
  await elsewhere.loadModel({ modelName: "org/open" });
  await here.loadModel({ modelName: "org/gated", token: TOKEN });
  assert.deepEqual(server.hubTokens, ["", TOKEN]);
});

test("settings that cannot be used are told, without the token", async () => {
  const target = "localhost:1";
  const absent = "/nowhere/unslothd-token";
  for (const token of [`two ${TOKEN}`, `${TOKEN}\nbreak`, `${TOKEN}ä`]) {
    assert.match(refused(target, { token }), /one word of ASCII characters/);
  }
  assert.match(refused(target, { token: TOKEN, tokenFile: absent }), /leave one of them out/);
  assert.match(refused(target, { tokenFile: absent }), /token file: \/nowhere\/unslothd-token cannot be read: ENOENT/);
  assert.throws(() => tlsFromFiles({ cert: absent }), /belong together/);
  assert.throws(() => tlsFromFiles({ ca: absent }), /ca: .* cannot be read/);
  const rubbish = await tokenFile("rubbish");
  assert.throws(() => tlsFromFiles({ ca: rubbish }), /is not PEM/);
  process.env["UNSLOTHD_TLS"] = "maybe";
  assert.match(refused(target), /UNSLOTHD_TLS is "maybe"/);
});

test("a token is shown nowhere, and a file that others can read is warned of", timeout, async (t) => {
  const file = await tokenFile(TOKEN);
  const warnings: string[] = [];
  const listen = ({ message }: Error) => void warnings.push(message);
  process.on("warning", listen);
  t.after(() => process.off("warning", listen));
  const client = new Client("localhost:1", { tokenFile: file });
  client.close();
  assert.ok(!inspect(client, { depth: 20, showHidden: true }).includes(TOKEN));
  await chmod(file, 0o644);
  new Client("localhost:1", { tokenFile: file }).close();
  await new Promise(setImmediate);
  assert.deepEqual(warnings, [`${file} holds a token and can be read by others; run: chmod 600 ${file}`]);
});
