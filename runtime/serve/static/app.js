// The page: asks /v1/chat/completions as any client does, and shows the `autosteer` object of the answers.

import { History, showCost, showStages, showVerdict, verdictKind, verdictWords } from "./gate.js";

const $ = (id) => document.getElementById(id);
const state = {
  model: null, // what /v1/models says
  dialogue: [], // turns whose answers were not refused
  pictures: [], // data URLs of the message being written
  running: null, // AbortController of the answers being written
};
const history = new History($("history"));

// --- the server -------------------------------------------------------------------------------------------------

async function call(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  if (response.status === 401) askForKey();
  throw new Error(said?.error?.message ?? `the server answered ${response.status}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}

async function connect() {
  try {
    const { data } = await (await call("/v1/models")).json();
    state.model = data[0];
  } catch (error) {
    $("model").textContent = "not connected";
    return fail(error);
  }
  const facts = state.model.autosteer;
  const gate = facts.layer === null ? "no gate" : `gate at layer ${facts.layer} of ${facts.layers}`;
  $("model").textContent = `${state.model.id} · ${facts.precision} · ${gate} · context ${facts.context_length}`;
  document.querySelector("label[for=file]").hidden = !facts.pictures;
  showPolicies(facts);
  fail(null);
}

function showPolicies({ policies, policy }) {
  const fieldset = $("policies");
  fieldset.querySelectorAll("label").forEach((label) => label.remove());
  for (const name of policies) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "policy", value: name });
    input.checked = name === policy;
    label.append(input, name);
    fieldset.append(label);
  }
  const can = policies.includes("off") && policies.length > 1;
  $("compare").disabled = !can;
  $("compare-label").hidden = policies.length < 2 && !can;
  $("compare-label").title = can ? "" : "Start the server with --weakest-policy off to compare";
}

function askForKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// --- a message --------------------------------------------------------------------------------------------------

async function addPictures(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    if (state.pictures.length >= (state.model?.autosteer.pictures ?? 0)) {
      fail(new Error(`this server takes ${state.model?.autosteer.pictures ?? 0} pictures in a request`));
      break;
    }
    state.pictures.push(await asDataUrl(file));
  }
  showPictures();
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function image(url, alt) {
  return Object.assign(document.createElement("img"), { src: url, alt });
}

function showPictures() {
  $("pictures").replaceChildren(
    ...state.pictures.map((url, n) => {
      const item = document.createElement("li");
      const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×", className: "plain" });
      remove.setAttribute("aria-label", `Remove picture ${n + 1}`);
      remove.onclick = () => {
        state.pictures.splice(n, 1);
        showPictures();
        $("text").focus();
      };
      item.append(image(url, `picture ${n + 1}`), remove);
      return item;
    }),
  );
}

function fail(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
}

async function send() {
  const text = $("text").value.trim();
  if (!text || state.running || !state.model) return;
  fail(null);
  const pictures = state.pictures;
  const parts = [...pictures.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
  const turn = { role: "user", content: parts };
  const shown = addTurn(text, pictures);
  $("text").value = "";
  state.pictures = [];
  showPictures();
  const policy = document.querySelector("input[name=policy]:checked")?.value ?? "off";
  const policies = $("compare").checked && policy !== "off" ? ["off", policy] : [policy];
  state.running = new AbortController();
  $("send").disabled = true;
  $("cancel").hidden = false;
  try {
    let last = null;
    for (const name of policies) last = await answer(shown, [...state.dialogue, turn], name);
    const { verdict } = last.facts;
    $("announced").textContent = `${verdictWords(verdict)[0]}: ${last.text}`; // once, not token by token
    if (verdict.action === "pass") state.dialogue.push(turn, { role: "assistant", content: last.text });
    else forget(shown);
  } catch (error) {
    forget(shown);
    if (error.name !== "AbortError") fail(error);
  } finally {
    state.running = null;
    $("send").disabled = false;
    $("cancel").hidden = true;
    $("text").focus();
  }
}

function addTurn(text, pictures) {
  const item = $("answer").content.firstElementChild.cloneNode(true);
  item.querySelector(".text").textContent = text;
  item.querySelector(".thumbs").append(...pictures.map((url, n) => image(url, `picture ${n + 1} of the message`)));
  $("turns").append(item);
  $("empty").hidden = true;
  item.scrollIntoView({ block: "end" });
  return item;
}

function forget(item) {
  item.classList.add("forgotten");
  const note = Object.assign(document.createElement("p"), { className: "note" });
  note.textContent = "This turn is not part of the dialogue any more: with it, every later turn would count as unsafe.";
  item.append(note);
}

async function answer(item, messages, policy) {
  const box = document.createElement("div");
  box.className = "answer waiting";
  const badge = Object.assign(document.createElement("p"), { className: "badge" });
  badge.append(Object.assign(document.createElement("b"), { textContent: "…" }), ` ${policy === "off" ? "gate off" : policy}`);
  const words = Object.assign(document.createElement("p"), { className: "text" });
  box.append(badge, words);
  item.querySelector(".answers").append(box);
  item.scrollIntoView({ block: "end" });
  let facts = null;
  try {
    const body = { model: state.model.id, messages, stream: true, autosteer: { policy } };
    const response = await call("/v1/chat/completions", body, state.running.signal);
    for await (const chunk of events(response)) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (chunk.autosteer) {
        if (!facts) begin(box, badge, chunk.autosteer);
        facts = chunk.autosteer;
        showStages($("stages"), $("stage-list"), facts.first_token_ms);
        showCost($("cost"), facts);
      }
      words.textContent += delta.content ?? delta.refusal ?? "";
      item.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    box.classList.add("failed");
    badge.querySelector("b").textContent = error.name === "AbortError" ? "CANCELLED" : "FAILED";
    throw error;
  } finally {
    box.classList.remove("waiting");
  }
  return { text: words.textContent, facts };
}

function begin(box, badge, facts) {
  box.classList.add(verdictKind(facts.verdict));
  const [head, rest] = verdictWords(facts.verdict);
  badge.replaceChildren(Object.assign(document.createElement("b"), { textContent: head }), ` ${rest}`);
  if (facts.verdict.p_unsafe === null) return; // gate off: what the gauge shows stays
  showVerdict($("verdict"), $("gauge"), facts.verdict);
  history.add(facts.verdict);
}

// --- events -----------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("text").addEventListener("paste", (event) => addPictures(event.clipboardData.files));
$("file").addEventListener("change", async (event) => {
  await addPictures(event.target.files);
  event.target.value = "";
});
$("cancel").addEventListener("click", () => state.running?.abort());
$("new-chat").addEventListener("click", () => {
  state.running?.abort();
  state.dialogue = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  fail(null);
  $("text").focus();
});
$("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("key", $("key").value.trim());
  connect();
});
const chat = document.querySelector(".chat");
for (const name of ["dragenter", "dragover"]) {
  chat.addEventListener(name, (event) => {
    event.preventDefault();
    chat.classList.add("dropping");
  });
}
for (const name of ["dragleave", "drop"]) chat.addEventListener(name, () => chat.classList.remove("dropping"));
chat.addEventListener("drop", (event) => {
  event.preventDefault();
  addPictures(event.dataTransfer.files);
});

connect();
