/** How much a request may have, at the edge and at the GPU worker alike. What the model's context allows comes on top. */

export const LIMITS = {
  /** Log-probabilities of one answer, some 75 bytes each. */
  logprobs: 4_000_000,
  /** JSON values in a body: each takes memory, some 50 times that of its text if it is one of "[[[[" or "{},{},". */
  values: 2 ** 20,
  messages: 4096,
  /** Parts of one message. */
  parts: 4096,
  /** Token ids of a prompt that comes as such. */
  promptTokens: 2 ** 20,
  choices: 16,
  stops: 16,
  stopCharacters: 1000,
  stopTokens: 64,
  biases: 1024,
  userCharacters: 256,
  /** Seconds. */
  deadline: 3600,
  /** Of an image's URL; one with the picture in it is bounded by the body. */
  urlCharacters: 8192,
  /** Of a picture, in pixels: more could not be decoded. */
  area: 2 ** 26,
  /** Of a response format's schema as JSON text: what the grammar's compiler takes is bounded. */
  schemaCharacters: 16 * 1024,
  schemaDepth: 32,
  /**
   * Of a prompt, on average: encoding takes some seconds a million characters. Text has three to five; only long runs of
   * spaces have more than this.
   */
  charactersPerToken: 16,
} as const;
