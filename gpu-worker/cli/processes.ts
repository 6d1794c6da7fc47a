/** Other processes of this machine and their memory, as Linux tells of them in /proc; elsewhere there are none. */
import { existsSync, readdirSync, readFileSync } from "node:fs";

export interface Process {
  pid: number;
  /** Its command line, with spaces between the arguments. */
  command: string;
}

/** All processes that this one, or another, has begun, and those that they have. */
export function descendants(root = process.pid): Process[] {
  if (!existsSync("/proc/self/stat")) return [];
  const children = new Map<number, Process[]>();
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      // The parent comes second after the name, which stands in parentheses and may hold anything.
      const stat = readFileSync(`/proc/${name}/stat`, "utf8");
      const parent = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]);
      const command = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ").trim();
      children.set(parent, [...(children.get(parent) ?? []), { pid: Number(name), command }]);
    } catch {
      // It ended while it was looked at.
    }
  }
  const below = (pid: number): Process[] => (children.get(pid) ?? []).flatMap((child) => [child, ...below(child.pid)]);
  return below(root);
}

/** Bytes of a process' memory, of what it shares with others its share. Throws when it is gone. */
export function memoryOf(pid: number): number {
  return Number(/^Pss:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"))![1]) * 1024;
}
