// What the gate saw and what it cost: words, the gauge, the history, and the stages of the first token.

const STAGES = [
  ["queue", "waiting for its turn"],
  ["vision", "pictures"],
  ["embed", "embedding"],
  ["lower", "decoder below the gate"],
  ["gate", "gate"],
  ["upper", "decoder above the gate"],
];
const REST = "everything else";
const SVG = "http://www.w3.org/2000/svg";
const MOST_SHOWN = 30;

export function verdictKind({ p_unsafe, unsafe, action }) {
  if (p_unsafe === null) return "unguarded";
  return unsafe && action === "pass" ? "watched" : action;
}

/** The verdict in words: [the action, why]. */
export function verdictWords({ p_unsafe, unsafe, action, policy, threshold, strength }) {
  if (p_unsafe === null) return ["GATE OFF", "not scored"];
  const relation = unsafe ? ">" : "≤";
  const more = action === "steer" ? `, strength ${strength}` : unsafe && action === "pass" ? `; policy ${policy} lets it pass` : "";
  return [action.toUpperCase(), `p_unsafe ${number(p_unsafe)} ${relation} ${threshold}${more}`];
}

export function showVerdict(words, gauge, verdict) {
  const [head, rest] = verdictWords(verdict);
  words.replaceChildren(Object.assign(document.createElement("b"), { textContent: head }), document.createElement("br"), rest);
  const limit = Math.min(Math.max(verdict.threshold, 0), 1);
  gauge.classList.remove("idle");
  gauge.style.setProperty("--at", `${100 * limit}%`);
  gauge.querySelector(".needle").style.left = `${100 * verdict.p_unsafe}%`;
  gauge.querySelector(".limit span").textContent = `threshold ${verdict.threshold}`;
  gauge.setAttribute("aria-valuenow", number(verdict.p_unsafe));
  gauge.setAttribute("aria-valuetext", `${number(verdict.p_unsafe)}, threshold ${verdict.threshold}: ${head.toLowerCase()}`);
}

/** A dot for each scored prompt, oldest on the left. */
export class History {
  constructor(svg) {
    this.svg = svg;
    this.verdicts = [];
  }

  add(verdict) {
    this.verdicts = [...this.verdicts, verdict].slice(-MOST_SHOWN);
    const y = (p) => 66 - 60 * p;
    const step = 290 / MOST_SHOWN;
    const dots = this.verdicts.map((v, n) => {
      const dot = shape("circle", { cx: 8 + n * step, cy: y(v.p_unsafe), r: 4, class: verdictKind(v) });
      dot.append(Object.assign(document.createElementNS(SVG, "title"), { textContent: verdictWords(v).join(" ") }));
      return dot;
    });
    const rules = [0, 1].map((p) => shape("line", { x1: 0, x2: 300, y1: y(p), y2: y(p) }));
    const limit = y(Math.min(Math.max(verdict.threshold, 0), 1));
    this.svg.replaceChildren(...rules, shape("line", { x1: 0, x2: 300, y1: limit, y2: limit, class: "threshold" }), ...dots);
    const scores = this.verdicts.map((v) => number(v.p_unsafe)).join(", ");
    this.svg.setAttribute("aria-label", `Scores of ${this.verdicts.length} prompts, oldest first: ${scores}`);
  }
}

export function showStages(bar, list, times) {
  const known = STAGES.map(([name, words]) => [words, times[name] ?? null]);
  const rest = Math.max(times.total - known.reduce((sum, [, ms]) => sum + (ms ?? 0), 0), 0);
  const all = [...known, [REST, rest]];
  bar.replaceChildren(
    ...all.map(([, ms], n) => {
      const part = document.createElement("div");
      part.style.flexGrow = ms ?? 0;
      part.style.background = `var(--stage-${n})`;
      return part;
    }),
  );
  bar.setAttribute("aria-label", all.map(([words, ms]) => `${words}: ${milliseconds(ms)}`).join("; "));
  list.replaceChildren(
    ...all.flatMap(([words, ms], n) => [swatch(n), cell("dt", words), cell("dd", milliseconds(ms))]),
    swatch(null), cell("dt", "total"), cell("dd", milliseconds(times.total)),
  );
}

export function showCost(target, facts) {
  const parts = [`${facts.prompt_tokens} tokens in the prompt`];
  if (facts.reused_tokens) parts.push(`${facts.reused_tokens} of them known from the turn before`);
  facts.pictures.forEach(({ tokens, tiles }, n) => {
    const encoded = tiles ? `${tiles} tiles` : "known already";
    parts.push(`picture ${n + 1}: ${tokens} tokens, ${encoded}`);
  });
  if (facts.tokens_per_second) parts.push(`${facts.tokens_per_second} tokens a second after the first`);
  target.textContent = `${parts.join("; ")}.`;
}

function number(p) {
  return p.toFixed(3);
}

function milliseconds(ms) {
  if (ms === null) return "never ran";
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(1)} ms`;
}

function cell(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

function swatch(n) {
  const found = document.createElement("i");
  if (n !== null) found.style.background = `var(--stage-${n})`;
  return found;
}

function shape(tag, attributes) {
  const found = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  return found;
}
