/** Edge, GPU worker and the engine in its own process, as `npm start` puts them together. */
import type { Engine } from "../../gpu-worker/engine.ts";
import { startEngine } from "../../gpu-worker/engine-process.ts";
import { startServer } from "../../gpu-worker/server.ts";
import { startEdge } from "../../gpu-worker/start.ts";
import { MODEL } from "./goldens.ts";

export interface Stack extends AsyncDisposable {
  engine: Engine;
  /** The edge's URL, and the GPU worker's. */
  url: string;
  workerUrl: string;
  close(): Promise<void>;
}

export async function startStack(model = MODEL): Promise<Stack> {
  const engine = await startEngine({ model });
  const server = await startServer(engine, { port: 0, host: "127.0.0.1" });
  const edge = await startEdge({ port: 0, upstream: server.url });
  const close = async () => {
    await edge.close();
    await server.close();
    await engine.close();
  };
  return { engine, url: edge.url, workerUrl: server.url, close, [Symbol.asyncDispose]: close };
}
