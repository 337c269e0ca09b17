// What openai-node makes of a running server: node client.mjs BASE_URL API_KEY MODEL
//
// Prints one JSON object of observations and judges nothing: the tests that start the server know what to expect.
import OpenAI, {
  APIError,
  AuthenticationError,
  BadRequestError,
  NotFoundError,
} from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Hi" }];
const request = { model, messages, max_tokens: 24, temperature: 0, seed: 1 };

/** The class and fields of the error that `attempt` ends with. */
async function failure(attempt) {
  try {
    await attempt();
  } catch (error) {
    const kinds = { AuthenticationError, BadRequestError, NotFoundError, APIError };
    const kind = Object.keys(kinds).find((name) => error instanceof kinds[name]) ?? "other";
    return { kind, status: error.status, code: error.code, param: error.param, type: error.type };
  }
  return { kind: "none" };
}

/** What a chat stream said, put together as front ends do. */
async function streamed(extra = {}) {
  const seen = { text: "", roles: [], finish: [], ids: new Set(), usage: null, timings: null, numChunks: 0 };
  const stream = await client.chat.completions.create({ ...request, ...extra, stream: true });
  for await (const chunk of stream) {
    seen.numChunks += 1;
    seen.ids.add(chunk.id);
    seen.usage = chunk.usage ?? seen.usage;
    seen.timings = chunk.timings ?? seen.timings;
    for (const choice of chunk.choices) {
      seen.text += choice.delta.content ?? "";
      if (choice.delta.role) seen.roles.push(choice.delta.role);
      if (choice.finish_reason) seen.finish.push(choice.finish_reason);
    }
  }
  return { ...seen, ids: seen.ids.size };
}

/** Stop reading after the first text; the server must notice. */
async function abandoned() {
  const stream = await client.chat.completions.create({ ...request, max_tokens: 200, ignore_eos: true, stream: true });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) break; // leaving the loop aborts the request
  }
  return { isAborted: stream.controller.signal.aborted };
}

const whole = await client.chat.completions.create(request);
const runner = client.chat.completions.stream(request); // the helper that checks and joins chunks itself
const joined = await runner.finalChatCompletion();
const completion = await client.completions.create({ model, prompt: "Hi", max_tokens: 8, temperature: 0 });
const models = [];
for await (const entry of client.models.list()) models.push(entry.id);

const observed = {
  whole: { text: whole.choices[0].message.content, finish: whole.choices[0].finish_reason, usage: whole.usage },
  streamed: await streamed(),
  withUsage: await streamed({ stream_options: { include_usage: true } }),
  joined: { text: joined.choices[0].message.content, finish: joined.choices[0].finish_reason },
  completion: { text: completion.choices[0].text, finish: completion.choices[0].finish_reason },
  models,
  oneModel: (await client.models.retrieve(model)).id,
  abandoned: await abandoned(),
  errors: {
    model: await failure(() => client.chat.completions.create({ ...request, model: "missing" })),
    parameter: await failure(() => client.chat.completions.create({ ...request, temperature: 9 })),
    context: await failure(() =>
      client.chat.completions.create({ ...request, messages: [{ role: "user", content: "long ".repeat(20_000) }] }),
    ),
    key: await failure(() =>
      new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).chat.completions.create(request),
    ),
  },
};
console.log(JSON.stringify(observed));
