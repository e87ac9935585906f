// Drives the JavaScript SDKs through the session; the twin of session.py, with the same input and output.
import { createHash } from "node:crypto";
import { text } from "node:stream/consumers";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const LONG = 2000;
const FINAL = { chat: "finalChatCompletion", responses: "finalResponse", messages: "finalMessage" };

// A value as plain JSON; a long text as its length and digest.
function plain(value) {
  const written = JSON.stringify(value, (_, item) => {
    if (typeof item !== "string" || item.length <= LONG) return item;
    const digest = createHash("sha256").update(item, "utf16le").digest("hex");
    return `${item.slice(0, 40)}... ${item.length} characters, ${digest}`;
  });
  return written === undefined ? null : JSON.parse(written);
}

const headersOf = (headers) => (headers ? Object.fromEntries([...headers.entries()].sort()) : null);

// What a caller can learn of an exception.
function raised(error) {
  const known = { class: error.constructor.name, message: plain(String(error.message)) };
  for (const name of ["status", "code", "type", "param", "requestID", "error"]) {
    if (error[name] !== undefined) known[name] = plain(error[name]);
  }
  if (error.headers) known.headers = headersOf(error.headers);
  if (error.cause) known.cause = error.cause.constructor.name;
  return known;
}

const resource = (client, call) =>
  call === "chat" ? client.chat.completions : call === "count_tokens" ? client.messages : client[call];

async function take(step, plainClient, keys, marks, seen) {
  const { call, how, options } = step;
  const { extra_headers: extra, ...params } = step.params;
  const request = { headers: { ...extra, ...marks } };
  if (options.timeout_s !== undefined) request.timeout = options.timeout_s * 1000;
  if (options.max_retries !== undefined) request.maxRetries = options.max_retries;
  const client = options.key ? plainClient.withOptions({ apiKey: keys[options.key] }) : plainClient;
  const target = resource(client, call);
  if (call === "models") {
    seen.value = [];
    for await (const model of client.models.list(request)) seen.value.push(plain(model));
  } else if (call === "count_tokens") {
    seen.value = plain(await target.countTokens(params, request));
  } else if (how === "whole") {
    const value = await target.create(params, request);
    seen.value = plain(value);
    seen.request_id = value._request_id ?? null;
  } else if (how === "raw") {
    const { data, response, request_id: id } = await target.create(params, request).withResponse();
    Object.assign(seen, { value: plain(data), headers: headersOf(response.headers), request_id: id });
  } else if (how === "helper") {
    const stream = target.stream(params, request);
    seen.events = [];
    for await (const event of stream) seen.events.push(plain(event));
    seen.value = plain(await stream[FINAL[call]]());
  } else {
    const { data: stream, response } = await target.create({ ...params, stream: true }, request).withResponse();
    seen.headers = headersOf(response.headers);
    seen.events = [];
    seen.count = 0;
    for await (const event of stream) {
      seen.count += 1;
      if (seen.count <= 400) seen.events.push(plain(event));
      if (how === "break" && seen.count === 2) break;
    }
  }
}

async function walk(sdk, way, where, steps) {
  const options = { baseURL: where.base_url, apiKey: where.api_key };
  const client = sdk.startsWith("openai") ? new OpenAI(options) : new Anthropic(options);
  for (const step of steps) {
    const seen = {};
    try {
      await take(step, client, where.keys, { "x-step": `${sdk}|${way}|${step.name}` }, seen);
    } catch (error) {
      seen.raised = raised(error);
    }
    process.stdout.write(JSON.stringify({ way, step: step.name, seen }) + "\n");
  }
}

const plan = JSON.parse(await text(process.stdin));
await Promise.all(Object.entries(plan.ways).map(([way, where]) => walk(plan.sdk, way, where, plan.steps)));
