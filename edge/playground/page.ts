/** The playground: a chat with pictures. Knows the page; what the API says and what is measured is stream.ts. */
import type { ChatMessage, ChatRequest } from "../../shared/api.ts";
import { codeFor, type Language, pictureMark } from "./code.ts";
import { drawExample, type Picture, readPicture } from "./pictures.ts";
import { type Answer, ask, call, Refused, refusal } from "./stream.ts";
import { asked, make, numbersOf, verdict, write } from "./view.ts";

interface Turn {
  pictures: Picture[];
  question: string;
  answer: string;
}

const $ = <T extends HTMLElement = HTMLInputElement>(id: string) => document.getElementById(id) as T;
const composer = $<HTMLFormElement>("composer");
const question = $<HTMLTextAreaElement>("question");
const send = $<HTMLButtonElement>("send");
const api = (path: string) => new URL(`v1/${path}`, document.baseURI);
const newSeed = () => Math.floor(Math.random() * 2 ** 31);

let model: string | undefined;
let turns: Turn[] = [];
/** Those that the next question is about. */
let pictures: Picture[] = [];
/** What the next answer is drawn with, at a temperature above 0. */
let seed = newSeed();
/** Set while an answer is under way. */
let running: AbortController | null = null;

/** For those who hear the page: told once, not with every token. */
const say = (text: string) => ($("status").textContent = text);
const words = (error: unknown) => (error instanceof Error ? error.message : String(error));

// Asking

function requestOf(history: Turn[], next: Turn, url: (picture: Picture) => string): ChatRequest {
  const messages = [...history, next].flatMap((turn): ChatMessage[] => {
    const images = turn.pictures.map((picture) => ({ type: "image_url" as const, image_url: { url: url(picture) } }));
    const content = images.length > 0 ? [...images, { type: "text" as const, text: turn.question }] : turn.question;
    const asked: ChatMessage = { role: "user", content };
    return turn === next ? [asked] : [asked, { role: "assistant", content: turn.answer }];
  });
  const temperature = $("temperature").valueAsNumber;
  return {
    model,
    temperature,
    seed: temperature > 0 ? seed : undefined,
    max_tokens: $("max_tokens").valueAsNumber,
    messages,
  };
}

const headers = (): Record<string, string> => ($("key").value ? { authorization: `Bearer ${$("key").value}` } : {});

async function submit(): Promise<void> {
  const turn: Turn = { pictures, question: question.value.trim(), answer: "" };
  if (turn.question === "" || running) return;
  const chat = turns;
  const compare = $("compare").checked;
  const request = requestOf(chat, turn, ({ url }) => url);
  const { signal } = (running = new AbortController());
  const answers = make("div", { className: compare ? "answers two" : "answers" });
  const article = make("article", {}, asked(pictures, turn.question), answers);
  $("turns").append(article);
  complain(null);
  compose([], "");
  busy(true);
  try {
    const drafting = ask(api("chat/completions"), request, headers(), signal);
    await show(drafting, answers, compare ? "With drafts" : "Answer").finally(() => (turn.answer = drafting.text));
    say(`Answer: ${drafting.text}`);
    if (!compare) return;
    // After the first and not beside it: the engine decodes one answer at a time, and both would only wait.
    const plain = ask(api("chat/completions"), { ...request, drafter: "none" }, headers(), signal);
    await show(plain, answers, "Plain decoding");
    article.append(make("p", { className: "verdict" }, ...verdict(drafting, plain)));
    say(article.lastElementChild!.textContent);
  } catch (error) {
    if (signal.aborted) say("Stopped.");
    if (turn.answer === "" && article.isConnected) {
      // Nothing came: the question goes back to where it can be mended.
      article.remove();
      compose([...turn.pictures, ...pictures], `${turn.question}\n${question.value}`.trim());
      if (!signal.aborted) complain(error);
    } else {
      const [text, role] = signal.aborted ? ["Stopped.", null] : [words(error), "alert"];
      answers.lastElementChild!.append(make("p", { className: "fault", role }, text));
    }
  } finally {
    if (turn.answer !== "") chat.push(turn);
    seed = newSeed();
    running = null;
    busy(false);
    showCode();
    follow();
  }
}

function newChat(): void {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  compose([], "");
  complain(null);
  say("");
  question.focus();
}

/** The one button sends, and stops what is under way; so it keeps the focus. */
function busy(on: boolean): void {
  send.type = on ? "button" : "submit";
  send.textContent = on ? "Stop" : "Send";
  if (on) say("Answering.");
}

// Showing

/** Writes an answer as it comes, with its numbers. Rejects with what breaks it off. */
async function show(answer: Answer, answers: HTMLElement, title: string): Promise<void> {
  const text = make("p", { className: "text" });
  const numbers = make("dl");
  const heading = make("h3", { className: title === "Answer" ? "unseen" : "" }, title);
  const panel = make("section", { className: "answer", ariaLabel: title, ariaBusy: "true" }, heading, text, numbers);
  answers.append(panel);
  pinned = true;
  let frame = 0;
  const paint = () => {
    frame = 0;
    numbers.replaceChildren(...numbersOf(answer));
    follow();
  };
  try {
    for await (const { drafted, own } of answer) {
      write(text, "draft", drafted);
      write(text, "own", own);
      frame ||= requestAnimationFrame(paint);
    }
  } finally {
    cancelAnimationFrame(frame);
    paint();
    panel.ariaBusy = "false";
    if (answer.finish === "length") panel.append(make("p", { className: "fault" }, "Cut off at the most tokens."));
  }
}

/** Whether the end of the page stays in view while text comes: until someone scrolls up, and again from when they return. */
let pinned = true;
let lastTop = 0;
const root = document.documentElement;
document.onscroll = () => {
  if (innerHeight + scrollY > root.scrollHeight - 40) pinned = true;
  else if (scrollY < lastTop) pinned = false;
  lastTop = scrollY;
};

function follow(): void {
  if (pinned) scrollTo({ top: root.scrollHeight });
}

/** Shows an error over the question and marks the field that it is about; null clears both. */
function complain(error: unknown): void {
  $("error").textContent = error === null ? "" : words(error);
  for (const marked of composer.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  if (!(error instanceof Refused)) return;
  const [, message, part] = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(error.param ?? "") ?? [];
  if (Number(message) === 2 * turns.length) $("pictures").children[Number(part)]?.classList.add("bad");
  const field = document.getElementById(error.status === 401 ? "key" : (error.param ?? ""));
  if (!(field instanceof HTMLInputElement)) return;
  field.ariaInvalid = "true";
  field.closest("details")!.open = true;
  field.focus();
}

// Composing

function compose(next: Picture[], text: string): void {
  pictures = next;
  question.value = text;
  const thumbnails = pictures.map(({ url, name }, index) => {
    const remove = make("button", { type: "button", ariaLabel: `Remove ${name}` }, "×");
    remove.onclick = () => {
      compose(pictures.toSpliced(index, 1), question.value);
      const others = $("pictures").querySelectorAll("button");
      (others[index] ?? others[index - 1] ?? $("file")).focus();
    };
    return make("li", {}, make("img", { src: url, alt: name }), remove);
  });
  $("pictures").replaceChildren(...thumbnails);
  showCode();
}

async function add(files: Iterable<File>): Promise<void> {
  complain(null);
  for (const file of files) {
    try {
      const picture = await readPicture(file);
      compose([...pictures, picture], question.value);
    } catch (error) {
      complain(error);
    }
  }
}

/** The code for what would be sent now, or else for what was sent last. */
function showCode(): void {
  if (!$<HTMLDetailsElement>("code").open) return;
  const typed = question.value.trim() !== "" || pictures.length > 0 || turns.length === 0;
  const next = typed ? { pictures, question: question.value.trim(), answer: "" } : turns.at(-1)!;
  const files: Picture[] = [];
  const request = requestOf(typed ? turns : turns.slice(0, -1), next, (picture) =>
    pictureMark(files.push(picture) - 1),
  );
  const language = new FormData(composer).get("language") as Language;
  const base = api("").href.replace(/\/$/, "");
  $("snippet").value = codeFor(language, request, files, base, $("key").value !== "");
}

async function copy(): Promise<void> {
  $("snippet").select();
  // The clipboard's interface is there over https and on loopback only.
  if (navigator.clipboard) await navigator.clipboard.writeText($("snippet").value);
  else document.execCommand("copy");
  say("Copied.");
}

async function nameModel(): Promise<void> {
  try {
    const response = await call(api("models"), { headers: headers() });
    if (!response.ok) throw await refusal(response);
    model = ((await response.json()) as { data: { id: string }[] }).data[0].id;
    $("model").textContent = model;
    complain(null);
    showCode();
  } catch (error) {
    complain(error);
  }
}

// Wiring

composer.onsubmit = (event) => {
  event.preventDefault();
  void submit();
};
// A field that is wrong can be shown only when it is unfolded. (The event does not bubble.)
const unfold = ({ target }: Event) => (target as Element).closest("details")?.setAttribute("open", "");
composer.addEventListener("invalid", unfold, { capture: true });
send.onclick = () => running?.abort();
question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
};
document.onkeydown = ({ key }) => {
  if (key === "Escape") running?.abort();
};
composer.oninput = showCode;
$("code").ontoggle = showCode;
$("new").onclick = newChat;
$("example").onclick = () => compose([...pictures, drawExample()], question.value || "Describe this image in detail.");
$("copy").onclick = copy;
$("file").onchange = async () => {
  await add([...$("file").files!]);
  $("file").value = "";
};
document.onpaste = (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0) return;
  event.preventDefault();
  void add(files);
};
/** A link is taken too, only to be refused: the browser would leave the page for it. */
const isForUs = ({ dataTransfer }: DragEvent) =>
  ["Files", "text/uri-list"].some((type) => dataTransfer?.types.includes(type));
document.ondragover = (event) => {
  if (!isForUs(event)) return;
  event.preventDefault();
  root.classList.add("dragging");
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) root.classList.remove("dragging");
};
document.ondrop = (event) => {
  if (!isForUs(event)) return;
  event.preventDefault();
  root.classList.remove("dragging");
  const { files } = event.dataTransfer!;
  if (files.length > 0) void add([...files]);
  else complain(new Error("A link cannot be taken; drop the picture's file."));
};
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => {
  sessionStorage.setItem("key", $("key").value);
  void nameModel();
};
void nameModel();
