/** Writes a Graph as an ONNX model. Weights become external data that point into the checkpoint's own files. */
import protobuf from "protobufjs";
import { DTYPES } from "../engine/tensor.ts";
import type { Attribute, Graph, Node, Value } from "./graph.ts";

/** The part of onnx.proto (IR version 10) that is written here: field name, number, type. */
const schema = protobuf.parse(`
  syntax = "proto3";
  message Entry { string key = 1; string value = 2; }
  message Attribute { string name = 1; float f = 2; int64 i = 3; bytes s = 4; repeated int64 ints = 8; int32 type = 20; }
  message Node { repeated string input = 1; repeated string output = 2; string name = 3; string op_type = 4;
    repeated Attribute attribute = 5; string domain = 7; }
  message Tensor { repeated int64 dims = 1; int32 data_type = 2; string name = 8; bytes raw_data = 9;
    repeated Entry external_data = 13; int32 data_location = 14; }
  message Dimension { oneof value { int64 dim_value = 1; string dim_param = 2; } }
  message Shape { repeated Dimension dim = 1; }
  message TensorType { int32 elem_type = 1; Shape shape = 2; }
  message Type { TensorType tensor_type = 1; }
  message ValueInfo { string name = 1; Type type = 2; }
  message Graph { repeated Node node = 1; string name = 2; repeated Tensor initializer = 5;
    repeated ValueInfo input = 11; repeated ValueInfo output = 12; }
  message Opset { string domain = 1; int64 version = 2; }
  message Model { int64 ir_version = 1; string producer_name = 2; Graph graph = 7; repeated Opset opset_import = 8; }
`).root;

const KIND = { float: 1, int: 2, string: 3, ints: 7 };
const EXTERNAL = 1;

function attribute(name: string, value: Attribute): object {
  if (typeof value === "number") return { name, type: KIND.int, i: value };
  if (typeof value === "string") return { name, type: KIND.string, s: Buffer.from(value) };
  if ("float" in value) return { name, type: KIND.float, f: value.float };
  return { name, type: KIND.ints, ints: value };
}

function valueInfo({ name, dtype, shape }: Value): object {
  const dim = shape.map((d) => (typeof d === "number" ? { dimValue: d } : { dimParam: d }));
  return { name, type: { tensorType: { elemType: DTYPES[dtype].onnx, shape: { dim } } } };
}

function node({ op, domain, inputs, outputs, attributes }: Node, index: number, nameOf: (v: Value) => string): object {
  return {
    name: `n${index}.${op}`,
    opType: op,
    domain,
    input: inputs.map((v) => (v ? nameOf(v) : "")),
    output: outputs.map(nameOf),
    attribute: Object.entries(attributes).map(([k, v]) => attribute(k, v)),
  };
}

/** Operators of our own. */
export const CUSTOM_DOMAIN = "vispec";

/** The ONNX model; external data locations are absolute paths without their first slash. */
export function encodeOnnx(graph: Graph): Uint8Array {
  // TensorScatter is new in opset 24; providers have fewer kernels for the newest opsets.
  const opset = graph.nodes.some((n) => n.op === "TensorScatter") ? 24 : 21;
  const outputName = new Map(graph.outputs.map(({ name, value }) => [value.name, name]));
  const nameOf = (value: Value) => outputName.get(value.name) ?? value.name;
  const weights = [...graph.weights.values()].map(({ value, stored }) => ({
    name: value.name,
    dims: stored.shape,
    dataType: DTYPES[stored.dtype].onnx,
    dataLocation: EXTERNAL,
    externalData: [
      { key: "location", value: stored.file.replace(/^\//, "") },
      { key: "offset", value: String(stored.offset) },
      { key: "length", value: String(stored.bytes) },
    ],
  }));
  const constants = graph.constants.map(({ value, bytes }) => ({
    name: value.name,
    dims: value.shape,
    dataType: DTYPES[value.dtype].onnx,
    rawData: bytes,
  }));
  const Model = schema.lookupType("Model");
  return Model.encode(
    Model.fromObject({
      irVersion: 10,
      producerName: "vispec",
      opsetImport: [
        { domain: "", version: opset },
        ...["com.microsoft", CUSTOM_DOMAIN].map((domain) => ({ domain, version: 1 })),
      ],
      graph: {
        name: "graph",
        node: graph.nodes.map((n, i) => node(n, i, nameOf)),
        initializer: [...weights, ...constants],
        input: [...graph.inputs, ...[...graph.bound.values()].map(({ value }) => value)].map(valueInfo),
        output: graph.outputs.map(({ name, value }) => valueInfo({ ...value, name })),
      },
    }),
  ).finish();
}
