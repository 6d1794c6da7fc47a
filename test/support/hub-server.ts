/** The part of the Hugging Face hub's HTTP API that gpu-worker/store/hub.ts uses, over folders, on loopback. */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { createServer, type IncomingMessage, type RequestListener, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";

export interface LoggedRequest {
  method: string;
  path: string;
  range?: string;
  authorization?: string;
  /** The header Accept-Encoding. */
  encoding?: string;
}

/** What a server of the tests can be told to do wrong. */
export class Faults {
  readonly log: LoggedRequest[] = [];
  #cut: number | null = null;
  readonly #answers: { status: number; headers: Record<string, string>; body: string }[] = [];

  /** Connections break after so many bytes of a longer body; what the hub's API says comes whole. */
  cutAfter(bytes: number | null): void {
    this.#cut = bytes;
  }

  /** The next request that would be answered gets this instead; several calls queue up. */
  answerNext(status: number, headers: Record<string, string> = {}, body = ""): void {
    this.#answers.push({ status, headers, body });
  }

  /** The listener with the faults in front of it. */
  wrap(listener: RequestListener): RequestListener {
    return (request, response) => {
      const { range, authorization, "accept-encoding": encoding } = request.headers;
      const { method = "", url: path = "" } = request;
      this.log.push({ method, path, range, authorization, encoding: encoding?.toString() });
      const answer = this.#answers.shift();
      if (answer) {
        request.resume().on("end", () => response.writeHead(answer.status, answer.headers).end(answer.body));
        return;
      }
      if (this.#cut !== null && !path.startsWith("/api/")) cut(response, this.#cut);
      listener(request, response);
    };
  }
}

function cut(response: ServerResponse, limit: number): void {
  const end = response.end.bind(response) as (body?: string | Buffer) => ServerResponse;
  response.end = ((body?: string | Buffer) => {
    const bytes = Buffer.from(body ?? "");
    if (bytes.length <= limit) return end(body);
    response.write(bytes.subarray(0, limit), () => response.socket?.destroy());
    return response;
  }) as typeof response.end;
}

/** Listens on loopback at a free port. */
export async function listen(listener: RequestListener): Promise<{ url: string; close(): Promise<void> }> {
  const server = createServer(listener);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const close = () =>
    new Promise<void>((resolve) => {
      server.close(() => resolve());
      server.closeAllConnections();
    });
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, close };
}

interface HubFile {
  /** Where its bytes are; they are read anew by each request, while size and hashes are those of the start. */
  path: string;
  size: number;
  oid: string;
  sha256: string;
  lfs: boolean;
}

interface Repo {
  sha: string;
  files: Map<string, HubFile>;
}

function readRepo(folder: string): Repo {
  const files = new Map<string, HubFile>();
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue;
    const path = join(entry.parentPath, entry.name);
    const bytes = readFileSync(path);
    files.set(path.slice(join(folder, "/").length).replaceAll("\\", "/"), {
      path,
      size: bytes.length,
      oid: createHash("sha1").update(`blob ${bytes.length}\0`).update(bytes).digest("hex"),
      sha256: createHash("sha256").update(bytes).digest("hex"),
      lfs: path.endsWith(".safetensors"),
    });
  }
  const sha = createHash("sha1");
  for (const [name, { sha256 }] of files) sha.update(`${name} ${sha256}\n`);
  return { sha: sha.digest("hex"), files };
}

/** Sends a file or the range of it that is asked for. */
function sendFile(request: IncomingMessage, response: ServerResponse, file: HubFile): void {
  const bytes = readFileSync(file.path);
  const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "");
  const headers = { etag: `"${file.lfs ? file.sha256 : file.oid}"`, "accept-ranges": "bytes" };
  if (!range) {
    response.writeHead(200, { ...headers, "content-length": bytes.length });
    response.end(request.method === "HEAD" ? undefined : bytes);
    return;
  }
  const from = Number(range[1]);
  const to = Math.min(bytes.length, range[2] === "" ? bytes.length : Number(range[2]) + 1);
  if (from >= to) {
    response.writeHead(416, { "content-range": `bytes */${bytes.length}` }).end();
    return;
  }
  const contentRange = `bytes ${from}-${to - 1}/${bytes.length}`;
  response.writeHead(206, { ...headers, "content-length": to - from, "content-range": contentRange });
  response.end(request.method === "HEAD" ? undefined : bytes.subarray(from, to));
}

function refuse(response: ServerResponse, status: number, code: string, message: string): void {
  response.writeHead(status, { "content-type": "application/json", "x-error-code": code, "x-error-message": message });
  response.end(JSON.stringify({ error: message }));
}

/** GET /api/models/{id}/revision/{revision}?blobs=true, as the hub answers it (the fields that matter). */
function describe(response: ServerResponse, id: string, { sha, files }: Repo): void {
  const siblings = [...files].map(([rfilename, { size, oid, sha256, lfs }]) => ({
    ...{ rfilename, size, blobId: oid },
    ...(lfs && { lfs: { sha256, size, pointerSize: 134 } }),
  }));
  response.writeHead(200, { "content-type": "application/json" });
  response.end(JSON.stringify({ id, modelId: id, sha, siblings }));
}

/**
 * A hub with these repositories (folders by their ids) at the revision "main" and its commit. Files *.safetensors are
 * LFS: a redirect leads to a "CDN" on another port, which answers 400 to any Authorization header, as S3 would.
 * With `token`, every repository is gated: 401 without one, 403 for another one. A repository that does not exist is 401
 * without a token and 404 with one, as at the hub. Requests to the CDN are in the log too, under /lfs/.
 */
export async function startHub(repos: Record<string, string>, { token }: { token?: string } = {}) {
  const known = new Map(Object.entries(repos).map(([id, folder]) => [id, readRepo(folder)]));
  const bySha256 = new Map(
    [...known.values()].flatMap(({ files }) => [...files.values()].map((file) => [file.sha256, file])),
  );
  const faults = new Faults();
  const cdn = await listen(
    faults.wrap((request, response) => {
      const file = bySha256.get(/^\/lfs\/(\w+)\?signature=\w+$/.exec(request.url ?? "")?.[1] ?? "");
      if (request.headers.authorization) response.writeHead(400).end("Only one auth mechanism allowed");
      else if (!file) response.writeHead(403).end("AccessDenied");
      else sendFile(request, response, file);
    }),
  );
  const hub = await listen(
    faults.wrap((request, response) => {
      const { pathname, searchParams } = new URL(request.url ?? "", "http://hub");
      const api = /^\/api\/models\/([^/]+\/[^/]+)\/revision\/([^/]+)$/.exec(pathname);
      const resolve = /^\/([^/]+\/[^/]+)\/resolve\/([^/]+)\/(.+)$/.exec(pathname);
      const [, id = "", revision = "", key = ""] = (api ?? resolve ?? []).map(decodeURIComponent);
      const { authorization } = request.headers;
      const repo = known.get(id);
      if (!repo) return refuse(response, authorization ? 404 : 401, "RepoNotFound", "Repository not found");
      if (token !== undefined && authorization !== `Bearer ${token}`)
        return refuse(response, authorization ? 403 : 401, "GatedRepo", `Access to model ${id} is restricted.`);
      if (revision !== "main" && revision !== repo.sha)
        return refuse(response, 404, "RevisionNotFound", `Invalid rev id: ${revision}`);
      if (api && searchParams.get("blobs") === "true") return describe(response, id, repo);
      const file = repo.files.get(key);
      if (!file) return refuse(response, 404, "EntryNotFound", "Entry not found");
      response.setHeader("x-repo-commit", repo.sha);
      if (!file.lfs) return sendFile(request, response, file);
      const headers = { "x-linked-size": file.size, "x-linked-etag": `"${file.sha256}"` };
      response.writeHead(302, { ...headers, location: `${cdn.url}/lfs/${file.sha256}?signature=abc` }).end();
    }),
  );
  return {
    url: hub.url,
    log: faults.log,
    cutAfter: (bytes: number | null) => faults.cutAfter(bytes),
    answerNext: faults.answerNext.bind(faults),
    close: async () => {
      await hub.close();
      await cdn.close();
    },
  };
}
