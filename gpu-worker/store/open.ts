/** The store that a location on the command line names. */
import { statSync } from "node:fs";
import { DirectoryStore } from "./directory.ts";
import { HUB_ID, HubStore } from "./hub.ts";
import { S3Store } from "./s3.ts";
import { type ObjectStore, type ReadableStore, StoreError } from "./store.ts";

const isDirectory = (path: string) => statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false;

/** What can be read: a directory (one that exists, or a path that begins with "." or "/"), s3://…, or a hub repository. */
export function openSource(location: string): ReadableStore {
  if (location.startsWith("s3://")) return new S3Store(location);
  if (/^[./]/.test(location) || isDirectory(location)) return new DirectoryStore(location);
  if (HUB_ID.test(location)) return new HubStore(location);
  throw new StoreError(
    `${location} is neither a directory, nor s3://bucket/prefix, nor a hub repository (org/name or org/name@revision)`,
  );
}

/** What can be written: s3://…, else a directory, which need not exist. */
export function openStore(location: string): ObjectStore {
  if (location.startsWith("s3://")) return new S3Store(location);
  if (location === "" || /^\w+:\/\//.test(location))
    throw new StoreError(`${location || '""'} is neither a directory nor s3://bucket/prefix`);
  return new DirectoryStore(location);
}
