/** A request as code that asks the same: curl, and the `openai` packages. Text in, text out. */

export type Language = "curl" | "JavaScript" | "Python";

export interface File {
  name: string;
  /** Media type. */
  type: string;
}

/** Stands in a request where a picture's data: URL belongs, so that the code can read the file instead. */
export const pictureMark = (index: number) => `\0${index}`;

/**
 * `request` has marks in place of data: URLs, `base` is the API's URL up to /v1. With `keyed`, the code takes the API key
 * from the environment: the key itself is never shown.
 */
export function codeFor(language: Language, request: object, files: File[], base: string, keyed: boolean): string {
  const json = JSON.stringify(request, null, 2);
  const fill = (text: string, picture: (file: File, name: string) => string) =>
    text.replace(/"\\u0000(\d+)"/g, (_, index) => picture(files[index], JSON.stringify(files[index].name)));
  if (language === "curl") {
    // A here-document, for a picture may be longer than an argument can be; the shell still looks for \ $ and ` in it.
    const body = fill(json.replace(/[\\$`]/g, "\\$&").replaceAll('"\\\\u0000', '"\\u0000'), ({ name, type }) => {
      return `"data:${type};base64,$(base64 < '${name.replaceAll("'", "'\\''")}' | tr -d '\\n')"`;
    });
    const key = keyed ? ` \\\n  -H "authorization: Bearer $API_KEY"` : "";
    return `curl ${base}/chat/completions \\\n  -H 'content-type: application/json'${key} -d @- <<END\n${body}\nEND`;
  }
  if (language === "JavaScript") {
    const read = files.length > 0 ? `import { readFileSync } from "node:fs";\n` : "";
    const body = fill(json.replace(/^( +)"(\w+)":/gm, "$1$2:"), ({ type }, name) => {
      return `\`data:${type};base64,\${readFileSync(${name}, "base64")}\``;
    });
    return `${read}import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base}", apiKey: ${keyed ? "process.env.API_KEY" : `"none"`} });
const answer = await client.chat.completions.create(${body});
console.log(answer.choices[0].message.content);`;
  }
  const imports = [files.length > 0 ? "import base64\n" : "", keyed ? "import os\n" : ""].join("");
  const body = fill(json.replace(/^ {2}"(\w+)": /gm, "  $1=").slice(1, -1), ({ type }, name) => {
    return `"data:${type};base64," + base64.b64encode(open(${name}, "rb").read()).decode()`;
  });
  return `${imports}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${keyed ? `os.environ["API_KEY"]` : `"none"`})
answer = client.chat.completions.create(${body})
print(answer.choices[0].message.content)`;
}
