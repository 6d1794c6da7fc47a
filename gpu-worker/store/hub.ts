/** A repository of the Hugging Face hub, or of a server with its API, as a store that can be read. */
import { z } from "zod";
import { type Opened, Passing, resume } from "./resume.ts";
import { byKey, chunks, NO_SUCH_BYTE, type ObjectInfo, type ReadableStore, StoreError } from "./store.ts";

const HUB = "https://huggingface.co";
export const HUB_ID = /^([\w.-]+\/[\w.-]+)(?:@(.+))?$/;

const MAX_REDIRECTS = 5;
/** The longest wait that a server may ask for. */
const MAX_WAIT_S = 60;

/** What /api/models/{id}/revision/{revision}?blobs=true answers: the fields that are used. */
const Revision = z.object({
  sha: z.string(),
  siblings: z.array(
    z.object({
      rfilename: z.string(),
      size: z.number().int().nonnegative(),
      blobId: z.string().optional(),
      lfs: z.object({ sha256: z.string() }).nullish(),
    }),
  ),
});

interface Commit {
  sha: string;
  files: Map<string, ObjectInfo>;
}

/** What the hub calls its refusals (header X-Error-Code), in our words. */
const REASONS: Record<string, string> = {
  RepoNotFound: "there is no such repository",
  RevisionNotFound: "there is no such revision",
  EntryNotFound: "there is no such file",
};

/**
 * `org/name` or `org/name@revision` (a branch, tag or commit; else "main") of HF_ENDPOINT. All is read of the commit that
 * the revision names at the first call. The token of HF_TOKEN goes to that endpoint only, not where it redirects to.
 */
export class HubStore implements ReadableStore {
  readonly location: string;
  readonly #id: string;
  readonly #revision: string;
  readonly #endpoint: string;
  readonly #token: string | undefined;
  #commit: Promise<Commit> | undefined;

  constructor(location: string) {
    const [, id, revision = "main"] = HUB_ID.exec(location) ?? [];
    if (!id) throw new StoreError(`${location}: a hub repository is written org/name or org/name@revision`);
    this.location = location;
    this.#id = id;
    this.#revision = revision;
    this.#endpoint = (process.env.HF_ENDPOINT || HUB).replace(/\/+$/, "");
    if (!URL.canParse(this.#endpoint)) throw new StoreError(`HF_ENDPOINT is not a URL: ${this.#endpoint}`);
    this.#token = process.env.HF_TOKEN || process.env.HUGGING_FACE_HUB_TOKEN || undefined;
  }

  async list(prefix = "", signal?: AbortSignal): Promise<ObjectInfo[]> {
    const { files } = await this.#pinned(signal);
    return [...files.values()].filter(({ key }) => key.startsWith(prefix)).sort(byKey);
  }

  async stat(key: string, signal?: AbortSignal): Promise<ObjectInfo | undefined> {
    return (await this.#pinned(signal)).files.get(key);
  }

  async *read(key: string, range: { from?: number; to?: number } = {}, signal?: AbortSignal) {
    const { sha, files } = await this.#pinned(signal);
    const file = files.get(key);
    const name = `${this.location}: ${key}`;
    if (!file) throw new StoreError(`${name}: there is no such file`);
    const path = `/${this.#id}/resolve/${sha}/${key.split("/").map(encodeURIComponent).join("/")}`;
    const open = async (from: number, to: number | undefined): Promise<Opened> => {
      if (from > 0 && from >= file.bytes) throw new StoreError(`${name}: ${NO_SUCH_BYTE}`);
      const range = from > 0 || to !== undefined ? `bytes=${from}-${to === undefined ? "" : to - 1}` : undefined;
      const { body, status, headers } = await this.#get(name, path, range, signal);
      const whole = status === 200 && range === undefined;
      if (body && (whole || headers.get("content-range")?.startsWith(`bytes ${from}-`)))
        return { body, size: file.bytes };
      await body?.cancel();
      throw new StoreError(`${name}: the server does not send the range that it was asked for`);
    };
    yield* resume(name, range, open, signal);
  }

  /** The revision's commit and its files, asked for once; again after a failure. */
  async #pinned(signal?: AbortSignal): Promise<Commit> {
    signal?.throwIfAborted();
    this.#commit ??= this.#pin(signal).catch((error) => {
      this.#commit = undefined;
      throw error;
    });
    return this.#commit;
  }

  async #pin(signal?: AbortSignal): Promise<Commit> {
    const name = `${this.location}: revision ${this.#revision}`;
    const path = `/api/models/${this.#id}/revision/${encodeURIComponent(this.#revision)}?blobs=true`;
    const open = async (): Promise<Opened> => {
      const answer = new Uint8Array(await (await this.#get(name, path, undefined, signal)).arrayBuffer());
      return { body: chunks(answer), size: answer.length };
    };
    const answer = Buffer.concat(await Array.fromAsync(resume(name, {}, open, signal)));
    try {
      const { sha, siblings } = Revision.parse(JSON.parse(answer.toString()));
      const files = siblings.map(({ rfilename: key, size: bytes, blobId, lfs }): [string, ObjectInfo] => [
        key,
        lfs ? { key, bytes, sha256: lfs.sha256, version: lfs.sha256 } : { key, bytes, version: blobId },
      ]);
      return { sha, files: new Map(files) };
    } catch (cause) {
      throw new StoreError(`${this.location}: ${this.#endpoint} does not answer as the hub does`, { cause });
    }
  }

  /** One try at a GET, through redirects: a good answer, else Passing or a StoreError. */
  async #get(name: string, path: string, range?: string, signal?: AbortSignal): Promise<Response> {
    const response = await this.#follow(new URL(this.#endpoint + path), range, signal);
    const { ok, status, headers, body } = response;
    if (ok) return response;
    await body?.cancel();
    if (status !== 429 && status < 500) throw new StoreError(`${name}: ${this.#refusal(response)}`);
    const seconds = Number.parseInt(headers.get("retry-after") ?? "", 10);
    throw new Passing(`the hub answers ${status}`, seconds >= 0 ? Math.min(seconds, MAX_WAIT_S) * 1000 : undefined);
  }

  /** By hand, because of the token, and because a compressed answer's ranges would be of other bytes. */
  async #follow(first: URL, range?: string, signal?: AbortSignal): Promise<Response> {
    let url = first;
    for (let hops = 0; hops <= MAX_REDIRECTS; hops++) {
      const headers = new Headers({ "accept-encoding": "identity" });
      if (range) headers.set("range", range);
      if (this.#token && url.origin === first.origin) headers.set("authorization", `Bearer ${this.#token}`);
      const response = await fetch(url, { redirect: "manual", signal, headers });
      const to = response.headers.get("location");
      if (response.status < 300 || response.status > 399 || !to) return response;
      await response.body?.cancel();
      const next = URL.parse(to, url.href);
      if (!next || !/^https?:$/.test(next.protocol))
        throw new StoreError(`${this.location}: ${url.origin} redirects to what is no http address`);
      url = next;
    }
    throw new StoreError(`${this.location}: ${first.origin} redirects in circles`);
  }

  #refusal({ status, headers }: Response): string {
    if (status !== 401 && status !== 403)
      return REASONS[headers.get("x-error-code") ?? ""] ?? `the hub answers ${status}`;
    // Without a token, the hub answers 401 for what does not exist too.
    const help = this.#token ? "HF_TOKEN has no access to it" : "set HF_TOKEN";
    return `the hub refuses it (${status}): there is no such repository, or it is private or gated, and ${help}`;
  }
}
