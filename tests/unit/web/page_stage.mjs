// The chat page's script on a stage without a browser: just enough of a document, and a fetch that plays a scene.
// `node page_stage.mjs index.html SCENE` prints what a person would see, as JSON.

import { readFileSync } from "node:fs";
import vm from "node:vm";

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], parent: null, listeners: {}, attributes: {}, value: "", disabled: false, options: [] });
    this.classes = new Set();
    const classes = this.classes;
    this.classList = { add: (name) => classes.add(name), remove: (name) => classes.delete(name) };
  }
  set className(text) { for (const name of text.split(" ")) if (name) this.classes.add(name); }
  set textContent(text) { this.children = text ? [text] : []; }
  get textContent() { return this.children.map((child) => (typeof child === "string" ? child : child.textContent)).join(""); }
  append(...nodes) { for (const node of nodes) { if (node.tag) node.parent = this; this.children.push(node); } }
  remove() { if (this.parent) this.parent.children = this.parent.children.filter((node) => node !== this); }
  replaceChildren() { this.children = []; }
  querySelectorAll(selector) { return this.children.filter((node) => node.classes?.has(selector.slice(1))); }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; }
  addEventListener(name, call) { this.listeners[name] = call; }
  focus() {}
}

const byId = {};
const store = new Map();
const asked = [];
const scene = process.argv[3];
const page = readFileSync(process.argv[2], "utf8");
let reloads = 0;

const encode = (...events) => new TextEncoder().encode(events.join(""));
const delta = (text) => `data: ${JSON.stringify({ delta: text })}\n\n`;
const failed = 'event: error\ndata: {"error":{"message":"The upstream broke off.","code":"upstream_broken"}}\n\n';
const done = 'event: done\ndata: {"finish_reason":"stop"}\n\n';

// A body that gives these chunks, one a read, and then breaks, ends or says nothing more until it is aborted.
const body = (chunks, end, signal) => ({
  getReader: () => ({
    read: () => {
      if (signal.aborted) return Promise.reject(new DOMException("aborted", "AbortError"));
      if (chunks.length) return Promise.resolve({ done: false, value: chunks.shift() });
      if (end === "break") return Promise.reject(new TypeError("network error"));
      if (end === "end") return Promise.resolve({ done: true });
      return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError"))));
    },
  }),
});
const refusal = (status, error) => ({ ok: false, status, headers: new Headers(), text: async () => JSON.stringify({ error }) });

const good = (signal) => ({ ok: true, body: body([encode(delta("Good."), done)], "end", signal) });
const first = {
  error_then_break: (signal) => ({ ok: true, body: body([encode(delta("Half"), failed)], "break", signal) }),
  error_alone_then_break: (signal) => ({ ok: true, body: body([encode(failed)], "break", signal) }),
  break_alone: (signal) => ({ ok: true, body: body([encode(delta("Half"))], "break", signal) }),
  offline: () => { throw new TypeError("Failed to fetch"); },
  old_session: () => refusal(403, { code: "invalid_token", message: "The token's signature is wrong." }),
  no_session: () => refusal(401, { code: "missing_token", message: "This needs a session token." }),
  other_403: () => refusal(403, { code: "model_not_allowed", message: "Not this model." }),
  too_large: () => refusal(413, { code: "body_too_large", message: "Body too large." }),
  new_chat: (signal) => ({ ok: true, body: body([encode(delta("Old text"))], "silent", signal) }),
  stopped: (signal) => ({ ok: true, body: body([], "silent", signal) }),
}[scene];

const element = (id) => (byId[id] ??= new Element(id));
const context = vm.createContext({
  document: { getElementById: element, createElement: (tag) => new Element(tag), addEventListener: () => {} },
  fetch: async (path, options) => {
    if (path === "v1/models") return { ok: false };
    asked.push({ messages: JSON.parse(options.body).messages.map((message) => message.content), signal: options.signal });
    return asked.length === 1 ? first(options.signal) : good(options.signal);
  },
  sessionStorage: {
    getItem: (name) => store.get(name) ?? null,
    setItem: (name, value) => store.set(name, value),
    removeItem: (name) => store.delete(name),
  },
  location: { reload: () => { reloads += 1; } },
  AbortController, TextDecoder, performance, setTimeout, clearTimeout, Option: Element,
});

const settle = () => new Promise((resolve) => setImmediate(() => setImmediate(resolve)));
const say = (text) => {
  element("prompt").value = text;
  element("form").listeners.submit({ preventDefault() {} });
};
const look = () => ({
  log: element("log").children.map((box) => box.children.filter((part) => !part.classes.has("note")).map((part) => part.textContent).join("|")),
  waits: element("log").children.some((box) => box.classes.has("waits")),
  input: element("prompt").value,
  canSend: !element("send").disabled,
});

vm.runInContext(/<script>(.*?)<\/script>/s.exec(page)[1], context);
say("First.");
await settle();
const during = look();
if (scene === "new_chat") element("clear").listeners.click();
if (scene === "stopped") element("stop").listeners.click();
await settle();
const after = look();
const problem = element("log").children.at(-1)?.children.find((part) => part.classes.has("problem"));
const button = problem?.children.find((part) => part.tag === "button");
if (button) button.listeners.click();
say("Second.");
await settle();
process.stdout.write(JSON.stringify({
  during, after, reloads, kept: store.get("prompt") ?? "", end: look(),
  asked: asked.map((one) => one.messages), aborted: asked[0].signal.aborted,
}));
