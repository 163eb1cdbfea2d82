// HttpAgent as an application uses it: its verifier and its reducer judge every event.
import { BASE_URL, TOKEN, play, request, say, until } from "./harness.mjs";

const { HttpAgent } = await import(process.env.CLIENT ?? "@ag-ui/client");

const agentAt = (name, more = {}) =>
  new HttpAgent({
    url: `${BASE_URL}/ag-ui/${name}`,
    headers: { Authorization: `Bearer ${TOKEN}` },
    threadId: "thread",
    ...more,
  });

const user = (content) => ({ id: crypto.randomUUID(), role: "user", content });

/** One run, and what the application has of it. `seen` is called with each event. */
const run = async (agent, parameters = {}, seen = () => {}) => {
  const events = [];
  let error = null;
  const onEvent = ({ event }) => {
    events.push(event);
    seen(event);
  };
  try {
    await agent.runAgent(parameters, { onEvent });
  } catch ({ message, status, payload }) {
    error = { message, status, payload };
  }
  const { messages, state, pendingInterrupts } = agent;
  say({ events, error, messages, state, pendingInterrupts });
  return events;
};

/** Sends a message and runs. */
const ask = async (agent, content, parameters, seen) => {
  agent.addMessage(user(content));
  return run(agent, parameters, seen);
};

const answers = (agent, payload) =>
  agent.pendingInterrupts.map(({ id }) => ({ interruptId: id, status: "resolved", payload }));

const DOOR = {
  name: "open_door",
  description: "Opens a door of the page.",
  parameters: { type: "object", properties: { number: { type: "integer" } } },
};

await play({
  /** Each further argument is one message on one thread. */
  talk: async (name, ...contents) => {
    const agent = agentAt(name);
    for (const content of contents) await ask(agent, content);
  },

  /** The frontend's own tool is called, and answered in a second run. */
  frontendTool: async (name, content) => {
    const agent = agentAt(name);
    await ask(agent, content, { tools: [DOOR] });
    const calls = agent.messages.flatMap(({ toolCalls }) => toolCalls ?? []);
    for (const { id } of calls.filter((call) => call.function.name === DOOR.name))
      agent.addMessage({ id: `result-${id}`, role: "tool", toolCallId: id, content: "opened" });
    await run(agent, { tools: [DOOR] });
  },

  /** The run pauses; a person answers with this payload (JSON), or abandons without one. */
  approval: async (name, content, payload) => {
    const agent = agentAt(name);
    await ask(agent, content);
    const resume = payload
      ? answers(agent, JSON.parse(payload))
      : agent.pendingInterrupts.map(({ id }) => ({ interruptId: id, status: "cancelled" }));
    await run(agent, { resume });
  },

  /** Nobody answers; the next message goes on all the same. */
  abandon: async (name, first, second) => {
    const agent = agentAt(name);
    await ask(agent, first);
    const resume = agent.pendingInterrupts.map(({ id }) => ({ interruptId: id, status: "cancelled" }));
    await ask(agent, second, { resume });
  },

  /** Somebody who has nothing but an interrupt's id answers it. */
  approveFromElsewhere: async (name, thread, interruptId) => {
    const resume = [{ interruptId, status: "resolved", payload: { approved: true } }];
    await run(agentAt(name, { threadId: thread }), { resume });
  },

  /** Two messages; then the second is answered once more, then it is put differently. */
  branches: async (name, first, second, other) => {
    const agent = agentAt(name);
    await ask(agent, first);
    await ask(agent, second);
    const before = agent.messages.findLastIndex(({ role }) => role === "user");
    agent.setMessages(agent.messages.slice(0, before + 1));
    await run(agent);
    agent.setMessages(agent.messages.slice(0, before));
    await ask(agent, other);
  },

  /** A page that was reloaded knows the thread, but none of its messages. */
  reload: async (name, first, second) => {
    await ask(agentAt(name), first);
    await ask(agentAt(name), second);
  },

  state: async (name, content, state, context) => {
    const agent = agentAt(name, { initialState: JSON.parse(state) });
    await ask(agent, content, { context: JSON.parse(context) });
  },

  image: async (name, value, mimeType) => {
    const part = { type: "image", source: { type: "data", value, mimeType } };
    await ask(agentAt(name), [{ type: "text", text: "What is this?" }, part]);
  },

  /** The user presses stop at the first word. */
  abort: async (name, content) => {
    const agent = agentAt(name);
    agent.addMessage(user(content));
    await run(agent, {}, (event) => event.type === "TEXT_MESSAGE_CONTENT" && agent.abortRun());
  },

  /** The run is stopped by somebody else. */
  stopped: async (name, content) => {
    const agent = agentAt(name);
    let id;
    const running = ask(agent, content, {}, ({ type, messageId }) => {
      if (type === "TEXT_MESSAGE_CONTENT") id = messageId.split("-")[0];
    });
    await until(() => id);
    await request(`/v1/responses/resp_${id}/cancel`, { method: "POST" });
    await running;
  },
});
