import { defineConfig } from "vitest/config";

/** What takes longer than npm test may is run by npm run test:long. */
const kind = process.env.LONG ? "long" : "test";

// Files run one after the other: several load the model, and the machine may have two cores.
export default defineConfig({
  test: { include: [`test/**/*.${kind}.ts`], fileParallelism: false, testTimeout: 60_000, hookTimeout: 60_000 },
});
