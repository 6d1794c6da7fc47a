/** The command line: picks the command, and turns signals, errors and exit codes into each other. */
import { CheckpointError, toApiError } from "../shared/errors.ts";
import { BENCH_HELP, benchCommand } from "./cli/bench.ts";
import { CUDA_HELP, cudaCommand } from "./cli/cuda.ts";
import { GENERATE_HELP, generateCommand } from "./cli/generate.ts";
import { IMPORT_HELP, importCommand } from "./cli/import.ts";
import { INFLATE_HELP, inflateCommand } from "./cli/inflate.ts";
import { UsageError } from "./cli/options.ts";
import { type EndSignals, SERVE_HELP, serveCommand, startCommand } from "./cli/serve.ts";
import { PortInUseError } from "./service/http.ts";
import { StoreError } from "./store/store.ts";

const either = ({ interrupt, terminate }: EndSignals) => AbortSignal.any([interrupt, terminate]);
const commands: Record<string, (args: string[], signals: EndSignals) => Promise<void>> = {
  generate: (args, signals) => generateCommand(args, either(signals)),
  serve: serveCommand,
  start: startCommand,
  import: (args, signals) => importCommand(args, either(signals)),
  inflate: (args, signals) => inflateCommand(args, either(signals)),
  bench: (args, signals) => benchCommand(args, either(signals)),
  cuda: (args, signals) => cudaCommand(args, either(signals)),
};

const HELP = `${[GENERATE_HELP, SERVE_HELP, IMPORT_HELP, INFLATE_HELP, BENCH_HELP, CUDA_HELP].join("\n\n")}\n`;

/** npm and node24.mjs pass SIGTERM on, so that one sent to the whole process group comes up to three times. */
const ONE_SIGTERM = 1000;

/** Ctrl-C interrupts, and so does a second SIGTERM. After an interrupt the next signal kills. */
function endSignals(): EndSignals {
  const interrupt = new AbortController();
  const terminate = new AbortController();
  process.once("SIGINT", () => interrupt.abort());
  let first = Number.POSITIVE_INFINITY;
  process.on("SIGTERM", function onTerminate() {
    terminate.abort();
    first = Math.min(first, performance.now());
    if (performance.now() - first < ONE_SIGTERM) return;
    interrupt.abort();
    process.off("SIGTERM", onTerminate);
  });
  return { interrupt: interrupt.signal, terminate: terminate.signal };
}

/** 2: what the caller gave cannot be used; 130: interrupted; 1: anything else. */
function exitCode(error: unknown, signals: EndSignals): number {
  if (either(signals).aborted) return 130;
  if ([UsageError, CheckpointError, StoreError].some((kind) => error instanceof kind)) return 2;
  return toApiError(error).status < 500 ? 2 : 1;
}

/** A disk without room is no fault of this program, nor of what the caller gave. */
const isFull = (error: unknown) => (error as NodeJS.ErrnoException).code === "ENOSPC";

const signals = endSignals();
const [name, ...args] = process.argv.slice(2);
if (name === undefined || name === "help" || process.argv.includes("--help")) process.stdout.write(HELP);
else
  try {
    const command = commands[name];
    if (!command) throw new UsageError(`there is no command ${name}; there are ${Object.keys(commands).join(", ")}`);
    await command(args, signals);
  } catch (error) {
    process.exitCode = exitCode(error, signals);
    if (process.exitCode === 2 || error instanceof PortInUseError || isFull(error))
      console.error(`vispec: ${(error as Error).message}`);
    else if (process.exitCode === 1) console.error(error);
  }
