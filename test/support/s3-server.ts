/** An S3 server in this process, on loopback: the emulator fauxqs with faults in front of it. */
import type { RequestListener } from "node:http";
import { buildApp } from "fauxqs";
import { Faults } from "./hub-server.ts";

/**
 * A server with one empty bucket. `env` holds the AWS_* variables that lead the SDK to it, for process.env or a child's
 * environment; the user's own profiles are left out. The emulator checks no signatures and refuses bodies over 11 MiB,
 * so parts have to be smaller.
 */
export async function startS3() {
  const bucket = "checkpoints";
  const faults = new Faults();
  // `startFauxqs` would listen on every address of the machine.
  const app = buildApp({ logger: false });
  await app.ready();
  const [listener] = app.server.listeners("request") as RequestListener[];
  app.server.removeAllListeners("request").on("request", faults.wrap(listener));
  const endpoint = await app.listen({ port: 0, host: "127.0.0.1" });
  await fetch(`${endpoint}/${bucket}`, { method: "PUT" });
  faults.log.length = 0;
  return {
    endpoint,
    bucket,
    env: {
      AWS_ENDPOINT_URL: endpoint,
      AWS_REGION: "us-east-1",
      AWS_ACCESS_KEY_ID: "test",
      AWS_SECRET_ACCESS_KEY: "secret-of-the-test",
      AWS_CONFIG_FILE: "/dev/null",
      AWS_SHARED_CREDENTIALS_FILE: "/dev/null",
      AWS_EC2_METADATA_DISABLED: "true",
    } as Record<string, string>,
    log: faults.log,
    cutAfter: (bytes: number | null) => faults.cutAfter(bytes),
    answerNext: faults.answerNext.bind(faults),
    close: async () => {
      await app.close();
    },
  };
}
