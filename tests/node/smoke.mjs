// A package run by nothing but onnxruntime-node and the manifest: proof that no Python hides in the files.
//
//     node smoke.mjs PACKAGE < requests        one JSON per line: {"token_ids", "max_tokens", "threshold"}
//
// Prompts come as token ids, because the tokenizer is another library's business. Greedy, policy steer. This binding cannot
// bind outputs, so every `present` goes back in as the next `past`, with its true length: slower, and the same tokens.
import { createHash } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import ort from "onnxruntime-node";

const folder = process.argv[2];
const sha256Of = (text) => createHash("sha256").update(text).digest("hex");
const written = readFileSync(join(folder, "autosteer.json"), "utf8");
const manifest = JSON.parse(written);
const own = manifest.manifest_sha256;
if (sha256Of(written.replace(own, "0".repeat(64))) !== own) throw new Error("autosteer.json: its own sha256 differs");
if (manifest.format_version !== 5) throw new Error("another format_version");
if (manifest.monitor || manifest.rotary.long || manifest.rotary.windowed?.length) throw new Error("not done here");

for (const { file, sha256 } of [...Object.values(manifest.graphs), ...manifest.files]) {
  const hash = createHash("sha256");
  for await (const block of createReadStream(join(folder, file))) hash.update(block);
  if (hash.digest("hex") !== sha256) throw new Error(`${file}: sha256 differs from the manifest`);
}

const sessions = {};
for (const [name, { file }] of Object.entries(manifest.graphs)) {
  sessions[name] = await ort.InferenceSession.create(join(folder, file), {
    intraOpNumThreads: 1,
    extra: { session: { intra_op: { allow_spinning: "0" } } },
  });
}

const { hidden_size: D, num_key_value_heads: heads, head_dim } = manifest.dims;
const floats = (data, dims) => new ort.Tensor("float32", Float32Array.from(data), dims);
const ints = (data) => new ort.Tensor("int64", BigInt64Array.from(data, BigInt), [1, data.length]);
const emptyOf = { float32: Float32Array, int8: Int8Array };
const int32 = (value, dims) => new ort.Tensor("int32", Int32Array.from([value]), dims);

/** The caches of one decoder half, empty. */
function emptyCaches(half) {
  const [first, last] = manifest.graphs[half].layers;
  const { dtype } = manifest.kv_cache;
  const caches = {};
  for (let i = first; i < last; i++) {
    for (const kind of ["key", "value"]) {
      caches[`past_key_values.${i}.${kind}`] = new ort.Tensor(dtype, new emptyOf[dtype](0), [1, heads, 0, head_dim]);
    }
  }
  return caches;
}

/** The graph that runs prefill for a half: its copy with weights at another precision, if the package has one. */
const prefillGraph = (half) => (sessions[half.replace("decoder", "prefill")] ? half.replace("decoder", "prefill") : half);

/** The rotary tables of `total` positions. This example knows models whose pictures count as text does. */
function rotaryTables(total) {
  const { frequencies, scale, axes } = manifest.rotary;
  if (axes.length) throw new Error("this example knows no rows and columns of pictures");
  const table = (f) => {
    const cells = Array.from({ length: total }, (_, at) => frequencies.map((w) => f(Math.fround(at * w)) * scale));
    return floats(cells.flat(), [total, frequencies.length]);
  };
  return { cos_cache: table(Math.cos), sin_cache: table(Math.sin) };
}

/** Run one half over new positions; `total` counts them and all earlier ones. Updates `caches`. */
async function runHalf(half, feeds, caches, total) {
  const lengths = { seqlens_k: int32(total - 1, [1]), total_sequence_length: int32(total, []) };
  if (manifest.graphs[half].inputs.some(({ name }) => name === "attention_bias")) {
    const rows = feeds.inputs_embeds.dims[1];
    feeds.attention_bias = floats(new Float32Array(rows * total), [1, 1, rows, total]); // hides nothing
  }
  const out = await sessions[half].run({ ...feeds, ...lengths, ...rotaryTables(total), ...caches });
  for (const [name, value] of Object.entries(out)) {
    if (name.startsWith("present.")) caches[name.replace("present", "past_key_values")] = value;
  }
  return out;
}

/** The prober's score of a hidden state; NaN, which is unsafe, if it gives none. */
async function probe(row) {
  try {
    const { p_unsafe } = await sessions.prober.run({ hidden_states: floats(row, [1, D]) });
    return p_unsafe.data.length === 1 ? p_unsafe.data[0] : NaN;
  } catch {
    return NaN;
  }
}

async function answer({ token_ids, max_tokens, threshold }) {
  const lower = emptyCaches("decoder_lower");
  const upper = emptyCaches("decoder_upper");
  let total = token_ids.length;
  const { inputs_embeds } = await sessions.embed_tokens.run({ input_ids: ints(token_ids) });
  let { hidden_states } = await runHalf(prefillGraph("decoder_lower"), { inputs_embeds }, lower, total);

  if (manifest.prober.pooling !== "last") throw new Error("this example knows probers of one row only");
  const at = (total + manifest.prober.token_offset) * D;
  const p_unsafe = hidden_states.data.every(Number.isFinite) ? await probe(hidden_states.data.slice(at, at + D)) : NaN;
  const safe = 0 <= p_unsafe && p_unsafe <= (threshold ?? manifest.prober.threshold) && p_unsafe <= 1;

  const generated = [];
  while (true) {
    const num_logits = new ort.Tensor("int64", BigInt64Array.of(1n), [1]);
    const half = generated.length ? "decoder_upper" : prefillGraph("decoder_upper");
    let { last_hidden_state } = await runHalf(half, { hidden_states, num_logits }, upper, total);
    if (!safe) {
      const strength = floats([manifest.refusal.strength], [1]);
      const steered = await sessions.refusal_head.run({ last_hidden_state, strength });
      last_hidden_state = steered.steered_hidden_state;
    }
    const { logits } = await sessions.lm_head.run({ last_hidden_state });
    const token = logits.data.reduce((best, x, i, all) => (x > all[best] ? i : best), 0);
    generated.push(token);
    const ended = manifest.prompt.end_token_ids.includes(token);
    if (ended || generated.length === max_tokens) {
      return { token_ids: generated, p_unsafe, action: safe ? "pass" : "steer", finish_reason: ended ? "stop" : "length" };
    }
    total += 1;
    const row = await sessions.embed_tokens.run({ input_ids: ints([token]) });
    ({ hidden_states } = await runHalf("decoder_lower", { inputs_embeds: row.inputs_embeds }, lower, total));
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(JSON.parse(line))));
}
