// The official openai client for JavaScript, unmodified, on responses and conversations.
import OpenAI from "openai";
import { BASE_URL, TOKEN, say } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: TOKEN, maxRetries: 0 });
const parameters = {
  type: "object",
  properties: { number: { type: "integer" } },
  required: ["number"],
  additionalProperties: false,
};
const DOOR = { type: "function", name: "open_door", strict: true, parameters };
const CITY = {
  type: "object",
  properties: { name: { type: "string" }, country: { type: "string" } },
  required: ["name", "country"],
  additionalProperties: false,
};
const asking = (input, more = {}) => ({ model: "assistant", input, ...more });
const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

// Text, whole and by the stream helper.
const whole = await client.responses.create(asking("Hello"));
say([whole.output_text, whole.status, whole.usage.total_tokens]);
const stream = client.responses.stream(asking("weather?"));
let said = "";
stream.on("response.output_text.delta", (event) => (said += event.delta));
const final = await stream.finalResponse();
say([said === final.output_text, final.output.map((item) => item.type)]);

// A function of the client's own, in a stream, and its result.
const calling = await client.responses.stream(asking("door", { tools: [DOOR] })).finalResponse();
const [call] = calling.output;
const output = { type: "function_call_output", call_id: call.call_id, output: "opened" };
const opened = await client.responses.create(
  asking([output], { tools: [DOOR], previous_response_id: calling.id }),
);
say([JSON.parse(call.arguments), opened.output_text]);

// Structured output.
const format = { type: "json_schema", name: "city", schema: CITY, strict: true };
const parsed = await client.responses.parse(asking("capital?", { text: { format } }));
say(parsed.output_parsed);

// In the background: polled, and a stream taken up again.
let polled = await client.responses.create(asking("Hello", { background: true }));
while (["queued", "in_progress"].includes(polled.status)) {
  await pause(20);
  polled = await client.responses.retrieve(polled.id);
}
const numbers = [];
const again = await client.responses.retrieve(polled.id, { stream: true, starting_after: 2 });
for await (const event of again) numbers.push(event.sequence_number);
say([polled.output_text, numbers[0], numbers.every((number, at) => number === at + 3)]);

// Approvals, as OpenAI's guide loops over them.
let reply = await client.responses.create(asking("pay", { model: "cashier" }));
const rounds = [];
for (;;) {
  const asked = reply.output.filter((item) => item.type === "mcp_approval_request");
  if (!asked.length) break;
  rounds.push(reply.status);
  reply = await client.responses.create({
    model: "cashier",
    previous_response_id: reply.id,
    input: asked.map((item) => ({
      type: "mcp_approval_response",
      approval_request_id: item.id,
      approve: true,
    })),
  });
}
say([rounds, reply.output_text]);

// A conversation.
const conversation = await client.conversations.create({
  items: [{ role: "user", content: "I am Ada." }],
  metadata: { topic: "names" },
});
await client.responses.create(asking("Hello", { conversation: conversation.id }));
const items = [];
const listed = client.conversations.items.list(conversation.id, { limit: 1, order: "asc" });
for await (const item of listed) items.push([item.role, item.content[0].text]);
const gone = await client.conversations.delete(conversation.id);
say([items, conversation.metadata, gone.deleted]);

// Errors.
try {
  await client.responses.create(asking("Hi", { previous_response_id: `resp_${"0".repeat(32)}` }));
} catch (error) {
  say([error.constructor.name, error.status, error.code, error.param]);
}
