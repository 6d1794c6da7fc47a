/** What a zod schema refuses: wrong values for every place that it speaks of, each with the name an error has to give. */
import { z } from "zod";

/** Draws whole numbers below n, the same for the same seed. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed;
  }

  /** mulberry32 */
  below(n: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * n);
  }

  pick<T>(list: readonly T[]): T {
    return list[this.below(list.length)];
  }
}

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type Body = { [key: string]: Json };

type Place = { path: (string | number)[]; branches: JsonSchema[]; required: boolean };
interface JsonSchema {
  type?: string | string[];
  anyOf?: JsonSchema[];
  oneOf?: JsonSchema[];
  const?: Json;
  enum?: Json[];
  properties?: Record<string, JsonSchema>;
  required?: string[];
  additionalProperties?: boolean | JsonSchema;
  propertyNames?: JsonSchema;
  items?: JsonSchema;
  prefixItems?: JsonSchema[];
  minItems?: number;
  maxItems?: number;
  minLength?: number;
  maxLength?: number;
  pattern?: string;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
}

const known = new Map<Body, Place[]>();

/** The places of a good body, found once. */
function placesIn(body: Body, schema: z.ZodType): Place[] {
  const places =
    known.get(body) ?? placesOf(body, z.toJSONSchema(schema, { io: "input", unrepresentable: "any" }) as JsonSchema);
  known.set(body, places);
  return places;
}

/** A schema's alternatives, each of one type. */
function branchesOf(schema: JsonSchema): JsonSchema[] {
  const inner = schema.anyOf ?? schema.oneOf;
  if (inner) return inner.flatMap(branchesOf);
  return Array.isArray(schema.type) ? schema.type.map((type) => ({ ...schema, type })) : [schema];
}

const typeOf = (value: Json) =>
  value === null ? "null" : Array.isArray(value) ? "array" : typeof value === "number" ? "number" : typeof value;

/** The alternative that a good value is of: by its type, and among objects by their constants. */
function branchOf(branches: JsonSchema[], value: Json): JsonSchema | undefined {
  return branches.find((branch) => {
    if ((branch.type === "integer" ? "number" : branch.type) !== typeOf(value)) return false;
    const properties = Object.entries(branch.properties ?? {});
    return properties.every(([key, { const: only }]) => only === undefined || (value as Body)[key] === only);
  });
}

/** Every place in a good value that a schema speaks of, those of absent keys included. */
function placesOf(value: Json | undefined, schema: JsonSchema, path: Place["path"] = [], required = true): Place[] {
  const branches = branchesOf(schema);
  const places: Place[] = [{ path, branches, required }];
  const branch = value === undefined ? undefined : branchOf(branches, value);
  if (branch?.properties)
    for (const [key, inner] of Object.entries(branch.properties))
      places.push(...placesOf((value as Body)[key], inner, [...path, key], branch.required?.includes(key) ?? false));
  const items = (i: number) => branch?.prefixItems?.[i] ?? branch?.items;
  if (Array.isArray(value))
    for (const [i, item] of value.entries()) if (items(i)) places.push(...placesOf(item, items(i)!, [...path, i]));
  return places;
}

/** Values that a place's schema refuses, each with what of it is wrong when that lies deeper. */
function wrongValues({ branches }: Place, value: Json | undefined): { value: Json; at?: string | number }[] {
  const types = new Set(branches.map(({ type }) => (type === "integer" ? "number" : type)));
  if (branches.some(({ type, const: only }) => type === undefined && only === undefined)) return []; // takes anything
  const samples: Json[] = [7, -1.5, "x", "1", "NaN", true, null, {}, [], [[]], { a: 1 }];
  const wrong: { value: Json; at?: string | number }[] = samples
    .filter((sample) => !types.has(typeOf(sample)))
    .map((sample) => ({ value: sample }));
  for (const branch of branches) wrong.push(...outOfBounds(branch, value));
  return wrong;
}

function outOfBounds(branch: JsonSchema, value: Json | undefined): { value: Json; at?: string | number }[] {
  const { type, minimum, maximum, exclusiveMinimum, minLength, maxLength, minItems, maxItems } = branch;
  const wrong: { value: Json; at?: string | number }[] = [];
  const step = type === "integer" ? 1 : 0.001;
  if (minimum !== undefined) wrong.push({ value: minimum - step }, { value: -1e300 });
  if (maximum !== undefined) wrong.push({ value: maximum + step }, { value: 1e300 });
  if (exclusiveMinimum !== undefined) wrong.push({ value: exclusiveMinimum });
  if (type === "integer") wrong.push({ value: 1.5 }, { value: 2 ** 60 });
  if (minLength) wrong.push({ value: "" });
  if (maxLength !== undefined) wrong.push({ value: "u".repeat(maxLength + 1) });
  if (branch.pattern) wrong.push({ value: "a b!" }, { value: "" });
  if (branch.enum || branch.const !== undefined) wrong.push({ value: "Auto " }, { value: "" });
  if (minItems) wrong.push({ value: [] });
  const sample = branch.items && branchesOf(branch.items)[0].type === "string" ? "x" : 1;
  if (maxItems !== undefined && maxItems < 1e5)
    wrong.push({ value: Array.from({ length: maxItems + 1 }, () => sample) });
  if (branch.additionalProperties === false && typeOf(value ?? null) === "object" && value !== null)
    for (const key of ["extra", "__proto__", "constructor", "toString", "", "messages ", "a.b[0]", "ключ"])
      if (!branch.properties?.[key])
        wrong.push({ value: Object.fromEntries([...Object.entries(value!), [key, 1]]) as Json, at: key });
  if (branch.propertyNames?.pattern)
    for (const key of ["x", "-1", "1.5", "", "1e3", "0123456789"]) wrong.push({ value: { [key]: 1 }, at: key });
  if (typeof branch.additionalProperties === "object" && branch.additionalProperties.type === "number")
    for (const bias of [101, -101, "1", null, {}]) wrong.push({ value: { "5": bias }, at: "5" });
  return wrong;
}

function nameOf(path: (string | number)[]): string {
  return path.reduce<string>((name, key) => (typeof key === "number" ? `${name}[${key}]` : name ? `${name}.${key}` : key), ""); // biome-ignore format: one line
}

/** The body with the value at the path replaced, or taken away. */
function changed(body: Json, path: (string | number)[], value: Json | undefined): Json {
  if (path.length === 0) return value!;
  const [key, ...rest] = path;
  const copy = structuredClone(body) as Record<string | number, Json>;
  if (rest.length > 0) copy[key] = changed(copy[key], rest, value);
  else if (value === undefined) delete copy[key];
  else copy[key] = value;
  return copy as Json;
}

const valueAt = (body: Json, path: (string | number)[]): Json | undefined =>
  path.reduce<Json | undefined>((value, key) => (value as Record<string | number, Json> | undefined)?.[key], body);

/** JSON text in which an own key __proto__ survives. */
export const encode = (body: Json) => Buffer.from(JSON.stringify(body));

export interface Broken {
  body: Buffer;
  /** The place, as the servers name it: `messages[0].content[1].type`; null is the whole body. */
  param: string | null;
}

/** One wrong value somewhere in a body that its schema speaks of, or a required key taken away. */
export function breakSomewhere(random: Random, body: Body, schema: z.ZodType): Broken {
  const places = placesIn(body, schema);
  for (;;) {
    const place = random.pick(places);
    const wrong = wrongValues(place, valueAt(body, place.path));
    if (place.required && typeof place.path.at(-1) === "string" && random.below(4) === 0)
      return { body: encode(changed(body, place.path, undefined)), param: nameOf(place.path) };
    if (wrong.length === 0) continue;
    const { value, at } = random.pick(wrong);
    const param = nameOf(at === undefined ? place.path : [...place.path, at]);
    return { body: encode(changed(body, place.path, value)), param: param || null };
  }
}
