/** The command line: picks the command, and turns errors into messages and exit codes. */
import { CheckpointError, toApiError } from "../shared/errors.ts";
import { BENCH_HELP, benchCommand } from "./cli/bench.ts";
import { GENERATE_HELP, generateCommand } from "./cli/generate.ts";
import { UsageError } from "./cli/options.ts";
import { SERVE_HELP, serveCommand, startCommand } from "./cli/serve.ts";
import { PortInUseError } from "./http.ts";

type Command = (args: string[], signal: AbortSignal) => Promise<void>;

const commands: Record<string, Command> = {
  generate: generateCommand,
  serve: serveCommand,
  start: startCommand,
  bench: benchCommand,
};

const HELP = `${[GENERATE_HELP, SERVE_HELP, BENCH_HELP].join("\n\n")}\n`;

/** 2: what the caller gave cannot be used; 130: interrupted; 1: anything else. */
function exitCode(error: unknown, signal: AbortSignal): number {
  if (signal.aborted) return 130;
  if (error instanceof UsageError || error instanceof CheckpointError) return 2;
  return toApiError(error).status < 500 ? 2 : 1;
}

const controller = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) process.once(name, () => controller.abort());
const [name, ...args] = process.argv.slice(2);
if (name === undefined || name === "help" || process.argv.includes("--help")) process.stdout.write(HELP);
else
  try {
    const command = commands[name];
    if (!command) throw new UsageError(`there is no command ${name}; there are ${Object.keys(commands).join(", ")}`);
    await command(args, controller.signal);
  } catch (error) {
    process.exitCode = exitCode(error, controller.signal);
    if (process.exitCode === 2 || error instanceof PortInUseError) console.error(`vispec: ${(error as Error).message}`);
    else if (process.exitCode === 1) console.error(error);
  }
