/** Signatures between edge and worker: what passes, and everything that does not. */
import { createHash, createHmac } from "node:crypto";
import { expect, test } from "vitest";
import { Signer, Verifier } from "../shared/sign.ts";

const SECRET = "correct horse battery staple";
const PATH = "/internal/images/ab?tenant=a%26b&min=1&max=2";
const BODY = '{"text":"grüße 🐎"}';
const start = Date.now();
const NONCE = "0123456789abcdef0123456789abcdef";

/** A header made by the definition, with Node's own HMAC. */
function header({
  at = start,
  nonce = NONCE,
  method = "POST",
  path = PATH,
  body = BODY,
  secret = SECRET,
} = {}): string {
  const seconds = Math.floor(at / 1000);
  const hash = createHash("sha256").update(body).digest("hex");
  const signed = `v1\n${seconds}\n${nonce}\n${method}\n${path}\n${hash}`;
  return `v1.${seconds}.${nonce}.${createHmac("sha256", secret).update(signed).digest("hex")}`;
}

const check = (value: string | undefined, verifier = new Verifier(SECRET, () => start)) =>
  verifier.verify("POST", PATH, BODY, value);
const invalid = (why: RegExp) => expect.objectContaining({ status: 401, code: "invalid_signature", message: expect.stringMatching(why) }); // biome-ignore format: one line

test("what a signer signs is accepted, each time with another nonce", async () => {
  const [signer, verifier] = [new Signer(SECRET), new Verifier(SECRET)];
  for (const body of [BODY, BODY, "", "a".repeat(100_000)]) {
    await verifier.verify("POST", PATH, body, await signer.sign("POST", PATH, body));
  }
  expect(verifier.remembered).toBe(4);
});

test("a header made by the definition, with another HMAC, is accepted, and is what the signer makes", async () => {
  await check(header());
  const [, seconds, nonce, hmac] = (await new Signer(SECRET).sign("POST", PATH, BODY)).split(".");
  expect(header({ at: Number(seconds) * 1000, nonce }).split(".")[3]).toBe(hmac);
});

const good = header();
const [version, seconds, nonce, hmac] = good.split(".");
test.each<[string, string | undefined]>([
  ["missing", undefined],
  ["empty", ""],
  ["of another version", good.replace("v1", "v2")],
  ["without its HMAC", `${version}.${seconds}.${nonce}`],
  ["with half an HMAC", good.slice(0, -32)],
  ["with an empty HMAC", `${version}.${seconds}.${nonce}.`],
  ["with more behind it", `${good}0`],
  ["with a line's end behind it", `${good}\n`],
  ["sent twice", `${good}, ${good}`],
  ["in capitals", good.toUpperCase().replace("V", "v")],
  ["with another time", `${version}.${Number(seconds) + 1}.${nonce}.${hmac}`],
  ["with the same time in other digits", `${version}.0${seconds}.${nonce}.${hmac}`],
  ["with a negative time", `${version}.-${seconds}.${nonce}.${hmac}`],
  ["with another nonce", `${version}.${seconds}.${nonce.replace("0", "1")}.${hmac}`],
  ["with one bit of the HMAC changed", good.slice(0, -1) + (Number.parseInt(good.at(-1)!, 16) ^ 1).toString(16)],
  ["of another secret", header({ secret: `${SECRET}!` })],
  ["of another method", header({ method: "PUT" })],
  ["of another path", header({ path: PATH.replace("ab", "ac") })],
  ["of another query", header({ path: PATH.replace("tenant=a", "tenant=b") })],
  ["of another body", header({ body: `${BODY} ` })],
])("a signature %s is refused, and nothing of it is remembered", async (_, value) => {
  const verifier = new Verifier(SECRET, () => start);
  await expect(check(value, verifier)).rejects.toEqual(invalid(/no valid signature/));
  expect(verifier.remembered).toBe(0);
  await check(good, verifier);
});

test("a time is good for 60 s either way, and no second longer", async () => {
  for (const off of [-60, -59, 0, 59, 60]) await check(header({ at: start + off * 1000 }));
  for (const off of [-61, 61, -1e6, 1e6]) {
    await expect(check(header({ at: start + off * 1000 }))).rejects.toEqual(invalid(/60 s/));
  }
});

test("a signature is good once, for as long as its time is", async () => {
  for (const ahead of [-60, 0, 60]) {
    let now = start;
    const verifier = new Verifier(SECRET, () => now);
    const value = header({ at: start + ahead * 1000 });
    await check(value, verifier);
    for (; now <= start + (ahead + 60) * 1000; now += 20_000) {
      await expect(check(value, verifier)).rejects.toEqual(invalid(/used before/));
    }
    await expect(check(value, verifier)).rejects.toEqual(invalid(/60 s/));
  }
});

test("of the same signature sent many times at once, one is accepted", async () => {
  const verifier = new Verifier(SECRET, () => start);
  const results = await Promise.allSettled(Array.from({ length: 20 }, () => check(header(), verifier)));
  expect(results.filter(({ status }) => status === "fulfilled")).toHaveLength(1);
});

test("nonces are forgotten when their time is over, so an hour of requests fills no memory", async () => {
  let now = start;
  const verifier = new Verifier(SECRET, () => now);
  for (let i = 0; i < 3600; i++, now += 1000) {
    await check(header({ at: now, nonce: i.toString(16).padStart(32, "0") }), verifier);
  }
  expect(verifier.remembered).toBeLessThanOrEqual(122);
});

test("an empty secret is refused before it signs anything", () => {
  expect(() => new Signer("")).toThrow("empty");
  expect(() => new Verifier("")).toThrow("empty");
});
