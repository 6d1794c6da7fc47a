/** Who is served while no API keys are configured: clients on this machine, and no web page from elsewhere. */
import { ApiError } from "../shared/errors.ts";
import { isLoopback } from "../shared/loopback.ts";

/**
 * Throws ApiError 401 for a client elsewhere, 403 for a web page elsewhere whose browser runs on this machine: one that
 * says where it is from (Origin), or one whose name was made to point here (Host).
 */
export function checkLocal(request: Request): void {
  // Cloudflare sets the first, and drops what a client sent under this name; other proxies and tunnels set the second.
  // Where nothing stands before it, workerd listens on loopback.
  for (const name of ["cf-connecting-ip", "x-forwarded-for"]) {
    const addresses = request.headers.get(name)?.split(",") ?? [];
    if (addresses.every((address) => isLoopback(address.trim()))) continue;
    throw new ApiError(401, "No API keys are configured, so only the service's own machine is served.", {
      code: "no_api_keys",
    });
  }
  if (!isLoopback(new URL(request.url).hostname))
    throw new ApiError(403, "No API keys are configured, so the header Host must name this machine, e.g. localhost.", {
      code: "host_not_allowed",
    });
  const origin = request.headers.get("origin");
  if (origin !== null && !isLocalOrigin(origin))
    throw new ApiError(403, "No API keys are configured, so web pages from other places are not served.", {
      code: "origin_not_allowed",
    });
}

export function isLocalOrigin(origin: string): boolean {
  return URL.canParse(origin) && /^https?:$/.test(new URL(origin).protocol) && isLoopback(new URL(origin).hostname);
}
