/**
 * Fetches a picture that a stranger names from a network that a stranger must not reach. Knows addresses, redirects and
 * limits; does not look into the picture. It is the worker that fetches, since a Worker on the edge sees no addresses.
 */
import type { LookupAddress } from "node:dns";
import { lookup } from "node:dns/promises";
import { request as httpRequest, type IncomingMessage } from "node:http";
import { request as httpsRequest } from "node:https";
import { BlockList, isIP, isIPv4 } from "node:net";
import { ApiError } from "../../shared/errors.ts";
import { untilAborted } from "../until-aborted.ts";

/** Whether pictures are fetched at all, from public addresses only, or (at home, and in tests) from anywhere. */
export type ImageUrls = "off" | "public" | "any";

/** Where from and how: what a policy says, and what tests replace. */
interface Means {
  isAllowed: (address: string, port: number) => boolean;
  /** What is said of every name and address that is not allowed, and of names that have no address. */
  refusal: string;
  /** All addresses of a name. */
  resolve: (host: string) => Promise<LookupAddress[]>;
  /** Milliseconds for all of it. */
  time: number;
  /** Milliseconds in which a connection must come about, and in which something must come through it. */
  silence: number;
  bytes: number;
  redirects: number;
}

const PUBLIC = { isAllowed: isPublic, refusal: "the URL leads to no public address on port 80 or 443" };
const ANY = { isAllowed: () => true, refusal: "the URL leads to no address" };
const COMMON = {
  resolve: (host: string) => lookup(host, { all: true }),
  time: 10_000,
  silence: 5_000,
  bytes: 20 * 2 ** 20,
  redirects: 3,
};

// IANA's special-purpose registries. Clouds have their metadata at link-local, shared (100.64/10) or unique local
// (fc00::/7, outside of 2000::/3) addresses, and Azure also at 168.63.129.16, which looks public. 2001::/23 has Teredo
// and 2002::/16 is 6to4: both wrap an IPv4 address.
const SPECIAL = subnets(`
  0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
  192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 168.63.129.16/32
  2001::/23 2001:db8::/32 2002::/16 3fff::/20`);
// All IPv6 unicast that is given out. What maps IPv4 (::ffff:0:0/96) or is translated to it (64:ff9b::/96) is outside.
const GIVEN_OUT = subnets("2000::/3");

function subnets(list: string): BlockList {
  const blocks = new BlockList();
  for (const subnet of list.trim().split(/\s+/)) {
    const [network, bits] = subnet.split("/");
    blocks.addSubnet(network, Number(bits), isIPv4(network) ? "ipv4" : "ipv6");
  }
  return blocks;
}

/** Whether it is an address of the open internet, and a port of the web: others have other things than pictures. */
export function isPublic(address: string, port: number): boolean {
  if (port !== 80 && port !== 443) return false;
  if (isIPv4(address)) return !SPECIAL.check(address, "ipv4");
  return GIVEN_OUT.check(address, "ipv6") && !SPECIAL.check(address, "ipv6");
}

/** A reason that the client may read; fetchImage adds where in the request the picture stands. */
class Refusal extends Error {
  readonly code: string;

  constructor(code: string, message: string, cause?: unknown) {
    super(message, { cause });
    this.code = code;
  }
}

/**
 * The bytes behind an http(s) URL. Throws ApiError 400 whose message begins with `where`, and the signal's reason when
 * it is aborted. No error tells whether a name or an address that is not allowed exists.
 */
export async function fetchImage(
  url: string,
  where: string,
  policy: ImageUrls,
  signal: AbortSignal,
  test: Partial<Means> = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const means: Means = { ...(policy === "any" ? ANY : PUBLIC), ...COMMON, ...test };
  const clock = AbortSignal.timeout(means.time);
  const end = AbortSignal.any([signal, clock]);
  try {
    if (policy === "off") throw new Refusal("image_url_refused", "pictures must be data: URLs here");
    // A look-up cannot be aborted, so it is not waited for.
    return await untilAborted(follow(parse(url), means, end), end);
  } catch (cause) {
    signal.throwIfAborted();
    const why = clock.aborted ? "took too long" : "failed";
    const { message, code } =
      cause instanceof Refusal ? cause : new Refusal("image_fetch_failed", `fetching the picture ${why}`);
    throw new ApiError(400, `${where}: ${message}`, { code, param: where, cause });
  }
}

async function follow(url: URL, means: Means, signal: AbortSignal): Promise<Uint8Array<ArrayBuffer>> {
  for (let hops = 0; hops <= means.redirects; hops++) {
    const addresses = await addressesOf(url, means);
    signal.throwIfAborted();
    const response = await get(url, addresses, means.silence, signal);
    try {
      const location = redirectOf(response);
      if (location === undefined) return await read(response, means.bytes);
      url = parse(location, url);
    } finally {
      response.destroy();
    }
  }
  throw new Refusal("image_fetch_failed", `the URL redirects more than ${means.redirects} times`);
}

/** A URL that may be fetched, as far as the URL itself tells; `from` is the one that redirects to it. */
function parse(text: string, from?: URL): URL {
  const url = URL.parse(text, from?.href);
  if (!url || !/^https?:$/.test(url.protocol))
    throw new Refusal("invalid_image_url", "must be a data:, http: or https: URL, and redirect to no other");
  if (url.username !== "" || url.password !== "")
    throw new Refusal("invalid_image_url", "the URL must have no user name and no password");
  // Who names an https: URL counts on nobody on the way seeing or changing the picture.
  if (from?.protocol === "https:" && url.protocol === "http:")
    throw new Refusal("image_url_refused", "the URL redirects from https: to http:");
  return url;
}

/** The addresses to connect to: looked up once, and all of them allowed. */
async function addressesOf(url: URL, { isAllowed, resolve, refusal }: Means): Promise<LookupAddress[]> {
  const refuse = (cause?: unknown) => new Refusal("image_url_refused", refusal, cause);
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const port = Number(url.port) || (url.protocol === "https:" ? 443 : 80);
  const family = isIP(host);
  const lookUp = () => resolve(host).catch((cause) => Promise.reject(refuse(cause)));
  const addresses = family > 0 ? [{ address: host, family }] : await lookUp();
  if (addresses.length === 0 || !addresses.every(({ address }) => isAllowed(address, port))) throw refuse();
  return addresses;
}

/** The head of the answer to a GET from one of these addresses, whatever the name means by now. */
function get(url: URL, addresses: LookupAddress[], silence: number, signal: AbortSignal): Promise<IncomingMessage> {
  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
  const request = (url.protocol === "https:" ? httpsRequest : httpRequest)(url, {
    agent: false,
    lookup: (_host, { all }, done) =>
      all ? done(null, addresses) : done(null, addresses[0].address, addresses[0].family),
    // Even where the environment turns it off for others.
    rejectUnauthorized: true,
    timeout: silence,
    signal,
    headers: { accept: "image/*", "accept-encoding": "identity", "user-agent": "vispec" },
  });
  request.once("timeout", () => request.destroy(new Error("nothing came through the connection")));
  // A connection that is closed without an answer and without an error: one that the server wants to upgrade.
  request.once("close", () => reject(new Error("the connection was closed")));
  request.once("response", resolve).on("error", reject).end();
  return promise;
}

function redirectOf({ statusCode, headers }: IncomingMessage): string | undefined {
  return [301, 302, 303, 307, 308].includes(statusCode!) ? headers.location : undefined;
}

async function read(response: IncomingMessage, limit: number): Promise<Uint8Array<ArrayBuffer>> {
  const { "content-encoding": encoding = "identity", "content-length": length = "0" } = response.headers;
  const tooLarge = () => new Refusal("image_too_large", `the picture is larger than ${limit / 2 ** 20} MiB`);
  if (response.statusCode !== 200)
    throw new Refusal("image_fetch_failed", `the picture's server answered ${response.statusCode}`);
  // A small body could unfold to a huge one.
  if (encoding !== "identity") throw new Refusal("image_fetch_failed", "the picture's server sent it compressed");
  if (Number(length) > limit) throw tooLarge();
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of response) {
    size += chunk.length;
    if (size > limit) throw tooLarge();
    chunks.push(chunk);
  }
  return new Uint8Array(Buffer.concat(chunks));
}
