/** `vispec cuda`: ONNX Runtime's CUDA provider, which npm's package has no room for, beside the library it belongs to. */
import { createReadStream, existsSync, mkdtempSync, renameSync, rmSync, statSync } from "node:fs";
import { copyFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { Progress } from "../progress.ts";
import { type Opened, Passing, resume } from "../store/resume.ts";
import { StoreError } from "../store/store.ts";
import { parseFlags, UsageError } from "./options.ts";
import { extract } from "./zip.ts";

const NUGET = "https://api.nuget.org/v3-flatcontainer";
const PACKAGE = "microsoft.ml.onnxruntime.gpu.linux";
const FOLDER_IN_PACKAGE = "runtimes/linux-x64/native";
const PROVIDER = "libonnxruntime_providers_cuda.so";
/** The provider last: where it is, the other is too. */
const FILES = ["libonnxruntime_providers_shared.so", PROVIDER];

export const CUDA_HELP = `vispec cuda [--from DIR|URL]
  Fetches ONNX Runtime's CUDA provider (Linux x64) from NuGet into node_modules, of exactly the version that is installed.
  DIR has ${FILES.join(" and ")}; URL is a .nupkg, or what a mirror has in the
  place of ${NUGET}. The machine needs an NVIDIA driver, cuDNN 9, and CUDA's libraries
  with NVRTC, of the major version that the command tells at its end (13 expected).`;

export interface ProviderOptions {
  /** Where libonnxruntime is. */
  folder: string;
  /** Of ONNX Runtime. */
  version: string;
  /** A folder, or a URL. */
  from?: string;
}

/** ONNX Runtime as npm installed it. */
function installed(): ProviderOptions {
  const require = createRequire(import.meta.url);
  const json = require.resolve("onnxruntime-node/package.json");
  return { folder: join(dirname(json), "bin", "napi-v6", "linux", "x64"), version: require(json).version };
}

/**
 * The major version of CUDA that a provider is built for.
 * @throws StoreError when it is not one of that version of ONNX Runtime. A library carries it as a string.
 */
async function cudaOf(path: string, version: string): Promise<string> {
  let cuda: string | undefined;
  let fits = false;
  let rest = "";
  for await (const chunk of createReadStream(path, { encoding: "latin1", highWaterMark: 1 << 20 })) {
    const text = rest + chunk;
    cuda ??= /\0libcublasLt\.so\.(\d+)\0/.exec(text)?.[1];
    fits ||= text.includes(`\0${version}\0`);
    if (cuda && fits) return cuda;
    rest = text.slice(-64);
  }
  throw new StoreError(`${path} is not the CUDA provider of ONNX Runtime ${version}, the installed one`);
}

/** Begins to read a URL at a byte. Throws StoreError where asking again would not help. */
async function openUrl(url: string, from: number, signal: AbortSignal): Promise<Opened> {
  const headers = { "accept-encoding": "identity", ...(from > 0 && { range: `bytes=${from}-` }) };
  const response = await fetch(url, { headers, signal });
  const { status, body } = response;
  const [, first = "0", size = response.headers.get("content-length")] =
    /^bytes (\d+)-\d+\/(\d+)$/.exec(response.headers.get("content-range") ?? "") ?? [];
  if (response.ok && body && size !== null && Number(first) === from) return { body, size: Number(size) };
  await body?.cancel();
  if (status === 429 || status >= 500) throw new Passing(`the server answers ${status}`);
  if (!response.ok) throw new StoreError(`${url}: the server answers ${status}`);
  throw new StoreError(`${url}: the server does not say how large it is, or sends other bytes than it was asked for`);
}

async function download(url: string, to: string, signal: AbortSignal): Promise<void> {
  let progress: Progress | undefined;
  async function* chunks() {
    const open = async (from: number) => {
      const opened = await openUrl(url, from, signal);
      progress ??= new Progress("cuda", opened.size);
      return opened;
    };
    for await (const chunk of resume(url, {}, open, signal)) {
      progress?.add(chunk.length);
      yield chunk;
    }
  }
  try {
    await writeFile(to, chunks(), { signal });
  } catch (error) {
    signal.throwIfAborted();
    if (!(error instanceof StoreError)) throw error;
    throw new StoreError(`${error.message}; --from takes a mirror, or a folder that has the files`, { cause: error });
  } finally {
    progress?.end();
  }
}

const packageUrl = (base: string, version: string) =>
  `${base.replace(/\/+$/, "")}/${PACKAGE}/${version}/${PACKAGE}.${version}.nupkg`;

/** Brings the files into the empty folder `to`. */
async function bring({ version, from = NUGET }: ProviderOptions, to: string, signal: AbortSignal): Promise<void> {
  if (/^https?:\/\//.test(from)) {
    const url = from.endsWith(".nupkg") ? from : packageUrl(from, version);
    console.error(`cuda fetches ${url}`);
    const archive = join(to, "nupkg");
    await download(url, archive, signal);
    for (const name of FILES)
      await extract(archive, `${FOLDER_IN_PACKAGE}/${name}`, join(to, name), signal).catch((error) => {
        signal.throwIfAborted();
        throw new StoreError(error.message.replace(archive, url), { cause: error });
      });
    return;
  }
  const missing = FILES.find((name) => !statSync(join(from, name), { throwIfNoEntry: false })?.isFile());
  if (missing) throw new UsageError(`--from ${from} is neither a URL nor a folder that has ${missing}`);
  for (const name of FILES) await copyFile(join(from, name), join(to, name));
}

/**
 * Puts the CUDA provider beside the library; both of its files, or none. Returns the major version of CUDA that it needs,
 * and whether it was there.
 * @throws StoreError when it cannot be had or is of another version; UsageError when `from` is no place.
 */
export async function installProvider(
  options: ProviderOptions,
  signal: AbortSignal,
): Promise<{ cuda: string; wasThere: boolean }> {
  const { folder, version } = options;
  if (FILES.every((name) => existsSync(join(folder, name)))) {
    const cuda = await cudaOf(join(folder, PROVIDER), version).catch(() => undefined);
    if (cuda) return { cuda, wasThere: true };
  }
  const partial = mkdtempSync(join(folder, "cuda-"));
  try {
    await bring(options, partial, signal);
    const cuda = await cudaOf(join(partial, PROVIDER), version);
    signal.throwIfAborted();
    for (const name of FILES) renameSync(join(partial, name), join(folder, name));
    return { cuda, wasThere: false };
  } finally {
    rmSync(partial, { recursive: true, force: true });
  }
}

/** Runs the command; what `signal` breaks off leaves nothing behind. */
export async function cudaCommand(args: string[], signal: AbortSignal): Promise<void> {
  const { from } = parseFlags(args, ["from"]) as { from?: string };
  if (process.platform !== "linux" || process.arch !== "x64")
    throw new UsageError(`ONNX Runtime's CUDA provider is for Linux x64, not for ${process.platform} ${process.arch}`);
  const runtime = installed();
  const { cuda, wasThere } = await installProvider({ ...runtime, from }, signal);
  console.log(`the CUDA provider of ONNX Runtime ${runtime.version} is ${wasThere ? "already " : ""}in ${runtime.folder}
it needs an NVIDIA driver for CUDA ${cuda}, CUDA ${cuda}'s libraries with NVRTC, and cuDNN 9, the libraries in LD_LIBRARY_PATH or
where the system's loader looks for them`);
}
