/** Edge, GPU worker and the engine in its own process, as `npm start` puts them together. */
import { type EngineProcess, startEngine } from "../../gpu-worker/engine-process.ts";
import { type ServerOptions, startServer } from "../../gpu-worker/service/server.ts";
import { startEdge } from "../../gpu-worker/start.ts";
import { MODEL } from "./goldens.ts";

export interface Stack extends AsyncDisposable {
  engine: EngineProcess;
  /** The edge's URL, and the GPU worker's. */
  url: string;
  workerUrl: string;
  /** What edge and worker share. */
  secret: string;
  close(): Promise<void>;
}

export interface StackOptions extends Partial<ServerOptions> {
  model?: string;
  hangTimeout?: number;
  concurrency?: number;
  apiKeys?: string;
}

export async function startStack({
  model = MODEL,
  hangTimeout,
  concurrency,
  apiKeys,
  ...options
}: StackOptions = {}): Promise<Stack> {
  const secret = "the stack's secret";
  const engine = await startEngine({ model, concurrency }, { hangTimeout, log: options.log });
  const server = await startServer(engine, { port: 0, host: "127.0.0.1", secret, ...options });
  const edge = await startEdge({ port: 0, upstream: server.url, secret, apiKeys });
  const close = async () => {
    await edge.close();
    await server.close();
    await engine.close();
  };
  return { engine, url: edge.url, workerUrl: server.url, secret, close, [Symbol.asyncDispose]: close };
}
