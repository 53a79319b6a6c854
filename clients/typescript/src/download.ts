/** Downloads files into a folder: checked, never half-written under their names, and gone on with after a break. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { constants, lstat, mkdir, open, realpath, rename, rm, type FileHandle } from "node:fs/promises";
import { dirname, join, posix, sep } from "node:path";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";

import type { ArtifactFile } from "../gen/unslothd/v1/artifact_pb.js";
import { DownloadArtifactRequestSchema, type DownloadArtifactRequest } from "../gen/unslothd/v1/service_pb.js";
import { endedEarly, localError, UnslothdError } from "./errors.js";
import { connectionLost, type Retry } from "./retry.js";
import { Stream, type Calls, type CallOptions } from "./transport.js";

/** How far a file has come. */
export interface DownloadProgress {
  /** Below the folder, with "/". */
  name: string;
  /** Bytes of it that are here. */
  done: number;
  numBytes: number;
}

export interface DownloadOptions extends CallOptions {
  /** Replace files of the same name and other content. */
  overwrite?: boolean;
  onProgress?: (progress: DownloadProgress) => void;
}

/** See `Client.download`. */
export async function download(
  calls: Calls,
  request: MessageInitShape<typeof DownloadArtifactRequestSchema>,
  folder: string,
  options: DownloadOptions,
): Promise<string[]> {
  await mkdir(folder, { recursive: true });
  const transfer = new Transfer(calls, create(DownloadArtifactRequestSchema, request), await realpath(folder), options);
  const names = new Set(request.names?.length ? request.names : await transfer.allNames());
  const paths: string[] = [];
  for (const name of [...names].sort()) {
    await transfer.take(name);
    paths.push(join(folder, ...name.split("/")));
  }
  return paths;
}

/** The bytes that were here before belong to another file. */
class Stale extends Error {}

class Transfer {
  readonly #retry: Retry;

  constructor(
    private readonly calls: Calls,
    private readonly request: DownloadArtifactRequest,
    private readonly root: string,
    private readonly options: DownloadOptions,
  ) {
    this.#retry = calls.streamRetry();
  }

  async allNames(): Promise<string[]> {
    for (;;) {
      const names: string[] = [];
      const stream = this.#stream({ headersOnly: true });
      try {
        let message = await stream.next();
        for (; message !== undefined && !(message instanceof UnslothdError); message = await stream.next()) {
          this.#retry.heard();
          if (message.part.case === "file") names.push(message.part.value.name);
        }
        if (message === undefined) return names;
        await this.#waitAfter(message);
      } finally {
        stream.close();
      }
    }
  }

  /** Fetches a file, with as many streams as it needs. */
  async take(name: string): Promise<void> {
    const path = await this.#inside(name);
    for (let restarted = false; ; ) {
      const offset = await bytesOf(`${path}.part`);
      try {
        return await this.#read(name, path, offset);
      } catch (error) {
        const stale = error instanceof Stale || (error instanceof UnslothdError && error.kind === "OutOfRange");
        if (stale && offset > 0 && !restarted) {
          restarted = true;
          await rm(`${path}.part`, { force: true });
        } else if (error instanceof Stale) {
          const text = `${name} arrived with another sha256 than the server told; the file may have changed or be damaged`;
          throw localError(Code.DataLoss, `${text} there. Nothing was kept of it: download it again, or export anew`);
        } else if (error instanceof UnslothdError) await this.#waitAfter(error);
        else throw error;
      }
    }
  }

  /** Takes from one stream what is not here yet. */
  async #read(name: string, path: string, offset: number): Promise<void> {
    const stream = this.#stream({ names: [name], offset: BigInt(offset) });
    try {
      const file = (await this.#message(stream)).part;
      if (file.case !== "file" || file.value.name !== name) throw localError(Code.DataLoss, `the server sent no file ${name}`);
      if (await this.#holds(file.value, path)) return this.#tell(name, Number(file.value.numBytes), file.value);
      const part = await Part.open(path, file.value);
      try {
        while (!part.complete) {
          this.#tell(name, part.numBytes, file.value);
          const { part: next } = await this.#message(stream);
          if (next.case === "chunk") await part.receive(next.value);
          this.#retry.progress();
        }
        this.#tell(name, part.numBytes, file.value);
        await part.finish();
      } finally {
        await part.close();
      }
    } finally {
      stream.close();
    }
  }

  #stream(wanted: { names?: string[]; offset?: bigint; headersOnly?: boolean }) {
    const request = { ...this.request, names: [], ...wanted };
    return new Stream(this.calls, (options) => this.calls.stub.downloadArtifact(request, options), this.options.signal);
  }

  async #message<Message>(stream: Stream<Message>): Promise<Message> {
    const message = await stream.next();
    if (message === undefined) throw endedEarly("the download");
    if (message instanceof UnslothdError) throw message;
    return message;
  }

  async #waitAfter(lost: UnslothdError): Promise<void> {
    if (!connectionLost(lost)) throw lost;
    await this.#retry.wait(lost, this.options.signal);
  }

  /** True when the whole file is here already. */
  async #holds(file: ArtifactFile, path: string): Promise<boolean> {
    const found = await lstat(path).catch(ignoreMissing);
    if (found === undefined) return false;
    if (BigInt(found.size) === file.numBytes && found.isFile() && (await sha256Of(path)) === file.sha256) return true;
    if (this.options.overwrite) return false;
    const text = `${path}: another file of this name is here; take another folder or allow overwriting`;
    throw Object.assign(new Error(text), { code: "EEXIST", path });
  }

  /** The path of a file; its folders are made. Nothing is ever written outside of the root, links included. */
  async #inside(name: string): Promise<string> {
    const plain = name !== "" && name === posix.normalize(name) && !/^[./]|[\\:\0]|^\.\.(\/|$)/.test(name);
    const path = join(this.root, ...name.split("/"));
    if (plain) {
      const above = await nearest(dirname(path));
      if (above === this.root || above.startsWith(this.root + sep)) {
        await mkdir(dirname(path), { recursive: true });
        return path;
      }
    }
    const text = `the server named a file ${JSON.stringify(name)}, which would not stay inside ${this.root}`;
    throw localError(Code.PermissionDenied, `${text}; nothing was written for it`);
  }

  #tell(name: string, done: number, file: ArtifactFile): void {
    this.options.onProgress?.({ name, done, numBytes: Number(file.numBytes) });
  }
}

/** A file that is being received: `<path>.part` until all of it is here and its hash is right. */
class Part {
  numBytes = 0;
  readonly #hash = createHash("sha256");
  #open = true;

  private constructor(
    private readonly path: string,
    private readonly file: ArtifactFile,
    private readonly handle: FileHandle,
  ) {}

  static async open(path: string, file: ArtifactFile): Promise<Part> {
    const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW;
    const part = new Part(path, file, await open(`${path}.part`, flags, 0o666));
    for await (const block of part.handle.createReadStream({ autoClose: false, start: 0 })) {
      part.#hash.update(block);
      part.numBytes += block.length;
    }
    return part;
  }

  get complete(): boolean {
    return this.numBytes >= Number(this.file.numBytes);
  }

  async receive(chunk: Uint8Array): Promise<void> {
    for (let written = 0; written < chunk.length; ) {
      const { bytesWritten } = await this.handle.write(chunk, written, chunk.length - written, this.numBytes);
      this.#hash.update(chunk.subarray(written, written + bytesWritten));
      written += bytesWritten;
      this.numBytes += bytesWritten;
    }
  }

  /** Gives the file its name; throws Stale, and its bytes are dropped, when they are not the server's. */
  async finish(): Promise<void> {
    if (BigInt(this.numBytes) !== this.file.numBytes || this.#hash.digest("hex") !== this.file.sha256) {
      await this.close();
      await rm(`${this.path}.part`);
      throw new Stale();
    }
    await this.handle.sync();
    await this.close();
    await rename(`${this.path}.part`, this.path);
  }

  /** Leaves what is here for the next time. */
  async close(): Promise<void> {
    if (this.#open) await this.handle.close();
    this.#open = false;
  }
}

/** The real path of the nearest folder that exists. */
async function nearest(folder: string): Promise<string> {
  return (await realpath(folder).catch(ignoreMissing)) ?? nearest(dirname(folder));
}

async function bytesOf(path: string): Promise<number> {
  const found = await lstat(path).catch(ignoreMissing);
  return found?.isFile() ? found.size : 0;
}

async function sha256Of(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const block of createReadStream(path)) hash.update(block);
  return hash.digest("hex");
}

function ignoreMissing(error: NodeJS.ErrnoException): undefined {
  if (error.code !== "ENOENT") throw error;
}
