/** What the conformance suite cannot see from outside: signals, tokens, loops that are left, files that lie. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtemp, mkdir, readFile, readdir, symlink, writeFile } from "node:fs/promises";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";

import { Code, ConnectError, type ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";

import { Client, DataFormat, UnslothdError, UnslothService, type ClientOptions } from "../src/index.js";

const trainingId = "training-20261124-120000-abcdef";
const timeout = { timeout: 20_000 };

async function serve(t: TestContext, methods: Partial<ServiceImpl<typeof UnslothService>>, options: ClientOptions = {}) {
  const server = createServer(connectNodeAdapter({ routes: ({ service }) => void service(UnslothService, methods) }));
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const client = new Client(`127.0.0.1:${(server.address() as AddressInfo).port}`, options);
  t.after(() => {
    client.close();
    server.close();
  });
  return client;
}

function isKind(kind: UnslothdError["kind"]) {
  return (error: unknown) => error instanceof UnslothdError && error.is(kind);
}

test("an aborted signal ends the reading with its own reason", timeout, async (t) => {
  const client = await serve(t, {
    async *watchTraining(_, { signal }) {
      yield { event: { sequence: 1n, trainingId } };
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
    },
  });
  const stop = new AbortController();
  const reason = new Error("the user left");
  await assert.rejects(async () => {
    for await (const _ of client.watch(trainingId, { signal: stop.signal })) stop.abort(reason);
  }, reason);
});

test("a loop that was left goes on where it stopped", timeout, async (t) => {
  const asked: bigint[] = [];
  const client = await serve(t, {
    async *watchTraining({ afterSequence }) {
      asked.push(afterSequence);
      for (let sequence = afterSequence + 1n; sequence < 4n; sequence++) yield { event: { sequence, trainingId } };
      yield { event: { sequence: 4n, trainingId, kind: { case: "succeeded", value: {} } } };
    },
  });
  const run = client.watch(trainingId);
  for await (const { sequence } of run) if (sequence === 2n) break;
  run.close();
  const rest: bigint[] = [];
  for await (const { sequence } of run) rest.push(sequence);
  assert.deepEqual(rest, [3n, 4n]);
  assert.deepEqual(asked, [0n, 2n]);
});

test("what a callback throws reaches the caller and is no lost connection", timeout, async (t) => {
  const client = await serve(t, {
    async *loadModel() {
      yield { result: { case: "progress", value: {} } };
    },
  });
  const onProgress = () => {
    throw new RangeError("mine");
  };
  await assert.rejects(client.loadModel({ modelName: "m" }, { onProgress }), RangeError);
});

const bytes = new TextEncoder().encode("0123456789".repeat(1000));
const fileName = "sub/model.bin";

/** Serves one file, in streams that break after 4000 bytes. */
function download(offsets: number[], content: Uint8Array<ArrayBuffer> = bytes): Partial<ServiceImpl<typeof UnslothService>> {
  return {
    async *downloadArtifact({ names, offset, headersOnly }) {
      const sha256 = createHash("sha256").update(content).digest("hex");
      yield { part: { case: "file", value: { name: names[0] ?? fileName, numBytes: BigInt(content.length), sha256 } } };
      if (headersOnly) return;
      const begin = Number(offset);
      offsets.push(begin);
      yield { part: { case: "chunk", value: content.slice(begin, begin + 4000) } };
      if (begin + 4000 < content.length) throw new ConnectError("Socket closed", Code.Unavailable);
    },
  };
}

test("a broken download goes on where it stopped", timeout, async (t) => {
  const offsets: number[] = [];
  const folder = await mkdtemp(join(tmpdir(), "unslothd-"));
  const source = { source: { case: "artifactId", value: "a" } } as const;
  const [path] = await (await serve(t, download(offsets))).download(source, folder);
  assert.deepEqual(new Uint8Array(await readFile(path ?? "")), bytes);
  assert.deepEqual(offsets, [0, 4000, 8000]);
});

test("nothing is written outside of the folder", timeout, async (t) => {
  const outside = await mkdtemp(join(tmpdir(), "unslothd-"));
  const folder = await mkdtemp(join(tmpdir(), "unslothd-"));
  await symlink(outside, join(folder, "sub"));
  const client = await serve(t, download([]));
  for (const name of ["../x", "/x", "a/../../x", "a\\..\\x", "C:x", ".", "..", fileName]) {
    const request = { source: { case: "artifactId" as const, value: "a" }, names: [name] };
    await assert.rejects(client.download(request, folder), isKind("PermissionDenied"), name);
  }
  assert.deepEqual(await readdir(outside), []);
});

test("another file of the same name is kept unless told otherwise", timeout, async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "unslothd-"));
  await mkdir(join(folder, "sub"));
  await writeFile(join(folder, fileName), "old");
  const client = await serve(t, download([]));
  const source = { source: { case: "artifactId", value: "a" } } as const;
  await assert.rejects(client.download(source, folder), { code: "EEXIST" });
  await client.download(source, folder, { overwrite: true });
});

test("an upload is sent again after a lost connection", timeout, async (t) => {
  let attempts = 0;
  const client = await serve(t, {
    getDataset() {
      throw new ConnectError("none", Code.NotFound);
    },
    async uploadDataset(requests) {
      let numBytes = 0;
      for await (const { part } of requests) if (part.case === "chunk") numBytes += part.value.length;
      if (++attempts === 1) throw new ConnectError("Socket closed", Code.Unavailable);
      return { dataset: { numBytes: BigInt(numBytes) } };
    },
  });
  let done = 0;
  const onProgress = (progress: { done: number }) => void (done = progress.done);
  const dataset = await client.uploadDataset(new Uint8Array(3_000_000), { format: DataFormat.JSONL, onProgress });
  assert.equal(dataset.numBytes, 3_000_000n);
  assert.equal(done, 3_000_000);
});
