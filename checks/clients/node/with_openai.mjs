// OpenAI's SDK for Node.js.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
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

const person = z.object({ name: z.string(), age: z.int() });

test("parse gives an object of the schema", async () => {
  const answer = await client.chat.completions.parse({
    model,
    messages: [{ role: "user", content: "Alice is 30 years old." }],
    response_format: zodResponseFormat(person, "person"),
  });
  assert.equal(answer.choices[0].message.parsed.age, 30);
});

for (const ask of ["parse", "stream"]) {
  test(`${ask} of a response gives an object of the schema`, async () => {
    const wanted = { model, input: "Alice is 30 years old.", text: { format: zodTextFormat(person, "person") } };
    const given = client.responses[ask](wanted);
    const response = ask === "stream" ? await given.finalResponse() : await given;
    assert.equal(response.output_parsed.age, 30);
  });

  test(`${ask} of a response calls the tool and answers with its result`, async () => {
    const tools = [zodResponsesFunction({ name: "get_weather", parameters: z.object({ city: z.string() }) })];
    const answer = async (wanted) => {
      const given = client.responses[ask]({ model, tools, ...wanted });
      return ask === "stream" ? given.finalResponse() : given;
    };
    const asked = await answer({ input: "What is the weather in Paris?" });
    const [call] = asked.output;
    assert.deepEqual(call.parsed_arguments, { city: "Paris" });
    const output = { type: "function_call_output", call_id: call.call_id, output: '{"temperature_c": 21}' };
    const told = await answer({ input: [output], previous_response_id: asked.id });
    assert.match(told.output_text, /21/);
  });
}
