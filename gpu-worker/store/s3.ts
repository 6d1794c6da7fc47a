/** A bucket of S3, or of a service that speaks its protocol, as a store: the only file that knows the AWS SDK. */
import { Readable } from "node:stream";
import type { S3 } from "@aws-sdk/client-s3";
import { type Opened, reasonOf, resume, TRIES } from "./resume.ts";
import { byKey, checkKey, chunks, NO_SUCH_BYTE, type ObjectInfo, type ObjectStore, StoreError } from "./store.ts";

/** Bytes of a part: S3 takes 10,000 of them, so that an object may have 80 GiB. The SDK holds four at a time. */
const PART = 8 << 20;
const CONNECT_MS = 10_000;
const SILENCE_MS = 60_000;

const OTHER_REGION = "the bucket is in another region: set AWS_REGION";
const BAD_CREDENTIALS = "the credentials are wrong";
/** Errors of S3 and the SDK by name. An answer to HEAD has no name, but a status. */
const REASONS: Record<string, string> = {
  NoSuchBucket: "there is no such bucket",
  NoSuchKey: "there is no such object",
  AccessDenied: "access is denied",
  403: "access is denied",
  InvalidAccessKeyId: BAD_CREDENTIALS,
  SignatureDoesNotMatch: BAD_CREDENTIALS,
  ExpiredToken: "the credentials have expired",
  PermanentRedirect: OTHER_REGION,
  AuthorizationHeaderMalformed: OTHER_REGION,
  301: OTHER_REGION,
  CredentialsProviderError: "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
  PreconditionFailed: "it changed while it was read",
  InvalidRange: NO_SUCH_BYTE,
};

interface SdkError extends NodeJS.ErrnoException {
  $metadata?: { httpStatusCode?: number };
}

function explain(error: SdkError): string {
  const status = error.$metadata?.httpStatusCode;
  const reason = REASONS[error.name] ?? REASONS[status ?? ""];
  if (reason) return reason;
  if (error.message.includes("Region is missing")) return "there is no region: set AWS_REGION";
  if (status === undefined && (error.code || error.name === "TimeoutError"))
    return `the endpoint cannot be reached: ${reasonOf(error)}`;
  return `${error.name}: ${error.message}`;
}

/**
 * `s3://bucket/prefix`. Region, credentials and endpoint are the SDK's own affair: AWS_REGION, AWS_ACCESS_KEY_ID, profiles,
 * …; with AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3 the bucket stands in the path, not in the host's name.
 */
export class S3Store implements ObjectStore {
  readonly location: string;
  readonly #bucket: string;
  /** "" or with a "/" at its end. */
  readonly #prefix: string;
  #client: Promise<S3> | undefined;

  constructor(location: string) {
    const [, bucket, prefix] = /^s3:\/\/([^/]+)\/*(.*?)\/*$/.exec(location) ?? [];
    if (!bucket) throw new StoreError(`${location}: S3 is written s3://bucket/prefix`);
    this.location = location;
    this.#bucket = bucket;
    this.#prefix = prefix === "" ? "" : `${prefix}/`;
  }

  async list(prefix = "", signal?: AbortSignal): Promise<ObjectInfo[]> {
    const s3 = await this.#s3();
    const query = { Bucket: this.#bucket, Prefix: this.#prefix + prefix };
    const infos: ObjectInfo[] = [];
    for (let token: string | undefined; ; ) {
      signal?.throwIfAborted();
      const request = s3.listObjectsV2({ ...query, ContinuationToken: token }, { abortSignal: signal });
      const page = await request.catch(this.#rethrow(prefix, signal));
      for (const { Key = "", Size = 0, ETag } of page.Contents ?? []) {
        const key = Key.slice(this.#prefix.length);
        // Consoles make empty objects for "folders".
        if (key !== "" && !key.endsWith("/")) infos.push({ key, bytes: Size, version: ETag });
      }
      token = page.NextContinuationToken;
      if (!token) return infos.sort(byKey);
    }
  }

  async stat(key: string, signal?: AbortSignal): Promise<ObjectInfo | undefined> {
    const object = this.#object(key);
    const s3 = await this.#s3();
    signal?.throwIfAborted();
    const request = s3.headObject({ ...object, ChecksumMode: "ENABLED" }, { abortSignal: signal });
    const head = await request.catch((error) => {
      if (error.$metadata?.httpStatusCode !== 404) this.#rethrow(key, signal)(error);
    });
    if (!head) return undefined;
    const info = { key, bytes: head.ContentLength ?? 0, version: head.ETag };
    const sha256 = head.ChecksumSHA256;
    // That of an object in parts is a hash of hashes.
    if (!sha256 || head.ChecksumType === "COMPOSITE" || sha256.includes("-")) return info;
    return { ...info, sha256: Buffer.from(sha256, "base64").toString("hex") };
  }

  read(key: string, range: { from?: number; to?: number } = {}, signal?: AbortSignal) {
    let version: string | undefined;
    const open = async (from: number, to: number | undefined): Promise<Opened> => {
      const object = this.#object(key);
      const s3 = await this.#s3();
      const Range = from > 0 || to !== undefined ? `bytes=${from}-${to === undefined ? "" : to - 1}` : undefined;
      const request = s3.getObject({ ...object, Range, IfMatch: version }, { abortSignal: signal });
      const answer = await request.catch(this.#rethrow(key));
      if (Range && !answer.ContentRange?.startsWith(`bytes ${from}-`)) {
        (answer.Body as Readable).destroy();
        throw new StoreError(`${this.#name(key)}: the server does not send the range that it was asked for`);
      }
      version ??= answer.ETag;
      const size = Number(answer.ContentRange?.split("/")[1] ?? answer.ContentLength);
      return { body: this.#checked(key, answer.Body as Readable), size };
    };
    return resume(this.#name(key), range, open, signal);
  }

  async write(key: string, body: Uint8Array | AsyncIterable<Uint8Array>, signal?: AbortSignal): Promise<void> {
    const object = this.#object(key);
    const { Upload } = await import("@aws-sdk/lib-storage");
    let failure: { error: unknown } | undefined;
    async function* watched() {
      try {
        for await (const { buffer, byteOffset, length } of chunks(body, signal))
          yield Buffer.from(buffer, byteOffset, length);
      } catch (error) {
        failure = { error };
        throw error;
      }
    }
    const params = { ...object, Body: Readable.from(watched()), ChecksumAlgorithm: "SHA256" as const };
    // When the body fails, the Upload removes its parts and then rejects. Its own `abort` would not wait for that.
    await new Upload({ client: await this.#s3(), params, partSize: PART }).done().catch((error) => {
      throw failure ? failure.error : this.#rethrow(key)(error);
    });
  }

  async remove(key: string): Promise<void> {
    const object = this.#object(key);
    const s3 = await this.#s3();
    await s3.deleteObject(object).catch(this.#rethrow(key));
  }

  #s3(): Promise<S3> {
    this.#client ??= connect();
    return this.#client;
  }

  #name = (key: string) => `s3://${this.#bucket}/${this.#prefix}${key}`;

  #object(key: string) {
    checkKey(this.location, key);
    return { Bucket: this.#bucket, Key: this.#prefix + key };
  }

  /** The body, with a wrong checksum as a StoreError: the SDK compares that of a whole object at its end. */
  async *#checked(key: string, body: Readable): AsyncGenerator<Uint8Array> {
    try {
      yield* body;
    } catch (error) {
      if (!reasonOf(error).startsWith("Checksum mismatch")) throw error;
      throw new StoreError(`${this.#name(key)}: what came does not have the checksum that S3 has for it`);
    }
  }

  /** Without the SDK's error as the cause: that one holds the request. */
  #rethrow = (key: string, signal?: AbortSignal) => (error: SdkError) => {
    signal?.throwIfAborted();
    throw new StoreError(`${this.#name(key)}: ${explain(error)}`);
  };
}

/** Loading the SDK takes 0.1 s, which one who uses no S3 should not wait for. */
async function connect(): Promise<S3> {
  const { S3 } = await import("@aws-sdk/client-s3");
  return new S3({
    forcePathStyle: Boolean(process.env.AWS_ENDPOINT_URL_S3 ?? process.env.AWS_ENDPOINT_URL),
    maxAttempts: TRIES,
    requestHandler: { connectionTimeout: CONNECT_MS, socketTimeout: SILENCE_MS },
  });
}
