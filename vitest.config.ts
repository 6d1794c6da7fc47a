import { defineConfig } from "vitest/config";

/** What takes longer than npm test may is run by npm run test:long, and files that do more there. */
const more = ["bad-requests", "goldens", "service", "start"].map((name) => `test/${name}.test.ts`);
const long = ["test/**/*.long.ts", ...more];
const include = process.env.LONG ? long : ["test/**/*.test.ts"];

// Files run one after the other: several load the model, and the machine may have two cores. Tests that only start a process
// and look at what it says run two at a time.
export default defineConfig({
  test: { include, fileParallelism: false, maxConcurrency: 2, testTimeout: 60_000, hookTimeout: 60_000 },
});
