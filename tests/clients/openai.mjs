// The official openai client for JavaScript, unmodified, on chat completions.
import OpenAI from "openai";
import { BASE_URL, TOKEN, say, until } from "./harness.mjs";

const PIXEL =
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5C" +
  "YII=";
const parameters = { type: "object", properties: { number: { type: "integer" } } };
const DOOR = { type: "function", function: { name: "open_door", parameters } };
const CITY = {
  type: "object",
  properties: { name: { type: "string" }, country: { type: "string" } },
  required: ["name", "country"],
  additionalProperties: false,
};

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: TOKEN, maxRetries: 0 });
const { completions } = client.chat;
const user = (content) => ({ role: "user", content });
const asking = (content, more = {}) => ({
  model: "assistant",
  messages: [user(content)],
  ...more,
});
const calls = (message) =>
  (message.tool_calls ?? []).map((call) => [call.function.name, JSON.parse(call.function.arguments)]);

const errorOf = async (act) => {
  try {
    await act();
  } catch (error) {
    return [error.constructor.name, error.status ?? null, error.code ?? null];
  }
  throw new Error("nothing was thrown");
};
const read = async (stream) => {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
};

// Text, whole and streamed.
const hello = await completions.create(asking("Hello", { temperature: 0.5, stop: ["END"], seed: 1 }));
say([hello.choices[0].message.content, hello.choices[0].finish_reason, hello.usage.total_tokens]);
const helper = completions.stream(asking("Hello", { stream_options: { include_usage: true } }));
const final = await helper.finalChatCompletion();
say([final.choices[0].message.content, final.choices[0].finish_reason, final.usage.total_tokens]);

// The server's tools run there; their progress is reasoning.
const weather = await completions.create(asking("weather in Paris?"));
say([weather.choices[0].message.content, weather.choices[0].message.reasoning_content.split("\n")[0]]);

// The client's functions: by hand, several at once, and with the helper that calls them itself.
const messages = [user("open both doors")];
const called = (await completions.create({ model: "assistant", messages, tools: [DOOR] })).choices[0];
messages.push(called.message);
for (const call of called.message.tool_calls)
  messages.push({ role: "tool", tool_call_id: call.id, content: "open" });
const done = await completions.create({ model: "assistant", messages, tools: [DOOR] });
say([calls(called.message), called.finish_reason, done.choices[0].message.content]);

const opened = [];
const open_door = ({ number }) => (opened.push(number), `door ${number} is open`);
const tool = {
  type: "function",
  function: { name: "open_door", parameters, parse: JSON.parse, function: open_door },
};
const runner = completions.runTools(asking("open both doors", { tools: [tool], stream: true }));
say([opened, await runner.finalContent(), runner.allChatCompletions().length]);

// An answer to a schema, and an image.
const response_format = { type: "json_schema", json_schema: { name: "City", schema: CITY, strict: true } };
const parsed = await completions.parse(asking("Name a capital.", { response_format }));
say(parsed.choices[0].message.parsed);
const image = [
  { type: "text", text: "What is in the picture?" },
  { type: "image_url", image_url: { url: PIXEL } },
];
say((await completions.create(asking(image))).choices[0].message.content);

// What goes wrong.
const stranger = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
say(await errorOf(() => stranger.chat.completions.create(asking("Hello"))));
say(await errorOf(() => completions.create(asking("Hello", { model: "gpt-9" }))));
say(await errorOf(() => completions.create(asking("Hello", { n: 2 }))));
say(await errorOf(() => completions.create(asking("too long"))));
say(await errorOf(() => completions.create(asking("busy"))));
say(await errorOf(() => completions.create(asking("broken"))));
const cut = [];
say(
  await errorOf(async () => {
    for await (const chunk of await completions.create(asking("cut", { stream: true })))
      cut.push(...chunk.choices.map((choice) => choice.finish_reason));
  }),
);
say([...new Set(cut)]);
say(await errorOf(() => completions.create(asking("hang"), { timeout: 1000 })));

// Leaving in the middle: this process stays until the test has looked.
const endless = completions.stream(asking("endless"));
let words = 0;
endless.on("content", () => words++);
const over = errorOf(() => endless.done());
await until(() => words > 0);
endless.abort();
say((await over)[0]);
setInterval(() => {}, 1000);
