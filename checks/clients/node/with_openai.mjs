// OpenAI's SDK for Node.js.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI();
const model = process.env.PENSTOCK_MODEL;
const messages = [{ role: "user", content: "My name is Alice. What is my name?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather in a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    parse: JSON.parse,
    function: ({ city }) => ({ temperature_c: city === "Paris" ? 21 : -1 }),
  },
};

test("a chat is answered whole and streamed with the same text", async () => {
  const answer = await client.chat.completions.create({ model, messages });
  const stream = client.chat.completions.stream({ model, messages });
  assert.match(answer.choices[0].message.content, /Alice/);
  assert.equal(await stream.finalContent(), answer.choices[0].message.content);
});

test("a stream that is aborted ends with the SDK's error for it", async () => {
  const stream = client.chat.completions.stream({ model, messages });
  stream.once("content", () => stream.abort());
  await assert.rejects(stream.done(), OpenAI.APIUserAbortError);
});

test("a response is answered whole and streamed with the same text", async () => {
  const wanted = { model, input: messages[0].content };
  const response = await client.responses.create(wanted);
  const final = await client.responses.stream(wanted).finalResponse();
  assert.match(response.output_text, /Alice/);
  assert.equal(final.output_text, response.output_text);
});

test("runTools calls the tool and ends with an answer that has its result", async () => {
  const runner = client.chat.completions.runTools({
    model,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    tools: [weather],
  });
  assert.match(await runner.finalContent(), /21/);
  assert.deepEqual(runner.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant"]);
});

test("runTools with a stream calls the tool and ends with an answer that has its result", async () => {
  const runner = client.chat.completions.runTools({
    model,
    stream: true,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    tools: [weather],
  });
  assert.match(await runner.finalContent(), /21/);
});

test("parse gives an object of the schema", async () => {
  const person = z.object({ name: z.string(), age: z.int() });
  const answer = await client.chat.completions.parse({
    model,
    messages: [{ role: "user", content: "Alice is 30 years old." }],
    response_format: zodResponseFormat(person, "person"),
  });
  assert.equal(answer.choices[0].message.parsed.age, 30);
});
