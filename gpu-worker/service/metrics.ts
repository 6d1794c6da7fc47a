/**
 * What a server counts and times, in Prometheus' format: under vLLM's names and labels where the meaning is the same, so
 * that its dashboards work. Knows steps and outcomes, no HTTP and no queue.
 */
import { Counter, Gauge, Histogram, Registry } from "prom-client";
import type { ApiError } from "../../shared/errors.ts";
import { type GenerateRequest, Priority } from "../../shared/protocol.ts";
import type { Finish, Step } from "../engine.ts";

// vLLM's buckets in seconds, with finer ones before them: a small model gives a token in less than a millisecond.
const FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560]; // biome-ignore format: one list
const BETWEEN = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]; // biome-ignore format: one list
const REQUEST = [0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]; // biome-ignore format: one list

/** What is asked when the metrics are read. */
export interface State {
  running(): number;
  waiting(): number;
  waitingOf(priority: Priority): number;
  ready(): boolean;
  restarts(): number;
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #registers = [this.#registry];
  readonly firstToken = this.#histogram("vllm:time_to_first_token_seconds", "From arrival, queue included", FIRST_TOKEN); // biome-ignore format: a row of the table
  readonly betweenTokens = this.#histogram("vllm:inter_token_latency_seconds", "A cycle's time over its tokens, once for each of them", BETWEEN); // biome-ignore format: a row of the table
  readonly whole = this.#histogram("vllm:e2e_request_latency_seconds", "Of requests answered in full", REQUEST);
  readonly queue = this.#histogram("vllm:request_queue_time_seconds", "Wait for a turn", REQUEST);
  readonly prompt = this.#counter("vllm:prompt_tokens_total", "Prompt tokens, images' included, of finished answers");
  readonly generated = this.#counter("vllm:generation_tokens_total", "Tokens generated");
  readonly finished = this.#counter("vllm:request_success_total", "Choices by how they ended", ["finished_reason"]);
  readonly drafts = this.#counter("vllm:spec_decode_num_drafts_total", "Cycles of choices that were drafted for");
  readonly drafted = this.#counter("vllm:spec_decode_num_draft_tokens_total", "Tokens drafted");
  readonly accepted = this.#counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens accepted");
  readonly acceptedAt = this.#counter("vllm:spec_decode_num_accepted_tokens_per_pos_total", "Cycles that accepted a draft at this position", ["position"]); // biome-ignore format: a row of the table
  readonly refused = this.#counter("vispec:requests_refused_total", "Requests that got an error, by its code", ["code"]); // biome-ignore format: a row of the table

  constructor(model: string, state: State) {
    this.#registry.setDefaultLabels({ model_name: model, engine: "0" });
    this.#gauge("vllm:num_requests_running", "Requests that hold a turn", state.running);
    this.#gauge("vllm:num_requests_waiting", "Requests that wait for one", state.waiting);
    this.#gauge("vispec:engine_ready", "Whether the engine's process serves", () => Number(state.ready()));
    this.#gauge("process_resident_memory_bytes", "Of the HTTP process", () => process.memoryUsage.rss());
    new Gauge({
      ...{ name: "vispec:requests_waiting", help: "Those that wait, by priority", labelNames: ["priority"] },
      registers: this.#registers,
      collect() {
        for (const priority of Priority.options) this.set({ priority }, state.waitingOf(priority));
      },
    });
    new Counter({
      name: "vispec:engine_restarts_total",
      help: "How often the engine's process died or hung",
      registers: this.#registers,
      collect() {
        this.reset();
        this.inc(state.restarts());
      },
    });
  }

  #histogram(name: string, help: string, buckets: number[]): Histogram {
    return new Histogram({ name, help, buckets, registers: this.#registers });
  }

  #counter(name: string, help: string, labelNames: string[] = []): Counter {
    return new Counter({ name, help, labelNames, registers: this.#registers });
  }

  #gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      ...{ name, help, registers: this.#registers },
      collect() {
        this.set(read());
      },
    });
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  text(): Promise<string> {
    return this.#registry.metrics();
  }
}

/** One request on its way: feeds the metrics as it goes, and knows at the end what the log says of it. */
export class RequestRecord {
  request: GenerateRequest | null = null;
  readonly #metrics: Metrics;
  readonly #arrived = performance.now();
  #queued = 0;
  #turn: number | null = null;
  #firstToken: number | null = null;
  #lastToken = 0;
  #tokens = 0;
  readonly #finishes: Finish[] = [];

  constructor(metrics: Metrics) {
    this.#metrics = metrics;
  }

  /** It begins to wait for its turn. */
  queued(): void {
    this.#queued = performance.now();
  }

  /** It has its turn. */
  started(): void {
    this.#turn = performance.now();
    this.#metrics.queue.observe((this.#turn - this.#queued) / 1000);
  }

  step({ tokens, finish }: Step): void {
    const now = performance.now();
    if (tokens.length > 0) {
      const each = (now - this.#lastToken) / 1000 / tokens.length;
      if (this.#firstToken !== null) for (const _ of tokens) this.#metrics.betweenTokens.observe(each);
      else {
        this.#firstToken = now;
        this.#metrics.firstToken.observe((now - this.#arrived) / 1000);
      }
      this.#lastToken = now;
      this.#tokens += tokens.length;
      this.#metrics.generated.inc(tokens.length);
    }
    if (finish) this.#finish(finish);
  }

  #finish(finish: Finish): void {
    const metrics = this.#metrics;
    // All choices come of one prefill.
    if (this.#finishes.length === 0) metrics.prompt.inc(finish.promptTokens);
    this.#finishes.push(finish);
    metrics.finished.inc({ finished_reason: finish.reason });
    if (finish.drafted === 0) return;
    metrics.drafts.inc(finish.cycles);
    metrics.drafted.inc(finish.drafted);
    metrics.accepted.inc(acceptedOf(finish));
    for (const accepted of finish.acceptedPerCycle)
      for (let position = 0; position < accepted; position++) metrics.acceptedAt.inc({ position });
  }

  /** It was answered in full. */
  answered(): void {
    this.#metrics.whole.observe((performance.now() - this.#arrived) / 1000);
  }

  /** It ended early: with an error, or (null) because its client left. */
  failed(error: ApiError | null): void {
    if (error === null) this.#metrics.finished.inc({ finished_reason: "abort" });
    else if (this.#firstToken !== null) this.#metrics.finished.inc({ finished_reason: "error" });
    else this.#metrics.refused.inc({ code: error.code ?? "invalid_request" });
  }

  /** Fields of the log line; times in milliseconds, null for what was not reached. */
  fields(): Record<string, unknown> {
    const since = (from: number, to: number | null) => (to === null ? null : Number((to - from).toFixed(1)));
    return {
      id: this.request?.id ?? null,
      tenant: this.request?.tenant ?? null,
      user: this.request?.user ?? null,
      finish: this.#finishes.map(({ reason }) => reason).join() || null,
      prompt_tokens: this.#finishes[0]?.promptTokens ?? null,
      completion_tokens: this.#tokens,
      queue_ms: since(this.#queued, this.#turn),
      ttft_ms: since(this.#arrived, this.#firstToken),
      total_ms: since(this.#arrived, performance.now()),
      accepted: this.#finishes.reduce((sum, finish) => sum + acceptedOf(finish), 0),
      drafted: this.#finishes.reduce((sum, { drafted }) => sum + drafted, 0),
    };
  }
}

function acceptedOf({ acceptedPerCycle }: Finish): number {
  return acceptedPerCycle.reduce((sum, accepted) => sum + accepted, 0);
}
