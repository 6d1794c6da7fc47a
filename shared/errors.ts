/** The error classes that both sides know; knows OpenAI's error shape, not how it is sent. */

export type ErrorKind = "invalid_request_error" | "not_found_error" | "rate_limit_error" | "server_error";

/** A fault of the request (or of the service) that the client is told about: HTTP status, machine-readable code, parameter. */
export class ApiError extends Error {
  override name = "ApiError";
  readonly status: number;
  readonly code: string | null;
  readonly param: string | null;
  /** Seconds after which trying again may help: the header Retry-After. */
  readonly retryAfter: number | null;

  constructor(
    status: number,
    message: string,
    options: { code?: string; param?: string; retryAfter?: number; cause?: unknown } = {},
  ) {
    super(message, { cause: options.cause });
    this.status = status;
    this.code = options.code ?? null;
    this.param = options.param ?? null;
    this.retryAfter = options.retryAfter ?? null;
  }

  get kind(): ErrorKind {
    if (this.status === 404) return "not_found_error";
    if (this.status === 429) return "rate_limit_error";
    return this.status >= 500 ? "server_error" : "invalid_request_error";
  }

  /** OpenAI's error body. */
  toJSON(): { error: { message: string; type: ErrorKind; param: string | null; code: string | null } } {
    return { error: { message: this.message, type: this.kind, param: this.param, code: this.code } };
  }
}

/** What may be shown of any thrown value: an ApiError as it is, everything else as a 500 that tells no internals. */
export function toApiError(error: unknown): ApiError {
  return error instanceof ApiError
    ? error
    : new ApiError(500, "The server had an error while processing the request.", {
        code: "internal_error",
        cause: error,
      });
}

/** A fault of whoever runs the service: `why` is for the log. */
export function misconfigured(why: string): ApiError {
  return new ApiError(500, "The service is not configured correctly; its log says more.", {
    code: "misconfigured",
    cause: why,
  });
}

/** A checkpoint that cannot be used as it is; the message names the file and the field or tensor. */
export class CheckpointError extends Error {
  override name = "CheckpointError";
}
