// `useChat` of @ai-sdk/react, rendered, with no configuration but a `fetch` that knows the server
// and the bearer. Each scenario prints the messages that a person would see at its end.
import { useChat } from "@ai-sdk/react";
import {
  lastAssistantMessageIsCompleteWithApprovalResponses,
  lastAssistantMessageIsCompleteWithToolCalls,
} from "ai";
import { createElement } from "react";
import TestRenderer from "react-test-renderer";
import { play, request, say, until } from "./harness.mjs";

globalThis.IS_REACT_ACT_ENVIRONMENT = false;
const posts = []; // bodies of what useChat posted
globalThis.fetch = ((plain) => (url, init = {}) => {
  if (!String(url).startsWith("/")) return plain(url, init);
  if (init.method === "POST") posts.push(JSON.parse(init.body));
  return request(url, init);
})(globalThis.fetch);

/** A page that shows one chat: `page.chat` is what `useChat` returned when it last rendered. */
const open = async (options) => {
  const page = { seen: [] };
  const Page = () => {
    page.chat = useChat(options);
    page.seen.push(page.chat.status);
    return null;
  };
  page.root = TestRenderer.create(createElement(Page));
  page.close = () => page.root.unmount();
  await until(() => page.chat, "the page is there");
  return page;
};

const isSettled = (page) => ["ready", "error"].includes(page.chat.status);

/** Does something with the chat; resolves when it is done, and rendered. */
const settled = async (page, act) => {
  const before = page.seen.length;
  await act(page.chat);
  await until(() => page.seen.length > before && isSettled(page), "the chat is ready");
};

/** Resolves when the page shows an answer's end. */
const answered = (page) =>
  until(() => isSettled(page) && textOf(page).endsWith("."), "an answer");

const reloaded = async (chat) => {
  const reply = await request(`/api/chat/${encodeURIComponent(chat)}`);
  return (await reply.json()).messages;
};

/** What a message shows: its parts, each as short as can be. */
const shown = (message) => ({
  id: message.id,
  role: message.role,
  parts: message.parts.map((part) => {
    if (part.type === "text" || part.type === "reasoning")
      return { [part.type]: part.text, state: part.state ?? "done" };
    if (part.type === "step-start") return "step";
    if (!part.type.startsWith("tool-")) return part;
    const { type, state, input, output, errorText } = part;
    return { tool: type.slice(5), state, input, output, errorText };
  }),
});

const tell = (page, more = {}) =>
  say({
    messages: page.chat.messages.map(shown),
    error: page.chat.error?.message ?? null,
    status: page.chat.status,
    posts: posts.length,
    ...more,
  });

const agent = process.env.AGENT;
const body = agent ? { body: { agent } } : undefined;
const textOf = (page) =>
  (page.chat.messages.findLast(({ role }) => role === "assistant")?.parts ?? [])
    .filter((part) => part.type === "text")
    .map((part) => part.text)
    .join("|");

await play({
  /** Sends each text when the one before is answered. */
  async ask(...texts) {
    const page = await open({ id: process.env.CHAT });
    for (const text of texts) {
      await settled(page, (chat) => chat.sendMessage({ text }, body));
    }
    tell(page, { seen: page.seen });
  },

  async image(url, filename) {
    const page = await open();
    const files = [{ type: "file", mediaType: "image/png", url, filename }];
    await settled(page, (chat) => chat.sendMessage({ text: "What is this?", files }));
    tell(page, { reloaded: await reloaded(page.chat.id) });
  },

  /** A function of the page's own, called as the SDK's documentation shows. */
  async clientTool(failing) {
    const tools = {
      open_door: {
        description: "Opens a door.",
        inputSchema: { type: "object", properties: { number: { type: "integer" } } },
      },
    };
    const called = [];
    const page = await open({
      sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithToolCalls,
      onToolCall({ toolCall }) {
        called.push(toolCall.toolName);
        const { toolName: tool, toolCallId } = toolCall;
        if (tool !== "open_door") return;
        page.chat.addToolOutput(
          failing
            ? { tool, toolCallId, state: "output-error", errorText: failing }
            : { tool, toolCallId, output: { open: true } },
        );
      },
    });
    await page.chat.sendMessage({ text: "open door 3" }, { body: { tools, agent } });
    await answered(page);
    tell(page, { called, reloaded: (await reloaded(page.chat.id)).map(shown) });
  },

  /** Answers each question with `yes` or a reason for a no. */
  async approve(text, ...answers) {
    const page = await open({
      sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithApprovalResponses,
    });
    await settled(page, (chat) => chat.sendMessage({ text }, body));
    const waiting = page.chat.messages.map(shown);
    const stream = await request(`/api/chat/${page.chat.id}/stream`);
    const loaded = await reloaded(page.chat.id);
    const keys = page.chat.messages
      .at(-1)
      .parts.filter((part) => part.state === "approval-requested")
      .map((part) => part.approval.id);
    for (const [at, id] of keys.entries()) {
      const approved = answers[at] === "yes";
      page.chat.addToolApprovalResponse({ id, approved, reason: approved ? undefined : answers[at] });
    }
    await answered(page);
    tell(page, {
      waiting,
      idle: stream.status,
      loaded: loaded.map(shown),
      keys: loaded.at(-1).parts.map((part) => part.approval?.id).filter(Boolean),
      asked: keys,
      reloaded: (await reloaded(page.chat.id)).map(shown),
    });
  },

  /** A page that was loaded again while a person was asked. */
  async approveAfterReload(text) {
    const first = await open({ id: "reloaded" });
    await settled(first, (chat) => chat.sendMessage({ text }, body));
    first.close();
    const page = await open({
      id: "reloaded",
      messages: await reloaded("reloaded"),
      resume: true,
      sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithApprovalResponses,
    });
    const [id] = page.chat.messages
      .at(-1)
      .parts.filter((part) => part.state === "approval-requested")
      .map((part) => part.approval.id);
    page.chat.addToolApprovalResponse({ id, approved: true });
    await answered(page);
    tell(page);
  },

  /** Stops in mid-answer, here and there, and then asks again. */
  async stop(text, next) {
    const page = await open();
    const sending = page.chat.sendMessage({ text });
    await until(() => textOf(page).length > 0, "some text");
    await page.chat.stop();
    await sending;
    const stopped = await request(`/api/chat/${page.chat.id}/stop`, { method: "POST" });
    await until(() => isSettled(page), "the chat is ready");
    const before = page.chat.messages.map(shown);
    await settled(page, (chat) => chat.sendMessage({ text: next }));
    tell(page, { stopped: await stopped.json(), before });
  },

  async regenerate(text) {
    const page = await open();
    await settled(page, (chat) => chat.sendMessage({ text }));
    const first = page.chat.messages.map(shown);
    await settled(page, (chat) => chat.regenerate());
    tell(page, { first, reloaded: (await reloaded(page.chat.id)).map(shown) });
  },

  /** Asks three times, then puts the second question in other words. */
  async edit(one, two, three, other) {
    const page = await open();
    for (const text of [one, two, three]) {
      await settled(page, (chat) => chat.sendMessage({ text }));
    }
    const { id } = page.chat.messages[2];
    await settled(page, (chat) => chat.sendMessage({ text: other, messageId: id }));
    tell(page, { reloaded: (await reloaded(page.chat.id)).map(shown) });
  },

  /** Loads the page again when it shows `enough`; before, says yes to what it is asked. */
  async reload(id, text, enough, approving) {
    const sendAutomaticallyWhen = lastAssistantMessageIsCompleteWithApprovalResponses;
    const first = await open({ id, sendAutomaticallyWhen });
    const sending = first.chat.sendMessage({ text }, body).catch(() => {});
    if (approving) {
      await sending;
      const parts = (await reloaded(id)).at(-1).parts;
      const { approval } = parts.find((part) => part.state === "approval-requested");
      first.chat.addToolApprovalResponse({ id: approval.id, approved: true });
    }
    await until(() => textOf(first).includes(enough), enough);
    const before = textOf(first);
    first.close(); // the page goes, and its connection with it
    const messages = await reloaded(id);
    const page = await open({ id, messages, resume: true });
    const texts = new Set();
    await until(() => {
      texts.add(textOf(page));
      return page.seen.includes("streaming") && isSettled(page);
    }, "the rest");
    const again = await request(`/api/chat/${encodeURIComponent(id)}/stream`);
    tell(page, {
      before,
      loaded: messages.map(shown),
      texts: [...texts],
      reloaded: (await reloaded(id)).map(shown),
      again: again.status,
    });
  },

  /** Loses the server in mid-answer, and comes back when the test has started another. */
  async restart(id, text, enough) {
    const page = await open({ id });
    page.chat.sendMessage({ text }).catch(() => {});
    await until(() => textOf(page).includes(enough), enough);
    say("half");
    await until(() => isSettled(page), "an error");
    const { status } = page.chat;
    let messages;
    while (!messages) {
      messages = await reloaded(id).catch(() => null);
      await new Promise((resume) => setTimeout(resume, 50));
    }
    page.chat.setMessages(messages);
    await settled(page, (chat) => chat.resumeStream());
    tell(page, { broken: status, reloaded: (await reloaded(id)).map(shown) });
  },
});
process.exit(0);
