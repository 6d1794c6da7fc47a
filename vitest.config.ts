import { defineConfig } from "vitest/config";

/** What takes longer than npm test may is run by npm run test:long. */
const include = process.env.LONG ? ["test/**/*.long.ts", "test/bad-requests.test.ts"] : ["test/**/*.test.ts"];

// Files run one after the other: several load the model, and the machine may have two cores.
export default defineConfig({
  test: { include, fileParallelism: false, testTimeout: 60_000, hookTimeout: 60_000 },
});
