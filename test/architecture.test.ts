/** Imports point one way. The rules are a table; the files are read as text. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { expect, test } from "vitest";
import { ROOT } from "./support/cli.ts";

interface Import {
  from: string;
  /** A path in the project, or a package's name. */
  to: string;
  /** Nothing of it is left at run time. */
  typeOnly: boolean;
  /** What stands between the braces, if nothing else is imported. */
  names: string[];
}

/** The imports of one file. `import { type A }` counts as a value: at run time it still loads the file. */
function importsOf(file: string, source: string): Import[] {
  const statements = source.matchAll(
    /^(?:import|export)\s+(type\s)?([^"';]*?\sfrom\s+)?"([^"]+)"|\bimport\("([^"]+)"\)/gm,
  );
  return [...statements].map(([, type, clause = "", name, dynamic]) => {
    const target = name ?? dynamic;
    const to = target.startsWith(".") ? join(dirname(file), target) : target;
    const names = /^\{([^}]*)\}/.exec(clause)?.[1].split(",").map((part) => part.trim()).filter(Boolean) ?? []; // biome-ignore format: one chain
    return { from: file, to, typeOnly: type !== undefined, names };
  });
}

/** Sources under `from` may not import what matches `to`, unless it matches `but`. */
interface Rule {
  from: RegExp;
  to: RegExp;
  but?: RegExp;
  /** Types may be imported all the same. */
  types?: true;
  /** So may these values. */
  values?: string[];
}

const INSIDE = /^gpu-worker\//;
const rules: Rule[] = [
  { from: /^edge\//, to: /^gpu-worker\/|^node:/ },
  { from: /^gpu-worker\//, to: /^edge\// },
  { from: /^shared\//, to: /^edge\/|^gpu-worker\/|^node:/ },
  { from: /^gpu-worker\/graph\//, to: INSIDE, but: /^gpu-worker\/(graph\/|engine\/tensor\.ts$)/ },
  { from: /^gpu-worker\/ops\//, to: INSIDE, but: /^gpu-worker\/((ops|graph)\/|engine\/(runtime|tensor)\.ts$)/ },
  { from: /^gpu-worker\/input\//, to: INSIDE, but: /^gpu-worker\/input\// },
  {
    from: /^gpu-worker\/model\//,
    to: INSIDE,
    but: /^gpu-worker\/((model|ops|graph|input)\/|engine\/(runtime|tensor)\.ts$)/,
  },
  { from: /^gpu-worker\/store\//, to: INSIDE, but: /^gpu-worker\/store\// },
  { from: /^(?!gpu-worker\/store\/s3\.ts$)/, to: /^@aws-sdk\// },
  // What the builders of graphs may know of the runtime: the element types.
  { from: /^gpu-worker\/(graph|ops|model)\//, to: /^gpu-worker\/engine\//, types: true, values: ["DTYPES"] },
  { from: /^gpu-worker\/checkpoint\//, to: /^gpu-worker\/(cli|service|decode|engine|graph)\//, types: true },
  { from: /^gpu-worker\/engine\//, to: /^gpu-worker\/((cli|service)\/|[^/]+$)/ },
  { from: /^gpu-worker\/engine\//, to: /^gpu-worker\/decode\//, types: true },
  { from: /^gpu-worker\/decode\//, to: /^gpu-worker\/((cli|service)\/|[^/]+$)|^node:http/, types: true },
  {
    from: /^gpu-worker\/((?!engine-local\.ts)[^/]+$|service\/)/,
    to: /^gpu-worker\/(model|ops|graph|input)\//,
    types: true,
  },
  {
    from: /^(?!gpu-worker\/(engine\/(runtime|ort-api|custom-op)|cuda\/(driver|kernel|libcuda|nvrtc))\.ts$)/,
    to: /^koffi$/,
    types: true,
  },
  { from: /^gpu-worker\/cuda\//, to: INSIDE, but: /^gpu-worker\/cuda\//, types: true },
  // The server knows the engine by its interface; what it is made of knows neither.
  { from: /^gpu-worker\/service\//, to: /^gpu-worker\/((cli|engine|decode)\/|(engine-|start|main).*\.ts$)/ },
  { from: /^gpu-worker\/service\/(?!server\.ts)/, to: /^gpu-worker\/service\/server\.ts$/ },
  { from: /^gpu-worker\/service\/(metrics|queue)\.ts$/, to: /^node:(http|net)$/ },
  { from: /^(?!gpu-worker\/service\/metrics\.ts$)/, to: /^prom-client$/ },
];

function violations(imports: Import[]): string[] {
  const broken = imports.filter(({ from, to, typeOnly, names }) =>
    rules.some((rule) => {
      if (!rule.from.test(from) || !rule.to.test(to) || rule.but?.test(to)) return false;
      if (rule.types && typeOnly) return false;
      const allowed = (name: string) => (rule.types && name.startsWith("type ")) || rule.values?.includes(name);
      return !(names.length > 0 && names.every(allowed));
    }),
  );
  return broken.map(({ from, to }) => `${from} imports ${to}`);
}

/** The files of one cycle of value imports, or null. */
function cycle(imports: Import[]): string[] | null {
  const next = new Map<string, string[]>();
  for (const { from, to, typeOnly } of imports) if (!typeOnly) next.set(from, [...(next.get(from) ?? []), to]);
  const done = new Set<string>();
  const visit = (file: string, path: string[]): string[] | null => {
    if (path.includes(file)) return [...path.slice(path.indexOf(file)), file];
    if (done.has(file)) return null;
    done.add(file);
    for (const to of next.get(file) ?? []) {
      const found = visit(to, [...path, file]);
      if (found) return found;
    }
    return null;
  };
  for (const file of next.keys()) {
    const found = visit(file, []);
    if (found) return found;
  }
  return null;
}

const files = ["edge", "shared", "gpu-worker"].flatMap((folder) =>
  readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts"))
    .map((name) => join(folder, name)),
);
const imports = files.flatMap((file) => importsOf(file, readFileSync(join(ROOT, file), "utf8")));

test("every import keeps to the rules, and no files import each other in a circle", () => {
  expect(files.length).toBeGreaterThan(40);
  expect(imports.length).toBeGreaterThan(2 * files.length);
  expect(violations(imports)).toEqual([]);
  expect(cycle(imports)).toBeNull();
});

test.each([
  ["edge/index.ts", 'import { startServer } from "../gpu-worker/service/server.ts";'],
  ["edge/upstream.ts", 'import type { Engine } from "../gpu-worker/engine.ts";'],
  ["edge/index.ts", 'import { readFileSync } from "node:fs";'],
  ["gpu-worker/service/server.ts", 'import app from "../../edge/index.ts";'],
  ["shared/chat.ts", 'import { createHash } from "node:crypto";'],
  ["shared/chat.ts", 'export { Answer } from "../gpu-worker/service/openai.ts";'],
  ["gpu-worker/graph/onnx.ts", 'import { LocalEngine } from "../engine-local.ts";'],
  ["gpu-worker/graph/onnx.ts", 'import { DTYPES, Tensor } from "../engine/tensor.ts";'],
  ["gpu-worker/ops/norm.ts", 'import {\n  linear,\n  parameter,\n} from "../model/layers.ts";'],
  ["gpu-worker/input/resize.ts", 'const { Target } = await import("../engine/target.ts");'],
  ["gpu-worker/decode/decode.ts", 'import { startServer } from "../service/server.ts";'],
  ["gpu-worker/engine/target.ts", 'import koffi from "koffi";'],
  ["gpu-worker/model/model.ts", 'import { LocalEngine } from "../decode/generate.ts";'],
  ["gpu-worker/checkpoint/import.ts", 'import { Runtime } from "../engine/runtime.ts";'],
  ["gpu-worker/service/queue.ts", 'import "../model/weights.ts";'],
  ["gpu-worker/service/server.ts", 'import { startEngine } from "../engine-process.ts";'],
  ["gpu-worker/service/pictures.ts", 'import { startServer } from "./server.ts";'],
  ["gpu-worker/service/metrics.ts", 'import type { ServerResponse } from "node:http";'],
  ["gpu-worker/service/server.ts", 'import { Registry } from "prom-client";'],
  ["gpu-worker/store/hub.ts", 'import type { TensorSource } from "../model/weights.ts";'],
  ["gpu-worker/store/hub.ts", 'const { S3 } = await import("@aws-sdk/client-s3");'],
])("%s breaks a rule with %s", (file, source) => {
  expect(violations(importsOf(file, source))).toHaveLength(1);
});

test("a circle is found, unless types alone close it", () => {
  const a = importsOf("shared/a.ts", 'import { b } from "./b.ts";');
  const b = importsOf("shared/b.ts", 'import { type C, c } from "./c.ts";');
  expect(cycle([...a, ...b, ...importsOf("shared/c.ts", 'import { a } from "./a.ts";')])).toEqual(["shared/a.ts", "shared/b.ts", "shared/c.ts", "shared/a.ts"]); // biome-ignore format: one line
  expect(cycle([...a, ...b, ...importsOf("shared/c.ts", 'import type { A } from "./a.ts";')])).toBeNull();
});
