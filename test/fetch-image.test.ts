/** Pictures by URL, from servers on loopback: what is fetched, and the tricks that must not reach our network. */
import { createServer, type IncomingMessage, type RequestListener, type Server } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import { setDefaultCACertificates } from "node:tls";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import { fetchImage, type ImageUrls, isPublic } from "../gpu-worker/service/fetch-image.ts";
import type { ApiError } from "../shared/errors.ts";

const WHERE = "messages[0].content[1]";
const PICTURE = Uint8Array.from({ length: 70_000 }, (_, i) => i % 251);

// A certificate for 127.0.0.1 that only this test trusts, from 2020 to 2120.
const pem = (label: string, base64: string) => `-----BEGIN ${label}-----\n${base64}\n-----END ${label}-----\n`;
const CERTIFICATE = pem("CERTIFICATE", "MIIBTTCB9aADAgECAgEBMAoGCCqGSM49BAMCMBYxFDASBgNVBAMMC3Zpc3BlYy10ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAWMRQwEgYDVQQDDAt2aXNwZWMtdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHwOsBW1HkPJniXRjl+NZqrQPFAdnDd3W/qKWgFlItN+cm2xQbhli0PVBGgbbSPgkvDSKyt+jw1KB6b5y34c38ajMjAwMA8GA1UdEQQIMAaHBH8AAAEwHQYDVR0OBBYEFFkldICKfB1Qh59NSQloIk19MjRKMAoGCCqGSM49BAMCA0cAMEQCICTrvwtgF8iC6nvC0f+FVqANoe76ZazjjaVAYl5zYb6XAiB0Ss1/KYzXUoIWKpjFvv5/htkYX3d/aXeJ4xim//yhGQ=="); // biome-ignore format: one line
const KEY = pem("PRIVATE KEY", "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg10slhAYF/WiG9+id0nRWjuk6V6ilxxjyFOrFEEL7FI2hRANCAAR8DrAVtR5DyZ4l0Y5fjWaq0DxQHZw3d1v6iloBZSLTfnJtsUG4ZYtD1QRoG20j4JLw0isrfo8NSgem+ct+HN/G"); // biome-ignore format: one line

/** A server on every address of this machine, which counts who connects. */
class Site {
  readonly server: Server;
  connections = 0;
  requests: IncomingMessage[] = [];
  answer: RequestListener = (_, response) => response.end(PICTURE);

  constructor(server: Server = createServer()) {
    this.server = server.on("connection", () => this.connections++);
    server.on("request", (request, response) => {
      this.requests.push(request);
      this.answer(request, response);
    });
  }

  get port(): number {
    return (this.server.address() as AddressInfo).port;
  }

  start = () => new Promise<void>((resolve) => this.server.listen(0, resolve));

  stop(): void {
    this.server.close();
    this.server.closeAllConnections();
  }
}

const [site, inside] = [new Site(), new Site()];
const secure = new Site(createTlsServer({ cert: CERTIFICATE, key: KEY }));
const sites = [site, inside, secure];
beforeAll(() => Promise.all(sites.map((one) => one.start())));
afterAll(() => {
  for (const one of sites) one.stop();
});
afterEach(() => {
  for (const one of sites) Object.assign(one, { connections: 0, requests: [], answer: new Site().answer });
});

type Means = Parameters<typeof fetchImage>[4];
const forever = new AbortController().signal;
const fetchIt = (url: string, policy: ImageUrls = "any", means?: Means, signal = forever) =>
  fetchImage(url, WHERE, policy, signal, means);
const at = (path: string, { port } = site) => `http://127.0.0.1:${port}${path}`;

/** The error of a fetch that has to fail in the one way in which these fail. */
async function failure(fetched: Promise<unknown>): Promise<ApiError> {
  const error = await fetched.then(
    () => expect.unreachable("it was fetched"),
    (thrown) => thrown,
  );
  expect(error).toMatchObject({ name: "ApiError", status: 400, param: WHERE });
  expect(error.message.startsWith(`${WHERE}: `)).toBe(true);
  return error;
}

/** Lets the site answer so; resolves when a connection is closed. */
function watch(answer: RequestListener): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  site.answer = (request, response) => {
    request.socket.once("close", () => resolve());
    answer(request, response);
  };
  return promise;
}

test("a picture is fetched whole, with nothing in the request that says who asks", async () => {
  expect(await fetchIt(at("/a.png?b=c#d"))).toEqual(PICTURE);
  expect(site.requests[0].url).toBe("/a.png?b=c");
  const names = site.requests[0].rawHeaders.filter((_, i) => i % 2 === 0).map((name) => name.toLowerCase());
  expect(names.sort()).toEqual(["accept", "accept-encoding", "connection", "host", "user-agent"]);
  expect(site.requests[0].headers).toMatchObject({ connection: "close", "accept-encoding": "identity" });
});

test("redirects are followed three times, to names and paths, and take no cookie along", async () => {
  site.answer = ({ url }, response) => {
    const next = { "/": "/1", "/1": `//localhost:${site.port}/2`, "/2": at("/3") }[url!];
    if (!next) return response.end(PICTURE);
    response.writeHead(302 + (url!.length % 2), { location: next, "set-cookie": "a=b" }).end("moved");
  };
  expect(await fetchIt(at("/"))).toEqual(PICTURE);
  expect(site.requests.map(({ url }) => url)).toEqual(["/", "/1", "/2", "/3"]);
  expect(site.requests.some(({ headers }) => headers.cookie)).toBe(false);
  expect(site.requests[2].headers.host).toBe(`localhost:${site.port}`);
});

const answers: [string, string, RegExp, RequestListener][] = [
  ["redirects for ever", "image_fetch_failed", /redirects more than 3 times$/, (_, r) => r.writeHead(307, { location: "/" }).end()],
  ["redirects nowhere", "image_fetch_failed", /answered 302$/, (_, r) => r.writeHead(302).end()],
  ["redirects to what is no URL", "invalid_image_url", /http/, (_, r) => r.writeHead(301, { location: "http://" }).end()],
  ["says that it is too large", "image_too_large", /larger than 0.125 MiB$/, (_, r) => r.writeHead(200, { "content-length": 2 ** 17 + 1 }).flushHeaders()],
  ["is too large, and does not say so", "image_too_large", /larger than 0.125 MiB$/, (_, r) => {
    r.write(new Uint8Array(2 ** 17));
    r.write("!");
  }],
  ["has nothing", "image_fetch_failed", /answered 404$/, (_, r) => r.writeHead(404).end(PICTURE)],
  ["has a part", "image_fetch_failed", /answered 206$/, (_, r) => r.writeHead(206).end(PICTURE)],
  ["compresses", "image_fetch_failed", /compressed$/, (_, r) => r.writeHead(200, { "content-encoding": "gzip" }).end(PICTURE)],
  ["breaks off", "image_fetch_failed", /failed$/, (_, r) => {
    r.writeHead(200, { "content-length": 100 }).write("half");
    setImmediate(() => r.destroy());
  }],
  ["hangs up", "image_fetch_failed", /failed$/, (_, r) => r.destroy()],
  ["speaks no HTTP", "image_fetch_failed", /failed$/, (_, r) => r.socket!.end("220 mail.example ESMTP\r\n")],
  ["switches protocols", "image_fetch_failed", /failed$/, (_, r) => r.socket!.end("HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")],
]; // biome-ignore format: a table
test.each(answers)("a server that %s: %s", async (_, code, message, answer) => {
  const left = watch(answer);
  const error = await failure(fetchIt(at("/"), "any", { bytes: 2 ** 17, time: 60_000, silence: 60_000 }));
  expect(error).toMatchObject({ code, message: expect.stringMatching(message) });
  await left;
});

test("a picture of just the most bytes is fetched", async () => {
  expect(await fetchIt(at("/"), "any", { bytes: PICTURE.length })).toEqual(PICTURE);
});

test("a port where nobody listens is a failure to connect", async () => {
  const gone = new Site();
  await gone.start();
  const url = at("/", gone);
  await new Promise((resolve) => gone.server.close(resolve));
  expect(await failure(fetchIt(url))).toMatchObject({ code: "image_fetch_failed", message: `${WHERE}: fetching the picture failed` }); // biome-ignore format: one line
});

test.each<[string, Means, RegExp, RequestListener]>([
  ["never answers", { time: 50 }, /took too long$/, () => {}],
  ["never answers", { silence: 50 }, /failed$/, () => {}],
  ["stops in the middle", { silence: 50 }, /failed$/, (_, response) => void response.write("half")],
  ["sends a byte now and then", { time: 100, silence: 10_000 }, /took too long$/, (_, response) => {
    const timer = setInterval(() => response.write("."), 5);
    response.on("close", () => clearInterval(timer));
  }],
  ["redirects slowly for ever", { time: 100, redirects: 1e9 }, /took too long$/, (_, response) => {
    setTimeout(() => response.writeHead(302, { location: "/" }).end(), 5);
  }],
])("a server that %s is left, with limits of %j", async (_, means, message, answer) => {
  const left = watch(answer);
  expect(await failure(fetchIt(at("/"), "any", means))).toMatchObject({ code: "image_fetch_failed", message: expect.stringMatching(message) }); // biome-ignore format: one line
  await left;
}); // biome-ignore format: a table

test("a name server that never answers is not waited for", async () => {
  const means = { time: 50, resolve: () => new Promise<never>(() => {}) };
  expect((await failure(fetchIt("http://slow.example/", "public", means))).message).toMatch(/took too long$/);
});

test("a caller's abort rejects with its reason and leaves the server", async () => {
  const reason = new Error("the client went away");
  const never = { resolve: () => new Promise<never>(() => {}), time: 60_000 };
  await expect(fetchIt("http://slow.example/", "any", never, AbortSignal.abort(reason))).rejects.toBe(reason);
  for (const begin of [false, true]) {
    const controller = new AbortController();
    const left = watch((_, response) => {
      if (begin) response.write("half");
      setTimeout(() => controller.abort(reason), 5);
    });
    await expect(fetchIt(at("/"), "any", {}, controller.signal)).rejects.toBe(reason);
    await left;
  }
  const controller = new AbortController();
  const slow = async () => {
    controller.abort(reason);
    return families(["127.0.0.1"]);
  };
  Object.assign(site, { connections: 0, answer: new Site().answer });
  const url = `http://slow.example:${site.port}/`;
  await expect(fetchIt(url, "any", { resolve: slow }, controller.signal)).rejects.toBe(reason);
  await fetchIt(at("/"));
  expect(site.connections).toBe(1);
});

test("certificates are checked, whatever the environment says, and https: does not redirect to http:", async () => {
  const url = `https://127.0.0.1:${secure.port}/`;
  process.env.NODE_TLS_REJECT_UNAUTHORIZED = "0";
  const error = await failure(fetchIt(url));
  delete process.env.NODE_TLS_REJECT_UNAUTHORIZED;
  expect(error).toMatchObject({ code: "image_fetch_failed", cause: { code: "DEPTH_ZERO_SELF_SIGNED_CERT" } });
  setDefaultCACertificates([CERTIFICATE]);
  expect(await fetchIt(url)).toEqual(PICTURE);
  expect((await failure(fetchIt(url.replace("127.0.0.1", "localhost")))).code).toBe("image_fetch_failed");
  secure.answer = (_, response) => response.writeHead(302, { location: at("/") }).end();
  expect(await failure(fetchIt(url))).toMatchObject({ code: "image_url_refused" });
  expect(site.connections).toBe(0);
});

test("where URLs are off, pictures must be data: URLs, and nothing is looked up", async () => {
  const error = await failure(fetchIt(at("/"), "off", { resolve: () => expect.unreachable("looked up") }));
  expect(error).toMatchObject({ code: "image_url_refused", message: `${WHERE}: pictures must be data: URLs here` });
  expect(site.connections).toBe(0);
});

// First and last addresses of each network that is not public, and their neighbours.
const closed = [
  "0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.0 127.0.0.1 127.255.255.255",
  "169.254.0.0 169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.255 192.0.2.0 192.0.2.255 192.88.99.0 192.88.99.255",
  "192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255 198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255",
  "224.0.0.0 239.255.255.255 240.0.0.0 255.255.255.255 :: ::1 ::7f00:1 ::ffff:8.8.8.8 ::ffff:127.0.0.1 64:ff9b::7f00:1",
  "64:ff9b::808:808 64:ff9b:1::1 100::1 1fff:ffff:: 2001:: 2001:0:7f00:1:: 2001:10::1 2001:20::1 2001:1ff:ffff:: ",
  "2001:db8:: 2001:db8:ffff:: 2002:: 2002:7f00:1:: 2002:ffff:: 3fff:: 3fff:fff:: 4000:: 5f00::1 fc00::1 fd00:ec2::254",
  // Clouds' metadata: that of AWS, Google and Azure, Alibaba's, Oracle's, and Azure's other one.
  "169.254.169.254 100.100.100.200 192.0.0.192 168.63.129.16",
  "fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1 localhost",
].flatMap((line) => line.trim().split(" ")); // biome-ignore format: a table
const open = [
  "1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255",
  "169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.88.98.255 192.88.100.0 192.167.255.255",
  "192.169.0.0 168.63.129.15 168.63.129.17 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255",
  "2000:: 2001:200:: 2001:db7:ffff:: 2001:db9:: 2001:ffff:: 2003:: 2606:4700:4700::1111 3ffe:ffff:: 3fff:1000::",
].flatMap((line) => line.split(" "));
test("public are the addresses that are given out for the open internet, on the web's two ports", () => {
  expect(closed.filter((address) => isPublic(address, 443))).toEqual([]);
  expect(open.filter((address) => !isPublic(address, 80))).toEqual([]);
  expect([21, 22, 25, 6379, 8080, 65535].filter((port) => isPublic("8.8.8.8", port))).toEqual([]);
});

const NAMES: Record<string, string[]> = {
  "loopback.example": ["127.0.0.1"],
  "six.example": ["::1"],
  "mapped.example": ["::ffff:127.0.0.1"],
  "zone.example": ["fe80::1%lo"],
  "mixed.example": ["93.184.215.14", "127.0.0.1"],
  "mixed6.example": ["2606:4700::1", "::1"],
  "empty.example": [],
};
const families = (addresses: string[]) => addresses.map((address) => ({ address, family: address.includes(":") ? 6 : 4 })); // biome-ignore format: one line
async function resolve(name: string) {
  if (NAMES[name]) return families(NAMES[name]);
  throw Object.assign(new Error(`getaddrinfo ENOTFOUND ${name}`), { code: "ENOTFOUND" });
}

// PORT is a server's on loopback. Ports are not looked at here, so that it is the address that is refused.
const anyPort = (address: string) => isPublic(address, 80);
const ADDRESSES = `
  http://127.0.0.1:PORT http://2130706433:PORT http://0x7f000001:PORT http://0x7F.1:PORT http://0177.0.0.1:PORT
  http://017700000001:PORT http://127.1:PORT http://127.0.1:PORT http://127.0.0.1.:PORT http://127.255.255.254:PORT
  http://0.0.0.0:PORT http://0:PORT http://[::1]:PORT http://[::]:PORT http://[0:0:0:0:0:0:0:1]:PORT
  http://[::127.0.0.1]:PORT http://[::ffff:127.0.0.1]:PORT http://[::ffff:7f00:1]:PORT http://[0:0:0:0:0:ffff:7f00:0001]:PORT
  http://[::ffff:0:127.0.0.1]:PORT http://[64:ff9b::7f00:1]:PORT http://[64:ff9b::127.0.0.1]:PORT http://[2002:7f00:1::]:PORT
  http://[2001:0:7f00:1::]:PORT http://[fe80::1]:PORT http://[fd00:ec2::254] http://169.254.169.254/latest/meta-data
  http://2852039166 http://0xa9fea9fe http://0251.0376.0251.0376 http://[::ffff:169.254.169.254] http://100.100.100.200
  http://10.0.0.1 http://192.168.1.1 http://172.16.0.1 http://255.255.255.255 http://224.0.0.1 http://192.0.0.192
  http:127.0.0.1:PORT http:/127.0.0.1:PORT http:///127.0.0.1:PORT http:\\\\127.0.0.1:PORT http:/\\127.0.0.1:PORT
  HTTP://127.0.0.1:PORT hTTps://127.0.0.1:PORT http://127.0.0.1:PORT\\@8.8.8.8/ http://127.0.0.1:PORT#@8.8.8.8/
  http://127.0.0.1:PORT?@8.8.8.8/ http://@127.0.0.1:PORT http://:@127.0.0.1:PORT http://127.0.0.1:0PORT
  http://１２７．０．０．１:PORT http://①②⑦.⓪.⓪.①:PORT http://127。0。0。1:PORT http://127｡0｡0｡1:PORT
  http://%31%32%37.0.0.1:PORT http://127%2e0%2e0%2e1:PORT http://%30x7f.1:PORT http://１２７.0x0.00.①:PORT
  http://loopback.example:PORT http://LOOPBACK.example:PORT http://ｌoopback。example:PORT http://loop%62ack.example:PORT
  http://loopback.example.:PORT http://six.example:PORT http://mapped.example:PORT http://zone.example:PORT
  http://mixed.example:PORT http://mixed6.example:PORT http://empty.example:PORT http://missing.example:PORT
  http://8.8.8.8.loopback.example:PORT http://localhost:PORT`.trim().split(/\s+/); // biome-ignore format: a table
const MALFORMED = `
  http://user:pass@127.0.0.1:PORT http://user@127.0.0.1:PORT http://:pass@127.0.0.1:PORT http://8.8.8.8@127.0.0.1:PORT
  http://8.8.8.8%40:x@127.0.0.1:PORT http://8.8.8.8:80@127.0.0.1:PORT/.. file:///etc/passwd file://127.0.0.1/x
  gopher://127.0.0.1:PORT/_x ftp://127.0.0.1:PORT/x dict://127.0.0.1:PORT/ ldap://127.0.0.1:PORT/ ws://127.0.0.1:PORT
  javascript:fetch("http://127.0.0.1:PORT") data:text/html,http://127.0.0.1:PORT blob:http://127.0.0.1:PORT/1
  view-source:http://127.0.0.1:PORT jar:http://127.0.0.1:PORT!/ about:blank //127.0.0.1:PORT /x 127.0.0.1:PORT http
  http: http:// http://[::1 http://[::1%25lo]:PORT http://[fe80::1%lo]:PORT http://127.0.0.1:99999 http://127.0.0.1:-1
  http://127.0.0.256:PORT http://127.0.0.0x1g.1:PORT http://1.2.3.4.5:PORT http://a%00b:PORT http://127.0.0.1%00.example:PORT
  http://127.0.0.1%23.example:PORT http://127.0.0.1%2f.example:PORT http://[::ffff:127.0.0.1.]:PORT`.trim().split(/\s+/); // biome-ignore format: a table

test("every URL that leads into our network is refused in the same words, and nobody connects", async () => {
  const refused = new Set<string>();
  for (const url of ADDRESSES) {
    const means = { isAllowed: anyPort, resolve, time: 2000 };
    const error = await failure(fetchIt(url.replaceAll("PORT", `${inside.port}`), "public", means));
    expect([url, error.code]).toEqual([url, "image_url_refused"]);
    refused.add(error.message);
  }
  expect(inside.connections).toBe(0);
  expect([...refused]).toEqual([`${WHERE}: the URL leads to no public address on port 80 or 443`]);
});

test("what is no URL of the web, or has a password, is refused before anything is looked up", async () => {
  for (const url of MALFORMED) {
    const means = { isAllowed: () => true, resolve: () => expect.unreachable("looked up") };
    const error = await failure(fetchIt(url.replaceAll("PORT", `${inside.port}`), "public", means));
    expect([url, error.code]).toEqual([url, "invalid_image_url"]);
  }
  expect(inside.connections).toBe(0);
});

test("the system's own names for this machine are refused", async () => {
  for (const name of ["localhost", "localhost.", "LOCALHOST", "ｌｏｃａｌｈｏｓｔ", "%6cocalhost"]) {
    const error = await failure(fetchIt(`http://${name}:${inside.port}`, "public", { isAllowed: anyPort }));
    expect([name, error.code]).toEqual([name, "image_url_refused"]);
  }
  expect(inside.connections).toBe(0);
});

test("other ports than the web's are refused on public addresses too", async () => {
  for (const port of [22, 25, 6379, 8080]) {
    const error = await failure(fetchIt(`http://8.8.8.8:${port}/`, "public"));
    expect(error.code).toBe("image_url_refused");
  }
});

test("a name is looked up once a hop, so that a changed answer changes nothing", async () => {
  // Here 127.0.0.1 plays the public address, and ::1 the one inside.
  let lookups = 0;
  const changing = async () => families(lookups++ === 0 ? ["127.0.0.1"] : ["::1"]);
  const means = { isAllowed: (address: string) => address === "127.0.0.1", resolve: changing };
  expect(await fetchIt(`http://changing.example:${site.port}/`, "public", means)).toEqual(PICTURE);
  expect(lookups).toBe(1);
  lookups = 0;
  site.answer = (_, response) => response.writeHead(302, { location: "/again" }).end();
  const error = await failure(fetchIt(`http://changing.example:${site.port}/`, "public", means));
  expect(error.code).toBe("image_url_refused");
  expect([lookups, site.requests.length]).toEqual([2, 2]);
});

test("an allowed server redirects into our network, and nobody follows", async () => {
  const means = { resolve, isAllowed: (address: string, port: number) => port === site.port || anyPort(address) };
  // Some are paths on the same server, where a URL is relative to one of its own scheme.
  const targets = [...ADDRESSES, ...MALFORMED]
    .map((target) => target.replaceAll("PORT", `${inside.port}`))
    .filter((target) => URL.parse(target, at("/"))?.port !== `${site.port}`);
  expect(targets.length).toBeGreaterThan(90);
  for (const target of targets) {
    site.answer = (_, response) => response.socket!.end(`HTTP/1.1 302 Found\r\nLocation: ${target}\r\n\r\n`);
    const error = await failure(fetchIt(at("/"), "public", means));
    expect([target, error.code]).toEqual([target, expect.stringMatching(/^(image_url_refused|invalid_image_url)$/)]);
  }
  expect(site.connections).toBe(targets.length);
  expect(inside.connections).toBe(0);
});
