import { defineConfig } from "vitest/config";

// Files run one after the other: several load the model, and the machine may have two cores.
export default defineConfig({
  test: { include: ["test/**/*.test.ts"], fileParallelism: false, testTimeout: 60_000, hookTimeout: 60_000 },
});
