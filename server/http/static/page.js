// The page at /: images in, captions out, over the interface that everybody uses (/openapi.json).
"use strict";

const $ = id => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const BEAMS = 4, MOST_TRIES = 20;
const STAGES = { queue: "queue", preprocess: "image", encode: "encode", decode: "tokens" };
const cards = [];  // one for each image that is shown
let places = 4;  // requests at once; fewer once the server has said that it is too many
const waiting = [];

// --- Asking -------------------------------------------------------------------------------------

async function inTurn(work) {
  if (places === 0) await new Promise(go => waiting.push(go));
  else places--;
  try { return await work(); } finally {
    if (waiting.length) waiting.shift()(); else places++;
  }
}

const pause = seconds => new Promise(done => setTimeout(done, seconds * 1000));

function formOf(file, fields) {
  const form = new FormData();
  form.append("image", file);
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  return form;
}

// What the server answers to an image: calls told(text) as the caption grows, returns the whole answer.
async function ask(file, fields, told, signal) {
  for (let tries = 1; ; tries++) {
    const headers = { Accept: fields.num_beams ? "application/json" : "text/event-stream" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const reply = await fetch("/caption", { method: "POST", body: formOf(file, fields), headers, signal });
    if (reply.status === 429 && tries < MOST_TRIES) {
      await pause(Number(reply.headers.get("Retry-After")) || 1);
      continue;
    }
    if (reply.status === 401) {
      $("keys").hidden = false;
      $("key").focus();
      throw new Error("This service wants an API key: enter yours, then caption again.");
    }
    if (!reply.ok || fields.num_beams) {
      const answer = await reply.json();
      if (answer.error) throw new Error(answer.error.message);
      return answer;
    }
    return await read(reply.body, told);
  }
}

// Server-sent events: token, token, ..., then caption or error.
async function read(body, told) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", whole = null; ;) {
    const { done, value } = await reader.read();
    if (done) {
      if (whole) return whole;
      throw new Error("The answer broke off.");
    }
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const [, kind, data] = /^event: (\w+)\ndata: (.*)$/s.exec(text.slice(0, end)) ?? [];
      if (!kind) continue;
      const news = JSON.parse(data);
      if (kind === "error") throw new Error(news.error.message);
      if (kind === "caption") whole = news; else told(news.text);
    }
  }
}

// --- Showing ------------------------------------------------------------------------------------

function copyOf(id) { return $(id).content.firstElementChild.cloneNode(true); }

function addCard(file) {
  const figure = copyOf("card"), image = figure.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  figure.querySelector(".name").textContent = file.name;
  $("cards").append(figure);
  cards.push({ file, figure, stop: null });
}

function addWay(card, how) {
  const way = copyOf("way");
  way.querySelector(".how").textContent = how;
  card.figure.querySelector(".ways").append(way);
  return way;
}

function showAnswer(way, answer) {
  const text = (answer.caption || "(nothing)") + (answer.finish_reason === "length" ? " … (cut off)" : "");
  way.querySelector(".caption").textContent = text;
  if (answer.score !== null) {
    const sure = Math.exp(answer.score), score = way.querySelector(".score");
    score.hidden = false;
    score.querySelector(".bar div").style.width = `${100 * sure}%`;
    score.querySelector("span").textContent = `probability ${(100 * sure).toFixed(sure > 0.99 ? 2 : 0)} % a token`;
    score.title = `score ${answer.score.toFixed(4)}: the mean log-probability of its tokens`;
  }
  const time = way.querySelector(".time"), bar = time.querySelector(".bar"), legend = time.querySelector("span");
  time.hidden = false;
  for (const [stage, name] of Object.entries(STAGES)) {
    const ms = answer.timing_ms[stage], part = document.createElement("div");
    const mark = document.createElement("i"), label = document.createElement("b");
    part.className = mark.className = stage;
    part.style.flexGrow = ms;
    bar.append(part);
    label.append(mark, `${name} ${ms < 10 ? ms.toFixed(1) : Math.round(ms)}`);
    legend.append(label, " ");
  }
  legend.append(Object.assign(document.createElement("b"), { textContent: `of ${Math.round(answer.timing_ms.total)} ms` }));
}

async function fill(card, way, fields) {
  const caption = way.querySelector(".caption");
  caption.classList.add("growing");
  try {
    const answer = await inTurn(() =>
      ask(card.file, fields, text => { caption.textContent = text; }, card.stop.signal));
    showAnswer(way, answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    caption.classList.add("error");
    caption.textContent = error instanceof TypeError ? "The server did not answer." : error.message;
  } finally {
    caption.classList.remove("growing");
  }
}

function captionCard(card) {
  card.stop?.abort();
  card.stop = new AbortController();
  card.figure.querySelector(".ways").replaceChildren();
  const fields = { prompt: $("prompt").value, model: $("model").length > 1 ? $("model").value : "" };
  const both = $("beams").checked;
  fill(card, addWay(card, both ? "greedy" : ""), fields);
  if (both) fill(card, addWay(card, `${BEAMS} beams`), { ...fields, num_beams: BEAMS });
}

function take(files) {
  const images = [...files].filter(file => file.type.startsWith("image/"));
  $("status").textContent = files.length && !images.length ? "That is not an image." : "";
  if (!images.length) return;
  for (const card of cards.splice(0)) {
    card.stop?.abort();
    URL.revokeObjectURL(card.figure.querySelector("img").src);
    card.figure.remove();
  }
  images.forEach(addCard);
  cards.forEach(captionCard);
}

// --- Code to copy -------------------------------------------------------------------------------

const quoted = text => JSON.stringify(text);

const CODE = {
  curl: () => {
    const fields = [["prompt", $("prompt").value], ["num_beams", $("beams").checked ? BEAMS : ""]];
    const more = fields.filter(([, value]) => value).map(([name, value]) =>
      ` \\\n  -F '${name}=${String(value).replaceAll("'", `'\\''`)}'`);
    return `curl -F image=@photo.jpg${more.join("")} \\\n  ${location.origin}/caption`;
  },
  Python: () => {
    const fields = [["prompt", $("prompt").value && quoted($("prompt").value)],
                    ["num_beams", $("beams").checked && String(BEAMS)]].filter(([, value]) => value);
    const data = fields.length ? `\n    data={${fields.map(([n, v]) => `"${n}": ${v}`).join(", ")}},` : "";
    return `from pathlib import Path\n\nimport requests\n\nanswer = requests.post(\n    "${location.origin}/caption",\n`
      + `    files={"image": Path("photo.jpg").read_bytes()},${data}\n)\nprint(answer.json()["caption"])`;
  },
  openai: () => `import base64\nfrom pathlib import Path\n\nimport openai\n\n`
    + `client = openai.OpenAI(base_url="${location.origin}/v1", api_key=${quoted($("key").value ? "..." : "none")})\n`
    + `image = base64.b64encode(Path("photo.jpg").read_bytes()).decode()\n`
    + `chat = client.chat.completions.create(\n    model=${quoted($("model").value)},\n    messages=[{"role": "user", "content": [\n`
    + ($("prompt").value ? `        {"type": "text", "text": ${quoted($("prompt").value)}},\n` : "")
    + `        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},\n    ]}],\n)\n`
    + `print(chat.choices[0].message.content)`,
};

function showCode(name) {
  for (const tab of $("tabs").children) {
    const chosen = tab.textContent === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) $("panel").setAttribute("aria-labelledby", tab.id);
  }
  $("code").textContent = CODE[name]();
}

const chosenCode = () => [...$("tabs").children].find(tab => tab.getAttribute("aria-selected") === "true").textContent;

// --- What people do -----------------------------------------------------------------------------

for (const name of Object.keys(CODE)) {
  const tab = Object.assign(document.createElement("button"), { type: "button", id: `tab-${name}`, textContent: name });
  tab.setAttribute("role", "tab");
  tab.setAttribute("aria-controls", "panel");
  tab.onclick = () => showCode(name);
  $("tabs").append(tab);
}
$("tabs").onkeydown = event => {
  const tabs = [...$("tabs").children], step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
};
$("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copy").textContent = "Copied";
  } catch {  // no permission, or the page did not come over https
    getSelection().selectAllChildren($("code"));
    $("copy").textContent = "Selected: copy it with your keyboard";
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
};

for (const name of Object.keys(facts.models)) $("model").append(new Option(name));
$("models").hidden = $("model").length < 2;
function describe() {
  const { about, asked } = facts.models[$("model").value];
  $("about").textContent = about;
  $("asks").textContent = asked ? "Question about the image" : "How the caption begins";
  $("prompt").placeholder = asked ? "how many cats are there" : "";
}
for (const name of facts.samples) {
  const button = Object.assign(document.createElement("button"), { type: "button", title: name });
  button.append(Object.assign(new Image(), { src: `/samples/${name}`, alt: name.slice(0, -4) }));
  button.onclick = async () => {
    const blob = await (await fetch(`/samples/${name}`)).blob();
    take([new File([blob], name, { type: blob.type })]);
  };
  $("samples").append(button);
}
for (const link of document.querySelectorAll(".ops")) link.hidden = !facts.ops;

$("choose").onclick = () => $("file").click();
$("photograph").onclick = () => $("camera").click();
$("file").onchange = $("camera").onchange = event => { take(event.target.files); event.target.value = ""; };
document.onpaste = event => { if (event.clipboardData.files.length) take(event.clipboardData.files); };
document.ondragover = event => { event.preventDefault(); $("drop").classList.add("over"); };
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = event => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
};
$("options").onsubmit = event => {
  event.preventDefault();
  $("status").textContent = cards.length ? "" : "Choose an image first.";
  cards.forEach(captionCard);
};
$("beams").onchange = () => cards.forEach(captionCard);
$("model").onchange = () => { describe(); cards.forEach(captionCard); };
$("options").addEventListener("input", () => showCode(chosenCode()));
describe();
showCode("curl");
