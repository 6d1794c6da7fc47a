/** `vispec cuda`: the CUDA provider comes whole and of the right version, or nothing changes. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { cudaCommand, installProvider } from "../gpu-worker/cli/cuda.ts";
import { Faults, listen } from "./support/hub-server.ts";

const require = createRequire(import.meta.url);
const AdmZip = createRequire(require.resolve("onnxruntime-node/package.json"))("adm-zip");

const VERSION = "1.29.0";
const PATH = `/microsoft.ml.onnxruntime.gpu.linux/${VERSION}/microsoft.ml.onnxruntime.gpu.linux.${VERSION}.nupkg`;
const SHARED = "libonnxruntime_providers_shared.so";
const PROVIDER = "libonnxruntime_providers_cuda.so";

/** What stands in for the provider: bytes that do not pack, its version across the border of two reads. */
function provider(version = VERSION, cuda = 13): Buffer {
  const words = new Uint32Array(300_000);
  for (let i = 0, state = 1; i < words.length; i++) words[i] = state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  const bytes = Buffer.from(words.buffer);
  bytes.write(`\0libcublasLt.so.${cuda}\0libcudart.so.${cuda}\0`, 500, "latin1");
  bytes.write(`\0${version}\0`, (1 << 20) - 4, "latin1");
  return bytes;
}

function nupkg(files: Record<string, Buffer>): Buffer {
  const zip = new AdmZip();
  zip.addFile("Microsoft.ML.OnnxRuntime.Gpu.Linux.nuspec", Buffer.from("<package/>"));
  for (const [name, bytes] of Object.entries(files)) zip.addFile(`runtimes/linux-x64/native/${name}`, bytes);
  // One is stored, the other packed.
  zip.getEntry(`runtimes/linux-x64/native/${SHARED}`).header.method = 0;
  zip.addZipComment("a comment");
  return zip.toBuffer();
}

const shared = Buffer.from("shared");
const whole = nupkg({ [SHARED]: shared, [PROVIDER]: provider() });

let scratch: string;
let folder: string;
let served: Buffer;
let faults: Faults;
let server: Awaited<ReturnType<typeof listen>>;
beforeEach(async () => {
  scratch = mkdtempSync(join(tmpdir(), "vispec-"));
  folder = join(scratch, "x64");
  mkdirSync(folder);
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
  vi.spyOn(console, "error").mockReturnValue();
  served = whole;
  faults = new Faults();
  server = await listen(
    faults.wrap((request, response) => {
      if (request.url !== PATH) return response.writeHead(404).end();
      const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
      const range = { "content-range": `bytes ${from}-${served.length - 1}/${served.length}` };
      const headers = { "content-length": served.length - from, ...(from > 0 && range) };
      response.writeHead(from > 0 ? 206 : 200, headers).end(served.subarray(from));
    }),
  );
});
afterEach(async () => {
  await server.close();
  rmSync(scratch, { recursive: true });
  vi.restoreAllMocks();
});

const install = (from = server.url, signal = new AbortController().signal) =>
  installProvider({ folder, version: VERSION, from }, signal);

function expectInstalled(): void {
  expect(readdirSync(folder).sort()).toEqual([PROVIDER, SHARED]);
  expect(readFileSync(join(folder, PROVIDER)).equals(provider())).toBe(true);
  expect(readFileSync(join(folder, SHARED)).equals(shared)).toBe(true);
}

test("both files come out of the package of the installed version, at NuGet's address", async () => {
  expect(await install(`${server.url}/`)).toEqual({ cuda: "13", wasThere: false });
  expectInstalled();
  expect(faults.log.map(({ path }) => path)).toEqual([PATH]);
});

test("a .nupkg's own address will do", async () => {
  await install(server.url + PATH);
  expectInstalled();
});

test("what is there is not fetched again, unless it is of another version", async () => {
  await install();
  expect(await install("http://127.0.0.1:1")).toEqual({ cuda: "13", wasThere: true });
  writeFileSync(join(folder, PROVIDER), provider("1.28.0"));
  expect((await install()).wasThere).toBe(false);
  expectInstalled();
});

test("a connection that breaks is taken up where it broke", async () => {
  faults.cutAfter(400_000);
  await install();
  expectInstalled();
  expect(faults.log.length).toBeGreaterThan(2);
  expect(faults.log[1].range).toMatch(/^bytes=[1-9]\d*-$/);
});

const damaged = Buffer.from(whole);
damaged[whole.indexOf(PROVIDER) + 5000] ^= 1;
test.each([
  ["is not there", () => faults.answerNext(404), /1\.29\.0\.nupkg: the server answers 404/],
  ["is damaged", () => (served = damaged), /1\.29\.0\.nupkg: runtimes.*_cuda\.so is damaged/],
  ["is no package", () => (served = Buffer.from("<html>".repeat(50))), /1\.29\.0\.nupkg: it is no zip archive/],
  ["lacks the provider", () => (served = nupkg({ [SHARED]: shared })), /nupkg: it has no runtimes.*_cuda\.so/],
  [
    "is of another version",
    () => (served = nupkg({ [SHARED]: shared, [PROVIDER]: provider("1.28.0") })),
    /is not the CUDA provider of ONNX Runtime 1\.29\.0/,
  ],
])("a package that %s changes nothing", async (_, fault, message) => {
  fault();
  await expect(install()).rejects.toMatchObject({ name: "StoreError", message: expect.stringMatching(message) });
  expect(readdirSync(folder)).toEqual([]);
});

test("a server that cannot be reached is named, with the way around it", async () => {
  await server.close();
  const message = new RegExp(`^${server.url}${PATH} cannot be read.*ECONNREFUSED.*--from takes a mirror`);
  await expect(install()).rejects.toThrow(message);
  expect(readdirSync(folder)).toEqual([]);
});

test("an interrupted download leaves nothing", async () => {
  const controller = new AbortController();
  faults.cutAfter(400_000);
  vi.mocked(process.stderr.write).mockImplementation(() => {
    controller.abort();
    return true;
  });
  await expect(install(server.url, controller.signal)).rejects.toThrow(/abort/);
  expect(readdirSync(folder)).toEqual([]);
});

test("a folder with both files will do; one that lacks a file is refused by the file's name", async () => {
  const from = join(scratch, "from");
  mkdirSync(from);
  writeFileSync(join(from, SHARED), shared);
  await expect(install(from)).rejects.toMatchObject({ name: "UsageError", message: expect.stringContaining(PROVIDER) });
  writeFileSync(join(from, PROVIDER), provider(VERSION, 12));
  expect(await install(from)).toEqual({ cuda: "12", wasThere: false });
});

test("a flag that the command does not have is a mistake of usage", async () => {
  await expect(cudaCommand(["--to", folder], new AbortController().signal)).rejects.toThrow(/--to/);
});
