/** Names and addresses of this machine, as URLs, headers and sockets have them. */

/** Whether a host means this machine: an address (IPv6 with or without brackets) or a name in lower case. */
export function isLoopback(host: string): boolean {
  return /^((.+\.)?localhost|(::ffff:)?127\.\d+\.\d+\.\d+|\[?::1\]?)$/.test(host);
}
